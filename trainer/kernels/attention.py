"""Attention over packed rows: each document sees itself only, and nothing of size S x S is ever
made on a GPU.

Three ways: Triton's for short documents (``trainer/kernels/attention_short.py``, the fused layer's
on Hopper), torch's flash attention for variable lengths, and one document after another for CPUs,
fp32 and odd head sizes. The eager twin is for comparing.

``register()`` adds the implementation "milktea" to transformers' AttentionInterface. The model then
takes the boundaries as forward arguments under transformers' own names: ``cu_seq_lens_q`` (int32
[documents + 1], on the model's device), ``max_length_q`` (a Python int, so that nothing waits for
the GPU), and the same for k. Without them a row is one causal sequence: such a batch must not be
padded, because transformers makes no mask for an implementation that is not in its mask table.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

log = logging.getLogger(__name__)

CAUSAL = {"window_size_left": -1, "window_size_right": 0}
# tokens of a document beyond which flash attention is used: up to here it was seen to be no faster
# (docs/speed-log.md)
LONG = 16384
_short_refused: list[str] = []  # why, once it is known


def short_kernels(q: Tensor, k: Tensor, v: Tensor, longest: int) -> ModuleType | None:
    """``trainer.kernels.attention_short`` where it is the faster: Hopper and newer, q, k, v views
    of one matrix, documents that are not very long."""
    if (
        _short_refused
        or longest > LONG
        or not _has_flash(q)
        or torch.cuda.get_device_capability(q.device) < (9, 0)
    ):
        return None
    try:
        from trainer.kernels import attention_short
    except ImportError as why:
        refuse_short(f"Triton is not usable: {why}")
        return None
    return attention_short if attention_short.fits(q, k, v) else None


def refuse_short(why: str) -> None:
    """From now on flash attention serves short documents too, in this process; says so in the
    log."""
    _short_refused.append(why)
    log.warning("attention for short documents: %s; flash attention does its work", why)


def name(short: bool, device: torch.device) -> str:
    """What runs, for the log and the manifest."""
    if device.type != "cuda":
        return "eager"
    flash = "torch flash, variable length"
    return f"Triton, tiles over short documents; {flash}, beyond {LONG} tokens" if short else flash


def _has_flash(q: Tensor) -> bool:
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
    )


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Causal attention within documents. q [M, H, D], k and v [M, KV, D], cu int32 [documents + 1]
    -> (out [M, H, D], what backward needs).

    On CUDA it is torch's own flash attention for variable lengths, which serves grouped heads as
    they are; elsewhere the twin."""
    if not _has_flash(q):
        return eager_forward(q, k, v, cu, scale)
    out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu, cu, longest, longest, 0.0, True, False, scale=scale, **CAUSAL
    )
    return out, (lse, rng, unused)


def flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    kept: tuple[Tensor, ...],
    cu: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``flash_forward``, shaped like q, k, v."""
    if not _has_flash(q):
        return eager_backward(dout, q, k, v, cu, scale)
    lse, rng, unused = kept
    return torch.ops.aten._flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        cu,
        cu,
        longest,
        longest,
        0.0,
        True,
        rng,
        unused,
        scale=scale,
        **CAUSAL,
    )


def document_mask(cu: Tensor, tokens: int) -> Tensor:
    """[tokens, tokens] bool: same document and not in the future."""
    document = torch.bucketize(
        torch.arange(tokens, device=cu.device, dtype=cu.dtype), cu[1:], right=True
    )
    return (document[:, None] == document[None, :]).tril()


def _probabilities(q: Tensor, k: Tensor, cu: Tensor, scale: float) -> Tensor:
    """q, k [M, H, D] fp32 -> [H, M, M]."""
    scores = torch.einsum("mhd,nhd->hmn", q, k) * scale
    return scores.masked_fill(~document_mask(cu, len(q)), -torch.inf).softmax(-1)


def eager_forward(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The twin: dense, exact, for the CPU and for the self-test."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    p = _probabilities(q.float(), k.float(), cu, scale)
    return torch.einsum("hmn,nhd->mhd", p, v.float()).to(q.dtype), ()


def eager_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    kf, vf = (x.repeat_interleave(group, 1).float() for x in (k, v))
    qf, d = q.float(), dout.float()
    p = _probabilities(qf, kf, cu, scale)
    dv = torch.einsum("hmn,mhd->nhd", p, d)
    dp = torch.einsum("mhd,nhd->hmn", d, vf)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    dq, dk = torch.einsum("hmn,nhd->mhd", ds, kf), torch.einsum("hmn,mhd->nhd", ds, qf)
    dk, dv = (x.unflatten(1, (heads, group)).sum(2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float
    ) -> Tensor:
        out, kept = flash_forward(q, k, v, cu, longest, scale)
        ctx.save_for_backward(q, k, v, out, cu, *kept)
        ctx.longest, ctx.scale = longest, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, cu, *kept = ctx.saved_tensors
        grads = flash_backward(
            dout.contiguous(), q, k, v, out, tuple(kept), cu, ctx.longest, ctx.scale
        )
        return (*grads, None, None, None)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls. query [B, H, S, D], key and value [B, KV, S, D] -> ([B, S, H, D],
    None)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cu_seq_lens_q is None:
        one = query.shape[2] == 1
        # a chunk after a cache: align to the end
        if attention_mask is None and not one and query.shape[2] != key.shape[2]:
            new, old = query.shape[2], key.shape[2]
            attention_mask = torch.ones(new, old, dtype=torch.bool, device=query.device).tril(
                old - new
            )
        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attention_mask,
            dropout,
            attention_mask is None and not one,
            scale=scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).contiguous(), None
    # as torch's own attention does; the angles have made q and k fp32
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (
            x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value)
        )
    if query.shape[0] != 1:
        raise ValueError(
            f"packed attention takes one row, got {query.shape[0]}: concatenate the "
            "documents and pass their boundaries"
        )
    if dropout:
        raise ValueError(
            f"attention dropout {dropout} is not supported on packed rows: set "
            "attention_dropout to 0 in the model's config"
        )
    if not _has_flash(query):
        return by_document(query, key, value, cu_seq_lens_q, scale), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    assert max_length_q is not None, "cu_seq_lens_q came without max_length_q"
    return _Varlen.apply(q, k, v, cu_seq_lens_q, int(max_length_q), scale)[None], None


def by_document(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, scale: float) -> Tensor:
    """torch's own kernel, one document after another: on the CPU, and on a GPU for fp32 and odd
    head sizes. query [1, H, M, D], key and value [1, KV, M, D] -> [1, M, H, D]."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scale
        )
        for a, b in pairwise(cu.tolist())
    ]
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


def register() -> str:
    """Make "milktea" a name for ``attn_implementation``. Safe to call twice. Returns the name."""
    AttentionInterface.register("milktea", packed_attention)
    return "milktea"
