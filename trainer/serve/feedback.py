"""What people think of answers, written as rows that `data.files` takes.

Three files of one folder: `feedback.jsonl` has answers that were liked or written anew (messages,
for sft); `feedback.pairs.jsonl` a better and a worse answer to one prompt (chosen and rejected, for
dpo); `feedback.labels.jsonl` an answer and whether it was liked (label, for kto). A later judgement
replaces an earlier one of the same answer, so that no row contradicts another.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from trainer.serve.requests import RequestError, messages_of

ROWS, PAIRS, LABELS = "feedback.jsonl", "feedback.pairs.jsonl", "feedback.labels.jsonl"
GONE = "gone"  # in a row that takes back what was said before
Row = dict[str, Any]


def rows_of(body: Any) -> dict[str, Row]:
    """The row for each file of {"messages": [...], "answer": text} with "liked": bool, "edited":
    text, or "worse": text (an answer to which `answer` was preferred). Raises RequestError."""
    if not isinstance(body, dict):
        raise RequestError("the body is not a JSON object")
    unknown = sorted(set(body) - {"messages", "answer", "liked", "edited", "worse"})
    if unknown:
        raise RequestError(f"{unknown[0][:100]} is not known here", unknown[0][:100])
    messages, liked = messages_of(body.get("messages")), body.get("liked")
    answer, edited, worse = (_answer(body, name) for name in ("answer", "edited", "worse"))
    if answer is None or sum(x is not None for x in (liked, edited, worse)) != 1:
        raise RequestError("give an answer and one of liked, edited, worse")
    if liked is not None:
        if not isinstance(liked, bool):
            raise RequestError("liked is not true or false", "liked")
        row: Row = {"messages": [*messages, answer]}
        return {ROWS: row | ({} if liked else {GONE: True}), LABELS: row | {"label": liked}}
    better, lesser = (edited, answer) if edited else (answer, worse)
    if better and lesser and better["content"].strip() == lesser["content"].strip():
        raise RequestError("the two answers are equal")
    pair = {"prompt": messages, "chosen": [better], "rejected": [lesser]}
    return ({ROWS: {"messages": [*messages, edited]}} if edited else {}) | {PAIRS: pair}


def _answer(body: Row, name: str) -> Row | None:
    text = body.get(name)
    if text is None:
        return None
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"{name} is not a text", name)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} holds half a character (a lone surrogate)", name) from None
    return {"role": "assistant", "content": text}


def _about(row: Any) -> str:
    """What a row judges: two rows of one file that judge the same are one."""
    if not isinstance(row, dict):
        return json.dumps(row)
    sides = sorted(json.dumps(row.get(side)) for side in ("chosen", "rejected"))
    return json.dumps([row.get("messages"), row.get("prompt"), sides])


class Feedback:
    """The files of `folder`, which is made when there is a row; from any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._lock = folder, threading.Lock()

    def add(self, rows: dict[str, Row]) -> list[str]:
        """The names of the files that have a row of this judgement now."""
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name, row in rows.items():
                self._put(self.folder / name, row)
        return [name for name, row in rows.items() if GONE not in row]

    def _put(self, path: Path, row: Row) -> None:
        before = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        about = _about({k: v for k, v in row.items() if k != GONE})
        kept = [line if line.endswith(b"\n") else line + b"\n" for line in before]
        kept = [line for line in kept if _read(line) != about]
        if GONE not in row:
            kept.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        part = path.with_suffix(".part")
        part.touch(0o600)
        part.write_bytes(b"".join(kept))
        part.replace(path)


def _read(line: bytes) -> str:
    try:
        return _about(json.loads(line))
    except ValueError:
        return ""
