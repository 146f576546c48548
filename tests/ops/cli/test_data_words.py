"""`milktea data ...` as it is typed: what it prints, writes and refuses."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ops.cli.app import app


def said(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, words)])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    asks = "What is the meaning of the word number {} in the big dictionary of this language?"
    told = [{"instruction": asks.format(n), "output": f"answer {n}", "id": n} for n in range(120)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*told, told[5] | {"id": 999}], indent=1), "utf-8")
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_check_names_the_place_of_a_defect_counts_it_and_exits_with_3(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    good = '{"instruction": "a", "output": "b"}\n'
    path.write_text(good + '{"instruction": "a", "output": ""}\n' + good, "utf-8")
    done = said("check", path)
    assert done.exit_code == 3
    assert f"{path}:2:" in done.output and "2 sound rows, 1 defect" in done.output
    *defects, last = map(json.loads, said("check", path, "--json").stdout.splitlines())
    assert [d["line"] for d in defects] == [2]
    assert last["defects"] == 1 and last["reasons"] == {"is empty": 1}
    assert said("stats", path).exit_code == 0
    refused = said("dedupe", path)
    assert refused.exit_code == 3 and "is empty" in refused.output
    assert said("dedupe", path, "--drop-bad").exit_code == 0
    report = json.loads((tmp_path / "bad.deduped.jsonl.report.json").read_text("utf-8"))
    assert "1 row left out" in report["notes"][0]


def test_a_disk_that_is_full_is_told_with_the_file_and_what_to_type(
    rows: Path, tmp_path: Path
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        done = said("dedupe", rows, "--to", tmp_path / "out.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert done.exit_code == 8
    assert str(tmp_path / "out.jsonl") in done.output and "the same command again" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"], "no half of a file"


def test_dedupe_writes_the_rows_as_they_were_and_says_what_went(rows: Path) -> None:
    before = rows.read_bytes()
    done = said("dedupe", rows, "--json")
    told = json.loads(done.stdout)
    assert told["removed"] == {"equal": 1}
    assert lines(rows.with_name("rows.deduped.jsonl")) == json.loads(before)[:-1]
    [gone] = json.loads(Path(told["report"]).read_text("utf-8"))["removed"]
    assert gone["reason"] == "equal" and gone["of"].startswith(f"{rows}:")
    assert rows.read_bytes() == before


def test_who_is_killed_while_it_writes_leaves_no_rows_without_their_report(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report = rows.with_name("out.jsonl"), rows.with_name("out.jsonl.report.json")
    real = os.replace

    def ended(here: Path, there: Path) -> None:
        if there == out:
            raise KeyboardInterrupt
        real(here, there)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", ended)
        assert said("dedupe", rows, "--to", out).exit_code
    assert report.is_file() and not out.exists()
    assert said("dedupe", rows, "--to", out).exit_code == 0 and out.is_file()


def test_nothing_is_overwritten_without_force(rows: Path) -> None:
    assert said("sample", rows, "--rows", "5").exit_code == 0
    first = rows.with_name("rows.sample.jsonl").read_bytes()
    again = said("sample", rows, "--rows", "6")
    assert again.exit_code == 2 and "exists" in again.output
    assert rows.with_name("rows.sample.jsonl").read_bytes() == first
    assert said("sample", rows, "--rows", "6", "--force").exit_code == 0
    assert len(lines(rows.with_name("rows.sample.jsonl"))) == 6
    assert said("sample", rows, "--rows", "6", "--to", rows, "--force").exit_code == 2


def test_split_writes_both_sides_and_keeps_equal_rows_together(rows: Path) -> None:
    assert said("split", rows, "--held-out", "20").exit_code == 0
    train = [r["id"] for r in lines(rows.with_name("rows.train.jsonl"))]
    held = [r["id"] for r in lines(rows.with_name("rows.held_out.jsonl"))]
    assert len(held) == 20 and len(train) == 101
    assert (5 in held) == (999 in held)


@pytest.mark.parametrize(
    "words",
    [
        ("sample",),
        ("sample", "--rows", "1", "--by", "luck"),
        ("split", "--held-out", "5000"),
        ("dedupe", "--near", "0.1"),
        ("dedupe", "--column", "output"),
        ("stats", "--format", "csv"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused_and_writes_nothing(
    rows: Path, words: tuple[str, ...]
) -> None:
    done = said(words[0], rows, *words[1:])
    assert done.exit_code == 2, done.output
    assert list(rows.parent.iterdir()) == [rows]


def test_columns_of_another_name_are_read_and_written_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("question,answer\nwhy,because\nwhen,now\n", "utf-8")
    assert said("stats", path).exit_code == 0
    names = ["--column", "instruction=question", "--column", "output=answer"]
    assert said("dedupe", path, *names).exit_code == 0
    written = lines(tmp_path / "other.deduped.jsonl")
    assert written[0] == {"question": "why", "answer": "because"}


def test_check_shows_the_first_defects_of_a_kind_and_counts_the_others(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"Q": "a", "A": "b"}\n' * 100, "utf-8")
    done = said("check", path)
    assert done.exit_code == 3 and len(done.output.splitlines()) < 40
    assert "more of this kind" in done.output and "200 defects" in done.output
    assert len(said("check", path, "--json").stdout.splitlines()) == 201


def test_check_tells_which_columns_nothing_reads(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b", "day": "Monday"}\n', "utf-8")
    done = said("check", path)
    assert done.exit_code == 0 and "nothing reads the fields day (1 row)" in done.output


def test_check_tells_what_the_rules_of_quality_find_and_drop_writes_the_other_rows(
    rows: Path,
) -> None:
    told = json.loads(rows.read_text("utf-8"))
    told[3]["output"] = "As an AI language model I cannot say."
    told[7]["output"] = "N/A"
    rows.write_text(json.dumps(told), "utf-8")
    done = said("check", rows)
    assert done.exit_code == 0 and "refusal: 1 row:" in done.output
    assert f"{rows}:1, row 4: What is the" in done.output, "an array on one line has numbers"
    found = [json.loads(line) for line in said("check", rows, "--json").stdout.splitlines()]
    assert [f["rule"] for f in found if f["kind"] == "quality"] == ["no-answer", "refusal"]
    assert "refusal" not in said("check", rows, "--rules", "echo,no-answer").output
    assert said("check", rows, "--rules", "ecco").exit_code == 2
    dropped = json.loads(said("check", rows, "--drop", "refusal", "--json").stdout)
    assert dropped["removed"] == {"refusal": 1}
    kept = lines(rows.with_name("rows.checked.jsonl"))
    assert len(kept) == 120 and all("AI language" not in row["output"] for row in kept)
    wrong = said("check", rows, "--drop", "language", "--language", "zh", "--force", "--json")
    assert json.loads(wrong.stdout)["rows"] == 121


def test_stats_counts_tokens_by_a_tokenizer_of_ones_own(rows: Path) -> None:
    base = Path(__file__).parents[3] / "trainer" / "practice" / "practice_model"
    told = json.loads(said("stats", rows, "--tokenizer", base, "--json").stdout)
    guessed = json.loads(said("stats", rows, "--json").stdout)
    assert told["counted"] and not guessed["counted"]
    assert told["total_tokens"] != guessed["total_tokens"] > 0
    assert said("stats", rows, "--tokenizer", rows.parent).exit_code == 3
