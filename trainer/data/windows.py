"""Documents for pre-training: cut into windows that hold every token once, their end trained once.

A document is one text: a line of a .txt file, or the `text` of a row. Each window begins with the
ids that the tokenizer puts before a text (Llama's <s>); the last alone ends in the end token.
Nothing is dropped. Conversations may stand among the texts: they are trained as fine-tuning does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.data.errors import InvalidJob
from trainer.data.files import read_rows
from trainer.data.formats import Row
from trainer.data.prepare import Reader
from trainer.data.template import Template
from trainer.data.tokenised import AT_ONCE, Rows, tokenise
from trainer.data.tokens import Vocabulary
from trainer.wire.job import Job

BREAKS = ("\n", "。！？.!?")  # a window rather ends after these, the first ones first
LOOK_BACK = 8  # that part of a window, at its end, is searched for a break


def windows(ends: Sequence[int], text: str, room: int, overlap: int) -> list[tuple[int, int, int]]:
    """(first token that it repeats, first of its own, the one after its last) of each window.
    `ends` is where each token of `text` ends, `room` the tokens that a window holds."""
    found, begin = [], 0
    while begin < len(ends):
        low = max(0, begin - overlap)
        end = min(len(ends), low + room)
        if end < len(ends):
            end = _break(ends, text, end, max(begin + 1, end - room // LOOK_BACK))
        found.append((low, begin, end))
        begin = end
    return found


def _break(ends: Sequence[int], text: str, end: int, least: int) -> int:
    """Where a window that may hold tokens before `end` rather ends; not before `least`."""
    for marks in BREAKS:
        for at in range(end, least - 1, -1):
            if text[ends[at - 1] - 1] in marks:
                return at
    return end


def tokenise_documents(
    found: Sequence[Row], vocabulary: Vocabulary, template: Template, job: Job
) -> Rows:
    """Texts as windows, conversations as they are. `extra["bytes"]` are the bytes of UTF-8 that a
    row's targets stand for, `extra["document"]` the number of its document. Raises InvalidJob for
    texts that hold a special token, and for what tokenised.tokenise refuses."""
    most, chats = job.data.max_length, [row for row in found if row.turns]
    texts = [row for row in found if not row.turns]
    parts = _Parts()
    eos = vocabulary.id_of(vocabulary.eos)
    assert eos is not None, "open_vocabulary refuses a tokenizer without an end token"
    prefix = list(vocabulary.prefix)
    # without an id before it nothing predicts a window's first token: the one before is repeated
    overlap = job.pt.overlap if prefix else max(1, job.pt.overlap)
    room = most - len(prefix) - 1  # one for the end token
    if room <= 2 * overlap:
        raise InvalidJob(
            f"windows of {most} tokens leave no room beside pt.overlap = {overlap}",
            hint="raise data.max_length, or lower pt.overlap",
        )
    faults = [f"{row.where}: {fault}" for row in texts if (fault := _fault(row, vocabulary))]
    if faults:
        raise InvalidJob(f"{len(faults)} texts cannot be trained on", faults, "mend the rows above")
    for start in range(0, len(texts), AT_ONCE):
        group = texts[start : start + AT_ONCE]
        codings = vocabulary.tokenizer.encode_batch(
            [row.text for row in group], add_special_tokens=False
        )
        for row, coding in zip(group, codings, strict=True):
            ends = [b for _, b in coding.offsets]
            cuts = windows(ends, row.text, room, overlap)
            if not cuts:
                raise InvalidJob(f"{row.where}: the tokenizer makes no token of this text")
            for low, begin, end in cuts:
                last = [eos] if end == len(ends) else []
                own = row.text[ends[begin - 1] if begin else 0 : ends[end - 1]]
                marks = [False] * (len(prefix) + begin - low) + [True] * (end - begin + len(last))
                ids = [*prefix, *coding.ids[low:end], *last]
                parts.add(ids, marks, row.where, len(own.encode()))
            parts.document(len(cuts))
    rows = parts.rows(len(texts))
    if not chats:
        return rows
    talked = tokenise(chats, vocabulary, template, job.data)
    return _joined(rows, talked, vocabulary, len(texts))


def _fault(row: Row, vocabulary: Vocabulary) -> str:
    for special in vocabulary.special_texts:
        if len(special) > 2 and special in row.text:
            return (
                f"holds the text {special!r}, which this tokenizer reads as a special token: "
                "write it otherwise"
            )
    return ""


class _Parts:
    """Windows while they are collected."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = [np.zeros(0, np.int32)]
        self.marks: list[np.ndarray] = [np.zeros(0, np.bool_)]
        self.where: list[str] = []
        self.bytes: list[int] = []
        self.numbers: list[int] = []
        self.cut = 0  # documents of several windows

    def add(self, ids: list[int], marks: list[bool], where: str, size: int) -> None:
        self.ids.append(np.asarray(ids, np.int32))
        self.marks.append(np.asarray(marks, np.bool_))
        self.where.append(where)
        self.bytes.append(size)

    def document(self, count: int) -> None:
        self.numbers += [(self.numbers[-1] + 1 if self.numbers else 0)] * count
        self.cut += count > 1

    def rows(self, texts: int) -> Rows:
        lengths = [len(i) for i in self.ids[1:]]
        summary = []
        if self.cut:
            summary.append(
                f"{self.cut} of {texts} texts are longer than a window: {texts} texts became "
                f"{len(lengths)} windows, no token is left out"
            )
        return Rows(
            np.concatenate(self.ids),
            np.concatenate(self.marks),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.zeros(len(lengths), np.bool_),
            self.where,
            summary=summary,
            extra={
                "bytes": np.asarray(self.bytes, np.int64),
                "document": np.asarray(self.numbers, np.int64),
            },
        )


def _joined(texts: Rows, chats: Rows, vocabulary: Vocabulary, documents: int) -> Rows:
    """Both, the texts first."""
    sizes = [
        len(vocabulary.tokenizer.decode(ids[marks].tolist()).encode())
        for ids, marks in zip(
            np.split(chats.ids, chats.starts[1:-1]),
            np.split(chats.trained, chats.starts[1:-1]),
            strict=True,
        )
    ]
    extra = {
        "bytes": np.concatenate([texts.extra["bytes"], np.asarray(sizes, np.int64)]),
        "document": np.concatenate(
            [texts.extra["document"], documents + np.arange(len(chats), dtype=np.int64)]
        ),
    }
    return Rows(
        np.concatenate([texts.ids, chats.ids]),
        np.concatenate([texts.trained, chats.trained]),
        np.concatenate([texts.starts, texts.starts[-1] + chats.starts[1:]]),
        np.concatenate([texts.prompted, chats.prompted]),
        [*texts.where, *chats.where],
        [*texts.notes, *chats.notes],
        [*texts.summary, *chats.summary],
        chats.thinking,
        extra,
    )


DOCUMENTS = Reader("documents", read_rows, tokenise_documents)
