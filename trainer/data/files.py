"""The user's data: every row read, every defect reported as file:line:column with its field,
the reason and a fix. No torch, no transformers.

    python -m trainer.data FILE... [--format alpaca|sharegpt|messages|prompt|text]

JSON arrays, JSON lines, Parquet, plain text (a line is a document), and LLaMA-Factory's
dataset_info.json as it is: given alone it stands for the files that it names, given with others it
says how to read them. Rows are read one by one; what is kept of a file are its rows and defects.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.data import formats, scan
from trainer.data.formats import Columns, Row
from trainer.data.scan import Broken

DATASET_INFO = "dataset_info.json"  # LLaMA-Factory's
SAMPLED_ROWS = 20  # rows sampled to detect the format
MAX_DEFECTS = 10_000  # of one file; reading it ends there


@dataclass(frozen=True, order=True)
class Defect:
    """`line` and `column` count from 1 (of a Parquet file, `line` is the row). `field` is '' where
    the whole row or file is meant."""

    file: str
    line: int
    column: int
    field: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return (
            f"{self.file}:{self.line}:{self.column}: "
            + (f"{self.field}: " if self.field else "")
            + f"{self.reason}: {self.fix}"
        )


@dataclass
class Report:
    """What examine_files found. `formats` is file name -> format; `ok` means that training may
    start."""

    rows: int = 0
    defects: list[Defect] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.defects and self.rows > 0

    def __str__(self) -> str:
        files = ", ".join(f"{name} ({form})" for name, form in self.formats.items())
        return "\n".join(
            [
                *map(str, self.defects),
                f"{self.rows} sound rows in {files or 'no file'}, {len(self.defects)} defects",
            ]
        )


@dataclass(frozen=True)
class Source:
    """One file and how it is to be read; `form` is '' until it is detected from the rows."""

    path: Path
    name: str
    form: str = ""
    columns: Columns = field(default_factory=Columns)
    max_rows: int | None = None


def examine_files(paths: Sequence[Path | tuple[Path, str]], form: str = "auto") -> Report:
    """Reads every file and reports every defect. A path may come with the name that defects carry.
    Raises nothing for bad data."""
    report = Report()
    sources, report.defects = find_sources(paths, form)
    for source in map(_with_format, sources):
        report.formats[source.name] = source.form
        report.rows += sum(1 for _ in islice(sound_rows(source, report.defects), source.max_rows))
    report.defects.sort()
    return report


def read_rows(
    paths: Sequence[Path | tuple[Path, str]], form: str = "auto"
) -> tuple[list[Row], list[Defect]]:
    """(sound rows in file order, all defects): what training uses, by the same reading as
    examine_files."""
    sources, defects = find_sources(paths, form)
    found: list[Row] = []
    for source in map(_with_format, sources):
        found += islice(sound_rows(source, defects), source.max_rows)
    return found, sorted(defects)


def _with_format(source: Source) -> Source:
    return replace(source, form=source.form or detect_format(source))


# -- which files, read how -------------------------------------------------------------------------


def find_sources(
    paths: Sequence[Path | tuple[Path, str]], form: str
) -> tuple[list[Source], list[Defect]]:
    """The files to read: dataset_info.json replaced by, or applied to, the files that it names."""
    given = [
        (Path(p), Path(p).name) if not isinstance(p, tuple) else (Path(p[0]), p[1]) for p in paths
    ]
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
    if head[:2] == b"\x1f\x8b":
        return Defect(name, 1, 1, "", "the file is packed by gzip", "unpack it: gunzip")
    if path.suffix in (".csv", ".tsv", ".xlsx", ".xls", ".gz", ".zip"):
        return Defect(
            name,
            1,
            1,
            "",
            f"{path.suffix} is not read",
            "convert it to JSON lines: one object a line",
        )
    encoding = json.detect_encoding(head).upper().replace("-LE", "LE").replace("-BE", "BE")
    if path.suffix != ".parquet" and not encoding.startswith("UTF-8"):
        fix = f"convert it: iconv -f {encoding} -t UTF-8 {shlex.quote(name)}"
        return Defect(name, 1, 1, "", f"the file is {encoding}", fix)
    if path.suffix not in (".parquet", ".txt") and head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (
        b"[",
        b"{",
    ):
        return Defect(
            name,
            1,
            1,
            "",
            f"it begins with {head.lstrip()[:12]!r}: neither a JSON array nor JSON lines",
            "begin with [ or {",
        )
    return None


def _within(file: Path, folder: Path) -> bool:
    """Whether a file lies in a folder or below it, wherever links lead: a registry is somebody
    else's, and its files travel to somebody else's machine."""
    try:
        return file.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a loop of links, a name that is none
        return False


def _is_text_map(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    )


_ENTRY: dict[str, Callable[[Any], bool]] = {  # what an entry of dataset_info.json holds
    "file_name": lambda value: isinstance(value, str),
    "columns": _is_text_map,
    "tags": _is_text_map,
    "num_samples": lambda value: value is None or (type(value) is int and value >= 0),
}


_OUR_NAMES = {  # of LLaMA-Factory's columns, by form
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "text": {"prompt": "text"},
}
_ROLE_TAGS = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}


def _source_of(entry: dict[str, Any], file: Path) -> Source:
    """One entry of LLaMA-Factory's registry, sound by _ENTRY."""
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if entry.get("formatting") == "sharegpt":
        form = "sharegpt"
    else:
        form = "text" if set(columns) == {"prompt"} else "alpaca"
    names = {_OUR_NAMES[form].get(k, k): v for k, v in columns.items()}
    roles = {tags[tag]: role for tag, role in _ROLE_TAGS.items() if tag in tags}
    how = Columns(names, tags.get("role_tag", ""), tags.get("content_tag", ""), roles)
    return Source(file, entry["file_name"], form, how, entry.get("num_samples"))


