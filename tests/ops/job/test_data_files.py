"""What a job's data becomes on the box: files that it can read with what it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ops.errors import PreflightError
from ops.job.data_files import data_files
from ops.job.job_file import JobFile
from trainer.data.files import read_rows

ROWS = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(3)]


def job_of(**data: Any) -> JobFile:
    told = {"name": "x", "model": {"base": "tiny"}, "limits": {"max_usd": 1}, "data": data}
    return JobFile.model_validate(told)


def pushed(tmp_path: Path, **data: Any) -> list[Any]:
    folder = tmp_path / "run"
    folder.mkdir()
    return data_files(job_of(**data), folder)


def test_a_table_that_needs_a_package_travels_as_json_lines_with_its_places(
    tmp_path: Path,
) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([*ROWS, {"instruction": "q", "output": ""}])
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    (push,) = pushed(tmp_path, files=[tmp_path / "t.parquet"])
    assert push.remote == "data/0.jsonl.gz" and push.local.name == "t.parquet"
    on_the_box = tmp_path / "0.jsonl.gz"
    on_the_box.write_bytes(push.local.read_bytes())
    told, theirs = (read_rows([(p, "t.parquet")]) for p in (on_the_box, tmp_path / "t.parquet"))
    assert told[0] == theirs[0]
    assert [(d.line, d.field) for d in told[1]] == [(d.line, d.field) for d in theirs[1]]
    assert [(d.line, d.field) for d in told[1]] == [(4, "output")]


def test_a_sheet_of_excel_keeps_its_row_numbers(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for line in (["instruction", "output"], [None, None], ["q", "a"]):
        book.active.append(line)
    book.save(tmp_path / "t.xlsx")
    (push,) = pushed(tmp_path, files=[tmp_path / "t.xlsx"])
    on_the_box = tmp_path / "0.jsonl.gz"
    on_the_box.write_bytes(push.local.read_bytes())
    assert read_rows([(on_the_box, "t.xlsx")])[0][0].where == "t.xlsx:3"


def test_a_folder_and_a_pattern_travel_as_their_files(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "c.csv"):
        (tmp_path / "rows" / name).write_text(json.dumps(ROWS[0]) + "\n")
    files = [tmp_path / "rows", tmp_path / "rows" / "*.jsonl"]
    found = pushed(tmp_path, files=files, held_out=tmp_path / "rows" / "b.jsonl")
    assert [(p.local.name, p.remote) for p in found] == [
        ("a.jsonl.gz", "data/0.jsonl.gz"),
        ("b.jsonl", "data/1.jsonl"),
        ("c.csv", "data/2.csv"),
        ("b.jsonl", "data/3.jsonl"),
        ("b.jsonl", "data/4.jsonl"),
    ]


REFUSED = {
    "a file that is not there": ({"files": ["absent.jsonl"]}, "no such file"),
    "a pattern that matches nothing": ({"files": ["*.nothing"]}, "matches no file"),
    "held-out rows in two files": ({"files": ["a.jsonl"], "held_out": "*.jsonl"}, "2 files"),
    "a broken table": ({"files": ["t.parquet"]}, "t.parquet:1:1"),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_cannot_be_read_is_refused_before_renting(tmp_path: Path, kind: str) -> None:
    for name in ("a.jsonl", "b.jsonl", "t.parquet"):
        (tmp_path / name).write_text(json.dumps(ROWS[0]) + "\n")
    data, word = REFUSED[kind]
    here = {
        "files": [tmp_path / name for name in data["files"]],
        **({"held_out": tmp_path / data["held_out"]} if "held_out" in data else {}),
    }
    with pytest.raises(PreflightError, match=word):
        pushed(tmp_path, **here)
