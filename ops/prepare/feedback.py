"""What people thought of answers, as rows to train on: what the page's thumbs, edits and votes and
what `/save` in a chat wrote becomes answers for sft and pairs for dpo."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ops.errors import PreflightError
from ops.prepare.rows import RowsWritten, outputs_of, write
from trainer.data import formats
from trainer.data.curate import Picked, Removed
from trainer.data.formats import Columns, Row
from trainer.data.pairs import Pair, pair_of
from trainer.data.records import Record

NAMES = ("feedback.jsonl", "feedback.pairs.jsonl", "feedback.labels.jsonl")
_LARGEST = 64 << 20  # bytes of a file


def feedback(places: Sequence[Path], *, to: Path | None = None, force: bool = False) -> RowsWritten:
    """Writes `TO.sft.jsonl` and `TO.dpo.jsonl` (feedback, in the first folder, without `to`) from
    folders that hold such files, and from files that `/save` wrote. A file without a row is not
    written. An answer that somebody disliked is in no row of sft; beside one that was liked, to the
    same question, it makes a pair. Raises PreflightError where there is nothing."""
    files = [file for place in places for file in _files_of(place)]
    if not files:
        what = f"no {', '.join(NAMES)} in {', '.join(map(str, places))}"
        raise PreflightError(what, hint="name the folder beside the adapter, or a file of /save")
    stem = to or files[0].parent / "feedback"
    named = {word: stem.with_name(f"{stem.name}.{word}.jsonl") for word in ("sft", "dpo")}
    outputs = outputs_of(files, named, force)
    gathered = _Gathered()
    for file in files:
        for where, line in _lines(file):
            gathered.take(where, line)
    parts = [gathered.answers(), gathered.pairs()]
    if not any(parts):
        raise PreflightError("there is no row in these files", hint=str(files[0]))
    kept = [(path, part) for path, part in zip(outputs, parts, strict=True) if part]
    rows = [part for _, part in kept]
    picked = Picked(rows[0], rows[1] if len(rows) > 1 else [], gathered.removed)
    settings = {"files": [str(file) for file in files]}
    read = [record for part in parts for record in part]
    return write("feedback", read, picked, [path for path, _ in kept], settings, [])


def _files_of(place: Path) -> list[Path]:
    if place.is_dir():
        return [place / name for name in NAMES if (place / name).is_file()]
    return [place] if place.is_file() else []


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    if file.stat().st_size > _LARGEST:
        raise PreflightError(f"{file} is larger than {_LARGEST >> 20} MiB", hint="split it")
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line.strip():
            yield f"{file}:{number}", line


class _Gathered:
    """Rows by what they say, so that equal ones are one."""

    def __init__(self) -> None:
        self.removed: list[Removed] = []
        self._answers: dict[str, tuple[str, dict[str, Any]]] = {}
        self._pairs: dict[str, tuple[str, dict[str, Any]]] = {}
        self._judged: dict[str, dict[bool, dict[str, Any]]] = {}  # of a question

    def take(self, where: str, line: bytes) -> None:
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is no object")
            self._sort(where, row)
        except (ValueError, RecursionError) as e:
            self.removed.append(Removed(where, f"no sound row: {e}"))

    def _sort(self, where: str, row: dict[str, Any]) -> None:
        if "chosen" in row:
            self._pairs.setdefault(_key(row), (where, _sound_pair(row)))
            return
        label = row.pop("label", None)
        sound = _sound_answer(row)
        if label is None or label is True:
            self._answers.setdefault(_key(row), (where, sound))
        if isinstance(label, bool):
            said = self._judged.setdefault(_key(row["messages"][:-1]), {})
            said.setdefault(label, {**sound, "where": where})

    def answers(self) -> list[Record]:
        """Answers that nobody disliked."""
        bad = {
            _key({"messages": said[False]["messages"]})
            for said in self._judged.values()
            if False in said
        }
        found = []
        for where, row in self._answers.values():
            if _key({"messages": row["messages"]}) in bad:
                self.removed.append(Removed(where, "somebody disliked it"))
            else:
                found.append(_record(where, row))
        return found

    def pairs(self) -> list[Record]:
        """Pairs as they were voted, and those that two judgements of one question make; none that
        says the opposite of an earlier one."""
        rows = list(self._pairs.values())
        for said in self._judged.values():
            if len(said) == 2:
                liked, other = said[True]["messages"], said[False]["messages"]
                made = {"prompt": liked[:-1], "chosen": liked[-1:], "rejected": other[-1:]}
                rows.append((said[True]["where"], made))
        found, seen = [], set[str]()
        for where, row in rows:
            if _key({**row, "chosen": row["rejected"], "rejected": row["chosen"]}) in seen:
                self.removed.append(Removed(where, "it says the opposite of an earlier pair"))
            elif _key(row) not in seen:
                seen.add(_key(row))
                found.append(_record(where, row))
        return found


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _tuples(row: dict[str, Any]) -> Any:
    return json.loads(json.dumps(row), object_pairs_hook=tuple)


def _sound_answer(row: dict[str, Any]) -> dict[str, Any]:
    """The row, where the trainer reads it as a conversation. Raises ValueError."""
    read = formats.problems_or_row(_tuples(row), "messages", Columns(), "")
    if not isinstance(read, Row):
        raise ValueError(read[0][1])
    return row


def _sound_pair(row: dict[str, Any]) -> dict[str, Any]:
    read = pair_of(dict(_tuples(row)), Columns(), "")
    if not isinstance(read, Pair):
        raise ValueError(read[0][1])
    return row


def _record(where: str, row: dict[str, Any]) -> Record:
    return Record(where, json.dumps(row, ensure_ascii=False), "", "", "", 0)
