"""Attention over packed rows: each document sees itself only, by the rules of its family.

``register()`` adds the implementation "milktea" to transformers' AttentionInterface. The model then
takes the boundaries as forward arguments under transformers' own names: ``cu_seq_lens_q`` (int32
[documents + 1], on the model's device), ``max_length_q`` (a Python int, so that nothing waits for
the GPU), and the same for k. Boundaries of k may differ from those of q: each document then has
keys in front of its own (a learned prefix), and its last query stands at its last key. Without
boundaries a row is one causal sequence: such a batch must not be padded at the left, because
transformers makes no mask for an implementation that is not in its mask table. With ``shared_keys``
(trainer/data/shared_keys.py) some documents also read keys of another one: each is then the end of
a row whose beginning stands elsewhere in the pack.

A family's rules arrive as keywords: ``scaling``, ``sliding_window``, ``softcap``, ``s_aux`` (the
sinks). An unknown keyword raises ValueError with the module and the keyword: attention that
ignored a rule of its family would train a different model.

Four implementations compute the same result: Triton kernels for short documents
(``trainer/kernels/attention_short.py``, used by the fused layer on Hopper); torch's flash attention
for variable lengths, with windows and, through its log-sum-exp, sinks; torch's
scaled_dot_product_attention one document after another, for CPUs, fp32 and unusual head sizes; and
plain torch in blocks of queries, for soft caps, and for sinks without flash attention. The eager
twin is dense and serves comparisons only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from trainer.data.shared_keys import SharedKeys
from trainer.kernels.shared_keys import spread_heads

log = logging.getLogger(__name__)

LONG = 16384  # tokens of a document beyond which flash attention is used (docs/speed-log.md)
BLOCK = 1024  # queries at a time where no kernel applies
# keywords that models pass to attention and that do not change the result here
SILENT = {
    *("position_ids", "cache_position", "seq_idx", "use_cache", "return_dict"),
    *("output_hidden_states", "output_router_logits", "num_items_in_batch", "logits_to_keep"),
}
_short_refused: list[str] = []  # the reason, once it is known


@dataclass(frozen=True)
class Rules:
    """A layer's rules of attention beside causality: score = cap(q k scale), and a query sees the
    keys that are fewer than ``window`` tokens before it."""

    scale: float
    window: int | None = None
    softcap: float | None = None

    def within(self, longest: int) -> Rules:
        """The same rules for documents of up to ``longest`` tokens; a window that none of them
        fills is dropped."""
        if self.window is None or self.window < longest:
            return self
        return Rules(self.scale, None, self.softcap)


def short_kernels(
    q: Tensor, k: Tensor, v: Tensor, longest: int, rules: Rules | None = None
) -> ModuleType | None:
    """``trainer.kernels.attention_short`` where it is faster, else None. It is faster on Hopper and
    newer, for documents that are not very long, where q, k, v are views of matrices with rows of
    one length. It takes all lengths where flash attention cannot be used: soft caps and heads wider
    than 256."""
    if _short_refused or not takes_short(q, longest, rules):
        return None
    try:
        from trainer.kernels import attention_short
    except ImportError as why:
        validate_lengths(f"Triton is not usable: {why}")
        return None
    return attention_short if attention_short.fits(q, k, v) else None


def takes_short(q: Tensor, longest: int, rules: Rules | None = None) -> bool:
    """Whether the card, the numbers and the lengths are those of ``short_kernels``."""
    alone = q.shape[-1] > 256 or (rules is not None and rules.softcap is not None)
    return (
        (longest <= LONG or alone)
        and q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(q.device) >= (9, 0)
    )


def validate_lengths(why: str) -> None:
    """Use flash attention for short documents too, from now on in this process; logs ``why``."""
    _short_refused.append(why)
    log.warning("attention for short documents: %s; flash attention does its work", why)


def name(short: bool, device: torch.device) -> str:
    """Name of the implementation that runs, for the log and the manifest."""
    if device.type != "cuda":
        return "eager"
    flash = "torch flash, variable length"
    return f"Triton, tiles over short documents; {flash}, beyond {LONG} tokens" if short else flash


def has_flash(q: Tensor) -> bool:
    """Whether torch's flash attention supports q: bf16 or fp16, Ampere or newer, head sizes to
    256."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def takes_flash(q: Tensor, v: Tensor) -> bool:
    """Whether flash attention computes q [1, H, M, D] with values [1, KV, N, E], which it wants no
    wider than the keys."""
    return has_flash(q) and v.shape[-1] <= q.shape[-1]


