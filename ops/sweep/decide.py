"""Pure: how many dollars a run of a sweep may have, and which runs end early."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

LOSS_SETTINGS = ("rm.", "dpo.", "kto.")
RUNGS = (0.25, 0.5)  # shares of a training's steps at which held-out losses are compared


def cap_usd(
    free_usd: float, enough_usd: float, most_usd: float, waiting: int, live: int
) -> float | None:
    """Dollars for the next run: an even share of what is free for the `waiting` ones, and at most
    `most_usd`. A share that is not enough waits (None) for what `live` runs give back; where none
    is live, it is raised to what is enough, and is None where that is not there."""
    needed = min(enough_usd, most_usd)
    share = min(most_usd, free_usd / max(1, waiting))
    if share >= needed:
        return _floor(share)
    return None if live or free_usd < needed else _floor(needed)


def _floor(usd: float) -> float:
    """In hundredths of a cent, never more; what is less than one stays as it is."""
    return math.floor(usd * 1e4) / 1e4 or usd


def worse_half(losses: Mapping[int, float]) -> set[int]:
    """The numbers whose loss is not among the better half (of five, three); equal losses stand
    together. A loss that is no number is the worst."""
    ordered = {n: math.inf if math.isnan(loss) else loss for n, loss in losses.items()}
    kept = math.ceil(len(ordered) / 2)
    return {
        n for n, loss in ordered.items() if sum(other < loss for other in ordered.values()) >= kept
    }


def to_end(rungs: Mapping[int, Mapping[float, float]], live: Sequence[int]) -> dict[int, float]:
    """Of the `live` runs those to end early, each with the rung at which it lost. `rungs` has for
    every run its losses by rung; a run is compared at the last rung that it has reached, with every
    run that reached it, whatever became of it."""
    found = {}
    for number in live:
        reached = rungs.get(number, {})
        if reached:
            rung = max(reached)
            if number in worse_half({n: r[rung] for n, r in rungs.items() if rung in r}):
                found[number] = rung
    return found


def comparable(differing: Iterable[str]) -> bool:
    """Whether held-out losses of runs that differ in these settings (dotted keys) are of one kind;
    dpo.beta and the like say what the loss is."""
    return not any(name.startswith(LOSS_SETTINGS) for name in differing)


def reached(
    looks: Sequence[tuple[int, float]], total_steps: int, rungs: Sequence[float] = RUNGS
) -> dict[float, float]:
    """The loss at each rung: that of the first look (step, loss) at or after its share of the
    steps. A look at the last step is the training's end and no rung."""
    found = {}
    for rung in rungs:
        at = math.ceil(rung * total_steps)
        loss = next((v for s, v in looks if s > 0 and at <= s < total_steps), None)
        if loss is not None:
            found[rung] = loss
    return found
