"""Tables, packed files, folders and patterns: read as they are, each row with its place."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from datetime import datetime, time
from pathlib import Path
from typing import Any

import pytest

from trainer.data import scan
from trainer.data.files import examine_files, read_rows
from trainer.data.formats import Row
from trainer.data.sources import Reading
from trainer.data.template import Turn

ROWS = [
    {"instruction": "Say, please: a", "input": "", "output": "a\nb"},
    {"instruction": 'Say "你好"', "input": "in 1 word", "output": "你好"},
]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TURNS = [
    (Turn("user", row["instruction"], row["input"]), Turn("assistant", row["output"]))
    for row in ROWS
]


def sound(*paths: Path) -> list[Row]:
    rows, defects = read_rows(list(paths))
    assert defects == [], defects
    return rows


def csv_text(sign: str = ",", end: str = "\n") -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [["instruction", "input", "output"], *(list(row.values()) for row in ROWS)]
    return "".join(sign.join(map(cell, line)) + end for line in lines)


@pytest.mark.parametrize(
    ("name", "sign", "end", "mark"),
    [
        ("a.csv", ",", "\n", ""),
        ("a.csv", ",", "\r\n", "\ufeff"),
        ("a.csv", ";", "\n", ""),
        ("a.tsv", "\t", "\n", ""),
    ],
)
def test_rows_of_csv_and_tsv_are_read_with_their_lines(
    tmp_path: Path, name: str, sign: str, end: str, mark: str
) -> None:
    (tmp_path / name).write_text(mark + csv_text(sign, end), encoding="utf-8", newline="")
    rows = sound(tmp_path / name)
    assert [r.turns for r in rows] == TURNS
    assert [r.where for r in rows] == [f"{name}:2", f"{name}:4"]  # the first goes over two lines


def test_turns_in_a_cell_are_json(tmp_path: Path) -> None:
    turns = json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}])
    quoted = '"' + turns.replace('"', '""') + '"'
    (tmp_path / "a.csv").write_text(f"id,messages\n1,{quoted}\n")
    assert sound(tmp_path / "a.csv")[0].turns[1] == Turn("assistant", "Yo")


BROKEN_TABLES = {
    "a row with more cells than the header": ("instruction,output\na,b,c\n", 2, "3 cells"),
    "a column without a name": ("instruction,\na,b\n", 2, "column 2 has a value and no name"),
    "a title above the names": ("My rows,\ninstruction,output\na,b\n", 2, "no title above"),
    "a column given twice": ("output,output\na,b\n", 1, "twice"),
    "a quotation mark that nothing closes": ('instruction,output\na,"b\n', 2, "CSV"),
    "a row without an answer": ("instruction,output\na,\n", 2, "output"),
}


@pytest.mark.parametrize("kind", sorted(BROKEN_TABLES))
def test_a_broken_table_is_told_with_its_line(tmp_path: Path, kind: str) -> None:
    text, line, word = BROKEN_TABLES[kind]
    (tmp_path / "a.csv").write_text(text)
    (defect,) = examine_files([tmp_path / "a.csv"]).defects
    assert defect.line == line and word in str(defect)


def test_a_csv_in_another_encoding_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("instruction,output\na,你\n".encode("gbk"))
    (defect,) = examine_files([tmp_path / "a.csv"]).defects
    assert defect.line == 2 and "iconv" in defect.fix


def write_excel(path: Path, lines: list[list[Any]]) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for line in lines:
        book.active.append(line)
    book.save(path)


def test_rows_of_excel_are_read_with_their_numbers(tmp_path: Path) -> None:
    lines = [["instruction", "output", "note"], ["2+2", 4, None], [None] * 3, ["pi", 3.5, "x"]]
    write_excel(tmp_path / "a.xlsx", lines)
    rows = sound(tmp_path / "a.xlsx")
    assert [r.turns[1].text for r in rows] == ["4", "3.5"]
    assert [r.where for r in rows] == ["a.xlsx:2", "a.xlsx:4"]


def test_a_cell_of_excel_is_learned_as_a_person_sees_it(tmp_path: Path) -> None:
    seen = {
        "2026-11-27": datetime(2026, 11, 27),
        "2026-11-27 09:30:00": datetime(2026, 11, 27, 9, 30),
        "09:30:00": time(9, 30),
        "0.3": 0.1 + 0.2,
        "TRUE": True,
        "“it’s hot” ": "“it’s hot” ",
    }
    lines = [["instruction", "output"], *(["say", value] for value in seen.values())]
    write_excel(tmp_path / "a.xlsx", lines)
    assert [r.turns[1].text for r in sound(tmp_path / "a.xlsx")] == [*seen]


def test_an_empty_cell_of_a_mapped_column_says_what_may_be_done(tmp_path: Path) -> None:
    write_excel(tmp_path / "a.xlsx", [["问题", "回答"], ["2+2", "4"], ["3+3", None]])
    columns = {"instruction": "问题", "output": "回答"}
    (defect,) = examine_files([tmp_path / "a.xlsx"], Reading("auto", columns)).defects
    assert "--drop-bad" in defect.fix and "=NAME" not in defect.fix


def test_an_empty_column_of_a_table_is_none(tmp_path: Path) -> None:
    lines = [["instruction", None, "output", None], ["2+2", None, "4", None]]
    write_excel(tmp_path / "a.xlsx", lines)
    (tmp_path / "a.csv").write_text("instruction,,output,\n2+2,,4,\n")
    assert [r.turns[1].text for r in sound(tmp_path / "a.xlsx", tmp_path / "a.csv")] == ["4", "4"]


@pytest.mark.parametrize(
    "lines",
    [
        [["My rows"], ["instruction", "output"], ["2+2", "4"]],
        [["instruction", "output"], ["2+2", "4", "five"]],
    ],
)
def test_a_value_of_excel_that_no_name_stands_above_is_not_dropped(
    tmp_path: Path, lines: list[list[str]]
) -> None:
    write_excel(tmp_path / "a.xlsx", lines)
    (defect,) = examine_files([tmp_path / "a.xlsx"]).defects
    assert defect.line == 2 and "has a value and no name" in str(defect)


def test_a_file_that_is_no_excel_file_is_told(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    (tmp_path / "a.xlsx").write_bytes(b"PK not a book")
    (defect,) = examine_files([tmp_path / "a.xlsx"]).defects
    assert "not a sound .xlsx file" in defect.reason


def test_a_sheet_that_breaks_off_is_told_with_its_row(tmp_path: Path) -> None:
    write_excel(tmp_path / "a.xlsx", [["instruction", "output"], ["a", "b"], ["c", "d"]])
    with zipfile.ZipFile(tmp_path / "a.xlsx") as book:
        members = {name: book.read(name) for name in book.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    with zipfile.ZipFile(tmp_path / "b.xlsx", "w") as book:
        for name, content in members.items():
            whole = content.replace(b'<row r="3"', b'<row r="-Infinity"')
            book.writestr(name, whole if name == sheet else content)
    report = examine_files([tmp_path / "b.xlsx"])
    (defect,) = report.defects
    assert report.rows == 1 and defect.line == 3 and "not a sound .xlsx file" in defect.reason
    empty = re.sub(b"<sheets>.*</sheets>", b"<sheets/>", members["xl/workbook.xml"], flags=re.S)
    members["xl/workbook.xml"] = empty
    with zipfile.ZipFile(tmp_path / "c.xlsx", "w") as book:
        for name, content in members.items():
            book.writestr(name, content)
    assert "not a sound .xlsx file" in examine_files([tmp_path / "c.xlsx"]).defects[0].reason


def test_offsets_that_somebody_made_up_in_an_arrow_file_are_not_followed(tmp_path: Path) -> None:
    import pyarrow

    offsets = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1 << 30, 1)))
    words = pyarrow.Array.from_buffers(pyarrow.utf8(), 2, [None, offsets, pyarrow.py_buffer(b"a")])
    table = pyarrow.Table.from_arrays([words, words], names=["instruction", "output"])
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    (defect,) = examine_files([tmp_path / "a.arrow"]).defects
    assert "not a sound Arrow file" in defect.reason


def test_fields_that_only_other_rows_have_are_not_learned_as_nulls(tmp_path: Path) -> None:
    """Arrow gives every object of a column the fields of all of them."""
    import pyarrow
    import pyarrow.parquet as parquet

    def asked(arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "w", "arguments": arguments}}
        said = {"role": "assistant", "content": None, "tool_calls": [call]}
        return {"messages": [{"role": "user", "content": "?", "tool_calls": None}, said]}

    def learned(path: Path) -> list[Any]:
        return [row.turns[1].calls[0]["function"]["arguments"] for row in sound(path)]

    wanted: list[Any] = [{"city": "Kyoto"}, {"zone": {"hours": 9}}]
    table = pyarrow.Table.from_pylist([asked(arguments) for arguments in wanted])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert learned(tmp_path / "a.parquet") == wanted
    texts = [asked(json.dumps(arguments)) for arguments in ({"city": None}, {"zone": 9})]
    parquet.write_table(pyarrow.Table.from_pylist(texts), tmp_path / "b.parquet")
    assert learned(tmp_path / "b.parquet") == [{"city": None}, {"zone": 9}]


def test_turns_as_json_text_in_a_column_are_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "[Hello]"}]
    table = pyarrow.Table.from_pylist([{"messages": json.dumps(turns)}])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [t.text for t in sound(tmp_path / "a.parquet")[0].turns] == ["Hi", "[Hello]"]


def test_a_folder_with_a_split_to_test_on_is_refused_with_the_files_to_name(
    tmp_path: Path,
) -> None:
    data = tmp_path / "hub" / "data"
    data.mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (data / f"{name}.jsonl").write_text(JSONL)
    (defect,) = examine_files([tmp_path / "hub"]).defects
    assert "the splits train, test" in defect.reason
    pattern = defect.fix.split('"')[1]
    assert len(sound(Path(pattern))) == 2 * len(ROWS)
    (data / "test-00000-of-00001.jsonl").unlink()
    assert len(sound(tmp_path / "hub")) == 2 * len(ROWS)


def test_a_name_that_no_file_can_have_is_a_defect(tmp_path: Path) -> None:
    for name in ("a" * 70_000, "a\0b"):
        (defect,) = examine_files([tmp_path / name]).defects
        assert "no such file" in defect.reason
    odd = [[{"filename": "a" * 70_000}], [{"filename": ["a"]}], [{"filename": 3}], "[" * 100_000]
    for files in odd:
        state = files if isinstance(files, str) else json.dumps({"_data_files": files})
        (tmp_path / "state.json").write_text(state)
        assert examine_files([tmp_path]).defects


def test_a_data_set_that_was_saved_to_disk_is_read_in_its_order(tmp_path: Path) -> None:
    import pyarrow

    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for split in ("train", "test"):
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        for name, row in zip(names, ROWS if split == "train" else ROWS[:1] * 2, strict=True):
            table = pyarrow.Table.from_pylist([row])
            with pyarrow.ipc.new_stream(folder / name, table.schema) as stream:
                stream.write_table(table)
        told = {"_data_files": [{"filename": name} for name in names]}
        (folder / "state.json").write_text(json.dumps(told))
        (folder / "dataset_info.json").write_text("{}")
    assert [r.turns for r in sound(tmp_path / "saved" / "train")] == TURNS
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [r.turns for r in sound(tmp_path / "saved")] == TURNS


def test_a_saved_data_set_without_a_train_split_names_its_splits(tmp_path: Path) -> None:
    for split in ("a", "b"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "state.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text("{}")
    (defect,) = examine_files([tmp_path]).defects
    assert "a, b" in defect.reason


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "a.csv.gz"])
def test_a_packed_file_is_read_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    text = csv_text() if "csv" in name else JSONL
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert [r.turns for r in sound(tmp_path / name)] == TURNS


@pytest.mark.parametrize("cut", [12, -9])
def test_a_packed_file_that_is_cut_short_is_told(tmp_path: Path, cut: int) -> None:
    packed = gzip.compress((JSONL * 400).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:cut])
    (defect,) = examine_files([tmp_path / "a.jsonl.gz"]).defects
    assert "unpacked" in defect.reason or "to its end" in defect.reason


def test_folders_and_patterns_stand_for_their_files(tmp_path: Path) -> None:
    inner = tmp_path / "rows" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "rows" / "a.jsonl").write_text(JSONL)
    (inner / "b.csv").write_text(csv_text())
    (inner / ".hidden.jsonl").write_text("not read")
    (tmp_path / "rows" / "README.md").write_text("not read")
    assert [r.turns for r in sound(tmp_path / "rows")] == TURNS * 2
    assert [r.turns for r in sound(tmp_path / "rows" / "*.jsonl")] == TURNS
    assert [r.turns for r in sound(tmp_path / "rows" / "**" / "*.csv")] == TURNS


@pytest.mark.parametrize("name", ["*.jsonl", "empty", "absent.jsonl"])
def test_a_path_that_stands_for_no_file_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (defect,) = examine_files([tmp_path / name]).defects
    assert defect.fix


@pytest.mark.parametrize("key", ["data", "train"])
def test_an_array_inside_of_an_object_is_read(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps({key: ROWS}, indent=1, ensure_ascii=False) + "\n")
    rows = sound(tmp_path / "a.json")
    assert [r.turns for r in rows] == TURNS and rows[1].where == "a.json:8"
    (tmp_path / "b.json").write_text(json.dumps({key: ROWS}) + " more")
    assert len(examine_files([tmp_path / "b.json"]).defects) == 1


def test_a_line_that_begins_with_its_turns_is_no_object_around_an_array(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    (tmp_path / "a.json").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    assert len(sound(tmp_path / "a.json")) == 2


def test_a_packed_array_of_many_rows_is_read_in_stretches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "CHUNK", 64)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(ROWS * 50).encode()))
    assert len(sound(tmp_path / "a.json.gz")) == 100
