"""A result that its box scores before it goes, against the emulator; only the scoring is a stub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import rig
from ops.errors import ConfigError
from ops.fakevast import FakeVast
from ops.job import config
from ops.run.evaluate import score_rows

ASKED = {"rows": 5, "new_tokens": 16, "seconds": 60.0}


def test_the_scores_come_home_beside_the_adapter_and_into_the_report(
    own: rig.Rig, fake: FakeVast
) -> None:
    outcome, lines, _ = rig.whole_run(own, fake, evaluate=ASKED)
    told = json.loads((outcome.adapter_zip.parent / "evaluation.json").read_text())
    assert told["scores"]["tuned"]["rouge-l"]["value"] == 31.25
    report = (outcome.adapter_zip.parent / "report.html").read_text()
    assert "rouge-l" in report and "31.25 (base 7.5)" in report
    kinds = [line.kind for line in lines]
    assert kinds[-5:] == ["pulled", "evaluated", "destroying", "destroyed", "bill"]


@pytest.mark.parametrize(
    ("flag", "why"), [("unscored", "exit code 3: .*no room"), ("slow", "its 0 minutes were over")]
)
def test_an_evaluation_that_fails_or_lasts_takes_nothing_of_the_result(
    own: rig.Rig, fake: FakeVast, flag: str, why: str
) -> None:
    (own.image / flag).touch()
    outcome, lines, _ = rig.whole_run(own, fake, evaluate=ASKED | {"seconds": 1.5})
    assert outcome.adapter_zip.is_file()
    [line] = [line for line in lines if line.kind == "evaluated"]
    assert re.search(why, line["why_not"].replace("\n", " "))
    assert not (outcome.adapter_zip.parent / "evaluation.json").exists()
    (own.image / flag).unlink()


@pytest.mark.parametrize(
    "lie",
    [b"", b"[]", b"{}", b'{"scores": 1}', b'{"scores": {"tuned": {"x": {"value": "<b>"}}}}'],
)
def test_scores_that_are_none_do_not_come_home(own: rig.Rig, fake: FakeVast, lie: bytes) -> None:
    (own.image / "scores.json").write_bytes(lie)
    outcome = rig.whole_run(own, fake, evaluate=ASKED)[0]
    assert outcome.adapter_zip.is_file()
    assert not (outcome.adapter_zip.parent / "evaluation.json").exists()


def test_what_stands_in_a_report_is_bounded_and_is_numbers() -> None:
    many: dict[str, Any] = {f"s{n}": {"value": n} for n in range(99)}
    lies = {"a": {"value": float("nan")}, "b": {"value": True}, "c": "x", "d" * 99: 2}
    assert len(score_rows({"scores": {"tuned": many}})) == 40
    assert score_rows({"scores": {"tuned": lies}}) == {"d" * 60: "2"}


def test_a_job_that_asks_for_scores_names_the_rows_and_prices_the_minutes(tmp_path: Path) -> None:
    job: dict[str, Any] = {
        "name": "x",
        "model": {"base": "org/base"},
        "data": {"files": ["rows.json"], "held_out": "held.json"},
        "limits": {"max_usd": 1.0},
        "evaluate": {"minutes": 5},
    }
    parsed = config.parse(job, tmp_path / "job.toml")
    assert parsed.evaluate and parsed.evaluate.asked()["seconds"] == 300
    job["data"] = {"files": ["rows.json"]}
    with pytest.raises(ConfigError, match="name it in data"):
        config.parse(job, tmp_path / "job.toml")
