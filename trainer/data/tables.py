"""Rows of tables, one by one, each with its place: CSV and TSV, Excel's .xlsx, Parquet, and the
Arrow files of `datasets`' save_to_disk. A row is (place, value) as scan.py yields it.

Cells of CSV and Excel are texts (a number is written out); a cell of a column of turns or tools may
hold JSON. Empty cells of Excel and nulls of Parquet and Arrow are no fields.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, time
from pathlib import Path
from typing import Any

from trainer.data import scan
from trainer.data.fields import plain
from trainer.data.scan import Broken

KINDS = (".csv", ".tsv", ".xlsx", ".parquet", ".arrow")
NEEDS_PACKAGE = (".xlsx", ".parquet", ".arrow")  # a box may lack it: ops sends JSON lines instead
STRUCTURED = frozenset(["conversations", "messages", "tools", "functions", "history"])
Item = tuple[scan.Location, Any] | Broken


class RowPlace(scan.Location):
    """A place in a table: the row's line (or number), no column."""

    def __init__(self, number: int) -> None:
        super().__init__("", 0, number)

    def locate(self, path: tuple[str | int, ...]) -> tuple[int, int]:
        return self.line, 1


def rows(path: Path, kind: str) -> Iterator[Item]:
    """The rows of a table of one of KINDS."""
    if kind in (".csv", ".tsv"):
        return _text_table(path, kind)
    return {".xlsx": _excel, ".parquet": _parquet, ".arrow": _arrow}[kind](path)


def as_json_line(item: Item) -> str:
    """A row as JSON lines have it, without the line end."""
    assert not isinstance(item, Broken)
    return json.dumps(plain(item[1]), ensure_ascii=False, default=str)


def _text_table(path: Path, kind: str) -> Iterator[Item]:
    broken: list[Broken] = []
    csv.field_size_limit(scan.MAX_ROW_SIZE)
    lines = _lines(path, broken)
    head = next(lines, "")
    sign = "\t" if kind == ".tsv" else max(",;\t", key=head.count)
    reader = csv.reader(_again(head, lines), delimiter=sign, strict=True)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Broken(line, 1, f"no sound {kind[1:].upper()} ({error})", "mend it", ends=True)
            return
        if broken:
            yield from broken
            return
        if cells is None:
            return
        if not any(cells):
            continue
        if names is None:
            names = [name.strip() for name in cells]
            if fault := _header_fault(names):
                yield Broken(line, 1, *fault, ends=True)
                return
        elif fault := _nameless(names, cells[: len(names)]):
            yield Broken(line, 1, *fault, ends=True)
            return
        elif len(cells) > len(names):
            reason = f"the row has {len(cells)} cells, the header {len(names)}"
            yield Broken(line, 1, reason, f"put quotation marks around texts that hold {sign!r}")
        else:
            held = [(n, c) for n, c in zip(names, cells, strict=False) if n]
            yield RowPlace(line), tuple((name, _cell(name, cell)) for name, cell in held)


def _lines(path: Path, broken: list[Broken]) -> Iterator[str]:
    """The lines with their ends; where one cannot be read, it is added to `broken` and they end."""
    for item in scan.text_lines(path, keep_ends=True):
        if isinstance(item, Broken):
            broken.append(item)
            return
        number, text = item
        yield text.removeprefix("\ufeff") if number == 1 else text


def _again(first: str, rest: Iterable[str]) -> Iterator[str]:
    if first:
        yield first
    yield from rest


def _header_fault(names: list[str]) -> tuple[str, str] | None:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        return f"the column {twice[0]!r} is given twice", "rename or remove one"
    return None


def _nameless(names: list[str], cells: Sequence[Any]) -> tuple[str, str] | None:
    """The fault of a row with a value where the header has no name; an empty column is none, and
    neither are row numbers in the first one, as pandas and CMMLU write them."""
    for number, cell in enumerate(cells):
        if number == 0 and str(cell).isdecimal():
            continue
        if cell not in (None, "") and not (number < len(names) and names[number]):
            reason = f"column {number + 1} has a value and no name"
            return reason, "the first row must name every column, with no title above it"
    return None


