"""The twins of ``trainer/kernels/step_ops.py`` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu as gelu_of
from torch.nn.functional import silu

from trainer.kernels.norms import HeadNorms, Norm


def _sum(first: Tensor, *more: Tensor | None) -> Tensor:
    """The sum in fp32."""
    total = first.float()
    for x in more:
        total = total if x is None else total + x.float()
    return total


def _normed(x: Tensor, norm: Norm) -> Tensor:
    """RMSNorm in fp32."""
    x = x.float()
    return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.float()


def add_norm(
    h: Tensor,
    y: Tensor | None,
    more: Tensor | None,
    branch: Norm | None,
    norm: Norm | None,
    out_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    total = h
    if y is not None:
        added = _sum(y, more)
        added = added if branch is None else _normed(added, branch)
        total = ((h.float() + added) * out_scale).to(h.dtype)
    return total, total if norm is None else _normed(total, norm).to(h.dtype)


def turn_and_keep(
    qkv: Tensor,
    more: Tensor | None,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int],
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    norms: HeadNorms | None = None,
    pairs: bool = False,
) -> Tensor:
    d = cos.shape[-1]
    x = _sum(qkv, more, bias).unflatten(1, (-1, d))
    x = x if norms is None else x.to(qkv.dtype).float()
    q, k, v = x.split([heads[0], heads[1], heads[1]], 1)
    if norms is not None:
        q, k, v = (
            _normed(part, Norm(weight, norms.eps)) if n < 2 or norms.values else part
            for n, (part, weight) in enumerate(zip((q, k, v), norms.weight, strict=True))
        )
    q, k = (_turned(part, cos, sin, pairs) for part in (q, k))
    keys[slots, positions] = k.to(keys.dtype)
    values[slots, positions] = v.to(values.dtype)
    made: Tensor = q.unflatten(1, (heads[1], -1)).transpose(1, 2).to(qkv.dtype)
    return made.contiguous()


def _turned(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    """x fp32 [B, H, D]."""
    half = x.shape[-1] // 2
    c, n = cos[:, None, :half].float(), sin[:, None, :half].float()
    if pairs:
        low, high = x[..., ::2], x[..., 1::2]
        return torch.stack([low * c - high * n, high * c + low * n], -1).flatten(-2)
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * c - high * n, high * c + low * n], -1)


def gate(gu: Tensor, more: Tensor | None, gelu: bool = False) -> Tensor:
    g, u = _sum(gu, more).chunk(2, -1)
    return ((gelu_of(g, approximate="tanh") if gelu else silu(g)) * u).to(gu.dtype)
