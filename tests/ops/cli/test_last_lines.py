"""What a terminal shows once a run is over."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from ops.api import Run
from ops.cli.ending import last_lines
from ops.cli.screen import Terminal

TESTS = Path(__file__).parents[2]
FINISHED = TESTS / "ops/run/runs_of_0_1/stub-20261126-141035-f0e0"


@pytest.mark.parametrize(("stage", "said"), [("sft", True), ("rm", False)])
def test_a_result_is_shown_with_what_to_type_to_talk_to_it(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    said: bool,
) -> None:
    run = shutil.copytree(FINISHED, tmp_path / "mine")
    sent = json.loads((TESTS / "trainer/wire/golden/job.json").read_text())
    sent["stages"] = [{"name": stage}]
    (run / "job.json").write_text(json.dumps(sent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # make puts no .venv/bin on it
    installed = tmp_path / ".venv/bin"
    installed.mkdir(parents=True)
    (installed / "milktea").touch()
    monkeypatch.setattr("sys.executable", str(installed / "python"))
    last_lines(Run(run), Terminal(Console(file=io.StringIO())), as_json=False)
    assert ("\ntalk      .venv/bin/milktea serve mine " in capsys.readouterr().out) == said
