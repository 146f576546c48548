"""Rows that a job holds out by itself, and how often they are looked at. Pure.

Which rows are held out follows from what they say, not from where they stand: a row stays on its
side when others are added, and equal rows are all on one side.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.wire.job import Training

MOST_ROWS = 200  # held out, and looked at while it trains
LEAST_ROWS = 100  # a job with fewer rows trains on all of them
COST = 0.02  # of the training's computation, that looking at them may take
MOST_LOOKS = 20
FORWARD = 1 / 3  # what a forward pass costs of a token's training


def identity(row: Any) -> int:
    """64 bits of all that a row says, without its place; `row` is what a Reader makes (a
    NamedTuple with `where`)."""
    said = repr(tuple(value for name, value in row._asdict().items() if name in SAID))
    return int.from_bytes(hashlib.sha256(said.encode("utf-8", "replace")).digest()[:8])


# of formats.Row, pairs.Pair and pairs.Tagged: not where they stand, nor which fields nobody reads
SAID = ("turns", "text", "tools", "chosen", "rejected", "margin", "wanted")


def split(found: Sequence[Any], share: float) -> tuple[list[Any], list[Any], str]:
    """(rows to train on, rows held out, a line about them): about `share` of the rows, those of the
    smallest identities, at most MOST_ROWS that differ; none of fewer than LEAST_ROWS."""
    if not share:
        return list(found), [], ""
    known = [identity(row) for row in found]
    distinct = sorted(set(known))
    if len(distinct) < LEAST_ROWS:
        few = f"{len(distinct):,} different rows are too few to hold some out: all are trained on"
        return list(found), [], few
    out = set([number for number in distinct if number < share * 2**64][:MOST_ROWS])
    held, seen = [], set[int]()
    for row, number in zip(found, known, strict=True):
        if number in out and number not in seen:
            seen.add(number)
            held.append(row)
    kept = [row for row, number in zip(found, known, strict=True) if number not in out]
    again = len(found) - len(kept) - len(held)
    more = f", and {again:,} that say the same" if again else ""
    line = (
        f"{len(held):,} of {len(found):,} rows are held out{more}, never trained on, and measured "
        'instead; data.held_out = "none" trains on all'
    )
    return kept, held, line


def in_both(held: Sequence[Any], found: Sequence[Any]) -> str:
    """A line about held-out rows that are trained on too; empty without any."""
    trained = {identity(row) for row in found}
    both = sum(identity(row) in trained for row in held)
    if not both:
        return ""
    return (
        f"{both:,} of {len(held):,} held-out rows are among the rows to train on: what they show "
        "is memory"
    )


@dataclass(frozen=True)
class Looks:
    """When the held-out rows are measured: before the first step, after the last and, unless
    `every` is 0, each time that so many steps are done. `cost` is their share of the training's
    computation."""

    every: int
    count: int
    cost: float

    @property
    def words(self) -> str:
        often = f"every {self.every:,} steps" if self.every else "before and after the training"
        times = f"{self.count} times, about {self.cost:.1%} of the training's work"
        return f"the held-out rows are measured {often}: {times}"


def looks(training: Training, steps: int, trained_tokens: float, held_tokens: int) -> Looks:
    """Of a run of `steps` steps over `trained_tokens`. Where training.eval_steps is left out, as
    often as COST allows, and at most MOST_LOOKS times."""
    every = training.eval_steps or 0
    if training.eval_steps is None:
        affordable = COST * trained_tokens / (FORWARD * max(1, held_tokens))
        between = min(MOST_LOOKS, int(affordable), steps)
        every = math.ceil(steps / between) if between else 0
    count = 2 + ((steps - 1) // every if every else 0)
    return Looks(every, count, count * FORWARD * held_tokens / max(1.0, trained_tokens))