class KeyEnds(NamedTuple):
    """Where the documents' keys end, where they have other keys than queries: boundaries ``cu``
    int32 [documents + 1], and the most keys of a document. The last query stands at the last
    key."""

    cu: Tensor
    longest: int


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    longest: int,
    rules: Rules,
    sinks: Tensor | None = None,
    ends: KeyEnds | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Causal attention within documents. q [M, H, D], k and v [M, KV, D] or with ``ends`` [N, KV,
    D], cu int32 [documents + 1], sinks [H] -> (out [M, H, D], what backward needs).

    On CUDA this is torch's own flash attention for variable lengths, which takes grouped heads as
    they are. Elsewhere, and for soft caps, it is the twin."""
    if not has_flash(q) or rules.softcap is not None:
        return eager_forward(q, k, v, cu, rules, sinks, ends)
    cu_k, longest_k = ends or (cu, longest)
    out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        *(q, k, v, cu, cu_k, longest, longest_k, 0.0, True, False),
        scale=rules.scale,
        **sides(rules.window),
    )
    if sinks is not None:  # a sink is a term of the sum with value zero; lse [H, M], natural
        joined = torch.logaddexp(lse, sinks.float()[:, None])
        out = (out.float() * (lse - joined).exp().t()[:, :, None]).to(out.dtype)
        lse = joined
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
    rules: Rules,
    sinks: Tensor | None = None,
    ends: KeyEnds | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``flash_forward``, shaped like q, k, v.

    Sinks need no further work: probabilities are recomputed from the log-sum-exp, which includes
    them."""
    if not has_flash(q) or rules.softcap is not None:
        return eager_backward(dout, q, k, v, cu, rules, sinks, ends)
    lse, rng, unused = kept
    cu_k, longest_k = ends or (cu, longest)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        cu,
        cu_k,
        longest,
        longest_k,
        0.0,
        True,
        rng,
        unused,
        scale=rules.scale,
        **sides(rules.window),
    )
    return grads


def sides(window: int | None) -> dict[str, int]:
    """Keywords of torch's flash attention for a window; None: no window."""
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}


# -- the twin -------------------------------------------------------------------------------------


def document_mask(
    cu: Tensor, tokens: int, window: int | None = None, ends: KeyEnds | None = None, keys: int = 0
) -> Tensor:
    """[tokens, tokens] bool, or with ``ends`` [tokens, keys]: same document, not in the future,
    within the window."""
    if ends is None:
        ends, keys = KeyEnds(cu, 0), tokens
    at, key = (torch.arange(n, device=cu.device, dtype=cu.dtype) for n in (tokens, keys))
    document = torch.bucketize(at, cu[1:], right=True)
    of_key = torch.bucketize(key, ends.cu[1:], right=True)
    at = at + (ends.cu - cu)[document + 1]  # the key at which a query stands
    ahead = at[:, None] - key[None, :]
    seen = (document[:, None] == of_key[None, :]) & (ahead >= 0)
    return seen if window is None else seen & (ahead < window)


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    rules: Rules,
    sinks: Tensor | None = None,
    ends: KeyEnds | None = None,
) -> Tensor:
    """The twin: dense, exact, differentiable. q [M, H, D], k [N, KV, D], v [N, KV, E], sinks [H]
    -> [M, H, E]; N is M without ``ends``."""
    seen = document_mask(cu, len(q), rules.window, ends, len(k))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return attend(q, k, v, seen, rules, sinks)[0].transpose(0, 1)


