"""Pure: cards before Ampere (Turing, Volta), which lack bf16: what a job may compute in on them,
and what is said of it. Precisions fp16 and fp32 take them, nf4 and int8 where offer.gpu_name names
one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ops.errors import PreflightError
from ops.hardware import gpus
from ops.hardware.gpus import AMPERE, Gpu
from ops.job.job_file import JobFile
from trainer import memory

# images whose torch has code for Volta: those of CUDA 12.6
_FOR_VOLTA = re.compile(r"cu(da)?12\.?6")
TURING = 7.5


def named(job: JobFile) -> list[Gpu]:
    """The cards of offer.gpu_name that the table knows."""
    every = gpus.all_meant(job.offer.gpu_name)
    return [found for name in every if (found := gpus.find(name))]


def _all_old(job: JobFile) -> bool:
    cards = named(job)
    return bool(cards) and all(g.compute_capability < AMPERE for g in cards)


def least_capability(job: JobFile) -> float:
    """The compute capability that the job's precision and its image ask for."""
    asks = gpus.MIN_COMPUTE_CAPABILITY
    if any(g.compute_capability < AMPERE for g in named(job)):
        asks = gpus.MIN_WHERE_NAMED
    volta = _FOR_VOLTA.search(job.image.ref)
    return max(asks[job.model.precision], 0.0 if volta else TURING)


def computes_in_fp16(job: JobFile) -> bool:
    """Whether the job computes in fp16 wherever it is trained: by its precision, or since it names
    only cards that lack bf16."""
    precision = job.model.precision
    return precision == "fp16" or (precision in ("nf4", "int8") and _all_old(job))


def on_cards(job: JobFile) -> dict[str, bool]:
    """memory.predict's settings for the cards that the job names."""
    return memory.BEFORE_AMPERE if _all_old(job) else {}


def validate(job: JobFile) -> None:
    """Raises PreflightError where no card that the job names computes in its precision."""
    cards, precision, least = named(job), job.model.precision, least_capability(job)
    if not cards or len(cards) < len(job.offer.gpu_name):
        return  # a name that the table lacks: the market may have it
    best = max(g.compute_capability for g in cards)
    if best >= least:
        return
    names = ", ".join(dict.fromkeys(g.name for g in cards))
    if gpus.MIN_WHERE_NAMED[precision] <= best:
        raise PreflightError(
            f"{names} has compute capability {best}, for which {job.image.ref} has no code",
            hint="set image.ref to one with CUDA 12.6 (images/train-cu126.toml), or name another "
            "card in offer.gpu_name",
        )
    other = "bf16" if best >= AMPERE else "fp16"
    raise PreflightError(
        f'{names} has compute capability {best}, and model.precision = "{precision}" needs {least}',
        hint=f'set model.precision = "{other}", or name another card in offer.gpu_name',
    )


def with_precision(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A job file's tables, with fp16 for model.precision where that is left out and offer.gpu_name
    names only cards that lack bf16."""
    model, offer = raw.get("model"), raw.get("offer")
    if not isinstance(model, dict) or not isinstance(offer, dict) or "precision" in model:
        return dict(raw)
    names = offer.get("gpu_name")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return dict(raw)
    cards = [gpus.find(name) for name in gpus.all_meant(names)]
    if not cards or any(g is None or g.compute_capability >= AMPERE for g in cards):
        return dict(raw)
    return {**raw, "model": {**model, "precision": "fp16"}}


def notes(job: JobFile) -> list[str]:
    """What the plan says of computing in fp16."""
    if not computes_in_fp16(job):
        return []
    said = "computed in fp16 with a loss scale, by transformers' own layers"
    if _all_old(job):
        return [
            f"{said}; training on a card before Ampere was not tried, only on a newer one that "
            "took itself for one"
        ]
    return [f'{said}: on cards that have bf16, model.precision = "bf16" is faster']
