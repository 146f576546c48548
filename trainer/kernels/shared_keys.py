"""Keys and values that several documents of a pack read: copied to each in front of its own, and
their gradients added up in a fixed order, so that the result has the same bits from run to run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.data.shared_keys import SharedKeys


def spread(own: Tensor, keys: SharedKeys) -> Tensor:
    """own [M, ...] -> [N, ...]: each document's keys, borrowed ones in front."""
    return own.index_select(0, keys.at)


def gather(grad: Tensor, keys: SharedKeys) -> Tensor:
    """The gradient of ``spread``: grad [N, ...] -> [M, ...]. Sums are made in fp32 at least."""
    made = grad.index_select(0, keys.own)
    total = made.index_select(0, keys.lent)
    total = total.float() if total.dtype in (torch.bfloat16, torch.float16) else total
    for copies in keys.copies:
        read = (copies >= 0).view(-1, *[1] * (grad.ndim - 1))
        total = total + grad.index_select(0, copies.clamp_min(0)) * read
    return made.index_copy(0, keys.lent, total.to(made.dtype))


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, *keys: Tensor) -> Tensor:
        ctx.save_for_backward(*keys)
        return spread(own, SharedKeys(*keys))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gather(grad, SharedKeys(*ctx.saved_tensors)), *(None,) * len(SharedKeys._fields)


def spread_heads(own: Tensor, keys: SharedKeys) -> Tensor:
    """[1, KV, M, D] -> [1, KV, N, D], differentiable."""
    apply: Any = _Spread.apply
    made: Tensor = apply(own[0].transpose(0, 1), *keys)
    return made.transpose(0, 1)[None]
