"""The device code of ``trainer/kernels/delta_ops.py``, which describes it. Arguments in capitals
are compile-time constants. The number of tokens is never specialised on.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _correlate(x, taps, at, columns, rows, ok, begin, row, W: tl.constexpr, D: tl.constexpr):
    """The convolution of one head's columns, fp32 [BM, D]."""
    total = tl.zeros([rows.shape[0], D], tl.float32)
    for back in tl.static_range(0, W):
        kept = (ok & (rows - back >= begin))[:, None]
        earlier = tl.load(x + (rows - back)[:, None] * row + at[None, :], mask=kept, other=0.0)
        tap = tl.load(taps + columns * W + (W - 1 - back)).to(tl.float32)
        total += earlier.to(tl.float32) * tap[None, :]
    return total


@triton.jit(do_not_specialize=["m"])
def mix_forward(
    x, taps, first, out, m, row, eps,
    HK: tl.constexpr, HV: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    head = tl.program_id(1)
    ok = rows < m
    begin = tl.load(first + rows, mask=ok, other=0)
    at = head * D + tl.arange(0, D)
    y = _correlate(x, taps, at, at, rows, ok, begin, row, W, D)
    y = y * tl.sigmoid(y)
    values = head >= 2 * HK
    if not values:
        y = y * tl.rsqrt(tl.sum(y * y, 1) + eps)[:, None]
    part = tl.minimum(head // HK, 2)
    heads = tl.where(values, HV, HK)
    to = out + part.to(tl.int64) * m * HK * D
    to += rows[:, None] * (heads * D) + (head - part * HK) * D + tl.arange(0, D)[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=ok[:, None])


@triton.jit(do_not_specialize=["m"])
def mix_backward_outer(
    x, taps, first, dq, dk, more, dv, out, m, row, eps,
    HK: tl.constexpr, HV: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    head = tl.program_id(1)
    ok = rows < m
    begin = tl.load(first + rows, mask=ok, other=0)
    d = tl.arange(0, D)
    at = head * D + d
    G: tl.constexpr = HV // HK
    y = _correlate(x, taps, at, at, rows, ok, begin, row, W, D)
    sig = tl.sigmoid(y)
    slope = sig * (1.0 + y * (1.0 - sig))
    grad = tl.zeros([BM, D], tl.float32)
    if head >= 2 * HK:
        of = dv + rows[:, None] * (HV * D) + (head - 2 * HK) * D + d[None, :]
        grad = tl.load(of, mask=ok[:, None], other=0.0).to(tl.float32)
    else:
        part = head // HK
        shift = rows[:, None] * (HV * D) + (head - part * HK) * G * D + d[None, :]
        for g in tl.static_range(0, G):
            if part == 0:
                grad += tl.load(dq + shift + g * D, mask=ok[:, None], other=0.0).to(tl.float32)
            else:
                grad += tl.load(dk + shift + g * D, mask=ok[:, None], other=0.0).to(tl.float32)
                grad += tl.load(more + shift + g * D, mask=ok[:, None], other=0.0).to(tl.float32)
        act = y * sig
        r = tl.rsqrt(tl.sum(act * act, 1) + eps)
        along = tl.sum(act * grad, 1) * r * r * r
        grad = grad * r[:, None] - act * along[:, None]
    to = out + rows[:, None] * ((2 * HK + HV) * D) + at[None, :]
    tl.store(to, (grad * slope).to(out.dtype.element_ty), mask=ok[:, None])


@triton.jit(do_not_specialize=["m"])
def mix_backward_inner(
    grad, taps, past, out, m, row, C: tl.constexpr,
    W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = rows < m
    end = tl.load(past + rows, mask=ok, other=0)
    fits = (columns < C)[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    for later in tl.static_range(0, W):
        kept = (ok & (rows + later < end))[:, None] & fits
        d = tl.load(grad + (rows + later)[:, None] * C + columns[None, :], mask=kept, other=0.0)
        tap = tl.load(taps + columns * W + (W - 1 - later), mask=columns < C, other=0.0)
        total += d.to(tl.float32) * tap.to(tl.float32)[None, :]
    to = out + rows[:, None] * row + columns[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=ok[:, None] & fits)


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit(do_not_specialize=["m"])
def decay_forward(
    b, a, rate, shift, beta, decay, m, row,
    HV: tl.constexpr, PAD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    heads = tl.arange(0, PAD)
    mask = (rows < m)[:, None] & (heads < HV)[None, :]
    at, to = rows[:, None] * row + heads[None, :], rows[:, None] * HV + heads[None, :]
    bb = tl.load(b + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(a + at, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(shift + heads, mask=heads < HV, other=0.0)[None, :]
    r = tl.load(rate + heads, mask=heads < HV, other=0.0)[None, :]
    tl.store(beta + to, tl.sigmoid(bb), mask=mask)
    tl.store(decay + to, -r * _softplus(x), mask=mask)


@triton.jit(do_not_specialize=["m"])
def decay_backward(
    b, a, rate, shift, dbeta, ddecay, db, da, m, row,
    HV: tl.constexpr, PAD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    heads = tl.arange(0, PAD)
    mask = (rows < m)[:, None] & (heads < HV)[None, :]
    at, to = rows[:, None] * row + heads[None, :], rows[:, None] * HV + heads[None, :]
    sig = tl.sigmoid(tl.load(b + at, mask=mask, other=0.0).to(tl.float32))
    x = tl.load(a + at, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(shift + heads, mask=heads < HV, other=0.0)[None, :]
    r = tl.load(rate + heads, mask=heads < HV, other=0.0)[None, :]
    of_b = tl.load(dbeta + to, mask=mask, other=0.0) * sig * (1.0 - sig)
    of_a = -tl.load(ddecay + to, mask=mask, other=0.0) * r * tl.sigmoid(x)
    tl.store(db + at, of_b.to(db.dtype.element_ty), mask=mask)
    tl.store(da + at, of_a.to(da.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m"])
def gated_norm_forward(
    o, z, weight, out, m, row, eps, HV: tl.constexpr, D: tl.constexpr, BM: tl.constexpr
):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    columns = tl.program_id(1) * D + tl.arange(0, D)
    ok = (rows < m)[:, None]
    x = tl.load(o + rows[:, None] * (HV * D) + columns[None, :], mask=ok, other=0.0).to(tl.float32)
    g = tl.load(z + rows[:, None] * row + columns[None, :], mask=ok, other=0.0).to(tl.float32)
    w = tl.load(weight + tl.arange(0, D)).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None] * w[None, :]
    y = x * g * tl.sigmoid(g)
    to = out + rows[:, None] * (HV * D) + columns[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["m"])
def gated_norm_backward(
    dout, o, z, weight, out, dz, m, row, eps, HV: tl.constexpr, D: tl.constexpr, BM: tl.constexpr
):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    columns = tl.program_id(1) * D + tl.arange(0, D)
    ok = (rows < m)[:, None]
    at, far = rows[:, None] * (HV * D) + columns[None, :], rows[:, None] * row + columns[None, :]
    x = tl.load(o + at, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(z + far, mask=ok, other=0.0).to(tl.float32)
    d = tl.load(dout + at, mask=ok, other=0.0).to(tl.float32)
    w = tl.load(weight + tl.arange(0, D)).to(tl.float32)[None, :]
    r = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    sig = tl.sigmoid(g)
    normed = x * r * w
    dn = d * g * sig * w
    dx = r * (dn - x * (r * r) * (tl.sum(dn * x, 1) / D)[:, None])
    tl.store(out + at, (normed * g * sig).to(out.dtype.element_ty), mask=ok)
    of_z = d * normed * sig * (1.0 + g * (1.0 - sig))
    tl.store(dz + far, of_z.to(dz.dtype.element_ty), mask=ok)
    tl.store(dout + at, dx.to(dout.dtype.element_ty), mask=ok)


@triton.jit
def gate_forward(x, gate, out, n, BN: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    v = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out + at, (v * tl.sigmoid(g)).to(out.dtype.element_ty), mask=at < n)


@triton.jit
def gate_backward(dout, x, gate, out, dgate, n, BN: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    d = tl.load(dout + at, mask=at < n, other=0.0).to(tl.float32)
    v = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    s = tl.sigmoid(tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32))
    tl.store(out + at, (v * s).to(out.dtype.element_ty), mask=at < n)
    tl.store(dgate + at, (d * v * s * (1.0 - s)).to(dgate.dtype.element_ty), mask=at < n)
    tl.store(dout + at, (d * s).to(dout.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["m"])
def pick(x, index, out, m, row, n, BM: tl.constexpr, BN: tl.constexpr):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    at = tl.load(index + columns, mask=columns < n, other=0)
    v = tl.load(x + rows[:, None] * row + at[None, :], mask=mask, other=0.0)
    tl.store(out + rows[:, None] * n + columns[None, :], v, mask=mask)
