"""The user's data: every row read, every defect told as file:line:column with its field, the reason and a fix. No torch, no transformers.

    python -m trainer.data FILE... [--format alpaca|sharegpt|messages|prompt|text]

JSON arrays, JSON lines, Parquet, plain text (a line is a document), and LLaMA-Factory's dataset_info.json as it is: given alone it stands
for the files that it names, given with others it says how to read them. A gigabyte takes some seconds; large files go over all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from trainer import rows as formats
from trainer import scan
from trainer.rows import Columns, Row
from trainer.scan import Broken

LARGE = 32 << 20  # bytes from which a file is checked by several processes
DATASET_INFO = "dataset_info.json"  # LLaMA-Factory's
LOOK = 20  # rows looked at to tell the format


@dataclass(frozen=True, order=True)
class Defect:
    """`line` and `column` count from 1 (of a Parquet file, `line` is the row). `field` is '' where the whole row or file is meant."""

    file: str
    line: int
    column: int
    field: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: " + (f"{self.field}: " if self.field else "") + f"{self.reason}: {self.fix}"


@dataclass
class Report:
    """What check_files found. `formats` is file name -> format; `ok` means that training may start."""

    rows: int = 0
    defects: list[Defect] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.defects and self.rows > 0

    def __str__(self) -> str:
        files = ", ".join(f"{name} ({form})" for name, form in self.formats.items())
        return "\n".join([*map(str, self.defects), f"{self.rows} sound rows in {files or 'no file'}, {len(self.defects)} defects"])


@dataclass(frozen=True)
class Source:
    """One file and how it is to be read; `form` is '' until it is told from the rows."""

    path: Path
    name: str
    form: str = ""
    columns: Columns = field(default_factory=Columns)
    most: int | None = None


def check_files(paths: Sequence[Path | tuple[Path, str]], form: str = "auto", processes: int | None = None) -> Report:
    """Reads every file whole and reports every defect. A path may come with the name that defects should carry. Raises nothing for bad data."""
    report = Report()
    sources, report.defects = find_sources(paths, form)
    for source in sources:
        source = replace(source, form=source.form or tell_format(source))
        report.formats[source.name] = source.form
        for count, defects in _check_parts(source, processes or os.cpu_count() or 1):
            report.rows += count
            report.defects += defects
    report.defects.sort()
    return report


def read_rows(paths: Sequence[Path | tuple[Path, str]], form: str = "auto") -> tuple[list[Row], list[Defect]]:
    """(sound rows in file order, all defects): what training uses, by the same reading as check_files."""
    sources, defects = find_sources(paths, form)
    found: list[Row] = []
    for source in sources:
        source = replace(source, form=source.form or tell_format(source))
        found += islice((row for row in examine(source, defects) if row), source.most)
    return found, sorted(defects)


# -- which files, read how --------------------------------------------------------------------------------------------------------


def find_sources(paths: Sequence[Path | tuple[Path, str]], form: str) -> tuple[list[Source], list[Defect]]:
    """The files to read: dataset_info.json replaced by, or applied to, the files that it names."""
    given = [(Path(p), Path(p).name) if not isinstance(p, tuple) else (Path(p[0]), p[1]) for p in paths]
    known: dict[str, Source] = {}
    defects: list[Defect] = []
    for path, name in given:
        if Path(name).name == DATASET_INFO:
            known |= _dataset_info(path, name, defects)
    plain = [(path, name) for path, name in given if Path(name).name != DATASET_INFO]
    if not plain and known:
        plain = [(source.path, source.name) for source in known.values()]
    sources = []
    for path, name in plain:
        fault = _unreadable(path, name)
        if fault:
            defects.append(fault)
            continue
        source = replace(known.get(Path(name).name, Source(path, name)), path=path, name=name)
        sources.append(source if form == "auto" else replace(source, form=form))
    return sources, defects


def _unreadable(path: Path, name: str) -> Defect | None:
    if not path.is_file():
        return Defect(name, 1, 1, "", "there is no such file", "correct the path")
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head.strip():
        return Defect(name, 1, 1, "", "the file is empty", "put rows into it")
    if path.suffix in (".csv", ".tsv", ".xlsx", ".xls", ".gz", ".zip"):
        return Defect(name, 1, 1, "", f"{path.suffix} is not read", "convert it to JSON lines: one object a line")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return Defect(name, 1, 1, "", "the file is UTF-16", f"convert it: iconv -f UTF-16 -t UTF-8 {name}")
    if path.suffix not in (".parquet", ".txt") and head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"[", b"{"):
        return Defect(name, 1, 1, "", f"it begins with {head.lstrip()[:12]!r}: neither a JSON array nor JSON lines", "begin with [ or {")
    return None


def _dataset_info(path: Path, name: str, defects: list[Defect]) -> dict[str, Source]:
    """LLaMA-Factory's registry: file name -> how to read it."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        line, column = (error.lineno, error.colno) if isinstance(error, json.JSONDecodeError) else (1, 1)
        defects.append(Defect(name, line, column, "", f"not a dataset_info.json ({error})", "mend the file"))
        return {}
    found = {}
    for key, entry in entries.items():
        if "file_name" not in entry:
            continue  # an entry for a hub data set: nothing local to read
        file = path.parent / entry["file_name"]
        columns, tags = entry.get("columns", {}), entry.get("tags", {})
        if entry.get("ranking") or "kto_tag" in columns:
            if file.is_file():
                defects.append(
                    Defect(
                        name,
                        1,
                        1,
                        key,
                        "holds preferences, which this stage does not learn from",
                        "remove the entry, or name another file",
                    )
                )
            continue
        form = "sharegpt" if entry.get("formatting") == "sharegpt" else "text" if set(columns) == {"prompt"} else "alpaca"
        canonical = {
            "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
            "sharegpt": {"messages": "conversations"},
        }
        names = {canonical.get(form, {"prompt": "text"}).get(k, k): v for k, v in columns.items()}
        roles = {tags[t]: r for t, r in (("user_tag", "user"), ("assistant_tag", "assistant"), ("system_tag", "system")) if t in tags}
        how = Columns(names, tags.get("role_tag", ""), tags.get("content_tag", ""), roles)
        found[file.name] = Source(file, entry["file_name"], form, how, entry.get("num_samples"))
    if not found:
        defects.append(Defect(name, 1, 1, "", "it names no local file that can be trained on", 'give an entry a "file_name"'))
    return {k: v for k, v in found.items() if len(entries) == 1 or v.path.is_file()} or found


