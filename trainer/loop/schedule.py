"""Learning rates by transformers' definitions, as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, peak: float, kind: str, warmup_ratio: float) -> float:
    """The rate of optimizer step `step` (from 0) of `total`: linear warm-up over ceil(ratio *
    total) steps, then `kind`.

    The same numbers as transformers' get_linear/cosine/constant_schedule_with_warmup (the first
    warm-up step has rate 0), except that a run of one step is not spent on warming up."""
    warmup = math.ceil(warmup_ratio * total) if total > 1 else 0
    if step < warmup:
        return peak * step / max(1, warmup)
    done = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return peak * max(0.0, 1.0 - done)
    if kind == "cosine":
        return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    return peak
