"""Compares what trains here with stock transformers and PEFT, at start, on a small copy of the
job's model.

The copy has the job's classes and widths, random weights, one layer of each kind (two at least), a
short vocabulary, and windows and length limits shortened until its rows pass them. The loss, and
the gradients of what trains, of rows packed (or padded) as in training must equal those of each row
alone in transformers' eager attention and PEFT's own forward, in fp32. On a GPU, and in fp16, the
same is then asked of the dtype that the job computes in, bf16 or fp16: no further off than eager
attention in it is.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig

from trainer import families
from trainer.data import batch
from trainer.data.tokenised import Rows
from trainer.kernels import delta
from trainer.kernels.backend import half
from trainer.model import load
from trainer.model.dropout import TokenKeys
from trainer.model.forward import target_loss
from trainer.model.parts import ModelError
from trainer.model.small_copy import (
    LENGTHS,
    VOCABULARY,
    base_copy,
    job_of_copy,
    random_adapters,
    small,
)
from trainer.wire.job import Job

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tolerance:
    """Of the mean loss; of a module's output, relative to its norm; of a gradient, relative to its
    norm."""

    loss: float
    output: float
    gradient: float


FP32 = Tolerance(1e-4, 1e-3, 1e-2)
# Triton's products round fp32 to TF32: real widths give 1e-4 and 0.002, the delta rule 0.007
FP32_GPU = Tolerance(5e-4, 1e-2, 2e-2)
WORSE = 4.0  # times as far from fp32 as eager attention in bf16 or fp16 is, at most,
# or this far; fp16 has three bits more
LOWER = {"bf16": Tolerance(0.02, 0.02, 0.1), "fp16": Tolerance(0.005, 0.005, 0.03)}


class Unlike(RuntimeError):
    """What trains here is not what transformers computes. ``module`` is the first that differs."""

    def __init__(self, reason: str, module: str) -> None:
        super().__init__(reason)
        self.module = module


@dataclass
class Trace:
    """What one way of computing gave: the mean loss, each parameter's gradient, and for each
    module, in the order in which they ended, what went in and came out, [tokens, ...] in fp32."""

    loss: float = 0.0
    gradients: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def compare(job: Job, folder: Path, device: torch.device, packed: bool) -> str:
    """How far apart they are, in words, for the log. ``packed``: whether the job's rows are. Takes
    seconds. Raises Unlike."""
    began = time.monotonic()
    config = AutoConfig.from_pretrained(folder)
    family = families.read(config.to_dict())
    try:
        config = small(config, windows=not (packed and family.row["masks"]))
        try:
            judge = stock(job, config, device)
        except ModelError:  # modules that the job names and the copy's layers lack
            every: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": None}
            every |= {"layers_to_transform": None, "rank_pattern": {}, "alpha_pattern": {}}
            lora = job.lora.model_copy(update=every)
            job = job.model_copy(update={"lora": lora})
            judge = stock(job, config, device)
        want = alone(judge, device)
    except Exception as why:  # transformers' own: it is not what is asked here
        log.warning("not compared with transformers: %s", why, exc_info=True)
        return f"not compared with transformers: {type(why).__name__}: {str(why)[:200]}"
    told = _compare(job, config, device, packed, "fp32", want, FP32_GPU if _gpu(device) else FP32)
    if job.model.precision == "fp16" or (_gpu(device) and job.model.precision != "fp32"):
        told += "; " + _compare_lower(job, config, device, packed, want)
    del judge, want
    if _gpu(device):
        free()
    return f"{told}, in {time.monotonic() - began:.1f} s"


def _compare_lower(job: Job, config: Any, device: torch.device, packed: bool, want: Trace) -> str:
    """The comparison in the dtype of two bytes that the job computes in. Raises Unlike."""
    name = "fp16" if half(job.model.precision, device) is torch.float16 else "bf16"
    near = distance(_lower(job, config, device, name), want)
    if not all(math.isfinite(n) for n in near):
        return f"{name} not compared: in it transformers' own attention is not finite"
    least = _parts(LOWER[name])
    limit = Tolerance(*(max(WORSE * n, w) for n, w in zip(near, least, strict=True)))
    return _compare(job, config, device, packed, name, want, limit)


def _compare(
    job: Job,
    config: Any,
    device: torch.device,
    packed: bool,
    precision: str,
    want: Trace,
    limit: Tolerance,
) -> str:
    """Raises Unlike where ours, in ``precision``, is further off than ``limit``."""
    try:
        got = ours(job, config, device, packed, precision)
    except Exception as why:
        raise Unlike(f"this model cannot be computed as it would be trained: {why}", "") from why
    loss, _, gradient = distance(got, want)
    if module := culprit(got, want, limit):
        how = "packed" if packed else "padded"
        raise Unlike(
            f"{module}: {how} rows are not what transformers' eager attention computes of each row "
            f"alone, in {precision}: the loss differs by {loss:.2g}, gradients by {gradient:.1%}",
            module,
        )
    return f"{precision} loss within {loss:.1g}, gradients {gradient:.1g} of transformers"


# -- the ways ----------------------------------------------------------------------------------


def stock(job: Job, config: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """Eager attention, experts one by one, delta nets in plain torch, PEFT's own forward."""
    model = base_copy(job, config, device, "eager", dtype)
    delta.use_plain(model)
    if model.family.mixture and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    job = job_of_copy(job, "fp32")
    model = load.add_trained(job, model, TokenKeys())
    model.to(device)
    random_adapters(model)
    return model.eval()


