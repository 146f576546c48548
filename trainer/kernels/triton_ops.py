"""Triton kernels of the fast decoder layer. ``trainer/kernels/reference.py`` has the same functions
in plain torch: the twins.

All kernels are bound by memory, so each does all that one read of a row allows: the LoRA B product
is added where the base product is read next, the LoRA A product and the FP8 cast happen where the
input is written. Reductions run over whole rows inside one program, never through atomics, so
results are the same bits from run to run.

Shapes: M tokens, K or N features, R the padded rank (a power of two, 16 or more), G linears that
read one input. ``a`` is [G*R, K] and ``b`` is [N, R], both in the compute dtype, ``b`` already
multiplied by PEFT's scaling.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from trainer.kernels import cast_device, delta_ops, experts_device
from trainer.kernels import triton_device as jit
from trainer.kernels.norms import HeadNorms

FP8 = torch.float8_e4m3fn

delta = delta_ops  # kernels of gated delta nets and gated attention


# Rows and columns of a tile, warps, pipeline stages: the best of a sweep on an H200 at 16,384
# tokens of a 7B (docs/speed-log.md).
TILES = {
    "norm_forward": (32, 64, 4, 3),
    "norm_backward": (32, 64, 4, 3),
    "rope_forward": (32, 16, 4, 3),  # columns: heads
    "rope_backward": (64, 0, 4, 2),  # no column loop
    "head_norm_backward": (32, 16, 4, 3),  # columns: heads
    "branch_forward": (32, 64, 4, 3),
    "swiglu_forward": (64, 64, 4, 3),
    "swiglu_backward": (32, 64, 2, 2),
}
CAST = (16, 512, 8)  # rows and columns of a tile, warps
UNPACK = (16, 256, 4)  # the same
CAST_OUTER = (64, 128, 4, 3)  # the same, and stages


_whole = False


@contextmanager
def whole_tiles() -> Iterator[None]:
    """Within the block launches take the tiles of a long micro-batch, even for few rows, so that
    the self-test compiles and checks the same kernels as the run."""
    global _whole
    _whole = True
    try:
        yield
    finally:
        _whole = False


@contextmanager
def only_compiling() -> Iterator[None]:
    """Within the block kernels are compiled in parallel, one per processor, and not launched: their
    outputs are not written. Ends when all are compiled; a kernel that does not compile raises when
    it is launched. Before Triton 3.5 they compile one after the other."""
    launch = JITFunction.run
    mode = getattr(triton, "AsyncCompileMode", None)

    def compile_only(kernel: Any, *args: Any, **options: Any) -> Any:
        return launch(kernel, *args, **options | {"warmup": True})

    JITFunction.run = compile_only
    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            if mode is None:
                yield
            else:
                with mode(pool, ignore_errors=True):
                    yield
    finally:
        JITFunction.run = launch


def _tile(name: str, m: int) -> dict[str, int]:
    """Launch options of a kernel. With few tokens a program takes fewer rows, so that every
    multiprocessor has two programs."""
    bm, bn, warps, stages = TILES[name]
    while bm > 16 and m < 250 * bm and not _whole:
        bm //= 2
    return {"BM": bm, "BN": bn, "num_warps": warps, "STAGES": stages}


def _empty(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, device=x.device, dtype=dtype or x.dtype)


def norm_forward(
    h: Tensor,
    weight: Tensor,
    eps: float,
    a: Tensor | None,
    fp8: bool,
    y: Tensor | None = None,
    t: Tensor | None = None,
    b: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """RMSNorm of ``h [M, K]``, after adding ``y`` and the LoRA term ``t b^T`` of the projection
    before it, where given.

    Returns (the sum or ``h``, the normed input [M, K] in h's dtype or FP8, its row scales [M] or
    None, ``x a^T`` [M, G*R] or None, rstd [M])."""
    m, k = h.shape
    total = torch.empty_like(h) if y is not None else h
    x = _empty(h, m, k, dtype=FP8 if fp8 else None)
    scale = _empty(h, m, dtype=torch.float32) if fp8 else None
    ro = a.shape[0] if a is not None else 0
    t_out = _empty(h, m, ro) if a is not None else None
    rstd = _empty(h, m, dtype=torch.float32)
    tile = _tile("norm_forward", m)
    jit.norm_forward[(triton.cdiv(m, tile["BM"]),)](
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
        R=b.shape[1] if b is not None else 16,
        RO=triton.next_power_of_2(max(ro, 16)),
        ADD=y is not None,
        LORA=b is not None,
        PROJECT=a is not None,
        QUANT=fp8,
        **tile,
    )
    return total, x, scale, t_out, rstd


def norm_backward(
    dx: Tensor,
    dt: Tensor | None,
    t: Tensor | None,
    a: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
) -> Tensor:
    """d(h) = ``residual`` + the RMSNorm gradient of ``dx + dt a``. All [M, K]; dt and ``t``,
    forward's x a^T, are [M, G*R]."""
    m, k = h.shape
    out = torch.empty_like(h)
    ro = a.shape[0] if a is not None else 0
    tile = _tile("norm_backward", m)
    jit.norm_backward[(triton.cdiv(m, tile["BM"]),)](
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
        RO=triton.next_power_of_2(max(ro, 16)),
        LORA=a is not None,
        ADD=residual is not None,
        **tile,
    )
    return out


