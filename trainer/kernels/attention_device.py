"""Device code of attention for short packed documents; ``trainer/kernels/attention_short.py``
launches it. Arguments in capitals are compile-time constants.

A tile is a run of consecutive tokens of the pack, whatever documents they belong to, and reads only
keys from its first token's document on. So no tile is partly empty, and no list of tiles is needed.
A row is a (token, head) pair: the G query heads of one key head lie side by side, so with grouped
heads a tile covers fewer tokens. ``first`` and ``past`` [M] are the first token of each token's
document and the one after its last; both include the window. Loops read through tensor descriptors
(the copy engine of Hopper and newer, plain loads elsewhere), which leaves twice the registers to
the products. Rows of q, k, v are s values apart.

G need not be a power of two. Where rows are loaded one by one, a tile holds BM // G tokens and
leaves the remaining rows idle. Where the copy engine loads them, the heads of a token are padded to
PAD, and heads of another key head are masked. LIMIT caps scores at limit tanh(x / limit), in powers
of two. SINKS starts each row's sum with one term whose value is zero. PAIRS: rotary pairs are
neighbours, not halves apart.

With SHARED, ``lent`` int32 [3, M] says of each token which tokens of another document its own
document reads too: the first of them, the one after the last (both M where it reads none), and the
one after the last token that reads this one. Documents that read the same one follow it, with
nothing between. A tile then runs over the borrowed keys before its first token's document, and
after them over its own.

A program computes DO of a head's D output columns, because an accumulator of 512 columns does not
fit the registers. The scores are recomputed for each such part.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

# below every score, but finite: the maximum of a row before its first key
NOTHING = tl.constexpr(-1.0e30)


@triton.jit
def _rows(begin, m, kv_head, G: tl.constexpr, BM: tl.constexpr):
    """Token and query head of each of BM rows, and which of them exist."""
    at = tl.arange(0, BM)
    token = begin + at // G
    held = (token < m) & (at < BM // G * G)
    return tl.minimum(token, m - 1), kv_head * G + at % G, held


@triton.jit
def _capped(x, limit):
    """limit tanh(x / limit)."""
    return limit * (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.8853900817779268 / limit))))


@triton.jit
def _reach(first, begin, m, TOKENS: tl.constexpr):
    """(first key, the one after the last, limit) of a tile of TOKENS: blocks that end at or before
    ``limit`` need no mask."""
    end = tl.minimum(begin + TOKENS, m)
    low = tl.load(first + begin)
    return low, end, tl.where(tl.load(first + end - 1) == low, begin + 1, 0)


@triton.jit
def _borrowed(theirs, until, m, own, alone, BN: tl.constexpr):
    """Of a tile whose own keys begin at ``own``: (first value of the loop, what a value below
    ``own`` is short of its key, the key after the last borrowed one, limit as ``_reach``'s)."""
    before = theirs < own
    front = tl.min(tl.where(before, theirs, m), 0)
    last = tl.max(tl.where(before, until, front), 0)
    low = own - (last - front + BN - 1) // BN * BN
    return low, front - low, last, tl.where(alone > 0, last, 0)


@triton.jit
def _seen(keys, start, room, theirs, until, stop, SHARED: tl.constexpr):
    """[rows, keys]: the keys of a row's document up to its token, and the borrowed ones. Unsigned,
    so that one comparison excludes both later and earlier keys."""
    seen = (keys[None, :] - start[:, None]).to(tl.uint32) <= room[:, None]
    if SHARED:
        wide = (until - theirs).to(tl.uint32)
        seen |= (keys[None, :] - theirs[:, None]).to(tl.uint32) < wide[:, None]
        seen &= (keys < stop)[None, :]
    return seen


@triton.jit(do_not_specialize=["m"])
def attention_forward(
    q,
    k,
    v,
    first,
    out,
    lse,
    m,
    lm,
    s,
    kv_heads,
    scale,
    limit,
    sinks,
    lent,
    G: tl.constexpr,
    D: tl.constexpr,
    DO: tl.constexpr,
    LIMIT: tl.constexpr,
    SINKS: tl.constexpr,
    SHARED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes out [M, H, D] and lse [H, lm], the latter in powers of two. k is a descriptor of [BN,
    D], v of [BN, DO]."""
    kv_head = tl.program_id(0)
    part = tl.program_id(2) * DO
    begin = tl.program_id(1) * (BM // G)
    token, head, ok = _rows(begin, m, kv_head, G, BM)
    d = tl.arange(0, D)
    start = tl.load(first + token)
    q_tile = tl.load(
        q + token[:, None] * s + (head * D)[:, None] + d[None, :], mask=ok[:, None], other=0.0
    )
    room = (token - start).to(tl.uint32)
    if SINKS:
        best = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        total = tl.full([BM], 1.0, tl.float32)
    else:
        best = tl.full([BM], NOTHING, tl.float32)
        total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DO], tl.float32)
    unit = 1.0 if LIMIT else scale
    low, end, alone = _reach(first, begin, m, BM // G)
    own = low
    theirs, until = start, start
    if SHARED:
        theirs, until = tl.load(lent + token), tl.load(lent + m + token)
        low, skipped, last, alone_there = _borrowed(theirs, until, m, own, alone, BN)
    for c in tl.range(low, end, BN, num_stages=STAGES):
        at, stop, bound = c, end, alone
        if SHARED:
            at = tl.where(c < own, c + skipped, c)
            stop = tl.where(c < own, last, end)
            bound = tl.where(c < own, alone_there, alone)
        x = tl.dot(q_tile, k.load([at, kv_head * D]).T)
        if LIMIT:
            x = _capped(x * scale, limit)
        if at + BN > bound:
            keys = at + tl.arange(0, BN)
            seen = _seen(keys, start, room, theirs, until, stop, SHARED)
            x = tl.where(seen, x, -float("inf"))
        new = tl.maximum(best, tl.max(x, 1) * unit)
        p = tl.exp2(x * unit - new[:, None])
        shrink = tl.exp2(best - new)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(q_tile.dtype), v.load([at, kv_head * D + part]), acc * shrink[:, None])
        best = new
    columns = part + tl.arange(0, DO)
    to = out + token[:, None] * (kv_heads * G * D) + (head * D)[:, None] + columns[None, :]
    tl.store(to, (acc * (1.0 / total)[:, None]).to(out.dtype.element_ty), mask=ok[:, None])
    tl.store(lse + head * lm + token, best + tl.log2(total), mask=ok & (part == 0))


@triton.jit
def _turn_back(x, cos, sin, token, ROWS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr):
    """Backward of rotary embedding: the gradient x [ROWS, D] of the rotated vector -> the gradient
    of the vector."""
    HALF: tl.constexpr = D // 2
    at = token[:, None] * D + tl.arange(0, HALF)[None, :]
    c = tl.load(cos + at).to(tl.float32)
    n = tl.load(sin + at).to(tl.float32)
    if PAIRS:
        low, high = tl.split(tl.reshape(x, (ROWS, HALF, 2)))
    else:
        low, high = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))
    both = tl.join(low * c + high * n, high * c - low * n)
    if not PAIRS:
        both = tl.permute(both, (0, 2, 1))
    return tl.reshape(both, (ROWS, D))


@triton.jit(do_not_specialize=["m"])
def attention_backward_q(
    q,
    k,
    k_part,
    v,
    first,
    out,
    dout,
    lse,
    delta,
    dq,
    cos,
    sin,
    m,
    lm,
    s,
    ds,
    kv_heads,
    scale,
    back_scale,
    limit,
    lent,
    G: tl.constexpr,
    D: tl.constexpr,
    DO: tl.constexpr,
    TURN: tl.constexpr,
    PAIRS: tl.constexpr,
    LIMIT: tl.constexpr,
    SHARED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes dq, its rows ds values apart, and delta [H, lm], the sums of dout * out, which
    ``attention_backward_kv`` reads."""
    kv_head = tl.program_id(0)
    part = tl.program_id(2) * DO
    begin = tl.program_id(1) * (BM // G)
    token, head, ok = _rows(begin, m, kv_head, G, BM)
    d = tl.arange(0, D)
    start = tl.load(first + token)
    q_tile = tl.load(
        q + token[:, None] * s + (head * D)[:, None] + d[None, :], mask=ok[:, None], other=0.0
    )
    of_out = token[:, None] * (kv_heads * G * D) + (head * D)[:, None] + d[None, :]
    do_tile = tl.load(dout + of_out, mask=ok[:, None], other=0.0)
    if DO == D:
        o_tile = tl.load(out + of_out, mask=ok[:, None], other=0.0)
        sums = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    else:
        sums = tl.zeros([BM], tl.float32)
        few = tl.arange(0, 64)
        for c in range(0, D, 64):
            near = token[:, None] * (kv_heads * G * D) + (head * D)[:, None] + c + few[None, :]
            one = tl.load(dout + near, mask=ok[:, None], other=0.0).to(tl.float32)
            sums += tl.sum(one * tl.load(out + near, mask=ok[:, None], other=0.0).to(tl.float32), 1)
    of_row = head * lm + token
    tl.store(delta + of_row, sums, mask=ok & (part == 0))
    log = tl.load(lse + of_row)
    room = (token - start).to(tl.uint32)
    acc = tl.zeros([BM, DO], tl.float32)
    low, end, alone = _reach(first, begin, m, BM // G)
    own = low
    theirs, until = start, start
    if SHARED:
        theirs, until = tl.load(lent + token), tl.load(lent + m + token)
        low, skipped, last, _ = _borrowed(theirs, until, m, own, alone, BN)
    for c in tl.range(low, end, BN, num_stages=STAGES):
        at, stop = c, end
        if SHARED:
            at = tl.where(c < own, c + skipped, c)
            stop = tl.where(c < own, last, end)
        keys = at + tl.arange(0, BN)
        k_tile = k.load([at, kv_head * D])
        x = tl.dot(q_tile, k_tile.T) * scale
        if LIMIT:
            x = _capped(x, limit)
            slope = 1.0 - (x / limit) * (x / limit)
        seen = _seen(keys, start, room, theirs, until, stop, SHARED)
        p = tl.exp2(tl.where(seen, x - log[:, None], -float("inf")))
        dp = tl.dot(do_tile, v.load([at, kv_head * D]).T)
        change = p * (dp - sums[:, None])
        if LIMIT:
            change *= slope
        if DO != D:
            k_tile = k_part.load([at, kv_head * D + part])
        acc = tl.dot(change.to(q_tile.dtype), k_tile, acc)
    acc *= back_scale
    if TURN:
        acc = _turn_back(acc, cos, sin, token, BM, D, PAIRS)
    to = dq + token[:, None] * ds + (head * D + part)[:, None] + tl.arange(0, DO)[None, :]
    tl.store(to, acc.to(dq.dtype.element_ty), mask=ok[:, None])


@triton.jit(do_not_specialize=["m"])
def attention_backward_kv(
    q,
    q_part,
    do_part,
    k,
    v,
    past,
    dout,
    lse,
    delta,
    lse_rows,
    delta_rows,
    lm,
    dk,
    dv,
    cos,
    sin,
    m,
    s,
    ds,
    kv_heads,
    scale,
    back_scale,
    limit,
    lent,
    G: tl.constexpr,
    D: tl.constexpr,
    DO: tl.constexpr,
    TURN: tl.constexpr,
    PAIRS: tl.constexpr,
    LIMIT: tl.constexpr,
    SHARED: tl.constexpr,
    PAD: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Writes dk (with DK) and dv (with DV) of BN keys, their rows ds values apart. Wide heads take
    two launches, because both accumulators do not fit the registers. Everything is transposed, so
    that the products' left sides stay in registers. q and dout are descriptors of [BM / PAD, PAD,
    D], lse and delta of [PAD, BM / PAD]; where the latter are shorter than the engine's 16 bytes
    they are read from [H, lm]."""
    kv_head = tl.program_id(0)
    part = tl.program_id(2) * DO
    begin = tl.program_id(1) * BN
    keys = begin + tl.arange(0, BN)
    held = keys < m
    d = tl.arange(0, D)
    at = keys[:, None] * s + kv_head * D + d[None, :]
    k_tile = tl.load(k + at, mask=held[:, None], other=0.0)
    stop = tl.load(past + keys, mask=held, other=0)
    if DK:
        v_tile = tl.load(v + at, mask=held[:, None], other=0.0)
        dk_acc = tl.zeros([BN, DO], tl.float32)
    if DV:
        dv_acc = tl.zeros([BN, DO], tl.float32)
    row = tl.arange(0, BM)
    end = tl.load(past + tl.minimum(begin + BN, m) - 1)
    # keys of several documents: every block needs the mask
    above = tl.where(tl.load(past + begin) == end, end, 0)
    if SHARED:
        end = tl.max(tl.load(lent + 2 * m + keys, mask=held, other=0), 0)
    for c in tl.range(begin, end, BM // PAD, num_stages=STAGES):
        q_tile = tl.reshape(q.load([c, kv_head * G, 0]), (BM, D))
        if DK or DO == D:
            do_tile = tl.reshape(dout.load([c, kv_head * G, 0]), (BM, D))
        if BM // PAD < 4:
            near = (kv_head * G + row % PAD) * lm + c + row // PAD
            there = (row % PAD < G) & (c + row // PAD < m)
            log = tl.load(lse_rows + near, mask=there, other=0.0)
        else:
            log = tl.reshape(tl.permute(lse.load([kv_head * G, c]), (1, 0)), (BM,))
        x = tl.dot(k_tile, q_tile.T) * scale
        if LIMIT:
            x = _capped(x, limit)
            slope = 1.0 - (x / limit) * (x / limit)
        x -= log[None, :]
        if (c < begin + BN - 1) | (c + BM // PAD > above):
            token = c + row // PAD
            seen = (keys[:, None] <= token[None, :]) & (token[None, :] < stop[:, None])
            if SHARED:
                theirs = tl.load(lent + token, mask=token < m, other=0)
                wide = tl.load(lent + m + token, mask=token < m, other=0) - theirs
                ahead = (keys[:, None] - theirs[None, :]).to(tl.uint32)
                seen |= ahead < wide.to(tl.uint32)[None, :]
            x = tl.where(seen, x, -float("inf"))
        if PAD != G:
            x = tl.where((row % PAD < G)[None, :], x, -float("inf"))
        p = tl.exp2(x)
        if DV:
            if DO == D:
                dv_acc = tl.dot(p.to(k_tile.dtype), do_tile, dv_acc)
            else:
                some = tl.reshape(do_part.load([c, kv_head * G, part]), (BM, DO))
                dv_acc = tl.dot(p.to(k_tile.dtype), some, dv_acc)
        if DK:
            dp = tl.dot(v_tile, do_tile.T)
            if BM // PAD < 4:
                sums = tl.load(delta_rows + near, mask=there, other=0.0)
            else:
                sums = tl.reshape(tl.permute(delta.load([kv_head * G, c]), (1, 0)), (BM,))
            change = p * (dp - sums[None, :])
            if LIMIT:
                change *= slope
            if DO != D:
                q_tile = tl.reshape(q_part.load([c, kv_head * G, part]), (BM, DO))
            dk_acc = tl.dot(change.to(k_tile.dtype), q_tile, dk_acc)
    to = keys[:, None] * ds + kv_head * D + part + tl.arange(0, DO)[None, :]
    if DK:
        dk_acc *= back_scale
        if TURN:
            dk_acc = _turn_back(dk_acc, cos, sin, tl.minimum(keys, m - 1), BN, D, PAIRS)
        tl.store(dk + to, dk_acc.to(dk.dtype.element_ty), mask=held[:, None])
    if DV:
        tl.store(dv + to, dv_acc.to(dv.dtype.element_ty), mask=held[:, None])
