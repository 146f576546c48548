"""Which files a job names, and how each is read: by itself, or by a dataset_info.json."""

from __future__ import annotations

import json
import shlex
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.data import scan, tables
from trainer.data.folders import DATASET_INFO, expand, is_file, kind_of
from trainer.data.formats import Columns


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
                Defect(name, 1, 1, printable(key), f"{wrong[0]} is of another kind", fix)
            )
            continue
        file = path.parent / entry["file_name"]
        if not _within(file, path.parent):
            reason = f"{entry['file_name']!r:.200} lies outside the folder of {DATASET_INFO}"
            fix = "copy the file beside it, or name it in data.files yourself"
            defects.append(Defect(name, 1, 1, printable(key), printable(reason), fix))
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


def printable(text: str) -> str:
    """What no terminal can show, or what would move its cursor, is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
