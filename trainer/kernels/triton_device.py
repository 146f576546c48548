"""The device code of ``trainer/kernels/triton_ops.py``, which describes it. Arguments in capitals
are compile-time constants.

The number of tokens is never specialised on: otherwise the first pack whose length is a multiple of
16 would compile during the run.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from trainer.kernels.cast_device import inverse_scale, to_fp8


@triton.jit(do_not_specialize=["m"])
def norm_forward(
    h,
    y,
    t,
    b,
    weight,
    a,
    total,
    x,
    scale,
    t_out,
    rstd,
    m,
    k,
    ro,
    eps,
    R: tl.constexpr,
    RO: tl.constexpr,
    ADD: tl.constexpr,
    LORA: tl.constexpr,
    PROJECT: tl.constexpr,
    QUANT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = rows < m
    base = rows.to(tl.int64)[:, None] * k
    rank = tl.arange(0, R)
    if LORA:
        t_tile = tl.load(
            t + rows.to(tl.int64)[:, None] * R + rank[None, :], mask=ok[:, None], other=0.0
        )
    squares = tl.zeros([BM], tl.float32)
    amax = tl.zeros([BM], tl.float32)
    for c in tl.range(0, k, BN, num_stages=STAGES):
        cols = c + tl.arange(0, BN)
        mask = ok[:, None] & (cols < k)[None, :]
        v = tl.load(h + base + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if ADD:
            v += tl.load(y + base + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            if LORA:
                b_tile = tl.load(
                    b + cols[None, :] * R + rank[:, None], mask=(cols < k)[None, :], other=0.0
                )
                v += tl.dot(t_tile, b_tile)
            rounded = v.to(total.dtype.element_ty)
            tl.store(total + base + cols[None, :], rounded, mask=mask)
            v = rounded.to(tl.float32)
        squares += tl.sum(v * v, 1)
        if QUANT:
            w = tl.load(weight + cols, mask=cols < k, other=0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.max(tl.abs(v * w[None, :]), 1))
    r = tl.rsqrt(squares / k + eps)
    tl.store(rstd + rows, r, mask=ok)
    if QUANT:
        s, inverse = inverse_scale(amax * r)
        tl.store(scale + rows, s, mask=ok)
    if ADD:
        tl.debug_barrier()  # the second pass reads what other threads of this program stored
    out_rank = tl.arange(0, RO)
    acc = tl.zeros([BM, RO], tl.float32)
    for c in tl.range(0, k, BN, num_stages=STAGES):
        cols = c + tl.arange(0, BN)
        mask = ok[:, None] & (cols < k)[None, :]
        v = tl.load(total + base + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + cols, mask=cols < k, other=0.0).to(tl.float32)
        v = v * r[:, None] * w[None, :]
        if PROJECT:
            a_tile = tl.load(
                a + out_rank[None, :] * k + cols[:, None],
                mask=(out_rank < ro)[None, :] & (cols < k)[:, None],
                other=0.0,
            )
            acc = tl.dot(v.to(a.dtype.element_ty), a_tile, acc)
        if QUANT:
            tl.store(x + base + cols[None, :], to_fp8(v * inverse[:, None]), mask=mask)
        else:
            tl.store(x + base + cols[None, :], v.to(x.dtype.element_ty), mask=mask)
    if PROJECT:
        at = t_out + rows.to(tl.int64)[:, None] * ro + out_rank[None, :]
        tl.store(at, acc.to(t_out.dtype.element_ty), mask=ok[:, None] & (out_rank < ro)[None, :])


@triton.jit(do_not_specialize=["m"])
def norm_backward(
    dx,
    dt,
    t,
    a,
    h,
    weight,
    rstd,
    residual,
    out,
    m,
    k,
    ro,
    RO: tl.constexpr,
    LORA: tl.constexpr,
    ADD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ok = rows < m
    base = rows.to(tl.int64)[:, None] * k
    rank = tl.arange(0, RO)
    if LORA:
        t_mask = ok[:, None] & (rank < ro)[None, :]
        t_tile = tl.load(
            dt + rows.to(tl.int64)[:, None] * ro + rank[None, :], mask=t_mask, other=0.0
        )
    r = tl.load(rstd + rows, mask=ok, other=0.0)
    dot = tl.zeros([BM], tl.float32)
    # sum((dt a) * w * h) = dt . (x a^T) / rstd with x a^T saved: the first pass needs no product
    if LORA:
        kept = tl.load(
            t + rows.to(tl.int64)[:, None] * ro + rank[None, :], mask=t_mask, other=0.0
        ).to(tl.float32)
        dot += tl.sum(t_tile.to(tl.float32) * kept, 1) / tl.maximum(r, 1e-30)
    for c in tl.range(0, k, BN, num_stages=STAGES):
        cols = c + tl.arange(0, BN)
        mask = ok[:, None] & (cols < k)[None, :]
        d = tl.load(dx + base + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + cols, mask=cols < k, other=0.0).to(tl.float32)
        v = tl.load(h + base + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dot += tl.sum(d * w[None, :] * v, 1)
    factor = dot * r * r * r / k
    for c in tl.range(0, k, BN, num_stages=STAGES):
        cols = c + tl.arange(0, BN)
        mask = ok[:, None] & (cols < k)[None, :]
        d = tl.load(dx + base + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if LORA:
            a_tile = tl.load(
                a + rank[:, None] * k + cols[None, :],
                mask=(rank < ro)[:, None] & (cols < k)[None, :],
                other=0.0,
            )
            d += tl.dot(t_tile, a_tile)
        w = tl.load(weight + cols, mask=cols < k, other=0.0).to(tl.float32)
        v = tl.load(h + base + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        g = d * w[None, :] * r[:, None] - v * factor[:, None]
        if ADD:
            g += tl.load(residual + base + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out + base + cols[None, :], g.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m"])
def branch_forward(
    h,
    y,
    t,
    b,
    weight,
    total,
    rstd,
    m,
    k,
    eps,
    scale,
    R: tl.constexpr,
    LORA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    ok = rows < m
    base = rows[:, None] * k
    rank = tl.arange(0, R)
    if LORA:
        t_tile = tl.load(t + rows[:, None] * R + rank[None, :], mask=ok[:, None], other=0.0)
    squares = tl.zeros([BM], tl.float32)
    for c in tl.range(0, k, BN, num_stages=STAGES):
        cols = c + tl.arange(0, BN)
        mask = ok[:, None] & (cols < k)[None, :]
        v = tl.load(y + base + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if LORA:
            b_tile = tl.load(
                b + cols[None, :] * R + rank[:, None], mask=(cols < k)[None, :], other=0.0
            )
            v += tl.dot(t_tile, b_tile)
            rounded = v.to(y.dtype.element_ty)
            tl.store(y + base + cols[None, :], rounded, mask=mask)
            v = rounded.to(tl.float32)
        squares += tl.sum(v * v, 1)
    r = tl.rsqrt(squares / k + eps)
    tl.store(rstd + rows, r, mask=ok)
    if LORA:
        tl.debug_barrier()  # the second pass reads what other threads of this program stored
    for c in tl.range(0, k, BN, num_stages=STAGES):
        cols = c + tl.arange(0, BN)
        mask = ok[:, None] & (cols < k)[None, :]
        v = tl.load(y + base + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + cols, mask=cols < k, other=0.0).to(tl.float32)
        v = v * r[:, None] * w[None, :]
        v += tl.load(h + base + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(total + base + cols[None, :], (v * scale).to(total.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m"])
def rope_forward(
    qkv,
    t,
    b,
    bias,
    cos,
    sin,
    out,
    norms,
    eps,
    m,
    s,
    heads,
    kv_heads,
    touched,
    R: tl.constexpr,
    HALF: tl.constexpr,
    LORA: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    VALUES: tl.constexpr,
    PAIRS: tl.constexpr,
    BM: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    STEP: tl.constexpr = 2 if PAIRS else 1
    OTHER: tl.constexpr = 1 if PAIRS else HALF
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    ok = rows[:, None] < m
    d = tl.arange(0, HALF)
    rank = tl.arange(0, R)
    c = tl.load(cos + rows[:, None] * (2 * HALF) + d[None, :], mask=ok, other=0.0).to(tl.float32)
    n = tl.load(sin + rows[:, None] * (2 * HALF) + d[None, :], mask=ok, other=0.0).to(tl.float32)
    first = tl.program_id(1) * HEADS
    for head in tl.range(first, tl.minimum(first + HEADS, touched), num_stages=STAGES):
        segment = (head >= heads).to(tl.int32) + (head >= heads + kv_heads).to(tl.int32)
        column = head * (2 * HALF) + d * STEP
        at = qkv + rows[:, None] * s + column[None, :]
        low = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        high = tl.load(at + OTHER, mask=ok, other=0.0).to(tl.float32)
        if LORA:
            t_tile = tl.load(
                t + rows[:, None] * (3 * R) + segment * R + rank[None, :], mask=ok, other=0.0
            )
            b_at = b + column[None, :] * R + rank[:, None]
            low += tl.dot(t_tile, tl.load(b_at))
            high += tl.dot(t_tile, tl.load(b_at + OTHER * R))
        if BIAS:
            low += tl.load(bias + column).to(tl.float32)[None, :]
            high += tl.load(bias + column + OTHER).to(tl.float32)[None, :]
        turn = (segment < 2).to(tl.float32)  # v is not turned: cos 1, sin 0
        to, store = at, ok
        if NORM:
            if LORA or BIAS:
                kept = low.to(qkv.dtype.element_ty)
                tl.store(at, kept, mask=ok)
                low = kept.to(tl.float32)
                kept = high.to(qkv.dtype.element_ty)
                tl.store(at + OTHER, kept, mask=ok)
                high = kept.to(tl.float32)
            r = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)
            w = norms + segment * (2 * HALF) + d * STEP
            low = low * r[:, None] * tl.load(w)[None, :]
            high = high * r[:, None] * tl.load(w + OTHER)[None, :]
            to = out + rows[:, None] * s + column[None, :]
            if not VALUES:
                store = ok & (segment < 2)
        cc = c * turn + (1.0 - turn)
        nn = n * turn
        tl.store(to, (low * cc - high * nn).to(qkv.dtype.element_ty), mask=store)
        tl.store(to + OTHER, (high * cc + low * nn).to(qkv.dtype.element_ty), mask=store)


@triton.jit(do_not_specialize=["m"])
def head_norm_backward(
    grad,
    qkv,
    cos,
    sin,
    norms,
    eps,
    m,
    s,
    heads,
    kv_heads,
    touched,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    BM: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    STEP: tl.constexpr = 2 if PAIRS else 1
    OTHER: tl.constexpr = 1 if PAIRS else HALF
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    ok = rows[:, None] < m
    d = tl.arange(0, HALF)
    c = tl.load(cos + rows[:, None] * (2 * HALF) + d[None, :], mask=ok, other=0.0).to(tl.float32)
    n = tl.load(sin + rows[:, None] * (2 * HALF) + d[None, :], mask=ok, other=0.0).to(tl.float32)
    first = tl.program_id(1) * HEADS
    for head in tl.range(first, tl.minimum(first + HEADS, touched), num_stages=STAGES):
        segment = (head >= heads).to(tl.int32) + (head >= heads + kv_heads).to(tl.int32)
        turn = (segment < 2).to(tl.float32)
        cc = c * turn + (1.0 - turn)
        nn = n * turn
        at = rows[:, None] * s + (head * (2 * HALF) + d * STEP)[None, :]
        low = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
        high = tl.load(grad + at + OTHER, mask=ok, other=0.0).to(tl.float32)
        w = norms + segment * (2 * HALF) + d * STEP
        g_low = (low * cc + high * nn) * tl.load(w)[None, :]
        g_high = (high * cc - low * nn) * tl.load(w + OTHER)[None, :]
        low = tl.load(qkv + at, mask=ok, other=0.0).to(tl.float32)
        high = tl.load(qkv + at + OTHER, mask=ok, other=0.0).to(tl.float32)
        r = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)
        mean = (tl.sum(g_low * low, 1) + tl.sum(g_high * high, 1)) * r * r / (2 * HALF)
        g_low = r[:, None] * (g_low - low * mean[:, None])
        g_high = r[:, None] * (g_high - high * mean[:, None])
        tl.store(grad + at, g_low.to(grad.dtype.element_ty), mask=ok)
        tl.store(grad + at + OTHER, g_high.to(grad.dtype.element_ty), mask=ok)


@triton.jit
def _rope_back_segment(
    src,
    b,
    column_scale,
    out,
    rows,
    ok,
    c,
    n,
    count,
    first,
    s,
    acc,
    amax,
    R: tl.constexpr,
    HALF: tl.constexpr,
    LORA: tl.constexpr,
    QUANT: tl.constexpr,
    ROTATE: tl.constexpr,
    PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One of q, k, v: undo the rotation of its heads, store them in ``out``, and accumulate the
    LoRA product and the row maximum."""
    STEP: tl.constexpr = 2 if PAIRS else 1
    OTHER: tl.constexpr = 1 if PAIRS else HALF
    d = tl.arange(0, HALF) * STEP
    rank = tl.arange(0, R)
    for head in tl.range(0, count, num_stages=STAGES):
        at = src + rows[:, None] * (count * 2 * HALF) + head * (2 * HALF) + d[None, :]
        low = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        high = tl.load(at + OTHER, mask=ok, other=0.0).to(tl.float32)
        if ROTATE:
            turned = low * c + high * n
            high = high * c - low * n
            low = turned
        column = (first + head) * (2 * HALF) + d
        low_r = low.to(out.dtype.element_ty)
        high_r = high.to(out.dtype.element_ty)
        to = out + rows[:, None] * s + column[None, :]
        tl.store(to, low_r, mask=ok)
        tl.store(to + OTHER, high_r, mask=ok)
        if LORA:
            b_at = b + column[:, None] * R + rank[None, :]
            acc = tl.dot(low_r, tl.load(b_at), acc)
            acc = tl.dot(high_r, tl.load(b_at + OTHER * R), acc)
        if QUANT:
            amax = tl.maximum(
                amax,
                tl.max(tl.abs(low_r.to(tl.float32) * tl.load(column_scale + column)[None, :]), 1),
            )
            amax = tl.maximum(
                amax,
                tl.max(
                    tl.abs(high_r.to(tl.float32) * tl.load(column_scale + column + OTHER)[None, :]),
                    1,
                ),
            )
    return acc, amax