def tell_format(source: Source) -> str:
    """The format of most of the first rows; alpaca where none fits, so that the defects name what is missing."""
    if source.path.suffix == ".txt":
        return "text"
    votes: dict[str, int] = {}
    for item in islice(_items(source), LOOK):
        if not isinstance(item, Broken) and type(item[1]) is tuple:
            form = formats.guess({k for k, _ in item[1]}, source.columns)
            if form:
                votes[form] = votes.get(form, 0) + 1
    return max(votes, key=lambda form: votes[form]) if votes else "alpaca"


# -- reading and checking ---------------------------------------------------------------------------------------------------------


def examine(source: Source, defects: list[Defect], items: Iterator[Any] | None = None) -> Iterator[Row | None]:
    """Each row of a source: the row, or None after its defects were added to `defects`."""
    name, form, columns = source.name, source.form, source.columns
    check, undecoded = formats.problems_or_row, set()
    for item in _items(source) if items is None else items:
        if type(item) is Broken:
            defects.append(Defect(name, item.line, item.column, "", item.reason, item.fix))
            undecoded.add(item.line)
            continue
        place, value = item
        result = check(value, form, columns, f"{name}:{place.line}")
        if place.odd and type(result) is Row:
            odd = formats.odd_texts(value)
            result = odd if odd else result
        if isinstance(result, Row):
            yield result
            continue
        for path, reason, fix in result:
            line, column = place.locate(path)
            if "U+FFFD" in reason and line in undecoded:
                continue  # told already, as bytes that are not UTF-8
            defects.append(Defect(name, line, column, _field(path), reason, fix))
        yield None


def _field(path: tuple[str | int, ...]) -> str:
    """('conversations', 3, 'value') -> 'conversations[3].value'"""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def _items(source: Source) -> Iterator[Any]:
    """(place, value) or Broken, whatever the file's kind."""
    if source.path.suffix == ".parquet":
        return _parquet(source.path)
    if source.path.suffix == ".txt":
        return _plain_text(source.path)
    if _is_array(source.path):
        return (item for item in scan.scan_array(source.path) if type(item) is not scan.End)
    return scan.scan_lines(source.path)