def eager_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    rules: Rules,
    sinks: Tensor | None = None,
    ends: KeyEnds | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The twin of ``flash_forward``."""
    out = eager_attention(q, k, v, cu, rules, sinks, ends)
    return out, () if sinks is None else (log_sums(q, k, cu, rules, sinks, ends),)


def eager_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    rules: Rules,
    sinks: Tensor | None = None,
    ends: KeyEnds | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of ``flash_backward``."""
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = eager_attention(q, k, v, cu, rules, sinks, ends)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    return dq, dk, dv


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, rules: Rules, sinks: Tensor | None = None
) -> Tensor:
    """Attention by its definition. q [B, H, Q, D], k [B, KV, K, D], v [B, KV, K, E], sinks [H];
    ``seen`` is a bool or additive mask that expands to [B, H, Q, K] -> [B, H, Q, E]. The softmax is
    in fp32 whatever the inputs are."""
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    p = _scores(q, k, seen, rules, sinks).softmax(-1)[..., : k.shape[2]]
    return (p @ v.float()).to(q.dtype)


def log_sums(
    q: Tensor,
    k: Tensor,
    cu: Tensor,
    rules: Rules,
    sinks: Tensor | None,
    ends: KeyEnds | None = None,
) -> Tensor:
    """Natural logarithm of each row's softmax denominator, fp32 [H, M]."""
    seen = document_mask(cu, len(q), rules.window, ends, len(k))
    q, k = (x.transpose(0, 1)[None] for x in (q, k))
    return _scores(q, k, seen, rules, sinks)[0].logsumexp(-1)


def _scores(q: Tensor, k: Tensor, seen: Tensor, rules: Rules, sinks: Tensor | None) -> Tensor:
    """[B, H, Q, K] fp32, minus infinity where masked; [B, H, Q, K + 1] with sinks."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q.float() @ k.float().transpose(-1, -2)) * rules.scale
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    if seen.dtype == torch.bool:
        scores = scores.masked_fill(~seen, -torch.inf)
    else:
        scores = scores + seen.float()
    if sinks is None:
        return scores
    column = sinks.float().view(1, -1, 1, 1).expand(len(q), -1, q.shape[2], 1)
    return torch.cat([scores, column], -1)


# -- implementations ------------------------------------------------------------------------------


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        cu: Tensor,
        longest: int,
        rules: Rules,
        ends: KeyEnds | None,
    ) -> Tensor:
        out, kept = flash_forward(q, k, v, cu, longest, rules, sinks, ends)
        ctx.save_for_backward(q, k, v, out, cu, sinks, *kept)
        ctx.longest, ctx.rules, ctx.ends = longest, rules, ends
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, cu, sinks, *kept = ctx.saved_tensors
        dout, more = dout.contiguous(), (cu, ctx.longest, ctx.rules, sinks, ctx.ends)
        grads = flash_backward(dout, q, k, v, out, tuple(kept), *more)
        dsinks = None
        if ctx.needs_input_grad[3]:  # the sink's probability in each row times dout . out
            share = (sinks.float()[:, None] - kept[0]).exp()
            dsinks = -(share * (dout.float() * out.float()).sum(-1).t()).sum(1).to(sinks.dtype)
        return (*grads, dsinks, None, None, None, None)


def by_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu: Tensor,
    longest: int,
    rules: Rules,
    ends: KeyEnds | None = None,
) -> Tensor:
    """torch's flash attention. q [1, H, M, D], k [1, KV, N, D], v [1, KV, N, E] -> [1, M, H, E]; N
    is M without ``ends``. Values narrower than keys (MLA) are widened with zeros."""
    wide = v.shape[-1]
    if wide != q.shape[-1]:
        v = pad(v, (0, q.shape[-1] - wide))
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    apply: Any = _Varlen.apply
    out = apply(q, k, v, sinks, cu, longest, rules, ends)
    assert isinstance(out, Tensor)
    return out[None, :, :, :wide]


def by_document(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, rules: Rules, cu_k: Tensor | None = None
) -> Tensor:
    """torch's own kernel, one document after another. q [1, H, M, D], k [1, KV, N, D],
    v [1, KV, N, E], cu and cu_k the boundaries of M and of N (the same without it) -> [1, M, H, E].
    A document's last query stands at its last key. With a window, in blocks of queries and the keys
    they reach."""
    k, v = _every_head(q, k, v)
    parts = []
    for one, keys, values in _documents(q, k, v, cu, cu_k):
        queries, tokens = one.shape[2], keys.shape[2]
        near = rules.within(tokens)
        if near.window is None:
            asked: Any = {"is_causal": True}
            if tokens > queries:
                asked = {"attn_mask": causal_lower_right(queries, tokens)}
            out = scaled_dot_product_attention(one, keys, values, scale=near.scale, **asked)
            parts.append(out)
            continue
        for a, b, low, end in _blocks(queries, tokens, near.window):
            seen = _seen(b - a, end - low, near.window, q.device)
            out = scaled_dot_product_attention(
                one[:, :, a:b], keys[:, :, low:end], values[:, :, low:end], seen, scale=near.scale
            )
            parts.append(out)
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


def _every_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with a copy of each head for every head of q that reads it."""
    group = q.shape[1] // k.shape[1]
    if group == 1:
        return k, v
    return k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