def alone(model: Any, device: torch.device, precise: Any = None) -> Trace:
    """Each row by itself, by the model's own forward."""
    found, rows, taken = Trace(), _rows(), []
    model.zero_grad()
    for i, tokens in enumerate(LENGTHS):
        ids = torch.from_numpy(rows.ids[rows.starts[i] : rows.starts[i + 1]]).long().to(device)
        with precise or nullcontext(), _watched(model, (1, tokens)) as modules:
            # behind what a learned prompt puts in front
            logits = model(input_ids=ids[None], use_cache=False).logits[0, -tokens:]
            loss = cross_entropy(logits[:-1].float(), ids[1:], reduction="sum")
        loss.backward()
        found.loss += float(loss.detach()) / sum(rows.targets())
        taken.append(modules)
    names = [n for n in taken[0] if all(n in modules for modules in taken)]
    for name in names:
        found.modules[name] = (
            torch.cat([modules[name][0] for modules in taken]),
            torch.cat([modules[name][1] for modules in taken]),
        )
    found.gradients = _gradients(model)
    return found


def ours(job: Job, config: Any, device: torch.device, packed: bool, precision: str) -> Trace:
    """The rows as one batch, by the model as `load` would make it of the job."""
    asked = job_of_copy(job, precision)
    dtype = _dtype(job, precision, device)
    packs = families.read(config.to_dict()).packs(max(LENGTHS))
    base = base_copy(asked, config, device, "milktea" if packed or packs else None, dtype)
    model, _ = load.assemble(asked, base, device, TokenKeys())
    random_adapters(model)
    model.eval()
    rows, found = _rows(), Trace()
    one = (batch.packed if packed else batch.padded)(rows, range(len(rows)), device)
    shape = tuple(one["input_ids"].shape)
    with _precise(job, precision, device), _watched(model, shape) as modules:
        loss = target_loss(model, one)
    loss.backward()
    found.loss = float(loss.detach()) / sum(rows.targets())
    real = one["attention_mask"].flatten().bool() if "attention_mask" in one else None
    for name, (given, made) in modules.items():
        found.modules[name] = (given, made) if real is None else (given[real], made[real])
    found.gradients = _gradients(model)
    return found


def _lower(job: Job, config: Any, device: torch.device, precision: str) -> Trace:
    """Eager attention in ``precision``, bf16 or fp16: what it explains."""
    model = stock(job, config, device, _dtype(job, precision, device))
    return alone(model, device, _precise(job, precision, device))


def _dtype(job: Job, precision: str, device: torch.device) -> torch.dtype:
    """What the copy's weights are held in."""
    whole = precision == "fp32" or job.training.trains_base
    return torch.float32 if whole else half(precision, device)


def _precise(job: Job, precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """As trainer/loop/step.py: mixed precision where the weights themselves train."""
    mixed = job.training.trains_base and precision != "fp32"
    return torch.autocast(device.type, half(precision, device)) if mixed else nullcontext()


def _rows() -> Rows:
    """Every token is a target but each row's first."""
    drawn = np.random.default_rng(1).integers(3, VOCABULARY, sum(LENGTHS)).astype(np.int32)
    starts = np.cumsum([0, *LENGTHS])
    trained = np.ones(len(drawn), np.bool_)
    trained[starts[:-1]] = False
    prompted = np.zeros(len(LENGTHS), np.bool_)
    return Rows(drawn, trained, starts, prompted, [""] * len(LENGTHS))


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        n: torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.detach().float()
        for n, p in model.named_parameters()
        if p.requires_grad
    }


