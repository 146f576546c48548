"""The device code of ``trainer/kernels/step_ops.py``, which describes it. One row is one token of
one answer. Arguments in capitals are compile-time constants.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_norm(
    h,
    y,
    more,
    branch,
    weight,
    total,
    x,
    k,
    branch_eps,
    eps,
    out_scale,
    ADD: tl.constexpr,
    MORE: tl.constexpr,
    BRANCH: tl.constexpr,
    NORM: tl.constexpr,
    BN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BN)
    mask = cols < k
    v = tl.load(h + row * k + cols, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        z = tl.load(y + row * k + cols, mask=mask, other=0.0).to(tl.float32)
        if MORE:
            z += tl.load(more + row * k + cols, mask=mask, other=0.0).to(tl.float32)
        if BRANCH:
            r = tl.rsqrt(tl.sum(z * z, 0) / k + branch_eps)
            z = z * r * tl.load(branch + cols, mask=mask, other=0.0).to(tl.float32)
        rounded = ((v + z) * out_scale).to(total.dtype.element_ty)
        tl.store(total + row * k + cols, rounded, mask=mask)
        v = rounded.to(tl.float32)
    if NORM:
        r = tl.rsqrt(tl.sum(v * v, 0) / k + eps)
        w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(x + row * k + cols, (v * r * w).to(x.dtype.element_ty), mask=mask)


@triton.jit
def turn_and_keep(
    qkv,
    more,
    bias,
    cos,
    sin,
    norms,
    q_out,
    keys,
    values,
    slots,
    positions,
    longest,
    heads,
    kv_heads,
    eps,
    MORE: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    VALUES: tl.constexpr,
    PAIRS: tl.constexpr,
    D: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    segment = (head >= heads).to(tl.int32) + (head >= heads + kv_heads).to(tl.int32)
    d = tl.arange(0, D)
    if PAIRS:
        other, angle, first = d ^ 1, d // 2, d % 2 == 0
    else:
        other, angle, first = (d + HALF) % D, d % HALF, d < HALF
    at = row * (heads + 2 * kv_heads) * D + head * D
    x = tl.load(qkv + at + d).to(tl.float32)
    o = tl.load(qkv + at + other).to(tl.float32)
    if MORE:
        x += tl.load(more + at + d).to(tl.float32)
        o += tl.load(more + at + other).to(tl.float32)
    if BIAS:
        x += tl.load(bias + head * D + d).to(tl.float32)
        o += tl.load(bias + head * D + other).to(tl.float32)
    if NORM:
        x, o = x.to(qkv.dtype.element_ty).to(tl.float32), o.to(qkv.dtype.element_ty).to(tl.float32)
    if NORM:
        r = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        w = norms + segment * D
        if VALUES:
            x, o = x * r * tl.load(w + d), o * r * tl.load(w + other)
        else:
            normed = segment < 2
            x = tl.where(normed, x * r * tl.load(w + d), x)
            o = tl.where(normed, o * r * tl.load(w + other), o)
    turn = (segment < 2).to(tl.float32)  # v is not turned: cos 1, sin 0
    c = tl.load(cos + row * D + angle).to(tl.float32) * turn + (1.0 - turn)
    n = tl.load(sin + row * D + angle).to(tl.float32) * turn
    found = (x * c + tl.where(first, -o, o) * n).to(q_out.dtype.element_ty)
    slot, position = tl.load(slots + row), tl.load(positions + row)
    kept = (slot * longest + position) * kv_heads
    if segment == 0:
        # [row, head of its group, group]: a group's queries form one document
        group = heads // kv_heads
        place = (row * group + head % group) * kv_heads + head // group
        tl.store(q_out + place * D + d, found)
    elif segment == 1:
        tl.store(keys + (kept + head - heads) * D + d, found)
    else:
        tl.store(values + (kept + head - heads - kv_heads) * D + d, found)


@triton.jit
def gate(gu, more, act, f, MORE: tl.constexpr, GELU: tl.constexpr, BN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = cols < f
    at = row * 2 * f + cols
    g = tl.load(gu + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gu + at + f, mask=mask, other=0.0).to(tl.float32)
    if MORE:
        g += tl.load(more + at, mask=mask, other=0.0).to(tl.float32)
        u += tl.load(more + at + f, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        g = g * tl.sigmoid(2.0 * inner)  # the tanh approximation
    else:
        g = g * tl.sigmoid(g)
    tl.store(act + row * f + cols, (g * u).to(act.dtype.element_ty), mask=mask)