def in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu: Tensor,
    rules: Rules,
    cu_k: Tensor | None = None,
) -> Tensor:
    """``attend`` over blocks of queries, one document after another, recomputed in backward so that
    only one block's scores exist at a time. Shapes as ``by_document``."""
    parts = []
    for one, keys, values in _documents(q, k, v, cu, cu_k):
        for a, b, low, end in _blocks(one.shape[2], keys.shape[2], rules.window):
            seen = _seen(b - a, end - low, rules.window, q.device)
            block = (one[:, :, a:b], keys[:, :, low:end], values[:, :, low:end], seen, rules, sinks)
            out = checkpoint(attend, *block, use_reentrant=False, preserve_rng_state=False)
            parts.append(out)
    return torch.cat(parts, 2).transpose(1, 2).contiguous()


def _documents(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, cu_k: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The documents of a pack, [1, H, tokens, D] each."""
    queries = [b - a for a, b in pairwise(cu.tolist())]
    keys = queries if cu_k is None else [b - a for a, b in pairwise(cu_k.tolist())]
    return zip(*(x.split(n, 2) for x, n in ((q, queries), (k, keys), (v, keys))), strict=True)


def _blocks(queries: int, keys: int, window: int | None) -> list[tuple[int, int, int, int]]:
    """(first query, the one after the last, first key, the one after the last) of each block of a
    document."""
    before = keys - queries
    return [
        (a, end, 0 if window is None else max(0, before + a - window + 1), before + end)
        for a in range(0, queries, BLOCK)
        for end in [min(a + BLOCK, queries)]
    ]


def _seen(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool mask, with the last query at the last key."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


# -- what transformers calls ----------------------------------------------------------------------


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    shared_keys: SharedKeys | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, H, S, D], key [B, KV, K, D], value [B, KV, K,
    E] -> ([B, S, H, E], None).

    Raises ValueError for an unknown keyword, and in a pack for more than one row, dropout, a mask,
    or attention to later tokens."""
    _validate_known(module, others)
    rules = Rules(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if torch.is_autocast_enabled(query.device.type):  # as torch's own; rotary gives q and k in fp32
        lower = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(lower) for x in (query, key, value))
    if cu_seq_lens_q is None:
        return _unpacked(query, key, value, attention_mask, rules, s_aux, dropout, causal), None
    _validate_fit(module, query, attention_mask, dropout, causal)
    if cu_seq_lens_k is not None and cu_seq_lens_k.shape != cu_seq_lens_q.shape:
        raise ValueError(f"{_named(module)}: cu_seq_lens_k and cu_seq_lens_q differ")
    if max_length_q is None:
        raise ValueError(f"{_named(module)}: cu_seq_lens_q came without max_length_q")
    longest = int(max_length_q)
    if shared_keys is not None:
        key, value = (spread_heads(x, shared_keys) for x in (key, value))
    elif cu_seq_lens_k is not None and key.shape[2] != query.shape[2]:
        if s_aux is not None or softcap is not None or _reaches(sliding_window, max_length_k):
            raise ValueError(f"{_named(module)}: no prefix beside sinks, a soft cap or a window")
    ends = None
    if cu_seq_lens_k is not None and key.shape[2] != query.shape[2]:
        if max_length_k is None:
            raise ValueError(f"{_named(module)}: cu_seq_lens_k came without max_length_k")
        ends = KeyEnds(cu_seq_lens_k, int(max_length_k))
    return _packed(query, key, value, s_aux, cu_seq_lens_q, longest, rules, ends), None


def _reaches(window: int | None, longest: int | None) -> bool:
    """Whether documents of up to ``longest`` keys are longer than the window."""
    return window is not None and (longest is None or window < longest)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu: Tensor,
    longest: int,
    rules: Rules,
    ends: KeyEnds | None = None,
) -> Tensor:
    rules = rules.within(longest if ends is None else ends.longest)
    cu_k = None if ends is None else ends.cu
    if rules.softcap is None:
        if takes_flash(q, v):
            return by_flash(q, k, v, sinks, cu, longest, rules, ends)
        if sinks is None:
            return by_document(q, k, v, cu, rules, cu_k)
    return in_blocks(q, k, v, sinks, cu, rules, cu_k)


