"""Picks among rows: without repeats, a sample, a part to hold out. Pure; each says what became of
every row that it leaves out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from trainer.data import near as alike
from trainer.data.records import Record

By = Literal["cheapest", "spread"]
BINS = 10  # of lengths, from which `spread` takes in turn


@dataclass(frozen=True)
class Removed:
    """A row that is left out: its place, the reason, the row that it repeats, how like it is."""

    row: str
    reason: str
    of: str = ""
    likeness: float | None = None


@dataclass(frozen=True)
class Picked:
    """`rows` are kept, `held` is what `split` holds out; both in file order."""

    rows: list[Record]
    held: list[Record] = field(default_factory=list)
    removed: list[Removed] = field(default_factory=list)


def dedupe(
    rows: Sequence[Record], near: float | None = 0.7, against: Sequence[Record] = ()
) -> Picked:
    """The first of every set of rows that repeat each other. Equal: but for case and blanks. Near:
    question and answer each have `near` of their 5-grams in common, all numbers are the same;
    `near` None looks for equal ones only. Rows that repeat one of `against` go too. Raises
    ValueError for a `near` below 0.4 or above 1."""
    every = [*against, *rows]
    removed = []
    kept = []
    for at, (first, likeness) in enumerate(_originals(every, near)):
        if at < len(against):
            continue
        if first == at:
            kept.append(every[at])
            continue
        reason = "equal" if every[at].key == every[first].key else "near"
        if first < len(against):
            reason = f"{reason}, in the other file"
        removed.append(Removed(every[at].where, reason, every[first].where, round(likeness, 3)))
    return Picked(kept, removed=removed)


def sample(
    rows: Sequence[Record],
    max_characters: int | None = None,
    max_rows: int | None = None,
    by: By = "spread",
    seed: int = 42,
) -> Picked:
    """Rows of at most so many characters together, and so many in number. `cheapest` takes the
    shortest; `spread` takes in turn from ten bins of lengths, at random by `seed`, and passes over
    a row that would not fit any more."""
    order = sorted(range(len(rows)), key=lambda n: rows[n].characters)
    if by == "spread":
        bins = [order[len(order) * b // BINS : len(order) * (b + 1) // BINS] for b in range(BINS)]
        for number, some in enumerate(bins):
            random.Random(f"{seed}:{number}").shuffle(some)
        longest = max(map(len, bins))
        order = [some[n] for n in range(longest) for some in bins if n < len(some)]
    taken: set[int] = set()
    left = max_characters
    for n in order:
        if max_rows is not None and len(taken) >= max_rows:
            break
        if left is not None and rows[n].characters > left:
            continue
        left = None if left is None else left - rows[n].characters
        taken.add(n)
    removed = [Removed(row.where, "not sampled") for n, row in enumerate(rows) if n not in taken]
    return Picked([rows[n] for n in sorted(taken)], removed=removed)


def split(
    rows: Sequence[Record], held_out: float, seed: int = 42, near: float | None = 0.7
) -> Picked:
    """A share (below 1) or number of rows to hold out, at most so many. Which ones follows from a
    hash of what they say and `seed`, not from where they stand; rows that repeat each other
    (`dedupe`) are all on one side. Raises ValueError as `dedupe` does, and where nothing or
    everything would be held out."""
    wanted = int(held_out * len(rows)) if held_out < 1 else int(held_out)
    if not 0 < wanted < len(rows):
        raise ValueError(f"{wanted} of {len(rows)} rows cannot be held out")
    groups: dict[int, list[int]] = {}
    for at, (first, _) in enumerate(_originals(rows, near)):
        groups.setdefault(first, []).append(at)

    def drawn(members: list[int]) -> str:
        said = f"{seed}:{min(rows[n].key for n in members)}"
        return hashlib.sha256(said.encode()).hexdigest()

    held: set[int] = set()
    for members in sorted(groups.values(), key=drawn):
        if len(held) + len(members) <= wanted:
            held.update(members)
    if not held:
        raise ValueError(f"every row repeats others: no set of them has at most {wanted} rows")
    kept = [row for n, row in enumerate(rows) if n not in held]
    return Picked(kept, [rows[n] for n in sorted(held)])


def _originals(rows: Sequence[Record], near: float | None) -> list[tuple[int, float]]:
    """For each row (the first that it repeats, their likeness); a row that repeats none has its own
    place. Near ones are looked for among the first of the equal ones."""
    firsts: dict[str, int] = {}
    equal = [firsts.setdefault(row.key, n) for n, row in enumerate(rows)]
    found = [(first, 1.0) for first in equal]
    if near is None:
        return found
    different = sorted(firsts.values())
    texts = [(alike.normal(rows[n].question), alike.normal(rows[n].answer)) for n in different]
    labels = [f"{rows[n].label}\x00{rows[n].numbers}" for n in different]
    root: dict[int, tuple[int, float]] = {}
    for n, (first, likeness) in zip(different, alike.originals(texts, labels, near), strict=True):
        root[n] = (different[first], likeness)
    return [root[first] for first in equal]
