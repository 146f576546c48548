"""Learning rates by transformers' definitions, as a pure function of the step."""

from __future__ import annotations

import math

from trainer.wire.job import Training


def learning_rate(step: int, total: int, training: Training) -> float:
    """The rate of optimizer step `step` (from 0) of `total`: linear warm-up over `warmup_steps` or
    ceil(warmup_ratio * total) steps, then a fall by `lr_scheduler_type` to `min_lr_rate` of the
    peak; "warmup_stable_decay" holds the peak before the last ceil(decay_ratio * total) steps, and
    falls as a cosine.

    The same numbers as transformers' schedules of these names (the first warm-up step has rate 0),
    except that a run of one step is not spent on warming up."""
    peak, kind, floor = training.learning_rate, training.lr_scheduler_type, training.min_lr_rate
    warmup = training.warmup_steps
    if warmup is None:
        warmup = math.ceil(training.warmup_ratio * total)
    warmup = warmup if total > 1 else 0
    if step < warmup:
        return peak * step / max(1, warmup)
    begin = warmup
    if kind == "warmup_stable_decay":
        begin = max(warmup, total - math.ceil(training.decay_ratio * total))
    done = min(1.0, max(0, step - begin) / max(1, total - begin))
    left = 1.0
    if kind == "linear":
        left = max(0.0, 1.0 - done)
    elif kind != "constant":
        left = max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    return peak * (floor + (1.0 - floor) * left)
