"""Held-out questions, answered greedily by the base model and by the trained one.

An answer may become as long as the expected one. Where that is short, the two must be the same;
longer ones are compared by chrF, because two good long answers never are the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.data.files import read_rows
from trainer.data.formats import Row
from trainer.data.prepare import Prepared, prompt_ids, reading_of
from trainer.eval.metrics import chrf
from trainer.model.decode import AT_ONCE, generate
from trainer.wire.job import Job

ROWS, SHOWN = 200, 4
SECONDS = 30.0  # a rented card costs by the second
SHORT = 32  # tokens of an answer that may be asked to be the same
LONGEST = 512  # tokens of an answer that are decoded, and compared
ROOM = 8  # tokens beyond the expected ones, for other ways to cut the same text


@dataclass
class Scored:
    """`exact`: of `rows` rows with short answers, the share that is the same, before and after, 0
    to 1. `chrf`: of `long_rows` rows with longer ones, before and after, 0 to 100. A few answers to
    show."""

    rows: int = 0
    exact: tuple[float, float] = (0.0, 0.0)
    long_rows: int = 0
    chrf: tuple[float, float] = (0.0, 0.0)
    samples: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """A held-out row, the answer that is expected of it (as far as it is compared), its tokens, and
    how many may be decoded."""

    row: Row
    expected: str
    tokens: int
    room: int

    @property
    def short(self) -> bool:
        return self.tokens <= SHORT and not self.row.turns[-1].reasoning


def questions(rows: Sequence[Row], data: Prepared) -> list[Question]:
    """The first ROWS rows that have an answer."""
    tokenizer, found = data.vocabulary.tokenizer, []
    for row in [r for r in rows if r.turns and r.turns[-1].text.strip()][:ROWS]:
        last = row.turns[-1]
        text = "\n".join(part for part in (last.reasoning.strip(), last.text.strip()) if part)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) > LONGEST:
            text = tokenizer.decode(ids[:LONGEST], skip_special_tokens=True).strip()
        found.append(Question(row, text, len(ids), min(len(ids) + ROOM, LONGEST)))
    return found


def answers(
    model: Any, asked: Sequence[Question], data: Prepared, device: torch.device
) -> list[str]:
    """Greedy answers, each of at most as many tokens as its question has room for."""
    prompts = [prompt_ids(data, q.row.turns[:-1], q.row.tools) for q in asked]
    room = max(question.room for question in asked)
    found = []
    for question, made in zip(
        asked, generate(model, prompts, {data.stop_id}, device, room), strict=True
    ):
        ids = (made.ids[:-1] if made.ended else made.ids)[: question.room]
        found.append(data.vocabulary.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return found


def held_out(model: Any, job: Job, run: Path, data: Prepared, device: torch.device) -> Scored:
    """Rows of data.held_out, in order, as many as SECONDS allow and at most ROWS; `before` is the
    same model with its adapter switched off (only an adapter can be)."""
    if job.data.held_out is None:
        return Scored()
    file = (run / job.data.held_out.path, job.data.held_out.name)
    asked = questions(read_rows([file], reading_of(job.data))[0], data)
    before: list[str] = []
    after: list[str] = []
    began, adapts = time.monotonic(), hasattr(model, "disable_adapter")
    while len(after) < len(asked) and time.monotonic() - began < SECONDS:
        some = asked[len(after) : len(after) + AT_ONCE]
        after += answers(model, some, data, device)
        with model.disable_adapter() if adapts else nullcontext():
            before += answers(model, some, data, device) if adapts else [""] * len(some)
    return scored(asked[: len(after)], before, after)


def scored(asked: Sequence[Question], before: Sequence[str], after: Sequence[str]) -> Scored:
    """How near both sides' answers are to what is expected."""
    short = [n for n, question in enumerate(asked) if question.short]
    long = [n for n, question in enumerate(asked) if not question.short]

    def same(found: Sequence[str]) -> float:
        return sum(found[n] == asked[n].expected for n in short) / max(1, len(short))

    def alike(found: Sequence[str]) -> float:
        return chrf([found[n] for n in long], [asked[n].expected for n in long])

    samples = [_shown(*each) for each in zip(asked[:SHOWN], before, after, strict=False)]
    return Scored(
        len(short), (same(before), same(after)), len(long), (alike(before), alike(after)), samples
    )


def _shown(question: Question, before: str, after: str) -> dict[str, str]:
    turn = question.row.turns[-2]
    prompt = "\n".join(part for part in (turn.text, turn.extra) if part)
    return {"prompt": prompt, "expected": question.expected, "before": before, "after": after}
