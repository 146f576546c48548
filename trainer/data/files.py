"""The user's data: every row read, every defect reported as file:line:column with its field,
the reason and a fix. No torch, no transformers.

    python -m trainer.data FILE... [--format alpaca|sharegpt|messages|prompt|text]

JSON arrays, JSON lines, tables (tables.py), plain text (a line is a document), each also packed by
gzip; folders and patterns of them (folders.py); and LLaMA-Factory's dataset_info.json as it is:
given alone it stands for the files that it names, given with others it says how to read them. Rows
are read one by one; what is kept of a file are its rows and defects.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.data import fields, formats, scan, tables
from trainer.data.folders import DATASET_INFO, expand, is_file, kind_of
from trainer.data.formats import Columns, Row
from trainer.data.scan import Broken

SAMPLED_ROWS = 20  # rows sampled to detect the format
MAX_DEFECTS = 10_000  # of one file; reading it ends there
MAX_ROW_DEFECTS = 20  # of one row that are told: each is looked for in the row's text


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
    """What examine_files found. `formats` is file name -> format, `notes` what is no defect; `ok`
    means that training may start."""

    rows: int = 0
    defects: list[Defect] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.defects and self.rows > 0

    def __str__(self) -> str:
        files = ", ".join(f"{name} ({form})" for name, form in self.formats.items())
        return "\n".join(
            [
                *map(str, self.defects),
                *self.notes,
                f"{self.rows} sound rows in {files or 'no file'}, {len(self.defects)} defects",
            ]
        )


@dataclass(frozen=True)
class Reading:
    """How rows are read, as the job says. `columns` is canonical name -> the name in the files,
    `fill` what stands for {{name}} in a text; with `bad_rows` "drop" a row that is not sound is
    left out and counted."""

    form: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    fill: Mapping[str, str] = field(default_factory=dict)
    bad_rows: str = "refuse"


@dataclass(frozen=True)
class Source:
    """One file and how it is to be read; `form` is '' until it is detected from the rows."""

    path: Path
    name: str
    form: str = ""
    columns: Columns = field(default_factory=Columns)
    max_rows: int | None = None
    fill: Mapping[str, str] = field(default_factory=dict)
    drops: bool = False


# of a decoded row, its source and its file:line: a row, or what is wrong with it
Validate = Callable[[Any, Source, str], Any | list[fields.Problem]]


@dataclass
class Findings:
    """What was found beside the sound rows: defects, and, file by file, how many rows were left out
    (with the first) and which fields nothing reads."""

    defects: list[Defect] = field(default_factory=list)
    dropped: dict[str, tuple[int, Defect]] = field(default_factory=dict)
    unread: dict[str, Counter[str]] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """One line for each file that has something to tell."""
        lines = [
            f'{name}: {count:,} rows left out (data.bad_rows = "drop"), first {first}'
            for name, (count, first) in self.dropped.items()
        ]
        for name, counts in self.unread.items():
            fields = ", ".join(f"{_printable(k)} ({n:,} rows)" for k, n in counts.most_common(12))
            more = f" and {len(counts) - 12} more" if len(counts) > 12 else ""
            lines.append(f"{name}: nothing reads the fields {fields}{more}")
        return lines


def examine_files(
    paths: Sequence[Path | tuple[Path, str]], reading: Reading | None = None
) -> Report:
    """Reads every file and reports every defect. A path may come with the name that defects carry.
    Raises nothing for bad data."""
    report, found = Report(), Findings()
    sources, found.defects = find_sources(paths, reading or Reading())
    for source in sources:
        source = _with_format(source)
        report.formats[source.name] = source.form
        report.rows += sum(1 for _ in islice(sound_rows(source, found), source.max_rows))
    report.defects, report.notes = sorted(found.defects), found.notes()
    return report


def read_rows(
    paths: Sequence[Path | tuple[Path, str]],
    reading: Reading | None = None,
    notes: list[str] | None = None,
) -> tuple[list[Row], list[Defect]]:
    """(sound rows in file order, all defects): what training uses, by the same reading as
    examine_files. What else is to be told of the files is added to `notes`."""
    found = Findings()
    sources, found.defects = find_sources(paths, reading or Reading())
    rows: list[Row] = []
    for source in map(_with_format, sources):
        rows += islice(sound_rows(source, found), source.max_rows)
    if notes is not None:
        notes += found.notes()
    return rows, sorted(found.defects)


def _with_format(source: Source) -> Source:
    return replace(source, form=source.form or detect_format(source))


# -- which files, read how -------------------------------------------------------------------------


def find_sources(
    paths: Sequence[Path | tuple[Path, str]], reading: Reading, preferences: bool = False
) -> tuple[list[Source], list[Defect]]:
    """The files to read: dataset_info.json replaced by, or applied to, the files that it names;
    with `preferences` those that hold pairs or tags, else the others."""
    known: dict[str, Source] = {}
    defects: list[Defect] = []
    given = [pair for path in paths for pair in _expanded(path, defects)]
    for path, name in given:
        if Path(name).name == DATASET_INFO:
            known |= _dataset_info(path, name, defects, preferences)
    plain = [(path, name) for path, name in given if Path(name).name != DATASET_INFO]
    if not plain and known:
        plain = [(source.path, source.name) for source in known.values()]
    sources = []
    for path, name in plain:
        fault = _unreadable(path, name)
        if fault:
            defects.append(fault)
            continue
        source = known.get(Path(name).name, Source(path, name))
        sources.append(
            replace(
                source,
                path=path,
                name=name,
                form=source.form if reading.form == "auto" else reading.form,
                columns=_columns(source.columns, reading.columns),
                fill=reading.fill,
                drops=reading.bad_rows == "drop",
            )
        )
    return sources, defects


def _expanded(path: Path | tuple[Path, str], defects: list[Defect]) -> list[tuple[Path, str]]:
    """(file, name) of each file that `path` stands for."""
    where, name = path if isinstance(path, tuple) else (Path(path), Path(path).name)
    files, fault = expand(Path(where))
    if fault:
        defects.append(Defect(name, 1, 1, "", *fault))
    if files == [Path(where)]:
        return [(Path(where), name)]
    return [(file, str(Path(name) / file.name)) for file in files]


def _columns(columns: Columns, given: Mapping[str, str]) -> Columns:
    """`columns` with what the job says; "role" and "content" are the tags of a turn."""
    names = columns.names | {k: v for k, v in given.items() if k not in ("role", "content")}
    return replace(
        columns,
        names=names,
        role_tag=given.get("role", columns.role_tag),
        content_tag=given.get("content", columns.content_tag),
    )


def _unreadable(path: Path, name: str) -> Defect | None:
    if not is_file(path):
        return Defect(name, 1, 1, "", "there is no such file", "correct the path")
    kind = kind_of(path)
    if kind in (".xls", ".zip", ".7z", ".rar", ".bz2", ".xz", ".zst"):
        fix = "unpack it, or save it as JSON lines, CSV or .xlsx"
        return Defect(name, 1, 1, "", f"{kind} is not read", fix)
    try:
        with scan.open_data(path) as file:
            head = file.read(4096)
    except (OSError, EOFError, zlib.error) as error:
        return Defect(name, 1, 1, "", f"it cannot be unpacked ({error})", "pack it again")
    if not head.strip():
        return Defect(name, 1, 1, "", "the file is empty", "put rows into it")
    if kind in tables.NEEDS_PACKAGE:
        return None
    encoding = json.detect_encoding(head).upper().replace("-LE", "LE").replace("-BE", "BE")
    if not encoding.startswith("UTF-8"):
        fix = f"convert it: iconv -f {encoding} -t UTF-8 {shlex.quote(name)}"
        return Defect(name, 1, 1, "", f"the file is {encoding}", fix)
    starts = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if kind not in (".txt", *tables.KINDS) and starts not in (b"[", b"{"):
        reason = f"it begins with {head.lstrip()[:12]!r}: neither a JSON array nor JSON lines"
        return Defect(name, 1, 1, "", reason, "begin with [ or {")
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
    "num_samples": lambda value: (
        value is None or (type(value) is int and 0 <= value <= sys.maxsize)
    ),
}


_OUR_NAMES = {  # of LLaMA-Factory's columns, by form
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "text": {"prompt": "text"},
}
_ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "function_tag": "call",
    "observation_tag": "tool",
}


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


def _dataset_info(
    path: Path, name: str, defects: list[Defect], preferences: bool
) -> dict[str, Source]:
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
        ranks = bool(entry.get("ranking") or "kto_tag" in (entry.get("columns") or {}))
        if ranks != preferences:
            if is_file(file):
                kind = "preferences" if ranks else "no preferences"
                reason = f"holds {kind}, which this stage does not learn from"
                fix = "remove the entry, or name another file"
                defects.append(Defect(name, 1, 1, key, reason, fix))
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
    return {k: v for k, v in found.items() if len(entries) == 1 or is_file(v.path)} or found


def detect_format(source: Source) -> str:
    """The format of most of the first rows; alpaca where none fits, so that the defects name what
    is missing."""
    if kind_of(source.path) == ".txt":
        return "text"
    votes: Counter[str] = Counter()
    for keys in _first_keys(source):
        if form := formats.guess(keys, source.columns):
            votes[form] += 1
    return max(votes, key=lambda form: votes[form]) if votes else "alpaca"


def _first_keys(source: Source) -> Iterator[set[str]]:
    for item in islice(_items(source), SAMPLED_ROWS):
        if not isinstance(item, Broken) and type(item[1]) is tuple:
            yield {k for k, _ in item[1]}


# -- reading and checking --------------------------------------------------------------------------


def sound_rows(source: Source, found: Findings, validate: Validate | None = None) -> Iterator[Any]:
    """The sound rows of a source, as `validate` makes them (formats.Row); what is wrong with the
    others is added to `found`."""
    name, defects_before = source.name, len(found.defects)
    if validate is None and (source.form == "text" or not source.columns.names):
        for keys in islice(_first_keys(source), 1):
            if fault := formats.kind_fault(source.form, keys):
                found.defects.append(Defect(name, 1, 1, "", *fault))
                return
    unread: Counter[str] = Counter()
    for item in _items(source):
        if isinstance(item, Broken):
            defects = [Defect(name, item.line, item.column, "", item.reason, item.fix)]
            ends = item.ends
        else:
            place, value = item
            try:
                made = (validate or _validated)(value, source, f"{name}:{place.line}")
            except RecursionError:
                made = [((), "brackets are nested too deep", "flatten the row")]
            if not isinstance(made, list):
                if isinstance(made, Row) and made.unread:
                    unread.update(made.unread)
                yield made
                continue
            defects = [_defect(name, place, problem) for problem in made[:MAX_ROW_DEFECTS]]
            ends = False
        if source.drops and not ends:
            count, first = found.dropped.get(name, (0, defects[0]))
            found.dropped[name] = (count + 1, first)
            continue
        found.defects += defects
        if len(found.defects) - defects_before >= MAX_DEFECTS:
            reason = f"{MAX_DEFECTS:,} defects: what follows in this file was not read"
            line = found.defects[-1].line + 1
            found.defects.append(Defect(name, line, 1, "", reason, "mend these first"))
            break
    if unread:
        found.unread[name] = unread


def _defect(name: str, place: scan.Location, problem: fields.Problem) -> Defect:
    path, reason, fix = problem
    line, column = place.locate(path)
    return Defect(name, line, column, _field(path), _printable(reason), _printable(fix))


def _validated(value: Any, source: Source, where: str) -> Row | list[fields.Problem]:
    found = formats.problems_or_row(value, source.form, source.columns, where)
    if not isinstance(found, Row):
        return found
    return formats.suspicious_texts(value) or _filled(found, value, source.fill)


def _filled(row: Row, value: Any, fill: Mapping[str, str]) -> Row | list[fields.Problem]:
    """`row` with what stands for {{name}} in its texts; a problem where nothing is given for a name
    that nobody means as it stands."""
    if not any("{{" in turn.text or "{{" in turn.extra for turn in row.turns):
        return row
    if lacking := fields.find_place(value, [n for n in fields.IDENTITY if n not in fill]):
        path, name = lacking
        fix = f'say what it stands for: data.fill = {{ {name} = "..." }}'
        return [(path, f"holds {{{{{name}}}}}, which would be learned as it stands", fix)]
    turns = tuple(
        turn._replace(text=fields.fill(turn.text, fill), extra=fields.fill(turn.extra, fill))
        for turn in row.turns
    )
    return row._replace(turns=turns)


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
    kind = kind_of(source.path)
    try:
        if kind in tables.KINDS:
            yield from tables.rows(source.path, kind)
        elif kind == ".txt":
            yield from _plain_text(source.path)
        elif _is_array(source.path):
            yield from scan.scan_array(source.path)
        else:
            yield from scan.scan_lines(source.path)
    except (OSError, EOFError, zlib.error) as error:
        yield Broken(1, 1, f"it cannot be read to its end ({error})", "copy it again", ends=True)


_WRAPPED = re.compile(rb'\{\s*"(data|train|rows|examples|instances|items)"\s*:\s*\[')


def _is_array(path: Path) -> bool:
    """Whether rows stand in an array: alone, or as the first field of an object."""
    with scan.open_data(path) as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    return head[:1] == b"[" or bool(_WRAPPED.match(head))


def _plain_text(path: Path) -> Iterator[Any]:
    for item in scan.text_lines(path):
        if isinstance(item, Broken):
            yield item
            continue
        number, text = item
        text = text.removeprefix("\ufeff") if number == 1 else text
        if text.strip():
            yield scan.Location(text, 0, number), (("text", text),)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.data", description="Checks training data and reports every defect."
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--format", default="auto", choices=["auto", *formats.KEYS])
    arguments = parser.parse_args()
    reading = Reading(arguments.format)
    report = examine_files([(p, str(p)) for p in arguments.files], reading)
    print(report)
    return 0 if report.ok else 3


if __name__ == "__main__":
    sys.exit(main())