def _cell(name: str, text: str) -> Any:
    if name in STRUCTURED and text[:1] in ("[", "{"):
        try:
            return _as_pairs(json.loads(text))
        except (ValueError, RecursionError):
            return text
    return text


def _excel(path: Path) -> Iterator[Item]:
    try:
        import openpyxl
    except ImportError:
        fix = "pip install openpyxl, or save the sheet as CSV (UTF-8)"
        yield Broken(1, 1, "Excel's files need the package openpyxl", fix, ends=True)
        return
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # openpyxl raises whatever its parts raise
        yield Broken(1, 1, f"not a sound .xlsx file ({error})", "save it again", ends=True)
        return
    number, lines = 0, _lines_of(book)
    names: list[str] | None = None
    while True:
        try:
            cells = next(lines, None)
        except Exception as error:
            reason = f"not a sound .xlsx file ({error})"
            yield Broken(number + 1, 1, reason, "save it again", ends=True)
            return
        if cells is None:
            break
        number += 1
        if all(cell is None for cell in cells):
            continue
        if names is None:
            names = ["" if cell is None else str(cell).strip() for cell in cells]
            if fault := _header_fault(names):
                yield Broken(number, 1, *fault, ends=True)
                return
            continue
        if fault := _nameless(names, cells):
            yield Broken(number, 1, *fault, ends=True)
            return
        held = [(n, c) for n, c in zip(names, cells, strict=False) if n and c is not None]
        yield RowPlace(number), tuple((name, _cell(name, _text(cell))) for name, cell in held)
    book.close()


def _lines_of(book: Any) -> Iterator[Any]:
    yield from book.worksheets[0].iter_rows(values_only=True)


def _text(cell: Any) -> str:
    """A cell as a person sees it: 4.0 is 4, a day has no hour."""
    if isinstance(cell, bool):
        return str(cell).upper()
    if isinstance(cell, float):
        return str(int(cell)) if cell.is_integer() else f"{cell:.15g}"  # Excel has 15 digits
    if isinstance(cell, datetime):
        return str(cell if cell.time() != time() else cell.date())
    return str(cell)


def _parquet(path: Path) -> Iterator[Item]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        yield _needs_pyarrow("Parquet")
        return
    yield from _batches(lambda: parquet.ParquetFile(path).iter_batches(4096), "Parquet")


def _arrow(path: Path) -> Iterator[Item]:
    try:
        import pyarrow
    except ImportError:
        yield _needs_pyarrow("Arrow")
        return

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as source:
            try:
                yield from pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                source.seek(0)
                file = pyarrow.ipc.open_file(source)
                yield from (file.get_batch(n) for n in range(file.num_record_batches))

    yield from _batches(batches, "Arrow")


def _needs_pyarrow(kind: str) -> Broken:
    fix = "pip install pyarrow, or convert the file to JSON lines"
    return Broken(1, 1, f"{kind} needs the package pyarrow", fix, ends=True)


def _batches(read: Any, kind: str) -> Iterator[Item]:
    number = 0
    try:
        for batch in read():
            batch.validate(full=True)  # else offsets that somebody made up are followed anywhere
            for row in batch.to_pylist():
                number += 1
                wanted = ("instruction", "output")
                held = {k: v for k, v in row.items() if v is not None or k in wanted}
                cells = ((k, _cell(k, v) if type(v) is str else v) for k, v in held.items())
                yield RowPlace(number), tuple((k, _without_nulls(v)) for k, v in cells)
    except Exception as error:  # pyarrow raises whatever its parts raise
        reason = f"not a sound {kind} file ({error})"
        yield Broken(number + 1, 1, reason, "write it again", ends=True)


def _without_nulls(value: Any) -> Any:
    """As `_as_pairs`, without the fields that are null: all objects of a column have the same
    fields there, so that each has those of all others as nulls."""
    if isinstance(value, dict):
        return tuple((k, _without_nulls(v)) for k, v in value.items() if v is not None)
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _as_pairs(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((k, _as_pairs(v)) for k, v in value.items())
    return [_as_pairs(v) for v in value] if isinstance(value, list) else value
