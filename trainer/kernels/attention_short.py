"""Attention for packs of short documents, forward and backward in Triton:
``trainer/kernels/attention_device.py`` has the device code.

Flash attention's blocks of 128 tokens are half empty on documents of about 200 tokens; these
kernels cut tiles from the pack, not from the documents. There are no atomics, so results are the
same bits from run to run. Backward writes d(q, k, v) as one joined matrix in the compute dtype, the
form that the projection's backward reads, with rotary embedding undone where angles are given.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from trainer.kernels import attention_device as jit
from trainer.kernels.spans import Spans, spans

# Query rows and keys of a tile, warps, pipeline stages, by head size: the best of a sweep on an
# H200 (docs/speed-log.md).
TILES = {
    512: {"forward": (64, 32, 4, 2), "backward_q": (64, 32, 4, 1), "backward_kv": (32, 64, 4, 1)},
    256: {"forward": (64, 32, 4, 2), "backward_q": (64, 32, 4, 1), "backward_kv": (64, 64, 4, 2)},
    128: {"forward": (64, 32, 4, 2), "backward_q": (64, 32, 4, 2), "backward_kv": (64, 64, 4, 2)},
    64: {"forward": (64, 32, 4, 3), "backward_q": (64, 64, 4, 2), "backward_kv": (64, 64, 4, 3)},
}
WIDEST = max(TILES)
MAX_GROUP = 16  # query heads of a key head; beyond it a tile's tokens do not fill 16 bytes
PART = 256  # the most output columns of a program
WIDE = 256  # head sizes from which dk and dv take two launches

__all__ = ["backward", "fits", "forward", "spans"]


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these kernels support q [M, H, D], k and v [M, KV, D]: views of matrices with rows of
    one length, with up to 16 query heads per key head."""
    (m, heads, d), kv_heads, row = q.shape, k.shape[1], q.stride(0)
    return (
        d in TILES
        and heads % kv_heads == 0
        and heads // kv_heads <= MAX_GROUP
        and all(x.stride() == (row, d, 1) and x.data_ptr() % 16 == 0 for x in (q, k, v))
        and row % 8 == 0
        and m * row < 2**31
    )


def _wide(x: Tensor, rows: int, part: int = WIDEST) -> TensorDescriptor:
    """Tiles of ``rows`` tokens and one head of x [M, H, D], or ``part`` columns of it."""
    m, heads, d = x.shape
    return TensorDescriptor(x, [m, heads * d], [x.stride(0), 1], [rows, min(d, part)])