@triton.jit(do_not_specialize=["m"])
def rope_backward(
    dq,
    dk,
    dv,
    cos,
    sin,
    b,
    column_scale,
    out,
    scale,
    dt,
    m,
    s,
    heads,
    kv_heads,
    R: tl.constexpr,
    HALF: tl.constexpr,
    LORA: tl.constexpr,
    QUANT: tl.constexpr,
    PAIRS: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    ok = rows[:, None] < m
    d = tl.arange(0, HALF)
    rank = tl.arange(0, R)
    c = tl.load(cos + rows[:, None] * (2 * HALF) + d[None, :], mask=ok, other=0.0).to(tl.float32)
    n = tl.load(sin + rows[:, None] * (2 * HALF) + d[None, :], mask=ok, other=0.0).to(tl.float32)
    amax = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, R], tl.float32)
    acc, amax = _rope_back_segment(
        dq,
        b,
        column_scale,
        out,
        rows,
        ok,
        c,
        n,
        heads,
        0,
        s,
        acc,
        amax,
        R,
        HALF,
        LORA,
        QUANT,
        True,
        PAIRS,
        STAGES,
    )
    if LORA:
        to = dt + rows[:, None] * (3 * R) + rank[None, :]
        tl.store(to, acc.to(dt.dtype.element_ty), mask=ok)
    acc = tl.zeros([BM, R], tl.float32)
    acc, amax = _rope_back_segment(
        dk,
        b,
        column_scale,
        out,
        rows,
        ok,
        c,
        n,
        kv_heads,
        heads,
        s,
        acc,
        amax,
        R,
        HALF,
        LORA,
        QUANT,
        True,
        PAIRS,
        STAGES,
    )
    if LORA:
        tl.store(to + R, acc.to(dt.dtype.element_ty), mask=ok)
    acc = tl.zeros([BM, R], tl.float32)
    acc, amax = _rope_back_segment(
        dv,
        b,
        column_scale,
        out,
        rows,
        ok,
        c,
        n,
        kv_heads,
        heads + kv_heads,
        s,
        acc,
        amax,
        R,
        HALF,
        LORA,
        QUANT,
        False,
        PAIRS,
        STAGES,
    )
    if LORA:
        tl.store(to + 2 * R, acc.to(dt.dtype.element_ty), mask=ok)
    if QUANT:
        factor, _ = inverse_scale(amax)
        tl.store(scale + rows, factor, mask=rows < m)