def branch_forward(
    h: Tensor,
    y: Tensor,
    t: Tensor | None,
    b: Tensor | None,
    weight: Tensor,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of a branch, added to the stream: z = y + t b^T, written over ``y``; total = (h +
    RMSNorm(z)) scale. Returns (total [M, K], z, rstd of z [M])."""
    m, k = h.shape
    total, rstd = torch.empty_like(h), _empty(h, m, dtype=torch.float32)
    tile = _tile("branch_forward", m)
    jit.branch_forward[(triton.cdiv(m, tile["BM"]),)](
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
        R=b.shape[1] if b is not None else 16,
        LORA=b is not None,
        **tile,
    )
    return total, y, rstd


def _of_heads(name: str, m: int, d: int) -> tuple[int, int, dict[str, int]]:
    """Rows of a tile, heads of a program, and options: fewer rows of wide heads."""
    tile = _tile(name, m)
    tile["BM"] = max(16, tile["BM"] * 128 // max(128, d))
    return tile["BM"], tile.pop("BN"), tile


def rope_forward_(
    qkv: Tensor,
    t: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    norms: HeadNorms | None = None,
    pairs: bool = False,
) -> Tensor:
    """In place on ``qkv [M, (heads + 2 kv_heads) D]``: add LoRA and bias, rotate q and k. cos, sin:
    [M, D], halves equal. ``pairs``: columns 2i and 2i + 1 turn together, not i and i + D / 2.
    Returns ``qkv``.

    With ``norms`` the norm and the rotation are written to a new matrix, which is returned: q, k,
    and v where it has a norm."""
    m, s = qkv.shape
    d = cos.shape[-1]
    added = b is not None or bias is not None
    touched = heads + (2 if added or (norms is not None and norms.values) else 1) * kv_heads
    r = b.shape[1] if b is not None else 16
    bm, per, tile = _of_heads("rope_forward", m, d)
    out = qkv if norms is None else torch.empty_like(qkv)
    jit.rope_forward[(triton.cdiv(m, bm), triton.cdiv(touched, per))](
        qkv,
        t,
        b,
        bias,
        cos,
        sin,
        out,
        norms.weight if norms is not None else None,
        norms.eps if norms is not None else 0.0,
        m,
        s,
        heads,
        kv_heads,
        touched,
        R=r,
        HALF=d // 2,
        LORA=b is not None,
        BIAS=bias is not None,
        NORM=norms is not None,
        VALUES=norms is not None and norms.values,
        PAIRS=pairs,
        HEADS=per,
        **tile,
    )
    return out


def head_norm_backward_(
    d: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    norms: HeadNorms,
    pairs: bool = False,
) -> None:
    """In place on ``d [M, (heads + 2 kv_heads) D]``, the gradient of attention's input: backward of
    the rotation and of the norms of ``qkv``."""
    m, s = qkv.shape
    size = cos.shape[-1]
    touched = heads + (2 if norms.values else 1) * kv_heads
    bm, per, tile = _of_heads("head_norm_backward", m, size)
    jit.head_norm_backward[(triton.cdiv(m, bm), triton.cdiv(touched, per))](
        d,
        qkv,
        cos,
        sin,
        norms.weight,
        norms.eps,
        m,
        s,
        heads,
        kv_heads,
        touched,
        HALF=size // 2,
        PAIRS=pairs,
        HEADS=per,
        **tile,
    )


def rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    b: Tensor | None,
    column_scale: Tensor | None,
    pairs: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dq [M, H, D], dk and dv [M, KV, D] -> (d(qkv) [M, S], its FP8 copy times column_scale, row
    scales, ``d b`` [M, 3 R])."""
    m, heads, d = dq.shape
    kv_heads = dk.shape[1]
    s = (heads + 2 * kv_heads) * d
    quant = column_scale is not None
    out = _empty(dq, m, s)
    scale = _empty(dq, m, dtype=torch.float32) if quant else None
    r = b.shape[1] if b is not None else 16
    dt = _empty(dq, m, 3 * r) if b is not None else None
    bm, _, tile = _of_heads("rope_backward", m, d)
    jit.rope_backward[(triton.cdiv(m, bm),)](
        dq.contiguous(),
        dk.contiguous(),
        dv.contiguous(),
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
        R=r,
        HALF=d // 2,
        LORA=b is not None,
        QUANT=quant,
        PAIRS=pairs,
        **tile,
    )
    return out, _cast(out, column_scale, scale) if scale is not None else None, scale, dt


def joined_backward(
    d: Tensor, b: Tensor | None, column_scale: Tensor | None, parts: list[int]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What ``rope_backward`` returns beside d(qkv), for ``d [M, S]`` whose rotation is undone
    already, of G ``parts`` of so many columns: FP8 copy times column_scale, its row scales, ``d b``
    [M, G R]."""
    dt = None
    if b is not None:
        r = b.shape[1]
        dt = _empty(d, len(d), len(parts) * r)
        for i, (x, y) in enumerate(zip(d.split(parts, 1), b.split(parts), strict=True)):
            torch.mm(x, y, out=dt[:, i * r : (i + 1) * r])
    if column_scale is None:
        return None, None, dt
    d8, scale, _ = quantise_rows(d, column_scale, None)
    return d8, scale, dt


def _cast(x: Tensor, column_scale: Tensor | None, scale: Tensor) -> Tensor:
    """x * column_scale / scale in FP8, where the row maxima are known."""
    m, k = x.shape
    out = _empty(x, m, k, dtype=FP8)
    bm, bn, warps = CAST
    grid = (triton.cdiv(m, bm), triton.cdiv(k, bn))
    cast_device.cast_rows[grid](
        x,
        column_scale,
        scale,
        out,
        m,
        k,
        FOLD=column_scale is not None,
        BM=bm,
        BN=bn,
        num_warps=warps,
    )
    return out


def cast_outer(
    x: Tensor, column_scale: Tensor | None, scale: Tensor | None, t: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(FP8 copy of ``x [M, K] * column_scale / scale``, or None without scales; ``x^T t`` [K, R]
    fp32 for t [M, R]), in one read of x.

    Rows are split over programs, and their sums are added in a fixed order."""
    if scale is None or column_scale is None:
        return None, torch.mm(x.t(), t, out_dtype=torch.float32) if t is not None else None
    (m, k), r = x.shape, t.shape[1] if t is not None else 16
    bm, bn, warps, stages = CAST_OUTER
    splits = max(1, min(8, m // 1024))
    rows = triton.cdiv(triton.cdiv(m, splits), bm) * bm
    out = _empty(x, m, k, dtype=FP8)
    partial = _empty(x, splits, k, r, dtype=torch.float32) if t is not None else None
    cast_device.cast_outer[(triton.cdiv(k, bn), splits)](
        x,
        column_scale,
        scale,
        t,
        out,
        partial,
        m,
        k,
        rows,
        R=r,
        LORA=t is not None,
        BM=bm,
        BN=bn,
        STAGES=stages,
        num_warps=warps,
    )
    return out, partial.sum(0) if partial is not None else None


def quantise_rows(
    x: Tensor, column_scale: Tensor | None, p: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """FP8 copy of ``x [M, K] * column_scale [K]`` with one scale a row, and ``x p`` for a LoRA
    factor p [K, R]. The row stays in registers between its maximum and its cast. The LoRA product
    is a product of its own: inside a program of 32 rows it takes twice as long."""
    m, k = x.shape
    out = _empty(x, m, k, dtype=FP8)
    scale = _empty(x, m, dtype=torch.float32)
    width = triton.next_power_of_2(k)
    warps = 4 if width <= 4096 else 8 if width <= 16384 else 16
    cast_device.quantise_rows[(m,)](
        x, column_scale, out, scale, k, FOLD=column_scale is not None, BN=width, num_warps=warps
    )
    return out, scale, x @ p if p is not None else None


def swiglu_forward(
    gu: Tensor,
    t: Tensor | None,
    b: Tensor | None,
    a: Tensor | None,
    fp8: bool,
    gelu: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """silu(gate) * up of ``gu [M, 2F]`` plus its LoRA terms, with ``gelu`` gelu in its tanh
    approximation instead of silu -> (act [M, F] in gu's dtype or FP8, row scales, ``act a^T`` [M,
    R])."""
    m, f2 = gu.shape
    f = f2 // 2
    act = _empty(gu, m, f)
    scale = _empty(gu, m, dtype=torch.float32) if fp8 else None
    ro = a.shape[0] if a is not None else 0
    t_out = _empty(gu, m, ro) if a is not None else None
    tile = _tile("swiglu_forward", m)
    jit.swiglu_forward[(triton.cdiv(m, tile["BM"]),)](
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
        R=b.shape[1] if b is not None else 16,
        RO=triton.next_power_of_2(max(ro, 16)),
        LORA=b is not None,
        PROJECT=a is not None,
        QUANT=fp8,
        GELU=gelu,
        **tile,
    )
    return (act if scale is None else _cast(act, None, scale)), scale, t_out


def swiglu_backward(
    gu: Tensor,
    t: Tensor | None,
    b: Tensor | None,
    dact: Tensor,
    dt: Tensor | None,
    a: Tensor | None,
    column_scale: Tensor | None,
    gelu: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Overwrites ``gu [M, 2F]`` with its gradient and ``dact [M, F]`` with act, which the gradient
    of down's A needs.

    ``dact + dt a`` is the gradient of act. Returns (act, d(gu), the row scales that its FP8 copy
    times column_scale wants, ``d(gu) b`` [M, 2 R])."""
    m, f2 = gu.shape
    f = f2 // 2
    quant = column_scale is not None
    scale = _empty(gu, m, dtype=torch.float32) if quant else None
    r = b.shape[1] if b is not None else 16
    dt_out = _empty(gu, m, 2 * r) if b is not None else None
    tile = _tile("swiglu_backward", m)
    jit.swiglu_backward[(triton.cdiv(m, tile["BM"]),)](
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
        R=r,
        RD=a.shape[0] if a is not None else 16,
        LORA=b is not None,
        DOWN=a is not None,
        QUANT=quant,
        GELU=gelu,
        **tile,
    )
    # autograd does not see the launch: with new versions a second backward raises
    torch.autograd.graph.increment_version([gu, dact])
    return dact, gu, scale, dt_out


def gate_forward_(gu: Tensor, more: Tensor | None) -> Tensor:
    """Adds ``more`` to ``gu [S, 2F]`` in place; silu(gate) * up [S, F]."""
    s, f = len(gu), gu.shape[1] // 2
    act = _empty(gu, s, f)
    experts_device.gate_forward[(triton.cdiv(s, 32), triton.cdiv(f, 128))](
        gu, more, act, s, f, MORE=more is not None, BM=32, BN=128, num_warps=4
    )
    return act


def gate_backward_(
    gu: Tensor, dact: Tensor, more: Tensor | None, share: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrites ``gu [S, 2F]`` with its gradient and ``dact [S, F]`` with act. The gradient of act
    is ``dact + more``, times ``share [S]``. Returns (act, d(gu), d(share) fp32 [S])."""
    s, f = len(gu), gu.shape[1] // 2
    dshare = _empty(gu, s, dtype=torch.float32)
    experts_device.gate_backward[(triton.cdiv(s, 16),)](
        gu, dact, more, share, dshare, s, f, MORE=more is not None, BM=16, BN=128, num_warps=4
    )
    return dact, gu, dshare


def clamped_forward_(
    gu: Tensor, more: Tensor | None, bias: Tensor, expert: Tensor, alpha: float, limit: float
) -> Tensor:
    """As ``gate_forward_`` with gpt-oss's gate: gate and up stand by turns in ``gu [S, 2F]``, to
    which ``bias [E, 2F]`` of each row's ``expert`` [S] is added too; gate ends at `limit`, up at
    both its signs: gate sigmoid(alpha gate) (up + 1) [S, F]."""
    s, f = len(gu), gu.shape[1] // 2
    act = _empty(gu, s, f)
    experts_device.clamped_forward[(triton.cdiv(s, 8), triton.cdiv(f, 128))](
        *(gu, more, bias, expert, act, s, f, alpha, limit),
        MORE=more is not None,
        BM=8,
        BN=128,
        num_warps=4,
    )
    return act


def clamped_backward_(
    gu: Tensor, dact: Tensor, more: Tensor | None, share: Tensor, alpha: float, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``gate_backward_``, with gpt-oss's gate."""
    s, f = len(gu), gu.shape[1] // 2
    dshare = _empty(gu, s, dtype=torch.float32)
    experts_device.clamped_backward[(triton.cdiv(s, 8),)](
        *(gu, dact, more, share, dshare, s, f, alpha, limit),
        MORE=more is not None,
        BM=8,
        BN=128,
        num_warps=4,
    )
    return dact, gu, dshare


def combine(
    y: Tensor,
    more: Tensor | None,
    back: Tensor,
    share: Tensor,
    bias: Tensor | None = None,
    expert: Tensor | None = None,
) -> Tensor:
    """Of each token the sum over its k pairs of share (y + more + bias): y, more [T k, K], rows
    ``back`` [T k], share [T, k], ``bias [E, K]`` of each row's ``expert`` [T k] -> [T, K]."""
    (tokens, k), width = share.shape, y.shape[1]
    out = _empty(y, tokens, width)
    experts_device.combine[(triton.cdiv(tokens, 16), triton.cdiv(width, 128))](
        *(y, more, bias, expert, back, share, out, tokens, width),
        K=k,
        MORE=more is not None,
        BIAS=bias is not None,
        BM=16,
        BN=128,
        num_warps=4,
    )
    return out


def residual_add(h: Tensor, y: Tensor, t: Tensor | None, b: Tensor | None) -> Tensor:
    """h + y + t b^T, written over ``y``. [M, K]."""
    m, k = h.shape
    r = b.shape[1] if b is not None else 16
    grid = (triton.cdiv(m, 64), triton.cdiv(k, 128))
    jit.residual_add[grid](h, y, t, b, y, m, k, R=r, LORA=b is not None, BM=64, BN=128, num_warps=4)
    return y


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    dlogits_dtype: torch.dtype,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-row cross-entropy [C] (fp32) of logits x scale, squashed to cap tanh(./cap), and
    d(logits) of their sum [C, V] in ``dlogits_dtype``. A target of -100 gives zero for both."""
    c, v = logits.shape
    loss = _empty(logits, c, dtype=torch.float32)
    grad = _empty(logits, c, v, dtype=dlogits_dtype)
    jit.cross_entropy_rows[(c,)](
        *(logits, targets, loss, grad, v, scale, cap or 1.0),
        CAP=cap is not None,
        BN=4096,
        num_warps=8,
    )
    return loss, grad


def log_prob_rows(
    logits: Tensor, targets: Tensor, scale: float = 1.0, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """(log p of each row's target, entropy of each row), fp32 [C], of logits [C, V] x scale,
    squashed to cap tanh(./cap). Reads them once."""
    c, v = logits.shape
    log_probs = _empty(logits, c, dtype=torch.float32)
    entropies = _empty(logits, c, dtype=torch.float32)
    jit.log_prob_rows[(c,)](
        *(logits, targets, log_probs, entropies, v, scale, cap or 1.0),
        CAP=cap is not None,
        BN=4096,
        num_warps=8,
    )
    return log_probs, entropies


def dequantise_nf4(
    packed: Tensor, absmax: Tensor, codebook: Tensor, out: Tensor, block: int
) -> Tensor:
    """packed uint8 [n / 2] (high nibble first), absmax fp32 [n / block] -> ``out``, n elements."""
    n = out.numel()
    jit.dequantise_nf4[(triton.cdiv(n // 2, 2048),)](
        packed, absmax, codebook, out, n // 2, BLOCK=block, BN=2048, num_warps=4
    )
    return out


def dequantise_rows(w: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """w [N, K] in FP8 times scale fp32 [N] by rows, rounded once -> ``out [N, K]``."""
    (n, k), (bm, bn, warps) = w.shape, UNPACK
    tiles = triton.cdiv(n, bm) * triton.cdiv(k, bn)
    cast_device.dequantise_rows[(tiles,)](w, scale, out, n, k, BM=bm, BN=bn, num_warps=warps)
    return out


def transpose_fp8(w: Tensor, out: Tensor | None = None) -> Tensor:
    """[N, K] -> [K, N], both row-major FP8."""
    n, k = w.shape
    out = _empty(w, k, n) if out is None else out
    jit.transpose_bytes[(triton.cdiv(n, 128), triton.cdiv(k, 128))](
        w.view(torch.uint8), out.view(torch.uint8), n, k, B=128, num_warps=8
    )
    return out
