"""Triton kernels for decoding, one token a row. ``trainer/kernels/triton_ops.py`` takes many rows a
program, which gives too few programs for a batch of a few answers.
``trainer/kernels/step_reference.py`` has the twins.

Shapes: B rows, K or F features, H heads and KV heads of keys of D columns.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from trainer.kernels import step_device as jit
from trainer.kernels.norms import HeadNorms, Norm

GATE_COLUMNS = 1024  # of a program


def add_norm(
    h: Tensor,
    y: Tensor | None,
    more: Tensor | None,
    branch: Norm | None,
    norm: Norm | None,
    out_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """h [B, K] -> (total, x). total = (h + y + ``more``) ``out_scale``, with y + ``more`` normed by
    ``branch`` first where given; without y it is h. x is total normed by ``norm``, or total without
    it."""
    b, k = h.shape
    total = torch.empty_like(h) if y is not None else h
    x = torch.empty_like(h) if norm is not None else total
    width = triton.next_power_of_2(k)
    jit.add_norm[(b,)](
        h,
        y,
        more,
        branch.weight if branch is not None else None,
        norm.weight if norm is not None else None,
        total,
        x,
        k,
        branch.eps if branch is not None else 0.0,
        norm.eps if norm is not None else 0.0,
        out_scale,
        ADD=y is not None,
        MORE=more is not None,
        BRANCH=branch is not None,
        NORM=norm is not None,
        BN=width,
        num_warps=4 if width <= 2048 else 8,
    )
    return total, x


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
    """qkv [B, (H + 2 KV) D], and ``more`` of that shape -> q of their sum [B, H / KV, KV, D] after
    rotary embedding. Keys and values are written to ``positions`` [B] of rows ``slots`` [B] of
    ``keys`` and ``values`` [rows, longest, KV, D]. cos, sin [B, D], halves equal; bias, norms,
    pairs as in ``rope_forward_``; heads: (H, KV)."""
    b, d = len(qkv), cos.shape[-1]
    q = qkv.new_empty(b, heads[0] // heads[1], heads[1], d)
    jit.turn_and_keep[(b, heads[0] + 2 * heads[1])](
        qkv,
        more,
        bias,
        cos,
        sin,
        norms.weight if norms is not None else None,
        q,
        keys,
        values,
        slots,
        positions,
        keys.shape[1],
        *heads,
        norms.eps if norms is not None else 0.0,
        MORE=more is not None,
        BIAS=bias is not None,
        NORM=norms is not None,
        VALUES=norms is not None and norms.values,
        PAIRS=pairs,
        D=d,
        num_warps=1 if d <= 128 else 2,
    )
    return q


def gate(gu: Tensor, more: Tensor | None, gelu: bool = False) -> Tensor:
    """gu [B, 2F], and ``more`` of that shape -> silu(gate) * up [B, F] of their sum; with ``gelu``
    gelu in its tanh approximation instead of silu."""
    b, f = gu.shape[0], gu.shape[1] // 2
    act = torch.empty(b, f, device=gu.device, dtype=gu.dtype)
    grid = (b, triton.cdiv(f, GATE_COLUMNS))
    jit.gate[grid](gu, more, act, f, MORE=more is not None, GELU=gelu, BN=GATE_COLUMNS, num_warps=4)
    return act
