"""The gated delta rule over packed documents on a GPU, by the Triton kernels of fla-core (MIT).

fla-core's own function waits for the GPU to count chunks. It also refuses Hopper under Triton 3.4
to 3.7, where its kernel for dq, dk, dw and dg is miscompiled, but only in blocks of 64 columns
(flash-linear-attention#640). This module calls fla-core's steps one by one: it counts chunks on the
device, runs that kernel in one block of a head's columns (128 in every Qwen3.5), and leaves the
gradients of q and k separate per value head, for the caller to sum.
``trainer/kernels/delta.py::trust`` compares the whole with its definition at every start.

T tokens, HK heads of q and k of K columns, HV heads of v of V columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from fla.ops.common import chunk_delta_h, chunk_o
from fla.ops.common.chunk_delta_h import (
    chunk_gated_delta_rule_bwd_dhu,
    chunk_gated_delta_rule_fwd_h,
)
from fla.ops.common.chunk_o import chunk_bwd_dv_local, chunk_bwd_kernel_dqkwg, chunk_fwd_o
from fla.ops.gated_delta_rule import chunk_fwd, wy_fast
from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
from fla.ops.gated_delta_rule.wy_fast import prepare_wy_repr_bwd_kernel, recompute_w_u_fwd
from fla.ops.utils import chunk_local_cumsum, cumsum
from fla.utils import check_shared_mem
from torch import Tensor

CHUNK = 64
LOG2E = 1.4426950408889634


# Blocks, warps and stages that fla-core's own search chose on an H200 for 16,384 tokens of
# Qwen3.5-9B (docs/speed-log.md). The search compiles about 80 variants one after another, which
# would take minutes at every start.
HOPPER: dict[Any, tuple[dict[str, int], int, int]] = {
    cumsum.chunk_local_cumsum_scalar_kernel: ({}, 1, 3),
    chunk_fwd.chunk_gated_delta_rule_fwd_kkt_solve_kernel: ({"BK": 64}, 1, 3),
    wy_fast.recompute_w_u_fwd_kernel: ({}, 4, 3),
    wy_fast.prepare_wy_repr_bwd_kernel: ({}, 4, 3),
    chunk_delta_h.chunk_gated_delta_rule_fwd_kernel_h_blockdim64: ({"BV": 64}, 4, 2),
    chunk_delta_h.chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64: ({"BV": 32}, 2, 2),
    chunk_o.chunk_fwd_kernel_o: ({"BK": 64, "BV": 64}, 4, 3),
    chunk_o.chunk_bwd_kernel_dv_local: ({}, 2, 2),
    chunk_o.chunk_bwd_kernel_dqkwg: ({}, 4, 2),
}


def _pin_tiles() -> bool:
    """Set fla-core's kernels to the tiles in ``HOPPER`` where this GPU is a Hopper; elsewhere each
    kernel searches when it first runs. Returns whether the tiles were set."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return False
    for kernel, (blocks, warps, stages) in HOPPER.items():
        kernel.fn.configs = [triton.Config(blocks, num_warps=warps, num_stages=stages)]
    return True


PINNED = _pin_tiles()


class Chunks(NamedTuple):
    """Chunks of a pack: the document boundaries ``cu``, and int32 [chunks, 2] with the document of
    each chunk and its number in that document. The number of chunks is an upper bound: surplus ones
    lie behind the last document's end, where nothing is read or written."""

    cu: Tensor
    indices: Tensor


class SavedChunks(NamedTuple):
    """What ``forward`` saves for ``backward``: cumulative decays fp32 [T, HV], and the solved
    systems of the chunks [T, HV, 64]."""

    sums: Tensor
    solved: Tensor


_latest: list[tuple[Tensor, int, int, Chunks]] = []  # of the latest pack, shared by all layers


