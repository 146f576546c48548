"""The user's rows before a job: check, describe, pick. `trainer.data` reads and picks; this module
refuses what is not sound and writes files that did not exist.

A command that writes makes JSON lines, each row with the fields and values that it had, and beside
it `OUT.report.json`, which says why each other row was left out.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from tokenizers import Tokenizer

from ops.errors import ConfigError, PreflightError
from ops.job import hub
from ops.prepare.languages import NAMES, Language
from trainer.data import convert as conversion
from trainer.data import curate, quality, records
from trainer.data.curate import By, Picked
from trainer.data.mistakes import grouped
from trainer.data.quality import Found
from trainer.data.records import Dataset, Record
from trainer.data.sources import Reading
from trainer.data.stats import Stats
from trainer.data.stats import stats as stats_of
from trainer.data.words import number_of
from trainer.wire.job import DataFormat

__all__ = [
    "FORMATS",
    "By",
    "Dataset",
    "Found",
    "RowsWritten",
    "Stats",
    "check",
    "check_words",
    "convert",
    "dedupe",
    "drop",
    "grouped",
    "looked_at",
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


def looked_at(found: Dataset, rules: str = "all", language: str = "") -> list[Found]:
    """What the rules of quality find among the sound rows; `rules` are names with commas, "all" or
    "none". Raises ConfigError for a name that is none."""
    if language and language not in NAMES:
        raise ConfigError(f"--language {language!r} is none", hint=f"one of {', '.join(NAMES)}")
    names = _rules(rules, bool(language))
    scripts = Language(language).scripts if quality.LANGUAGE in names else ()
    return quality.judge(found.rows, names, scripts)


def _rules(names: str, with_language: bool) -> list[str]:
    known = [*quality.RULES, *([quality.LANGUAGE] if with_language else [])]
    if names in ("all", "none"):
        return known if names == "all" else []
    found = [name.strip() for name in names.split(",")]
    if wrong := [name for name in found if name not in known]:
        more = "" if with_language else f", and {quality.LANGUAGE} with --language zh"
        raise ConfigError(f"{wrong[0]!r} is no rule", hint=f"all, {', '.join(known)}{more}")
    return found


def drop(
    files: Sequence[Path],
    reading: Reading | None = None,
    *,
    rules: str = "all",
    language: str = "",
    to: Path | None = None,
    force: bool = False,
) -> RowsWritten:
    """Writes the rows in which none of the rules finds anything. Raises as `dedupe`."""
    outputs = outputs_of(files, {"checked": to}, force)
    found = sound(files, reading)
    why: dict[str, str] = {}
    for one in looked_at(found, rules, language):
        for where, _ in one.rows:
            why.setdefault(where, one.rule)
    kept = [row for row in found.rows if row.where not in why]
    picked = Picked(kept, removed=[curate.Removed(where, rule) for where, rule in why.items()])
    settings = {"rules": rules, "language": language}
    return write("check", found.rows, picked, outputs, settings, found.notes)


def convert(
    files: Sequence[Path],
    layout: str,
    reading: Reading | None = None,
    *,
    to: Path | None = None,
    force: bool = False,
) -> RowsWritten:
    """Writes the rows in another layout; what it cannot hold whole is left out and listed. Raises
    as `dedupe`."""
    known = [one for one in conversion.LAYOUTS if one == layout]
    if not known:
        hint = f"one of {', '.join(conversion.LAYOUTS)}"
        raise ConfigError(f"--to {layout!r} is no layout", hint=hint)
    outputs = outputs_of(files, {layout: to}, force)
    found = sound(files, reading)
    picked = Picked([])
    for row in found.rows:
        name = row.where.rpartition(":")[0]
        kind, _, form = found.files[name]
        try:
            made = conversion.converted(row.line, kind, form, found.columns[name], known[0])
        except conversion.Unfit as e:
            picked.removed.append(curate.Removed(row.where, str(e)))
            continue
        picked.rows.append(row._replace(line=json.dumps(made, ensure_ascii=False)))
    return write("convert", found.rows, picked, outputs, {"to": layout}, found.notes)


def stats(
    files: Sequence[Path], reading: Reading | None = None, tokenizer: str = ""
) -> tuple[Stats, Dataset]:
    """(the figures of the sound rows, what was read). `tokenizer` is a model's folder or its id on
    the hub. Raises PreflightError where it cannot be had."""
    opened = _tokenizer(tokenizer) if tokenizer else None
    found = records.read(files, reading)
    return stats_of(found.rows, opened), found


def _tokenizer(base: str) -> Tokenizer:
    path = Path(base) / "tokenizer.json"
    try:
        if not Path(base).is_dir():
            path = hub.file(base, "tokenizer.json")
        return Tokenizer.from_str(path.read_text("utf-8"))
    except Exception as e:  # a tokenizer that is none is a bare Exception
        what = f"the tokenizer of {base} cannot be had: {str(e).splitlines()[0][:200]}"
        raise PreflightError(what, hint="--tokenizer FOLDER, one with tokenizer.json") from e


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
            f"{number_of(len(found.defects), 'defect')}, the first: {found.defects[0]}",
            hint=f"`{check_words(files, reading)}` tells all; --drop-bad leaves such rows out",
        )
    if not found.rows:
        raise PreflightError("the files hold no row", hint=f"`{check_words(files, reading)}`")
    return found


def check_words(files: Sequence[Path], reading: Reading | None = None) -> str:
    """The command that tells all that is wrong with these files."""
    reading = reading or Reading()
    columns = (f"--column {shlex.quote(f'{k}={v}')}" for k, v in reading.columns.items())
    form = [] if reading.form == "auto" else [f"--format {reading.form}"]
    named = (shlex.quote(str(path)) for path in files)
    return " ".join(["milktea data check", *named, *form, *columns])


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
    report = report_of(found[0])  # alone, it is what a process left that was killed as it wrote
    for path in [*found, report]:
        if path.resolve() in given:
            raise ConfigError(f"{path} is read: it cannot be written", hint="name another file")
        if path.exists() and not force and path != report:
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
    """Writes the report beside the first file, in which `more` stands too, and then what was
    picked: who finds the rows finds the report."""
    parts = [picked.rows, picked.held][: len(outputs)]
    report = report_of(outputs[0])
    counts = {str(path): len(part) for path, part in zip(outputs, parts, strict=True)}
    told = {"word": word, "settings": dict(settings), "rows": len(rows), "files": counts}
    left = [{k: v for k, v in asdict(r).items() if v not in ("", None)} for r in picked.removed]
    whole = told | dict(more or {}) | {"notes": list(notes), "removed": left}
    texts = {report: json.dumps(whole, ensure_ascii=False, indent=1) + "\n"}
    for path, part in zip(outputs, parts, strict=True):
        texts[path] = "".join(f"{row.line}\n" for row in part)
    _replace(texts)
    removed = dict(Counter(r.reason for r in picked.removed).most_common())
    return RowsWritten(len(rows), counts, removed, str(report))


def _replace(texts: Mapping[Path, str]) -> None:
    """Writes the files whole, in their order, or none of them where the disk is full."""
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in texts}
    path = next(iter(texts))
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            parts[path].write_text(text, "utf-8")
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as error:  # a write says no file, and the reader knows no temporary one
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
