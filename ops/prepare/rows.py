"""The user's rows before a job: check, describe, pick. `trainer.data` reads and picks; this module
refuses what is not sound and writes files that did not exist.

A command that writes makes JSON lines, each row with the fields and values that it had, and beside
it `OUT.report.json`, which says why each other row was left out.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from ops.errors import ConfigError, PreflightError
from trainer.data import curate, records
from trainer.data.curate import By, Picked
from trainer.data.records import Dataset, Record
from trainer.data.sources import Reading
from trainer.data.stats import Stats
from trainer.data.stats import stats as stats_of
from trainer.wire.job import DataFormat

__all__ = [
    "FORMATS",
    "By",
    "Dataset",
    "RowsWritten",
    "Stats",
    "check",
    "dedupe",
    "reasons",
    "sample",
    "split",
]
FORMATS = (*get_args(DataFormat), "prompts")  # of rows; prompts are those that need no answer
_VARIES = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,]*")


@dataclass(frozen=True)
class RowsWritten:
    """What a command wrote: file -> rows in it; `report` names each row that was left out."""

    rows: int
    files: dict[str, int]
    removed: dict[str, int]  # reason -> rows
    report: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def check(files: Sequence[Path], reading: Reading | None = None) -> Dataset:
    """All that is wrong with the files, by the trainer's own reader."""
    return records.read(files, reading)


def reasons(found: Dataset) -> dict[str, int]:
    """How often each defect occurs, whatever names and numbers it is told with."""
    told = (_VARIES.sub("…", f"{defect.reason}") for defect in found.defects)
    return dict(Counter(told).most_common())


def stats(files: Sequence[Path], reading: Reading | None = None) -> tuple[Stats, Dataset]:
    """(the figures of the sound rows, what was read)."""
    found = records.read(files, reading)
    return stats_of(found.rows), found


def dedupe(
    files: Sequence[Path],
    reading: Reading | None = None,
    *,
    near: float | None = 0.7,
    against: Sequence[Path] = (),
    to: Path | None = None,
    force: bool = False,
) -> RowsWritten:
    """Writes the rows that repeat no other, and none of `against`. Raises PreflightError for rows
    that are not sound, ConfigError for a file that exists."""
    outputs = outputs_of(files, {"deduped": to}, force)
    found = sound(files, reading)
    rows, notes = found.rows, found.notes
    others = sound(against, reading).rows if against else []
    settings = {"near": near, "against": [str(p) for p in against]}
    picked = _picked(lambda: curate.dedupe(rows, near, others))
    return write("dedupe", rows, picked, outputs, settings, notes)


def sample(
    files: Sequence[Path],
    reading: Reading | None = None,
    *,
    max_characters: int | None = None,
    max_rows: int | None = None,
    by: By = "spread",
    seed: int = 42,
    to: Path | None = None,
    force: bool = False,
) -> RowsWritten:
    """Writes rows of at most so many characters and so many in number. Raises as `dedupe`."""
    outputs = outputs_of(files, {"sample": to}, force)
    found = sound(files, reading)
    rows, notes = found.rows, found.notes
    settings = {"max_characters": max_characters, "max_rows": max_rows, "by": by, "seed": seed}
    picked = _picked(lambda: curate.sample(rows, max_characters, max_rows, by, seed))
    return write("sample", rows, picked, outputs, settings, notes)


def split(
    files: Sequence[Path],
    reading: Reading | None = None,
    *,
    held_out: float,
    seed: int = 42,
    near: float | None = 0.7,
    to: Path | None = None,
    held_to: Path | None = None,
    force: bool = False,
) -> RowsWritten:
    """Writes rows to train on and rows to hold out, in two files. Raises as `dedupe`."""
    outputs = outputs_of(files, {"train": to, "held_out": held_to}, force)
    found = sound(files, reading)
    rows, notes = found.rows, found.notes
    settings = {"held_out": held_out, "seed": seed, "near": near}
    picked = _picked(lambda: curate.split(rows, held_out, seed, near))
    return write("split", rows, picked, outputs, settings, notes)


def _picked(pick: Any) -> Picked:
    try:
        made = pick()
    except ValueError as e:
        raise ConfigError(str(e), hint="see --help") from e
    assert isinstance(made, Picked)
    return made


def sound(files: Sequence[Path], reading: Reading | None = None) -> Dataset:
    """What the files hold. Raises PreflightError for rows that are not sound, or none."""
    found = records.read(files, reading)
    if found.defects:
        raise PreflightError(
            f"{len(found.defects):,} defects, the first: {found.defects[0]}",
            hint="`milktea data check FILE` tells all; --drop-bad leaves such rows out",
        )
    if not found.rows:
        raise PreflightError("the files hold no row", hint="milktea data check FILE")
    return found


def outputs_of(files: Sequence[Path], named: Mapping[str, Path | None], force: bool) -> list[Path]:
    """The files to write; beside the first of `files` where no name is given. Raises ConfigError
    where one exists, or is one of those that are read."""
    first = files[0]
    stem = first.name.removesuffix(".gz")
    stem = Path(stem).stem if first.is_file() else stem
    found = [path or first.parent / f"{stem}.{name}.jsonl" for name, path in named.items()]
    given = {path.resolve() for path in files}
    if len({path.resolve() for path in found}) < len(found):
        raise ConfigError("both outputs are one file", hint="name two with --to and --held-to")
    for path in [*found, report_of(found[0])]:
        if path.resolve() in given:
            raise ConfigError(f"{path} is read: it cannot be written", hint="name another file")
        if path.exists() and not force:
            raise ConfigError(f"{path} exists", hint="name another with --to, or add --force")
    return found


def report_of(path: Path) -> Path:
    return path.with_name(path.name + ".report.json")


def write(
    word: str,
    rows: Sequence[Record],
    picked: Picked,
    outputs: Sequence[Path],
    settings: Mapping[str, Any],
    notes: Sequence[str],
    more: Mapping[str, Any] | None = None,
) -> RowsWritten:
    """Writes what was picked, and the report beside the first file; `more` stands in it too."""
    parts = [picked.rows, picked.held][: len(outputs)]
    for path, part in zip(outputs, parts, strict=True):
        _replace(path, "".join(f"{row.line}\n" for row in part))
    report = report_of(outputs[0])
    counts = {str(path): len(part) for path, part in zip(outputs, parts, strict=True)}
    told = {"word": word, "settings": dict(settings), "rows": len(rows), "files": counts}
    left = [{k: v for k, v in asdict(r).items() if v not in ("", None)} for r in picked.removed]
    whole = told | dict(more or {}) | {"notes": list(notes), "removed": left}
    _replace(report, json.dumps(whole, ensure_ascii=False, indent=1) + "\n")
    removed = dict(Counter(r.reason for r in picked.removed).most_common())
    return RowsWritten(len(rows), counts, removed, str(report))


def _replace(path: Path, text: str) -> None:
    """Writes the file whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    except OSError as error:  # a write says no file, and the reader knows no temporary one
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