def _dataset_info(path: Path, name: str, defects: list[Defect]) -> dict[str, Source]:
    """LLaMA-Factory's registry: file name -> how to read it."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(entries, dict):
            raise ValueError("it must be an object of data sets")
    except (OSError, ValueError, RecursionError) as error:
        line, column = (
            (error.lineno, error.colno) if isinstance(error, json.JSONDecodeError) else (1, 1)
        )
        defects.append(
            Defect(name, line, column, "", f"not a dataset_info.json ({error})", "mend the file")
        )
        return {}
    found = {}
    for key, entry in entries.items():
        if not isinstance(entry, dict) or "file_name" not in entry:
            continue  # an entry for a hub data set: nothing local to read
        wrong = [k for k, sound in _ENTRY.items() if not sound(entry.get(k))]
        if wrong:
            fix = "write the entry as LLaMA-Factory does"
            defects.append(
                Defect(name, 1, 1, _printable(key), f"{wrong[0]} is of another kind", fix)
            )
            continue
        file = path.parent / entry["file_name"]
        if not _within(file, path.parent):
            reason = f"{entry['file_name']!r:.200} lies outside the folder of {DATASET_INFO}"
            fix = "copy the file beside it, or name it in data.files yourself"
            defects.append(Defect(name, 1, 1, _printable(key), _printable(reason), fix))
            continue
        if entry.get("ranking") or "kto_tag" in (entry.get("columns") or {}):
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
        found[file.name] = _source_of(entry, file)
    if not found:
        defects.append(
            Defect(
                name,
                1,
                1,
                "",
                "it names no local file that can be trained on",
                'give an entry a "file_name"',
            )
        )
    return {k: v for k, v in found.items() if len(entries) == 1 or v.path.is_file()} or found


def detect_format(source: Source) -> str:
    """The format of most of the first rows; alpaca where none fits, so that the defects name what
    is missing."""
    if source.path.suffix == ".txt":
        return "text"
    votes: dict[str, int] = {}
    for item in islice(_items(source), SAMPLED_ROWS):
        if not isinstance(item, Broken) and type(item[1]) is tuple:
            form = formats.guess({k for k, _ in item[1]}, source.columns)
            if form:
                votes[form] = votes.get(form, 0) + 1
    return max(votes, key=lambda form: votes[form]) if votes else "alpaca"


# -- reading and checking --------------------------------------------------------------------------


def sound_rows(source: Source, defects: list[Defect]) -> Iterator[Row]:
    """The sound rows of a source; what is wrong with the others is added to `defects`."""
    name, form, columns = source.name, source.form, source.columns
    defects_before = len(defects)
    for item in _items(source):
        if isinstance(item, Broken):
            defects.append(Defect(name, item.line, item.column, "", item.reason, item.fix))
        else:
            place, value = item
            found = _validated(value, form, columns, f"{name}:{place.line}")
            if isinstance(found, Row):
                yield found
                continue
            for path, reason, fix in found:
                at, column = place.locate(path)
                defects.append(
                    Defect(name, at, column, _field(path), _printable(reason), _printable(fix))
                )
        if len(defects) - defects_before >= MAX_DEFECTS:
            reason = f"{MAX_DEFECTS:,} defects: what follows in this file was not read"
            defects.append(Defect(name, defects[-1].line + 1, 1, "", reason, "mend these first"))
            return


def _validated(value: Any, form: str, columns: Columns, where: str) -> Row | list[formats.Problem]:
    try:
        found = formats.problems_or_row(value, form, columns, where)
        return (formats.suspicious_texts(value) or found) if isinstance(found, Row) else found
    except RecursionError:
        return [((), "brackets are nested too deep", "flatten the row")]


def _printable(text: str) -> str:
    """What no terminal can show, or what would move its cursor, is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _field(path: tuple[str | int, ...]) -> str:
    """('conversations', 3, 'value') -> 'conversations[3].value'"""
    steps = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    return _printable(steps.lstrip("."))


def _items(source: Source) -> Iterator[Any]:
    """(place, value) or Broken, whatever the file's kind."""
    if source.path.suffix == ".parquet":
        return _parquet(source.path)
    if source.path.suffix == ".txt":
        return _plain_text(source.path)
    if _is_array(source.path):
        return scan.scan_array(source.path)
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
        yield Broken(
            1,
            1,
            "Parquet needs the package pyarrow",
            "pip install pyarrow, or convert the file to JSON lines",
        )
        return
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(4096):
            for row in batch.to_pylist():
                number += 1
                yield (
                    _RowPlace("", 0, number),
                    _as_pairs(
                        {
                            k: v
                            for k, v in row.items()
                            if v is not None or k in ("instruction", "output")
                        }
                    ),
                )
    except (OSError, ValueError) as error:
        yield Broken(number + 1, 1, f"not a sound Parquet file ({error})", "write it again")


def _as_pairs(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((k, _as_pairs(v)) for k, v in value.items())
    return [_as_pairs(v) for v in value] if isinstance(value, list) else value


def _plain_text(path: Path) -> Iterator[Any]:
    for item in scan.text_lines(path):
        if isinstance(item, Broken):
            yield item
            continue
        number, text = item
        text = text.removeprefix("\ufeff") if number == 1 else text
        if text.strip():
            yield scan.Place(text, 0, number), (("text", text),)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.data", description="Checks training data and reports every defect."
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--format", default="auto", choices=["auto", *formats.KEYS])
    arguments = parser.parse_args()
    report = examine_files([(p, str(p)) for p in arguments.files], arguments.format)
    print(report)
    return 0 if report.ok else 3


if __name__ == "__main__":
    sys.exit(main())
