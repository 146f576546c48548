"""Whether rows that share their beginning in a pack are what they are alone: looked at before the
first step, on the model and the device that train."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data import batch, sharing
from trainer.data.sharing import Borrowed
from trainer.data.tokenised import Rows
from trainer.kernels.patch import inner_model
from trainer.kernels.verify_sharing import distrusts_sharing
from trainer.model.forward import hidden_states, model_inputs

log = logging.getLogger(__name__)

# of the norm of hidden states and of gradients; rounding alone gives a tenth of it
TOLERANCE = {"fp32": 1e-3, "bf16": 0.03, "fp16": 0.01, "nf4": 0.03, "fp8": 0.2, "int8": 0.2}
# in which a rounding grows within tens of layers to what a fault would make: a few layers tell more
COARSE = ("fp8", "int8")
NOISE = 4.0  # times what packing without sharing changes
PROMPT, ANSWER = 64, 24  # tokens of a row that are shared, at most, and that are its own


def difference(
    model: nn.Module, rows: Rows, group: list[int], precision: str, device: torch.device
) -> str:
    """Why rows must not share their beginnings, or "" where those of `group`, shortened, give the
    hidden states and the gradients that they give alone. Leaves gradients as they are."""
    fast = getattr(inner_model(model), "fast_layers", [])
    if why := distrusts_sharing(list({layer.kind: layer for layer in fast}.values())):
        return why
    some = _shortened(rows, group)
    numbers = range(len(some))
    taken = [Borrowed(0, n) for n in sharing.beginnings(some, numbers)]
    training = model.training
    model.eval()
    few = _first_layers(inner_model(model)) if precision in COARSE else nullcontext()
    try:
        with few:
            alone = [_asked(model, some, [n], None, device) for n in numbers]
            packed = _asked(model, some, numbers, None, device)
            shared = _asked(model, some, numbers, taken, device)
        want = (
            torch.cat([states for states, _ in alone]),
            torch.stack([gradient for _, gradient in alone]).sum(0),
        )
    except Exception as wrong:  # whatever the model's own code, or a kernel, cannot do
        log.warning("prompts are not shared", exc_info=True)
        return f"the model cannot be computed so ({type(wrong).__name__}: {str(wrong)[:120]})"
    finally:
        model.train(training)
    for what, a, b, w in zip(("states", "gradients"), shared, packed, want, strict=True):
        limit = max(TOLERANCE[precision], NOISE * _apart(b, w))
        if not (off := _apart(a, w)) < limit:
            return f"{what} differ from those of rows alone by {off:.2g}, more than {limit:.2g}"
    return ""


@contextmanager
def _first_layers(inner: Any) -> Iterator[None]:
    """The model with its first layers alone for the while: two, or as many as show each kind."""
    every, kinds = inner.layers, getattr(inner.config.get_text_config(), "layer_types", None)
    kinds = list(kinds or ["full_attention"] * len(every))
    inner.layers = every[: max(2, *(kinds.index(kind) + 1 for kind in kinds))]
    try:
        yield
    finally:
        inner.layers = every


def _apart(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp_min(1e-12))


def _shortened(rows: Rows, group: list[int]) -> Rows:
    """The rows with up to PROMPT tokens of their common beginning, and ANSWER tokens behind it."""
    parts = []
    front = max(sharing.beginnings(rows, group))
    kept = min(front, PROMPT)
    for row in group:
        ids = rows.ids[rows.starts[row] : rows.starts[row + 1]]
        own = ids[front : front + ANSWER]
        parts.append(np.concatenate([ids[:kept], own]))
    starts = np.cumsum([0, *(len(part) for part in parts)])
    marks = [np.arange(len(part)) > kept for part in parts]
    told = (np.concatenate(parts), np.concatenate(marks), starts.astype(np.int64))
    return Rows(*told, np.ones(len(parts), np.bool_), [""] * len(parts))


def _asked(
    model: nn.Module, rows: Rows, numbers: Any, taken: list[Borrowed] | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(hidden states of the tokens that each row has for itself, fp32; the gradient of a sum of
    theirs by all that trains, flat)."""
    own = max(sharing.beginnings(rows, range(len(rows))))
    one = batch.packed(rows, list(numbers), device, taken)
    states = hidden_states(model, **model_inputs(one))[0]
    kept = states[one["position_ids"][0] >= own].float()
    dice = torch.Generator().manual_seed(0)
    weights = torch.randn(len(rows) * ANSWER, kept.shape[1], generator=dice).to(device)
    places = [int((rows.starts[n + 1] - rows.starts[n]) - own) for n in range(len(rows))]
    starts = np.cumsum([0, *places])
    chosen = torch.cat([weights[starts[n] : starts[n + 1]] for n in numbers])
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad((kept * chosen).sum(), trained, allow_unused=True)
    return kept.detach(), torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.float().flatten()
            for p, g in zip(trained, grads, strict=True)
        ]
    )
