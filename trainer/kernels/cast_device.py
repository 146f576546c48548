"""Device code of the casts to and from FP8, for ``trainer/kernels/triton_ops.py``. Arguments in
capitals are compile-time constants."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)  # the largest finite e4m3 value


@triton.jit
def inverse_scale(amax):
    """Row scale and its inverse; an all-zero row gets a harmless positive scale."""
    scale = tl.maximum(amax, 1e-12) / FP8_MAX
    return scale, 1.0 / scale


@triton.jit
def to_fp8(x):
    return tl.minimum(tl.maximum(x, -FP8_MAX), FP8_MAX).to(tl.float8e4nv)


@triton.jit
def quantise_rows(x, column_scale, out, scale, k, FOLD: tl.constexpr, BN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BN)
    v = tl.load(x + row * k + cols, mask=cols < k, other=0.0).to(tl.float32)
    if FOLD:
        v = v * tl.load(column_scale + cols, mask=cols < k, other=0.0)
    s, inverse = inverse_scale(tl.max(tl.abs(v), 0))
    tl.store(scale + row, s)
    tl.store(out + row * k + cols, to_fp8(v * inverse), mask=cols < k)


@triton.jit(do_not_specialize=["m"])
def cast_rows(
    x, column_scale, scale, out, m, k, FOLD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (rows[:, None] < m) & (cols < k)[None, :]
    v = tl.load(x + rows[:, None] * k + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    v = v * (1.0 / tl.load(scale + rows, mask=rows < m, other=1.0))[:, None]
    if FOLD:
        v = v * tl.load(column_scale + cols, mask=cols < k, other=0.0)[None, :]
    tl.store(out + rows[:, None] * k + cols[None, :], to_fp8(v), mask=mask)


@triton.jit(do_not_specialize=["n"])
def dequantise_rows(w, scale, out, n, k, BM: tl.constexpr, BN: tl.constexpr):
    across = tl.cdiv(k, BN)  # one axis of programs: only the first of a grid may be long
    cols = tl.program_id(0) % across * BN + tl.arange(0, BN)
    rows = (tl.program_id(0) // across * BM + tl.arange(0, BM)).to(tl.int64)
    mask = (rows[:, None] < n) & (cols < k)[None, :]
    at = rows[:, None] * k + cols[None, :]
    v = tl.load(w + at, mask=mask, other=0.0).to(tl.float32)
    v = v * tl.load(scale + rows, mask=rows < n, other=0.0)[:, None]
    tl.store(out + at, v.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m"])
def cast_outer(
    x,
    column_scale,
    scale,
    t,
    out,
    partial,
    m,
    k,
    rows,
    R: tl.constexpr,
    LORA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Reads x once for two results: its FP8 copy, and x^T t over ``rows`` rows, into partial
    [splits, K, R]."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = cols < k
    fold = tl.load(column_scale + cols, mask=inside, other=0.0)
    rank = tl.arange(0, R)
    first = tl.program_id(1) * rows
    acc = tl.zeros([BN, R], tl.float32)
    for c in tl.range(first, tl.minimum(first + rows, m), BM, num_stages=STAGES):
        row = (c + tl.arange(0, BM)).to(tl.int64)
        at = row[:, None] * k + cols[None, :]
        mask = (row < m)[:, None] & inside[None, :]
        tile = tl.load(x + at, mask=mask, other=0.0)
        if LORA:
            acc = tl.dot(
                tl.trans(tile),
                tl.load(t + row[:, None] * R + rank[None, :], mask=(row < m)[:, None], other=0.0),
                acc,
            )
        inverse = 1.0 / tl.load(scale + row, mask=row < m, other=1.0)
        tl.store(
            out + at, to_fp8(tile.to(tl.float32) * inverse[:, None] * fold[None, :]), mask=mask
        )
    if LORA:
        to = partial + (tl.program_id(1) * k + cols)[:, None] * R + rank[None, :]
        tl.store(to, acc, mask=inside[:, None])