@contextmanager
def _watched(
    model: nn.Module, shape: tuple[int, ...]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What goes into and comes out of each module that is called once and maps tokens to tokens,
    in the order in which they end; tokens are ``shape`` (rows, tokens of a row), flat."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    called: dict[str, int] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, given: Any, named: Any, made: Any) -> None:
            called[name] = called.get(name, 0) + 1
            first = next((_flat(x) for x in (*given, *named.values()) if _is(x, shape)), None)
            last = made[0] if isinstance(made, tuple) and made else made
            if first is not None and _is(last, shape) and called[name] == 1:
                seen[name] = (first, _flat(last))

        return keep

    hooks = [
        m.register_forward_hook(hook(n), with_kwargs=True) for n, m in model.named_modules() if n
    ]
    try:
        yield seen
    finally:
        for one in hooks:
            one.remove()
        for name in [n for n in seen if called[n] > 1]:
            del seen[name]


def _is(x: Any, shape: tuple[int, ...]) -> bool:
    """Whether x holds numbers for every token: [rows, tokens, ...] or [rows x tokens, ...]."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        return False
    return len(x) == shape[0] * shape[1] if x.ndim == 2 else tuple(x.shape[:2]) == shape


def _flat(x: Tensor) -> Tensor:
    x = x.detach().float()  # a copy: what follows may write over it
    return (x if x.ndim == 2 else x.flatten(0, 1).flatten(1)).clone()


# -- the difference ----------------------------------------------------------------------------


def distance(got: Trace, want: Trace) -> tuple[float, float, float]:
    """(of the mean loss, of the output that is furthest off, of the gradient that is)."""
    return (
        abs(got.loss - want.loss),
        max((_apart(got.modules[n][1], w[1]) for n, w in _shared(got, want)), default=0.0),
        max((_of(got, want, n) for n in want.gradients), default=0.0),
    )


def culprit(got: Trace, want: Trace, limit: Tolerance) -> str:
    """The module that makes the difference, or "" where there is none beyond ``limit``: the first
    that was given the same and made something else, no part of which did; else the last whose
    gradient differs, as backward comes from the end."""
    wrong = [
        name
        for name, (given, made) in _shared(got, want)
        if not _apart(got.modules[name][1], made) < limit.output
        and _apart(got.modules[name][0], given) < limit.output
    ]
    inner = [n for n in wrong if not any(other.startswith(n + ".") for other in wrong)]
    if inner:
        return _plain(inner[0])
    if not abs(got.loss - want.loss) < limit.loss:
        return "the head and its loss (scale or cap of the logits)"
    off = [n for n in want.gradients if not _of(got, want, n) < limit.gradient]
    return _plain(off[-1]) + " (its gradient)" if off else ""


def _shared(got: Trace, want: Trace) -> list[tuple[str, tuple[Tensor, Tensor]]]:
    """In our order, modules that both have called with the same sizes."""
    return [
        (n, want.modules[n])
        for n, (given, made) in got.modules.items()
        if n in want.modules
        and want.modules[n][0].shape == given.shape
        and want.modules[n][1].shape == made.shape
    ]


def _of(got: Trace, want: Trace, name: str) -> float:
    """How far a gradient is off, of its norm or, where it is next to nothing, of the largest."""
    largest = max(float(g.norm()) for g in want.gradients.values())
    return _apart(got.gradients[name], want.gradients[name], 1e-4 * largest)


def _apart(got: Tensor, want: Tensor, least: float = 1e-6) -> float:
    return float((got - want).norm() / want.norm().clamp_min(max(least, 1e-12)))


def _plain(name: str) -> str:
    return name.partition(".lora_")[0].removesuffix(".base_layer").removeprefix("base_model.model.")


def _parts(limit: Tolerance) -> tuple[float, float, float]:
    return limit.loss, limit.output, limit.gradient


def _gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def free() -> None:
    """Gives the copy's memory on a GPU back."""
    gc.collect()
    torch.cuda.empty_cache()
