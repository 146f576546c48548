"""A decoder layer as one autograd function, built from parts by family: what it saves, what it
recomputes, and every product are explicit.

M tokens, h hidden, f intermediate. Per token forward saves 5h + (1 + 2 KV/H) h + 2f values: the
layer's input, q k v, attention's output, the middle of the residual stream, gate and up; 2h more
where branches have norms of their own. Backward recomputes the other norms, rotary embedding behind
head norms, and the activation's product. A checkpointed layer saves only its input. Backward never
forms a weight gradient of the frozen base: 4N FLOPs a token, 6N when checkpointed. ``ops`` is
``trainer.kernels.triton_ops`` on a GPU and its twin ``trainer.kernels.reference`` elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.data.shared_keys import SharedKeys
from trainer.kernels.attention import (
    KeyEnds,
    Rules,
    flash_backward,
    flash_forward,
    short_kernels,
)
from trainer.kernels.lora import Group, outer, validate_latest
from trainer.kernels.nets import ColumnOrder
from trainer.kernels.norms import HeadNorms, Norm
from trainer.kernels.shared_keys import gather, spread
from trainer.kernels.shared_mlp import SharedMlp


class Packed(NamedTuple):
    """Document boundaries ``cu`` int32 [documents + 1], the longest document's tokens ``longest``
    (int), and each token's angles cos and sin [M, D]. ``keep`` is called with the keys and values
    [M, KV, D] of the tokens. Where documents read each other's keys, ``shared`` says which, and
    ``ends`` where each document's keys end."""

    cos: Tensor
    sin: Tensor
    cu: Tensor
    longest: int
    keep: Callable[[Tensor, Tensor], None] | None = None
    shared: SharedKeys | None = None
    ends: KeyEnds | None = None

    @property
    def most_keys(self) -> int:
        """The most keys that a document reads."""
        return self.longest if self.ends is None else self.ends.longest

    @property
    def reads(self) -> Tensor | None:
        """Which tokens of others each document reads: ``SharedKeys.reads``."""
        return None if self.shared is None else self.shared.reads

    def short_kernels(self, q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> ModuleType | None:
        """Attention for short documents where it computes this pack: with a window only documents
        that read no others."""
        if self.shared is not None and rules.window is not None:
            return None
        return short_kernels(q, k, v, self.most_keys, rules)


# the results of ``rope_backward``
Turned = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


class SavedActivations(NamedTuple):
    """What forward saves for backward, beside the layer's input. ``qkv`` is the input of attention
    or, with head norms, of these norms; ``z`` and ``rstd_z`` belong to the norms of branches.
    ``flash`` ends with the gate of attention's output where there is one."""

    qkv: Tensor
    out: Tensor
    middle: Tensor | None
    gu: Tensor | None
    rstd1: Tensor
    rstd2: Tensor | None
    z1: Tensor | None
    z2: Tensor | None
    rstd_z1: Tensor | None
    rstd_z2: Tensor | None
    t: tuple[Tensor | None, ...]  # x A^T before qkv, o, gate-up, down
    flash: tuple[Tensor, ...]


TENSORS = SavedActivations._fields.index("t")  # fields of SavedActivations before the tuples


@dataclass
class FastLayer:
    """The parts of one decoder layer. ``checkpoint``: save only the input and run forward again in
    backward. Without ``gate_up`` and ``down`` the fused part ends in the middle of the residual
    stream, and ``after`` (experts) computes the rest; with ``remake_after`` backward recomputes
    it."""

    ops: ModuleType
    qkv: Group
    o: Group
    gate_up: Group | None
    down: Group | None
    norm1: Norm
    norm2: Norm | None
    bias: Tensor | None  # of q, k, v joined
    heads: int
    kv_heads: int
    head_dim: int
    rules: Rules
    checkpoint: bool = False
    head_norms: HeadNorms | None = None
    branch1: Norm | None = None  # of attention's branch
    branch2: Norm | None = None  # of the MLP's
    o_bias: Tensor | None = None
    sinks: Tensor | None = None  # [H]
    turned: float = 1.0  # the share of a head's columns that rotary embedding turns
    pairs: bool = False  # rotary pairs are neighbours (i, i + 1), not halves apart
    gelu: bool = False  # gelu in its tanh approximation, instead of silu
    out_scale: float = 1.0  # of the layer's output
    order: ColumnOrder | None = None  # of a joined projection that also holds attention's gate
    beside: SharedMlp | None = None  # the shared expert, part of ``after``
    after: Callable[[Tensor], Tensor] | None = None  # [M, h] -> [M, h]
    remake_after: bool = False  # where it saves many times the stream's memory
    steps: bool = False  # whether decoding uses ``trainer/kernels/step_layer.py``

    @property
    def groups(self) -> list[Group]:
        return [g for g in (self.qkv, self.o, self.gate_up, self.down) if g is not None]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.groups for p in group.parameters]

    @property
    def like(self) -> Tensor:
        """Empty, of the compute dtype on the layer's device."""
        return self.qkv.like

    @property
    def attends(self) -> bool:
        """Whether the layer mixes tokens by attention."""
        return True

    @property
    def kind(self) -> tuple[Any, ...]:
        """Layers of equal kind run the same kernels."""
        sizes = tuple(tuple(g.sizes) for g in self.groups)
        some = (self.head_norms, self.branch1, self.sinks, self.bias, self.o_bias)
        norms = tuple(x is not None for x in (*some, self.order))
        numbers = (self.head_dim, self.pairs, self.gelu, self.out_scale)
        return (self.attends, self.rules, *numbers, norms, sizes)

    @property
    def _turns(self) -> dict[str, Any]:
        return {"norms": self.head_norms, "pairs": self.pairs}

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[M, (H + 2 KV) D] -> views q [M, H, D], k and v [M, KV, D]."""
        q, k, v = qkv.split(
            [
                self.heads * self.head_dim,
                self.kv_heads * self.head_dim,
                self.kv_heads * self.head_dim,
            ],
            1,
        )
        return (
            q.unflatten(1, (-1, self.head_dim)),
            k.unflatten(1, (-1, self.head_dim)),
            v.unflatten(1, (-1, self.head_dim)),
        )

    def _heads(self, qkv: Tensor, turned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of attention; v comes from ``qkv`` where head norms leave it out."""
        q, k, v = self._split(turned)
        if self.head_norms is not None and not self.head_norms.values:
            v = self._split(qkv)[2]
        return q, k, v

    def _project(
        self, x: Tensor, group: Group, p: Tensor | None, fold: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(``x`` as the frozen product takes it, its FP8 row scales or None, ``x p`` or None)."""
        if group.weight.column_scale is None:
            return x, None, x @ p if p is not None else None
        scale = group.weight.column_scale if fold else None
        quantised: tuple[Tensor, Tensor, Tensor | None] = self.ops.quantise_rows(x, scale, p)
        return quantised

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, packed: Packed
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        rules = self.rules.within(packed.most_keys)
        near = (packed.cu, packed.longest, rules, self.sinks, packed.ends)
        short = packed.short_kernels(q, k, v, rules)
        if short is None:
            if packed.shared is not None:
                k, v = (spread(x, packed.shared) for x in (k, v))
            return flash_forward(q, k, v, *near)
        first = short.spans(packed.cu, len(q), rules.window).first
        found: tuple[Tensor, tuple[Tensor, ...]] = short.forward(
            q, k, v, first, rules.scale, rules.softcap, self.sinks, packed.reads
        )
        return found

    def _mix(
        self, joined: Tensor, t: Tensor | None, packed: Packed
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Mix tokens. The projection [M, N], to which LoRA's term is added in place -> (the input
        of the branch's last projection [M, W]; qkv, out and flash of ``SavedActivations``)."""
        ops, b, qkv = self.ops, self.qkv.b, joined
        if self.order is not None:
            add_lora_(joined, t, b, self.qkv.sizes)
            qkv, t, b = ops.delta.pick(joined, self.order.dense, self.order.run), None, None
        counts = (packed.cos, packed.sin, self.heads, self.kv_heads)
        turned = ops.rope_forward_(qkv, t, b, self.bias, *counts, **self._turns)
        q, k, v = self._heads(qkv, turned)
        if packed.keep is not None:
            packed.keep(k, v)
        out, flash = self._attend(q, k, v, packed)
        if self.order is None:
            return out.flatten(1), qkv, out, flash
        gate = ops.delta.pick(joined, self.order.gate, self.order.run)
        return ops.delta.gate_forward(out.flatten(1), gate), qkv, out, (*flash, gate)

    def _ungate(self, dout: Tensor, kept: SavedActivations) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradient of the branch's last projection's input [M, W], which may be overwritten ->
        (that input, d(out), the gate's gradient or None)."""
        if self.order is None:
            return kept.out.flatten(1), dout, None
        mixed, dgate = self.ops.delta.gate_backward_(dout, kept.out.flatten(1), kept.flash[-1])
        return mixed, dout, dgate

    def _unmix(
        self, dout: Tensor, kept: SavedActivations, packed: Packed, dgate: Tensor | None
    ) -> Turned:
        """d(out) [M, W] -> what ``rope_backward`` returns."""
        ops, norms, turn = self.ops, self.head_norms, (packed.cos, packed.sin)
        b, column_scale = self.qkv.b, self.qkv.weight.column_scale
        counts, dout = (self.heads, self.kv_heads), dout.view_as(kept.out)
        turned, flash = kept.qkv, kept.flash
        if self.order is not None:
            flash = flash[:-1]
        if norms is not None:
            none = (None, None, None)
            turned = ops.rope_forward_(kept.qkv, *none, *turn, *counts, **self._turns)
        q, k, v = self._heads(kept.qkv, turned)
        rules, shared = self.rules.within(packed.most_keys), packed.shared
        short = packed.short_kernels(q, k, v, rules)
        if short is None:
            if shared is not None:
                k, v = (spread(x, shared) for x in (k, v))
            near = (packed.cu, packed.longest, rules, self.sinks, packed.ends)
            dq, dk, dv = flash_backward(dout, q, k, v, kept.out, flash, *near)
            if shared is not None:
                dk, dv = gather(dk, shared), gather(dv, shared)
            parts = (dq, dk, dv)
            if norms is None:
                found = ops.rope_backward(*parts, *turn, b, column_scale, self.pairs)
                return cast(Turned, found)
            d = torch.cat([x.flatten(1) for x in parts], 1)
        else:
            spans = short.spans(packed.cu, len(q), rules.window)
            asked = (None, None) if norms is not None else turn
            more = (spans, rules.scale, *asked, self.pairs, rules.softcap, packed.reads)
            d = short.backward(dout, q, k, v, kept.out, flash[0], *more)
        if norms is not None:
            ops.head_norm_backward_(d, kept.qkv, *turn, *counts, **self._turns)
        if self.order is not None and dgate is not None:
            d = ops.delta.pick(torch.cat([d, dgate], 1), self.order.back, self.order.run)
        return (d, *ops.joined_backward(d, b, column_scale, self.qkv.sizes))

    def forward(
        self, h: Tensor, packed: Packed, again: bool = False
    ) -> tuple[Tensor | None, SavedActivations]:
        """h [M, h] -> (the layer's output [M, h], what backward needs). ``again``: recompute only
        the latter; the output may then be None."""
        ops = self.ops
        fp8 = self.qkv.weight.column_scale is not None
        _, x, s, t1, rstd1 = ops.norm_forward(h, *self.norm1, self.qkv.a, fp8)
        mixed, qkv, out, flash = self._mix(self.qkv.weight.forward(x, s), t1, packed)
        o_a = self.o.a.t() if self.o.a is not None else None
        x, s, t2 = self._project(mixed, self.o, o_a, False)
        del mixed
        y, added = self.o.weight.forward(x, s), (t2, self.o.b)
        if self.o_bias is not None:
            y += self.o_bias
        z1 = rstd_z1 = None
        stream, extra = h, cast(tuple[Any, ...], (y, *added))
        if self.branch1 is not None:
            stream, z1, rstd_z1 = ops.branch_forward(h, y, *added, *self.branch1, 1.0)
            extra = ()
        if self.gate_up is None or self.down is None or self.norm2 is None:
            end = stream if not extra else ops.residual_add(h, *extra)
            ts: tuple[Tensor | None, ...] = (t1, t2, None, None)
            none = (None, None, rstd1, None, z1, None, rstd_z1, None)
            return end, SavedActivations(qkv, out, *none, ts, flash)
        middle, x, s, t3, rstd2 = ops.norm_forward(stream, *self.norm2, self.gate_up.a, fp8, *extra)
        del y, extra
        gu = self.gate_up.weight.forward(x, s)
        kept = SavedActivations(
            *(qkv, out, middle, gu, rstd1, rstd2, z1, None, rstd_z1, None),
            (t1, t2, t3, None),
            flash,
        )
        if again and self.branch2 is None:
            return None, kept
        x, s, t4 = ops.swiglu_forward(gu, t3, self.gate_up.b, self.down.a, fp8, self.gelu)
        y, ts = self.down.weight.forward(x, s), (t1, t2, t3, t4)
        if self.branch2 is None:
            return ops.residual_add(middle, y, t4, self.down.b), kept._replace(t=ts)
        end, z2, rstd_z2 = ops.branch_forward(
            middle, y, t4, self.down.b, *self.branch2, self.out_scale
        )
        return end, kept._replace(t=ts, z2=z2, rstd_z2=rstd_z2)

    def backward(
        self, dh: Tensor, h: Tensor, packed: Packed, kept: SavedActivations, first: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """d(output) [M, h] -> (d(h), or None for the first layer; gradients in the order of
        ``parameters``). Overwrites ``kept.gu``."""
        dmiddle, after = self._mlp_backward(dh, kept)
        ops, (t1, t2, *_) = self.ops, kept.t
        dbranch = _branch_backward(ops, dmiddle, self.branch1, kept.z1, kept.rstd_z1)
        x, s, dt2 = self._project(dbranch, self.o, self.o.b, True)
        dout = self.o.weight.backward(x, s)
        if dt2 is not None and self.o.a is not None:
            dout.addmm_(dt2, self.o.a)
        mixed, dout, dgate = self._ungate(dout, kept)
        o = self.o.gradients(
            outer(dt2, mixed) if dt2 is not None else None,
            outer(dbranch, t2) if t2 is not None else None,
        )
        del dbranch, x, mixed
        d, d8, s, dt1 = self._unmix(dout, kept, packed, dgate)
        del dout, dgate
        grads = self.qkv.gradients(
            self._grad_a(dt1, kept.rstd1, h, self.norm1), outer(d, t1) if t1 is not None else None
        )
        grads += o + after
        if first:
            return None, grads
        dx = self.qkv.weight.backward(d if d8 is None else d8, s)
        more = (self.qkv.a, h, self.norm1.weight, kept.rstd1, dmiddle)
        return ops.norm_backward(dx, dt1, t1, *more), grads

    def _mlp_backward(
        self, dh: Tensor, kept: SavedActivations
    ) -> tuple[Tensor, list[Tensor | None]]:
        """d(output) -> (d(the middle of the stream), the gradients of gate, up and down)."""
        if self.gate_up is None or self.down is None or self.norm2 is None:
            return dh, []
        ops, (_, _, t3, t4) = self.ops, kept.t
        assert kept.gu is not None and kept.middle is not None and kept.rstd2 is not None
        if self.out_scale != 1.0:
            dh = dh * self.out_scale
        dbranch = _branch_backward(ops, dh, self.branch2, kept.z2, kept.rstd_z2)
        x, s, dt4 = self._project(dbranch, self.down, self.down.b, True)
        dact = self.down.weight.backward(x, s)
        column_scale = self.gate_up.weight.column_scale
        act, dgu, s, dt3 = ops.swiglu_backward(
            kept.gu, t3, self.gate_up.b, dact, dt4, self.down.a, column_scale, self.gelu
        )
        if t4 is None and self.down.a is not None:
            t4 = act @ self.down.a.t()
        down = self.down.gradients(
            outer(dt4, act) if dt4 is not None else None,
            outer(dbranch, t4) if t4 is not None else None,
        )
        del act, dact, dbranch, x
        d8, grad_b3 = ops.cast_outer(dgu, column_scale, s, t3)
        dx = self.gate_up.weight.backward(dgu if d8 is None else d8, s)
        more = (self.gate_up.a, kept.middle, self.norm2.weight, kept.rstd2, dh)
        dmiddle = ops.norm_backward(dx, dt3, t3, *more)
        gate_up = self.gate_up.gradients(
            self._grad_a(dt3, kept.rstd2, kept.middle, self.norm2), grad_b3
        )
        return dmiddle, gate_up + down

    @staticmethod
    def _grad_a(dt: Tensor | None, rstd: Tensor, h: Tensor, norm: Norm) -> Tensor | None:
        """dA = dt^T x with x = h * rstd * norm, without computing x: scale dt's rows before the
        product and its columns after. [G*R, K] fp32."""
        if dt is None:
            return None
        return outer((dt * rstd[:, None]).to(h.dtype), h) * norm.weight.float()


def add_lora_(joined: Tensor, t: Tensor | None, b: Tensor | None, sizes: list[int]) -> None:
    """Adds t b^T to the parts of ``joined [M, N]`` in place: t [M, G R], b [N, R]."""
    if t is None or b is None:
        return
    r = b.shape[1]
    for i, (part, rows) in enumerate(zip(joined.split(sizes, 1), b.split(sizes), strict=True)):
        part.addmm_(t[:, i * r : (i + 1) * r], rows.t())


def _branch_backward(
    ops: ModuleType, d: Tensor, norm: Norm | None, z: Tensor | None, rstd: Tensor | None
) -> Tensor:
    """d(the normed branch) -> d(the branch), which is the same without a norm."""
    if norm is None or z is None or rstd is None:
        return d
    return cast(Tensor, ops.norm_backward(d, None, None, None, z, norm.weight, rstd, None))


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, layer: FastLayer, packed: Packed, *parameters: Tensor
    ) -> Tensor:
        ctx.layer, ctx.packed, ctx.generation = layer, packed, layer.qkv.generation
        y, kept = layer.forward(h, packed)
        assert y is not None
        if layer.checkpoint:
            ctx.save_for_backward(h)
        else:
            ctx.save_for_backward(h, *kept[:TENSORS], *kept.t, *kept.flash)
        return y

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        h, *rest = ctx.saved_tensors
        layer: FastLayer = ctx.layer
        validate_latest(layer.qkv, ctx.generation)
        if rest:
            parts, t, flash = rest[:TENSORS], rest[TENSORS : TENSORS + 4], rest[TENSORS + 4 :]
            kept = SavedActivations._make((*parts, tuple(t), tuple(flash)))
            del rest, parts, t, flash
        else:
            kept = layer.forward(h, ctx.packed, again=True)[1]
        dx, grads = layer.backward(
            dh.contiguous(), h, ctx.packed, kept, not ctx.needs_input_grad[0]
        )
        return dx, None, None, *grads


def run_layer(layer: FastLayer, h: Tensor, packed: Packed) -> Tensor:
    """h [M, h] -> [M, h], differentiable in h and in the adapters."""
    out: Tensor = _Layer.apply(h, layer, packed, *layer.parameters)  # type: ignore[no-untyped-call]
    if layer.after is None:
        return out
    if not (out.requires_grad and (layer.checkpoint or layer.remake_after)):
        return layer.after(out)
    end: Tensor = checkpoint(layer.after, out, use_reentrant=False, preserve_rng_state=False)
    return end


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, eps: float, ops: ModuleType) -> Tensor:
        _, x, _, _, rstd = ops.norm_forward(h, weight, eps, None, False)
        ctx.save_for_backward(h, weight, rstd)
        ctx.ops = ops
        return cast(Tensor, x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, rstd = ctx.saved_tensors
        return (
            ctx.ops.norm_backward(dx.contiguous(), None, None, None, h, weight, rstd, None),
            None,
            None,
            None,
        )


def frozen_norm(h: Tensor, weight: Tensor, eps: float, ops: ModuleType) -> Tensor:
    """RMSNorm of h [M, K] with a frozen weight [K]."""
    out: Tensor = _Norm.apply(h, weight, eps, ops)  # type: ignore[no-untyped-call]
    return out