def _grouped(x: Tensor, rows: int, group: int, part: int = WIDEST) -> TensorDescriptor:
    """Tiles of ``rows / group`` tokens and ``group`` heads, a power of two."""
    box = [rows // group, group, min(x.shape[2], part)]
    return TensorDescriptor(x, list(x.shape), [x.stride(0), x.shape[2], 1], box)


def _of_rows(x: Tensor, tokens: int, rows: int, group: int) -> TensorDescriptor:
    """Descriptor of the same tiles with one number a row, from x [H, lm]; a copy is at least 16
    bytes."""
    wide = max(4, rows // group)
    return TensorDescriptor(x, [x.shape[0], tokens], [x.stride(0), 1], [group, wide])


def _tile(name: str, d: int) -> tuple[int, int, dict[str, int]]:
    bm, bn, warps, stages = TILES[d][name]
    return bm, bn, {"BM": bm, "BN": bn, "num_warps": warps, "STAGES": stages}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    scale: float,
    cap: float | None = None,
    sinks: Tensor | None = None,
    lent: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor]]:
    """Causal attention within spans: q [M, H, D], k and v [M, KV, D], sinks [H], scores squashed to
    cap tanh(score / cap) -> (out [M, H, D], what ``backward`` needs: the logarithms of the sums in
    powers of two, fp32 [H, M and up to 15 more]). With ``lent``
    (trainer/data/shared_keys.py) documents read keys of others too, and spans have no window."""
    (m, heads, d), kv_heads = q.shape, k.shape[1]
    out = q.new_empty(m, heads, d)
    # the copy engine takes rows of a multiple of 16 bytes
    lse = q.new_empty(heads, -(-m // 16) * 16, dtype=torch.float32)
    bm, bn, tile = _tile("forward", d)
    group = heads // kv_heads
    parts = -(-d // PART)
    jit.attention_forward[(kv_heads, triton.cdiv(m, bm // group), parts)](
        q,
        _wide(k, bn),
        _wide(v, bn, PART),
        first,
        out,
        lse,
        m,
        lse.shape[1],
        q.stride(0),
        kv_heads,
        scale / math.log(2),
        (cap or 0.0) / math.log(2),
        sinks,
        lent,
        G=group,
        D=d,
        DO=d // parts,
        LIMIT=cap is not None,
        SINKS=sinks is not None,
        SHARED=lent is not None,
        **tile,
    )
    return out, (lse,)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    at: Spans,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
    pairs: bool = False,
    cap: float | None = None,
    lent: Tensor | None = None,
) -> Tensor:
    """Gradients of ``forward``, joined: [M, (H + 2 KV) D]. With cos and sin [M, D] (halves equal)
    those of q and k are taken back to before rotary embedding; ``pairs``: its pairs are neighbours.
    ``dout`` is contiguous. ``lse`` includes sinks. Raises ValueError for cos and sin with heads
    wider than ``PART``."""
    if cos is not None and q.shape[2] > PART:
        raise ValueError(f"a head of {q.shape[2]} columns is not turned back here")
    (m, heads, d), kv_heads = q.shape, k.shape[1]
    joined = q.new_empty(m, (heads + 2 * kv_heads) * d)
    dq, dk, dv = joined.split([heads * d, kv_heads * d, kv_heads * d], 1)
    delta = torch.empty_like(lse)
    group = heads // kv_heads
    limit = (cap or 0.0) / math.log(2)
    ending = (q.stride(0), joined.shape[1], kv_heads, scale / math.log(2), scale, limit, lent)
    parts = -(-d // PART)
    fixed = {"G": group, "D": d, "DO": d // parts, "PAIRS": pairs, "LIMIT": cap is not None}
    fixed |= {"TURN": cos is not None, "SHARED": lent is not None}
    bm, bn, tile = _tile("backward_q", d)
    jit.attention_backward_q[(kv_heads, triton.cdiv(m, bm // group), parts)](
        *(q, _wide(k, bn), _wide(k, bn, PART), _wide(v, bn), at.first, out, dout),
        *(lse, delta, dq, cos, sin, m, lse.shape[1], *ending),
        **fixed,
        **tile,
    )
    _backward_kv(dout, q, k, v, at, (lse, delta), (dk, dv, cos, sin, m, *ending), fixed)
    return joined


def _backward_kv(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    at: Spans,
    rows: tuple[Tensor, Tensor],
    ending: tuple[Any, ...],
    fixed: dict[str, Any],
) -> None:
    """Compute dk and dv for ``backward``; ``rows`` are lse and delta [H, lm]."""
    m, d, kv_heads = len(q), fixed["D"], k.shape[1]
    bm, bn, tile = _tile("backward_kv", d)
    padded = triton.next_power_of_2(fixed["G"])
    asked = (
        *(_grouped(q, bm, padded), _grouped(q, bm, padded, PART), _grouped(dout, bm, padded, PART)),
        *(k, v, at.past, _grouped(dout, bm, padded)),
        *(_of_rows(x, m, bm, padded) for x in rows),
        *(*rows, rows[0].shape[1], *ending),
    )
    grid = (kv_heads, triton.cdiv(m, bn), d // fixed["DO"])
    for makes_dk, makes_dv in [(True, True)] if d < WIDE else [(True, False), (False, True)]:
        jit.attention_backward_kv[grid](
            *asked, PAD=padded, DK=makes_dk, DV=makes_dv, **fixed, **tile
        )
