"""One decoding step of a decoder layer: one more token for each of a few rows whose earlier keys
and values are cached. It uses the parts and weights of ``trainer/kernels/decoder_layer.py``,
without gradients.

Nothing waits for the device and every shape is known beforehand, so a step can be captured as a
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.kernels import reference, step_reference
from trainer.kernels.attention import Rules, attend, has_flash, sides
from trainer.kernels.decoder_layer import FastLayer
from trainer.kernels.lora import Group


class CachePositions(NamedTuple):
    """Where the next token of each of B rows goes in the cache: row ``slots`` int64 [B], place
    ``positions`` int64 [B]. For flash attention, ``firsts`` int32 [B + 1] are the boundaries of the
    queries, ``starts`` int32 [B + 1] the first place of each row when all cache rows lie end to
    end, and ``seen`` int32 [B] the number of tokens that each row then holds. ``share`` [B,
    adapters] says how much each held adapter counts in a row; None where all rows have the same."""

    slots: Tensor
    positions: Tensor
    firsts: Tensor
    starts: Tensor
    seen: Tensor
    share: Tensor | None = None

    @classmethod
    def of(
        cls, slots: Tensor, positions: Tensor, longest: int, share: Tensor | None = None
    ) -> CachePositions:
        """``longest`` is the number of places in a cache row."""
        firsts = torch.arange(len(slots) + 1, dtype=torch.int32, device=slots.device)
        starts = torch.nn.functional.pad((slots * longest).int(), (0, 1))
        return cls(slots, positions, firsts, starts, (positions + 1).int(), share)


Attention = Callable[[Tensor, Tensor, Tensor, CachePositions, Rules, Tensor | None], Tensor]


def takes_steps(layer: FastLayer) -> bool:
    """Whether ``step`` supports this layer. It does not support experts, whose routing waits for
    the device, gated delta nets, gated attention, and, on a GPU, score caps and heads wider than
    256 columns."""
    flash = layer.rules.softcap is None and layer.head_dim <= 256
    plain = layer.attends and layer.order is None
    return plain and layer.down is not None and (flash or not layer.like.is_cuda)


def step(
    layer: FastLayer,
    h: Tensor,
    cos: Tensor,
    sin: Tensor,
    at: CachePositions,
    kept: tuple[Tensor, Tensor],
    attention: Attention | None = None,
) -> Tensor:
    """h [B, h], cos and sin [B, D] with equal halves -> the layer's output [B, h]. Writes the
    tokens' keys and values into ``kept``. ``attention`` replaces ``by_flash``."""
    ops = operations(layer)
    assert layer.gate_up is not None and layer.down is not None
    _, x = ops.add_norm(h, None, None, None, layer.norm1)
    q = ops.turn_and_keep(
        *product(layer, layer.qkv, x, at.share),
        *(layer.bias, cos, sin, (layer.heads, layer.kv_heads), *kept, at.slots, at.positions),
        norms=layer.head_norms,
        pairs=layer.pairs,
    )
    out = (attention or by_flash)(q, *kept, at, layer.rules, layer.sinks)
    y, more = product(layer, layer.o, out.flatten(1), at.share)
    if layer.o_bias is not None:
        y += layer.o_bias
    middle, x = ops.add_norm(h, y, more, layer.branch1, layer.norm2)
    act = ops.gate(*product(layer, layer.gate_up, x, at.share), layer.gelu)
    scale = 1.0 if layer.branch2 is None else layer.out_scale
    last = product(layer, layer.down, act, at.share)
    end: Tensor = ops.add_norm(middle, *last, layer.branch2, None, scale)[0]
    return end


def operations(layer: FastLayer) -> ModuleType:
    """``trainer.kernels.step_ops`` where the layer computes by Triton, else the twin."""
    if layer.ops is reference:
        return step_reference
    from trainer.kernels import step_ops

    return step_ops


def product(
    layer: FastLayer, group: Group, x: Tensor, share: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x [B, K], ``share`` [B, adapters] -> (x W^T [B, N], the adapters' term [B, N] or None).
    During graph capture the two run on separate streams: the base product is bound by memory, and
    the adapters' products are short."""
    beside = None
    if group.wide_a is not None and x.is_cuda and torch.cuda.is_current_stream_capturing():
        beside = _beside(x.device)
        beside.wait_stream(torch.cuda.current_stream())
    more = None
    with torch.cuda.stream(beside):
        if group.wide_a is not None and group.wide_b is not None:
            t = x @ group.wide_a.t()
            if share is not None:
                t = (t.unflatten(1, (share.shape[1], -1)) * share[:, :, None]).flatten(1)
            more = t @ group.wide_b.t()
    if group.weight.column_scale is None:
        y = group.weight.forward(x, None)
    else:
        x8, scale, _ = layer.ops.quantise_rows(x, None, None)
        y = group.weight.forward(x8, scale)
    if beside is not None:
        torch.cuda.current_stream().wait_stream(beside)
    return y, more


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def by_flash(
    q: Tensor, keys: Tensor, values: Tensor, at: CachePositions, rules: Rules, sinks: Tensor | None
) -> Tensor:
    """q [B, G, KV, D], keys and values [rows, longest, KV, D] -> [B, KV, G, D]. Each row's query
    attends to the keys of its row, within the window."""
    if not has_flash(q) or rules.softcap is not None:
        return by_twin(q, keys, values, at, rules, sinks)
    (b, group, kv, d), longest = q.shape, keys.shape[1]
    near = {"window_size_left": -1, "window_size_right": -1}
    if rules.window is None:  # a group's queries see the same keys, as one document
        q, firsts, queries = q.flatten(0, 1), at.firsts * group, group
    else:
        q, firsts, queries = q.transpose(1, 2).reshape(b, kv * group, d), at.firsts, 1
        near = sides(rules.window)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(q, keys.flatten(0, 1), values.flatten(0, 1), firsts, at.starts),
        *(queries, longest, 0.0, False, False),
        scale=rules.scale,
        seqused_k=at.seen,
        **near,
    )
    if rules.window is None:  # out [B G, KV, D], lse [KV, B G]
        out = out.view(b, group, kv, d).transpose(1, 2)
        lse = lse.view(kv, b, group).transpose(0, 1)
    else:
        out, lse = out.view(b, kv, group, d), lse.view(kv, group, b).permute(2, 0, 1)
    if sinks is not None:  # a sink is a term of the sum with value zero; lse [B, KV, G], natural
        joined = torch.logaddexp(lse, sinks.float().view(kv, group))
        out = out.float() * (lse - joined).exp()[..., None]
    made: Tensor = out.to(q.dtype)
    return made


def by_twin(
    q: Tensor, keys: Tensor, values: Tensor, at: CachePositions, rules: Rules, sinks: Tensor | None
) -> Tensor:
    """The twin of ``by_flash``."""
    behind = at.positions[:, None] - torch.arange(keys.shape[1], device=q.device)
    seen = behind >= 0
    if rules.window is not None:
        seen &= behind < rules.window
    k, v = (x[at.slots].transpose(1, 2) for x in (keys, values))
    heads = q.transpose(1, 2).flatten(1, 2)[:, :, None]
    out = attend(heads, k, v, seen[:, None, None], rules, sinks)[:, :, 0]
    made: Tensor = out.unflatten(1, (keys.shape[2], -1))
    return made
