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
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.data import fields, formats, scan, tables
from trainer.data.folders import kind_of
from trainer.data.formats import Row
from trainer.data.scan import Broken
from trainer.data.sources import Defect, Reading, Source, find_sources, printable
from trainer.data.words import number_of

SAMPLED_ROWS = 20  # rows sampled to detect the format
MAX_DEFECTS = 10_000  # of one file; reading it ends there
MAX_ROW_DEFECTS = 20  # of one row that are told: each is looked for in the row's text


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
                f"{number_of(self.rows, 'sound row')} in {files or 'no file'}, "
                f"{number_of(len(self.defects), 'defect')}",
            ]
        )


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
            f'{name}: {number_of(count, "row")} left out (data.bad_rows = "drop"), first {first}'
            for name, (count, first) in self.dropped.items()
        ]
        for name, counts in self.unread.items():
            fields = ", ".join(
                f"{printable(k)} ({number_of(n, 'row')})" for k, n in counts.most_common(12)
            )
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
                unread.update(getattr(made, "unread", ()))
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
    return Defect(name, line, column, _field(path), printable(reason), printable(fix))


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


def _field(path: tuple[str | int, ...]) -> str:
    """('conversations', 3, 'value') -> 'conversations[3].value'"""
    steps = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    return printable(steps.lstrip("."))


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
            yield tables.RowPlace(number), (("text", text),)


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
