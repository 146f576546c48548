"""Device code around the grouped products of experts, for ``trainer/kernels/triton_ops.py``.
Arguments in capitals are compile-time constants."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["s"])
def gate_forward(gu, more, act, s, f, MORE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (rows < s)[:, None] & (cols < f)[None, :]
    at = rows[:, None] * (2 * f) + cols[None, :]
    g = tl.load(gu + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gu + at + f, mask=mask, other=0.0).to(tl.float32)
    if MORE:
        g += tl.load(more + at, mask=mask, other=0.0).to(tl.float32)
        u += tl.load(more + at + f, mask=mask, other=0.0).to(tl.float32)
        g_kept, u_kept = g.to(gu.dtype.element_ty), u.to(gu.dtype.element_ty)
        tl.store(gu + at, g_kept, mask=mask)
        tl.store(gu + at + f, u_kept, mask=mask)
        g, u = g_kept.to(tl.float32), u_kept.to(tl.float32)
    v = g * tl.sigmoid(g) * u
    tl.store(act + rows[:, None] * f + cols[None, :], v.to(act.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["s"])
def clamped_forward(
    gu,
    more,
    bias,
    expert,
    act,
    s,
    f,
    alpha,
    limit,
    MORE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    ok = rows < s
    wide = tl.program_id(1) * 2 * BN + tl.arange(0, 2 * BN)  # gate and up by turns
    mask = ok[:, None] & (wide < 2 * f)[None, :]
    at = rows[:, None] * (2 * f) + wide[None, :]
    whose = tl.load(expert + rows, mask=ok, other=0)
    v = tl.load(gu + at, mask=mask, other=0.0).to(tl.float32)
    v += tl.load(bias + whose[:, None] * (2 * f) + wide[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    if MORE:
        v += tl.load(more + at, mask=mask, other=0.0).to(tl.float32)
    kept = v.to(gu.dtype.element_ty)
    tl.store(gu + at, kept, mask=mask)
    g, u = tl.split(tl.reshape(kept.to(tl.float32), [BM, BN, 2]))
    g = tl.minimum(g, limit)
    u = tl.minimum(tl.maximum(u, -limit), limit)
    v = g * tl.sigmoid(alpha * g) * (u + 1.0)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    to = rows[:, None] * f + cols[None, :]
    tl.store(act + to, v.to(act.dtype.element_ty), mask=ok[:, None] & (cols < f)[None, :])


@triton.jit(do_not_specialize=["s"])
def clamped_backward(
    gu,
    dact,
    more,
    share,
    dshare,
    s,
    f,
    alpha,
    limit,
    MORE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    ok = rows < s
    near = tl.load(share + rows, mask=ok, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros([BM], tl.float32)
    for c in range(0, f, BN):
        wide, cols = 2 * c + tl.arange(0, 2 * BN), c + tl.arange(0, BN)
        both = ok[:, None] & (wide < 2 * f)[None, :]
        mask = ok[:, None] & (cols < f)[None, :]
        at = gu + rows[:, None] * (2 * f) + wide[None, :]
        to = rows[:, None] * f + cols[None, :]
        v = tl.load(at, mask=both, other=0.0).to(tl.float32)
        da = tl.load(dact + to, mask=mask, other=0.0).to(tl.float32)
        if MORE:
            da += tl.load(more + to, mask=mask, other=0.0).to(tl.float32)
        g, u = tl.split(tl.reshape(v, [BM, BN, 2]))
        gc = tl.minimum(g, limit)
        uc = tl.minimum(tl.maximum(u, -limit), limit)
        sig = tl.sigmoid(alpha * gc)
        gated = gc * sig
        total += tl.sum(gated * (uc + 1.0) * da, 1)
        tl.store(dact + to, (gated * (uc + 1.0)).to(dact.dtype.element_ty), mask=mask)
        da = da * near
        slope = sig * (1.0 + alpha * gc * (1.0 - sig))
        dg = tl.where(g <= limit, da * (uc + 1.0) * slope, 0.0)
        du = tl.where(tl.abs(u) <= limit, da * gated, 0.0)
        d = tl.reshape(tl.join(dg, du), [BM, 2 * BN])
        tl.store(at, d.to(gu.dtype.element_ty), mask=both)
    tl.store(dshare + rows, total, mask=ok)


@triton.jit(do_not_specialize=["s"])
def gate_backward(
    gu, dact, more, share, dshare, s, f, MORE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    ok = rows < s
    near = tl.load(share + rows, mask=ok, other=0.0).to(tl.float32)
    total = tl.zeros([BM], tl.float32)
    for c in range(0, f, BN):
        cols = c + tl.arange(0, BN)
        mask = ok[:, None] & (cols < f)[None, :]
        at = gu + rows[:, None] * (2 * f) + cols[None, :]
        to = rows[:, None] * f + cols[None, :]
        g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(at + f, mask=mask, other=0.0).to(tl.float32)
        da = tl.load(dact + to, mask=mask, other=0.0).to(tl.float32)
        if MORE:
            da += tl.load(more + to, mask=mask, other=0.0).to(tl.float32)
        sig = tl.sigmoid(g)
        gated = g * sig
        total += tl.sum(gated * u * da, 1)
        da = da * near[:, None]
        tl.store(dact + to, (gated * u).to(dact.dtype.element_ty), mask=mask)
        dg = da * u * sig * (1.0 + g * (1.0 - sig))
        tl.store(at, dg.to(gu.dtype.element_ty), mask=mask)
        tl.store(at + f, (da * gated).to(gu.dtype.element_ty), mask=mask)
    tl.store(dshare + rows, total, mask=ok)


@triton.jit(do_not_specialize=["tokens"])
def combine(
    y,
    more,
    bias,
    expert,
    back,
    share,
    out,
    tokens,
    width,
    K: tl.constexpr,
    MORE: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = rows < tokens
    mask = ok[:, None] & (cols < width)[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for j in tl.static_range(K):
        pair = tl.load(back + rows * K + j, mask=ok, other=0)
        weight = tl.load(share + rows * K + j, mask=ok, other=0.0).to(tl.float32)
        at = pair[:, None] * width + cols[None, :]
        v = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        if MORE:
            v += tl.load(more + at, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            whose = tl.load(expert + pair, mask=ok, other=0)
            at = whose[:, None] * width + cols[None, :]
            v += tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
        acc += v * weight[:, None]
    tl.store(out + rows[:, None] * width + cols[None, :], acc.to(out.dtype.element_ty), mask=mask)