def _is_array(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["


class _RowPlace(scan.Place):
    """A place in a Parquet file: the row's number, no column."""

    def locate(self, path: tuple[str | int, ...]) -> tuple[int, int]:
        return self.line, 1


def _parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        yield Broken(1, 1, "Parquet needs the package pyarrow", "pip install pyarrow, or convert the file to JSON lines")
        return
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(4096):
            for row in batch.to_pylist():
                number += 1
                yield (
                    _RowPlace("", 0, number, 0, True),
                    _as_pairs({k: v for k, v in row.items() if v is not None or k in ("instruction", "output")}),
                )
    except (OSError, ValueError) as error:
        yield Broken(number + 1, 1, f"not a sound Parquet file ({error})", "write it again")


def _as_pairs(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((k, _as_pairs(v)) for k, v in value.items())
    return [_as_pairs(v) for v in value] if isinstance(value, list) else value


def _plain_text(path: Path) -> Iterator[Any]:
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        text, faults = scan.decode(raw.rstrip(b"\r"), number)
        yield from faults
        if text.strip() and not faults:
            yield scan.Place(text, 0, number, 0, "\x00" in text or "\ufffd" in text), (("text", text),)


# -- a large file over several processes ------------------------------------------------------------------------------------------

Part = tuple[int, list[Defect]]  # sound rows, defects


def _check_parts(source: Source, processes: int) -> Iterator[Part]:
    large = source.path.stat().st_size >= LARGE and processes > 1 and source.path.suffix not in (".parquet", ".txt")
    if not large:
        defects: list[Defect] = []
        yield sum(row is not None for row in islice(examine(source, defects), source.most)), defects
        return
    array = _is_array(source.path)
    cuts = scan.row_starts(source.path, processes * 2) if array else _line_starts(source.path, processes * 2)
    begins, ends = [0, *cuts], [*cuts, None]
    check = _check_array_part if array else _check_lines_part
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        lines, characters = 0, 0
        for until, (count, defects, end) in zip(ends, pool.map(check, repeat(source), begins, ends), strict=True):
            yield count, [replace(d, line=d.line + lines, column=d.column + (characters if d.line == 1 else 0)) for d in defects]
            lines, characters = lines + end.lines, end.characters + (0 if end.lines else characters)
            if end.byte != until or until is None:
                break  # this part read on to the file's end: the cut after it was not between rows


def _check_array_part(source: Source, begin: int, until: int | None) -> tuple[int, list[Defect], scan.End]:
    """(sound rows, defects with places from `begin`, where it stopped)."""
    defects: list[Defect] = []
    end = scan.End(None)

    def items() -> Iterator[Any]:
        nonlocal end
        for item in scan.scan_array(source.path, begin, until):
            if type(item) is scan.End:
                end = item
            else:
                yield item

    return sum(row is not None for row in examine(source, defects, items())), defects, end


def _check_lines_part(source: Source, begin: int, until: int | None) -> tuple[int, list[Defect], scan.End]:
    defects: list[Defect] = []
    count = sum(row is not None for row in examine(source, defects, scan.scan_lines(source.path, begin, until)))
    lines, left = 0, (source.path.stat().st_size if until is None else until) - begin
    with open(source.path, "rb") as file:
        file.seek(begin)
        while left > 0 and (block := file.read(min(left, scan.BLOCK))):
            lines, left = lines + block.count(b"\n"), left - len(block)
    return count, defects, scan.End(until, lines)


def _line_starts(path: Path, parts: int) -> list[int]:
    size, starts = path.stat().st_size, []
    with open(path, "rb") as file:
        for part in range(1, parts):
            file.seek(size * part // parts)
            file.readline()
            if file.tell() < size:
                starts.append(file.tell())
    return sorted(set(starts))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.data", description="Checks training data and tells every defect.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--format", default="auto", choices=["auto", *formats.KEYS])
    arguments = parser.parse_args()
    report = check_files([(p, str(p)) for p in arguments.files], arguments.format)
    print(report)
    return 0 if report.ok else 3


if __name__ == "__main__":
    sys.exit(main())
