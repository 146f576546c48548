"""The plain torch twins of what a gated delta net does between its projections, on any device and
in any float type."""

from __future__ import annotations

from functools import cache
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

EPS = 1e-6  # of the length of q and k


def convolve(x: Tensor, taps: Tensor, first: Tensor) -> Tensor:
    """silu of the causal convolution of each column, within documents. x [M, C], taps [C, W], first
    [M] (the token at which each token's document begins) -> [M, C]."""
    return silu(correlate(x, taps, first)).to(x.dtype)


def correlate(x: Tensor, taps: Tensor, first: Tensor) -> Tensor:
    """The convolution by itself, fp32."""
    tokens, width = len(x), taps.shape[1]
    behind = torch.arange(tokens, device=x.device) - first
    total = x.float() * taps[:, -1].float()
    for back in range(1, width):
        earlier = pad(x, (0, 0, back, 0))[:tokens].float()
        kept = (behind >= back)[:, None]
        total = total + torch.where(kept, earlier, 0.0) * taps[:, -1 - back].float()
    return total


def unit(x: Tensor) -> Tensor:
    """x [..., D] at length one."""
    v = x.float()
    return (v * torch.rsqrt(v.square().sum(-1, keepdim=True) + EPS)).to(x.dtype)


def rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cu: Tensor) -> Tensor:
    """See ``trainer.kernels.delta.rule``. Each document is a row of its own; what fills the rows up
    stands behind it."""
    lengths = cu.diff().tolist()
    longest = max(lengths)
    rows = []
    for x in (q, k, v, decay, beta):
        parts = x.split(lengths)
        full = [pad(p, (0, 0) * (p.ndim - 1) + (0, longest - len(p))) for p in parts]
        rows.append(torch.stack(full))
    out, _ = _alone()(*rows)
    return torch.cat([row[:n] for row, n in zip(out, lengths, strict=True)])


@cache
def _alone() -> Any:
    """transformers' own rule in plain torch, not what stands in its place where fla-core is."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    return unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)