def chunks(cu: Tensor, tokens: int) -> Chunks:
    """Chunks of the boundaries ``cu`` int32 [documents + 1], the last of which is ``tokens``. Does
    not wait for the GPU."""
    if _latest:
        of, length, version, found = _latest[0]
        if of is cu and (length, version) == (tokens, cu._version):
            return found
    ends = ((cu.diff() + (CHUNK - 1)) // CHUNK).cumsum(0)
    at = torch.arange(tokens // CHUNK + len(cu) - 1, device=cu.device)
    document = torch.bucketize(at, ends, right=True).clamp_max(len(cu) - 2)
    number = at - torch.where(document > 0, ends[document - 1], 0)
    found = Chunks(cu, torch.stack([document, number], 1).to(cu.dtype))
    _latest[:] = [(cu, tokens, cu._version, found)]
    return found


def unfit() -> str:
    """Why the rule cannot run on this machine's GPU, or ""."""
    if torch.cuda.get_device_capability() < (8, 0):
        return "gated delta nets are packed on GPUs of compute capability 8.0 and more"
    return ""


def forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cu: Tensor
) -> tuple[Tensor, SavedChunks]:
    """q, k [T, HK, K] of unit norm, v [T, HV, V], decay (logarithms) and beta fp32 [T, HV], cu
    int32 [documents + 1] -> (out [T, HV, V], what ``backward`` needs)."""
    q, k, v, decay, beta = (x.contiguous()[None] for x in (q, k, v, decay, beta))
    at = _chunked(chunks(cu, v.shape[1]))
    sums = chunk_local_cumsum(decay, chunk_size=CHUNK, scale=LOG2E, **at)
    w, u, solved = chunk_gated_delta_rule_fwd_intra(k, v, sums, beta, chunk_size=CHUNK, **at)
    h, fresh, _ = chunk_gated_delta_rule_fwd_h(k, w, u, sums, chunk_size=CHUNK, **at)
    out = chunk_fwd_o(q, k, fresh, h, sums, scale=q.shape[-1] ** -0.5, chunk_size=CHUNK, **at)
    return out[0], SavedChunks(sums[0], solved[0])


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, kept: SavedChunks, cu: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    """Returns dq [T, HV, K], two terms of dk [T, HV, K] each, dv [T, HV, V], d(decay) and d(beta)
    fp32 [T, HV]. Gradients of q and k are per value head."""
    q, k, v, beta, dout = (x.contiguous()[None] for x in (q, k, v, beta, dout))
    sums, solved = (x[None] for x in kept)
    found = chunks(cu, v.shape[1])
    at, scale = _chunked(found), q.shape[-1] ** -0.5
    w, u = recompute_w_u_fwd(k, v, beta, solved, sums, **at)
    h, fresh, _ = chunk_gated_delta_rule_fwd_h(k, w, u, sums, chunk_size=CHUNK, **at)
    dv = chunk_bwd_dv_local(q, k, dout, g=sums, scale=scale, chunk_size=CHUNK, **at)
    dh, _, dv = chunk_gated_delta_rule_bwd_dhu(
        q, k, w, dout, dv, g=sums, scale=scale, chunk_size=CHUNK, **at
    )
    dq, dk, dw, dsums = _inner(q, k, fresh, w, sums, h, dv, dout, dh, scale, found)
    more, dv, dbeta, dmore = _systems(k, v, beta, sums, solved, dw, dv, found)
    ddecay = chunk_local_cumsum(dsums.add_(dmore), chunk_size=CHUNK, reverse=True, **at)
    return dq[0], (dk[0], more[0]), dv[0], ddecay[0], dbeta[0]


def _chunked(found: Chunks) -> dict[str, Tensor]:
    return {"cu_seqlens": found.cu, "chunk_indices": found.indices}


def _inner(
    q: Tensor,
    k: Tensor,
    fresh: Tensor,
    w: Tensor,
    sums: Tensor,
    h: Tensor,
    dv: Tensor,
    dout: Tensor,
    dh: Tensor,
    scale: float,
    found: Chunks,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dw [1, T, HV, K], d(sums) [1, T, HV]): fla-core's kernel of that name, in blocks as
    wide as a head."""
    (_, tokens, heads, columns), (values, width) = k.shape, dout.shape[2:]
    dq, dk, dw = (q.new_empty(1, tokens, values, columns) for _ in range(3))
    dsums = torch.empty_like(sums)
    chunk_bwd_kernel_dqkwg[(len(found.indices), values)](
        q=q,
        k=k,
        v=fresh,
        g=sums,
        g_gamma=None,
        h=h,
        do=dout,
        dh=dh,
        dq=dq,
        dk=dk,
        dw=dw,
        dv=dv,
        dg=dsums,
        **_chunked(found),
        scale=scale,
        B=1,
        T=tokens,
        H=heads,
        HV=values,
        K=columns,
        V=width,
        BT=CHUNK,
        BK=triton.next_power_of_2(columns),
        BV=min(triton.next_power_of_2(width), 128 if check_shared_mem("ampere") else 64),
        STATE_V_FIRST=False,
    )
    return dq, dk, dw, dsums


def _systems(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    sums: Tensor,
    solved: Tensor,
    dw: Tensor,
    du: Tensor,
    found: Chunks,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(the rest of dk [1, T, HV, K], dv, d(beta), the rest of d(sums)): back through the systems
    that each chunk solves."""
    (_, tokens, heads, columns), (values, width) = k.shape, v.shape[2:]
    dk, dv = k.new_empty(1, tokens, values, columns), torch.empty_like(v)
    dsums, dbeta = torch.empty_like(sums), torch.empty_like(beta)
    block = 64 if check_shared_mem() else 32
    prepare_wy_repr_bwd_kernel[(len(found.indices), values)](
        k=k,
        v=v,
        beta=beta,
        g=sums,
        A=solved,
        dw=dw,
        du=du,
        dk=dk,
        dv=dv,
        db=dbeta,
        dg=dsums,
        **_chunked(found),
        T=tokens,
        H=heads,
        HV=values,
        K=columns,
        V=width,
        BT=CHUNK,
        BK=min(triton.next_power_of_2(columns), block),
        BV=min(triton.next_power_of_2(width), block),
    )
    return dk, dv, dbeta, dsums


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        decay, beta, cu = rest
        out, kept = forward(q, k, v, decay, beta, cu)
        ctx.save_for_backward(q, k, v, beta, cu, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, cu, *kept = ctx.saved_tensors
        dq, dk, dv, ddecay, dbeta = backward(dout, q, k, v, beta, SavedChunks(*kept), cu)
        of_k = dk[0] + dk[1]
        return by_key(dq, q.shape[1]), by_key(of_k, q.shape[1]), dv, ddecay, dbeta, None


def by_key(d: Tensor, heads: int) -> Tensor:
    """[T, HV, K] -> [T, HK, K], summed over the value heads of each key head."""
    return d if d.shape[1] == heads else d.unflatten(1, (heads, -1)).sum(2)


def rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cu: Tensor) -> Tensor:
    """See ``trainer.kernels.delta.rule``."""
    out: Tensor = _Rule.apply(q, k, v, decay, beta, cu)  # type: ignore[no-untyped-call]
    return out