@triton.jit
def _gelu(g):
    """gelu in its tanh approximation, and its derivative."""
    inner = 0.7978845608028654 * g * (1.0 + 0.044715 * g * g)
    t = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
    half = 0.5 * (1.0 + t)
    slope = half + 0.5 * g * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * g * g)
    return g * half, slope


@triton.jit(do_not_specialize=["m"])
def swiglu_forward(
    gu,
    t,
    b,
    a,
    act,
    scale,
    t_out,
    m,
    f,
    ro,
    R: tl.constexpr,
    RO: tl.constexpr,
    LORA: tl.constexpr,
    PROJECT: tl.constexpr,
    QUANT: tl.constexpr,
    GELU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    ok = rows[:, None] < m
    rank = tl.arange(0, R)
    out_rank = tl.arange(0, RO)
    if LORA:
        t_gate = tl.load(t + rows[:, None] * (2 * R) + rank[None, :], mask=ok, other=0.0)
        t_up = tl.load(t + rows[:, None] * (2 * R) + R + rank[None, :], mask=ok, other=0.0)
    acc = tl.zeros([BM, RO], tl.float32)
    amax = tl.zeros([BM], tl.float32)
    for c in tl.range(0, f, BN, num_stages=STAGES):
        cols = c + tl.arange(0, BN)
        mask = ok & (cols < f)[None, :]
        at = gu + rows[:, None] * (2 * f) + cols[None, :]
        g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(at + f, mask=mask, other=0.0).to(tl.float32)
        if LORA:
            b_at = b + cols[None, :] * R + rank[:, None]
            g += tl.dot(t_gate, tl.load(b_at, mask=(cols < f)[None, :], other=0.0))
            u += tl.dot(t_up, tl.load(b_at + f * R, mask=(cols < f)[None, :], other=0.0))
        if GELU:
            gated, _ = _gelu(g)
        else:
            gated = g * tl.sigmoid(g)
        v = (gated * u).to(act.dtype.element_ty)
        tl.store(act + rows[:, None] * f + cols[None, :], v, mask=mask)
        if PROJECT:
            a_tile = tl.load(
                a + out_rank[None, :] * f + cols[:, None],
                mask=(cols < f)[:, None] & (out_rank < ro)[None, :],
                other=0.0,
            )
            acc = tl.dot(v, a_tile, acc)
        if QUANT:
            amax = tl.maximum(amax, tl.max(tl.abs(v.to(tl.float32)), 1))
    if PROJECT:
        tl.store(
            t_out + rows[:, None] * ro + out_rank[None, :],
            acc.to(t_out.dtype.element_ty),
            mask=ok & (out_rank < ro)[None, :],
        )
    if QUANT:
        s, _ = inverse_scale(amax)
        tl.store(scale + rows, s, mask=rows < m)


@triton.jit(do_not_specialize=["m"])
def swiglu_backward(
    gu,
    t,
    b,
    dact,
    dt,
    a,
    column_scale,
    scale,
    dt_out,
    m,
    f,
    R: tl.constexpr,
    RD: tl.constexpr,
    LORA: tl.constexpr,
    DOWN: tl.constexpr,
    QUANT: tl.constexpr,
    GELU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    ok = rows[:, None] < m
    rank = tl.arange(0, R)
    down_rank = tl.arange(0, RD)
    if LORA:
        t_gate = tl.load(t + rows[:, None] * (2 * R) + rank[None, :], mask=ok, other=0.0)
        t_up = tl.load(t + rows[:, None] * (2 * R) + R + rank[None, :], mask=ok, other=0.0)
    if DOWN:
        t_down = tl.load(dt + rows[:, None] * RD + down_rank[None, :], mask=ok, other=0.0)
    acc_gate = tl.zeros([BM, R], tl.float32)
    acc_up = tl.zeros([BM, R], tl.float32)
    amax = tl.zeros([BM], tl.float32)
    for c in tl.range(0, f, BN, num_stages=STAGES):
        cols = c + tl.arange(0, BN)
        mask = ok & (cols < f)[None, :]
        at = gu + rows[:, None] * (2 * f) + cols[None, :]
        g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(at + f, mask=mask, other=0.0).to(tl.float32)
        da = tl.load(dact + rows[:, None] * f + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if LORA:
            b_at = b + cols[None, :] * R + rank[:, None]
            g += tl.dot(t_gate, tl.load(b_at, mask=(cols < f)[None, :], other=0.0))
            u += tl.dot(t_up, tl.load(b_at + f * R, mask=(cols < f)[None, :], other=0.0))
        if DOWN:
            da += tl.dot(
                t_down,
                tl.load(
                    a + down_rank[:, None] * f + cols[None, :], mask=(cols < f)[None, :], other=0.0
                ),
            )
        if GELU:
            gated, slope = _gelu(g)
        else:
            sig = tl.sigmoid(g)
            gated = g * sig
            slope = sig * (1.0 + g * (1.0 - sig))
        tl.store(
            dact + rows[:, None] * f + cols[None, :],
            (gated * u).to(dact.dtype.element_ty),
            mask=mask,
        )
        dg = (da * u * slope).to(gu.dtype.element_ty)
        du = (da * gated).to(gu.dtype.element_ty)
        tl.store(at, dg, mask=mask)
        tl.store(at + f, du, mask=mask)
        if LORA:
            back = b + cols[:, None] * R + rank[None, :]
            acc_gate = tl.dot(dg, tl.load(back, mask=(cols < f)[:, None], other=0.0), acc_gate)
            acc_up = tl.dot(du, tl.load(back + f * R, mask=(cols < f)[:, None], other=0.0), acc_up)
        if QUANT:
            wg = tl.load(column_scale + cols, mask=cols < f, other=0.0)
            wu = tl.load(column_scale + f + cols, mask=cols < f, other=0.0)
            amax = tl.maximum(amax, tl.max(tl.abs(dg.to(tl.float32) * wg[None, :]), 1))
            amax = tl.maximum(amax, tl.max(tl.abs(du.to(tl.float32) * wu[None, :]), 1))
    if LORA:
        to = dt_out + rows[:, None] * (2 * R) + rank[None, :]
        tl.store(to, acc_gate.to(dt_out.dtype.element_ty), mask=ok)
        tl.store(to + R, acc_up.to(dt_out.dtype.element_ty), mask=ok)
    if QUANT:
        s, _ = inverse_scale(amax)
        tl.store(scale + rows, s, mask=rows < m)


@triton.jit(do_not_specialize=["m"])
def residual_add(
    h, y, t, b, out, m, k, R: tl.constexpr, LORA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (rows[:, None] < m) & (cols < k)[None, :]
    at = rows[:, None] * k + cols[None, :]
    v = tl.load(h + at, mask=mask, other=0.0).to(tl.float32) + tl.load(
        y + at, mask=mask, other=0.0
    ).to(tl.float32)
    if LORA:
        rank = tl.arange(0, R)
        t_tile = tl.load(t + rows[:, None] * R + rank[None, :], mask=rows[:, None] < m, other=0.0)
        v += tl.dot(
            t_tile,
            tl.load(b + cols[None, :] * R + rank[:, None], mask=(cols < k)[None, :], other=0.0),
        )
    tl.store(out + at, v.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _logits(at, mask, other, scale, cap, CAP: tl.constexpr):
    """x scale; with CAP cap tanh(x scale / cap)."""
    x = tl.load(at, mask=mask, other=other).to(tl.float32) * scale
    if CAP:
        x = cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0)
        x = tl.where(mask, x, other)
    return x


@triton.jit
def cross_entropy_rows(
    logits, targets, loss, grad, v, scale, cap, CAP: tl.constexpr, BN: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    best = -float("inf")
    total = 0.0
    for c in range(0, v, BN):
        cols = c + tl.arange(0, BN)
        x = _logits(logits + row * v + cols, cols < v, -float("inf"), scale, cap, CAP)
        new = tl.maximum(best, tl.max(x, 0))
        total = total * tl.exp(best - new) + tl.sum(tl.exp(x - new), 0)
        best = new
    counted = target >= 0
    lse = best + tl.log(total)
    picked = _logits(logits + row * v + tl.maximum(target, 0), True, 0.0, scale, cap, CAP)
    tl.store(loss + row, tl.where(counted, lse - picked, 0.0))
    for c in range(0, v, BN):
        cols = c + tl.arange(0, BN)
        x = _logits(logits + row * v + cols, cols < v, 0.0, scale, cap, CAP)
        p = (tl.exp(x - lse) - tl.where(cols == target, 1.0, 0.0)) * scale
        if CAP:
            p *= 1.0 - (x / cap) * (x / cap)
        tl.store(
            grad + row * v + cols,
            tl.where(counted, p, 0.0).to(grad.dtype.element_ty),
            mask=cols < v,
        )


@triton.jit
def log_prob_rows(
    logits, targets, log_probs, entropies, v, scale, cap, CAP: tl.constexpr, BN: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    best = -float("inf")
    total = 0.0
    weighed = 0.0  # sum of exp(x - best) x
    for c in range(0, v, BN):
        cols = c + tl.arange(0, BN)
        x = _logits(logits + row * v + cols, cols < v, -float("inf"), scale, cap, CAP)
        new = tl.maximum(best, tl.max(x, 0))
        e = tl.exp(x - new)
        kept = tl.exp(best - new)
        total = total * kept + tl.sum(e, 0)
        weighed = weighed * kept + tl.sum(e * tl.where(cols < v, x, 0.0), 0)
        best = new
    lse = best + tl.log(total)
    picked = _logits(logits + row * v + tl.load(targets + row), True, 0.0, scale, cap, CAP)
    tl.store(log_probs + row, picked - lse)
    tl.store(entropies + row, lse - weighed / total)


@triton.jit
def dequantise_nf4(packed, absmax, codebook, out, n_bytes, BLOCK: tl.constexpr, BN: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    mask = at < n_bytes
    pair = tl.load(packed + at, mask=mask, other=0).to(tl.int32)
    scale = tl.load(absmax + at // (BLOCK // 2), mask=mask, other=0.0)
    high = tl.load(codebook + (pair >> 4)) * scale
    low = tl.load(codebook + (pair & 15)) * scale
    both = tl.interleave(high, low)
    to = tl.program_id(0).to(tl.int64) * (2 * BN) + tl.arange(0, 2 * BN)
    tl.store(out + to, both.to(out.dtype.element_ty), mask=to < 2 * n_bytes)


@triton.jit
def transpose_bytes(src, out, n, k, B: tl.constexpr):
    i = (tl.program_id(0) * B + tl.arange(0, B)).to(tl.int64)
    j = (tl.program_id(1) * B + tl.arange(0, B)).to(tl.int64)
    tile = tl.load(
        src + i[:, None] * k + j[None, :], mask=(i[:, None] < n) & (j[None, :] < k), other=0
    )
    tl.store(
        out + j[:, None] * n + i[None, :], tl.trans(tile), mask=(j[:, None] < k) & (i[None, :] < n)
    )