def _unpacked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    rules: Rules,
    sinks: Tensor | None,
    dropout: float,
    causal: bool,
) -> Tensor:
    """Attention of rows that are one sequence each, the last query at the last key -> [B, S, H,
    E]."""
    rows, _, queries, _ = q.shape
    keys = k.shape[2]
    if causal and mask is None and queries == keys:
        rules = rules.within(keys)
    plain = rules.softcap is None and sinks is None
    if dropout and not plain:
        raise ValueError(f"attention dropout {dropout} is not supported here: set it to 0")
    if causal and mask is None:
        if plain and rules.window is None and queries == keys:
            out = scaled_dot_product_attention(
                q, k, v, None, dropout, True, scale=rules.scale, enable_gqa=True
            )
            return out.transpose(1, 2).contiguous()
        if queries == keys and not dropout:  # rows end to end are a pack
            cu = torch.arange(0, (rows + 1) * keys, keys, dtype=torch.int32, device=q.device)
            one, its_keys, values = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v))
            out = _packed(one, its_keys, values, sinks, cu, keys, rules)
            return out.view(rows, queries, *out.shape[2:])
        mask = _seen(queries, keys, rules.window, q.device)
    if plain:
        out = scaled_dot_product_attention(
            q, k, v, mask, dropout, scale=rules.scale, enable_gqa=True
        )
    else:
        every = torch.ones(1, 1, dtype=torch.bool, device=q.device)
        out = attend(q, k, v, every if mask is None else mask, rules, sinks)
    return out.transpose(1, 2).contiguous()


def _validate_known(module: torch.nn.Module, others: dict[str, Any]) -> None:
    unknown = [k for k, v in others.items() if v is not None and v is not False and k not in SILENT]
    if unknown:
        raise ValueError(
            f"{_named(module)} asks attention for {', '.join(sorted(unknown))}, which "
            "packed attention does not know: set training.packing = false"
        )


def _validate_fit(
    module: torch.nn.Module, query: Tensor, mask: Tensor | None, dropout: float, causal: bool
) -> None:
    if query.shape[0] != 1:
        raise ValueError(
            f"packed attention takes one row, got {query.shape[0]}: concatenate the documents and "
            "pass their boundaries"
        )
    if dropout:
        raise ValueError(
            f"attention dropout {dropout} is not supported on packed rows: set attention_dropout "
            "to 0 in the model's config"
        )
    if mask is not None:
        raise ValueError(f"{_named(module)} has an attention mask of its own beside boundaries")
    if not causal:
        raise ValueError(f"{_named(module)} attends to later tokens too: it cannot be packed")


def _named(module: torch.nn.Module) -> str:
    layer = getattr(module, "layer_idx", None)
    return type(module).__name__ + ("" if layer is None else f" of layer {layer}")


def register() -> str:
    """Make "milktea" a name for ``attn_implementation``. Safe to call twice. Returns the name."""
    AttentionInterface.register("milktea", packed_attention)
    return "milktea"
