"""Which rows form a step, which rank takes which, and how they are laid into micro-batches. Pure;
numpy only.

Everything follows from (seed, epoch, row number): not from the number of processes, nor from where
a run was resumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """The global order of `rows` rows: each epoch is one permutation, each step the next
    `batch_size` of it (the last one may be short)."""

    rows: int
    batch_size: int
    epochs: float
    seed: int
    max_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    @property
    def total_steps(self) -> int:
        wanted = max(1, math.ceil(self.epochs * self.steps_per_epoch - 1e-9))
        return wanted if self.max_steps is None else self.max_steps

    def step(self, step: int) -> list[int]:
        """Row numbers of optimizer step `step` (from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = self._permutation(epoch)
        return order[place * self.batch_size : (place + 1) * self.batch_size]

    def _permutation(self, epoch: int) -> list[int]:
        # the last permutation is cached: a million rows take a tenth of a second to shuffle. Two
        # threads read it, so it is assigned together with its epoch
        kept: tuple[int, list[int]] | None = getattr(self, "_kept", None)
        if kept is None or kept[0] != epoch:
            made = np.random.default_rng([self.seed, epoch]).permutation(self.rows).tolist()
            kept = (epoch, made)
            object.__setattr__(self, "_kept", kept)
        return kept[1]


def share(
    rows: Sequence[int], lengths: Sequence[int] | Mapping[int, int], ranks: int
) -> list[list[int]]:
    """Splits a step's rows over ranks so that token counts are level: longest first, each to the
    rank that has fewest tokens."""
    loads = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for row in sorted(rows, key=lambda r: (-lengths[r], r)):
        rank = min(range(ranks), key=lambda k: (loads[k], k))
        loads[rank] += lengths[row]
        shares[rank].append(row)
    return shares


def pack(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: micro-batches of at most `budget` tokens, a row longer than that alone.
    Deterministic."""
    bins: list[list[int]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda r: (-lengths[r], r)):
        fits = [(left, k) for k, left in enumerate(room) if left >= lengths[row]]
        if fits:
            _, k = min(fits)
            bins[k].append(row)
            room[k] -= lengths[row]
        else:
            bins.append([row])
            room.append(budget - lengths[row])
    return bins


def level(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """`pack`, and where it leaves one less than half full, as many micro-batches of like size: few
    tokens cost more each. Deterministic."""
    packs = pack(rows, lengths, budget)
    sizes = [sum(lengths[row] for row in part) for part in packs]
    if len(packs) < 2 or 2 * min(sizes) >= budget:
        return packs
    alike = share(rows, lengths, len(packs))
    most = max(sum(lengths[row] for row in part) for part in alike)
    return alike if most <= budget else packs


def pad(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Without packing: micro-batches of rows of similar length whose padded rectangle is at most
    `budget` tokens."""
    batches: list[list[int]] = []
    for row in sorted(rows, key=lambda r: (-lengths[r], r)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
