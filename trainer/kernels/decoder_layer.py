"""A Llama-shaped decoder layer as one autograd function: what it keeps, what it makes again, and
every product, in the open.

M tokens, h hidden, f intermediate. Per token it keeps 5h + (1 + 2 KV/H) h + 2f values (its input, q
k v, attention's output, the middle of the residual stream, gate and up) and makes the norms and
silu(gate) * up again; checkpointed, only its input. Backward never forms a weight gradient of the
frozen base: 4N FLOPs a token, 6N when checkpointed. ``ops`` is ``trainer.kernels`` on a GPU and its
twin ``trainer.kernels.reference`` elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from trainer.kernels.attention import flash_backward, flash_forward, short_kernels
from trainer.kernels.lora import Group, outer, validate_latest


class Packed(NamedTuple):
    """Where documents begin and the angles of each token: cos and sin [M, D], cu int32 [documents +
    1], longest an int."""

    cos: Tensor
    sin: Tensor
    cu: Tensor
    longest: int


# the joined gradient and what the products make of it; see ``rope_backward``
Turned = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


class Kept(NamedTuple):
    """What backward needs beside the layer's input."""

    qkv: Tensor
    out: Tensor
    middle: Tensor
    gu: Tensor
    rstd1: Tensor
    rstd2: Tensor
    t: tuple[Tensor | None, ...]  # x A^T before qkv, o, gate-up, down
    flash: tuple[Tensor, ...]


@dataclass
class FastLayer:
    """The parts of one decoder layer. ``checkpoint``: keep only the input and run forward again in
    backward."""

    ops: ModuleType
    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    norm1: Tensor
    norm2: Tensor
    bias: Tensor | None  # of q, k, v joined
    eps1: float
    eps2: float
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    checkpoint: bool = False

    @property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.groups for p in group.parameters]

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

    def _project(
        self, x: Tensor, group: Group, p: Tensor | None, fold: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the frozen product wants of ``x``, and ``x p``."""
        if group.weight.column_scale is None:
            return x, None, x @ p if p is not None else None
        scale = group.weight.column_scale if fold else None
        quantised: tuple[Tensor, Tensor, Tensor | None] = self.ops.quantise_rows(x, scale, p)
        return quantised

    def _attend(self, qkv: Tensor, packed: Packed) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, k, v = self._split(qkv)
        short = short_kernels(q, k, v, packed.longest)
        if short is None:
            return flash_forward(q, k, v, packed.cu, packed.longest, self.scale)
        first = short.spans(packed.cu, len(q)).first
        found: tuple[Tensor, tuple[Tensor, ...]] = short.forward(q, k, v, first, self.scale)
        return found

    def _attend_backward(self, dout: Tensor, kept: Kept, packed: Packed) -> Turned:
        """d(attention's output) [M, H, D] -> what ``rope_backward`` returns."""
        q, k, v = self._split(kept.qkv)
        b, column_scale = self.qkv.b, self.qkv.weight.column_scale
        short = short_kernels(q, k, v, packed.longest)
        if short is None:
            dqkv = flash_backward(
                dout, q, k, v, kept.out, kept.flash, packed.cu, packed.longest, self.scale
            )
            return cast(
                Turned, self.ops.rope_backward(*dqkv, packed.cos, packed.sin, b, column_scale)
            )
        spans = short.spans(packed.cu, len(q))
        d = short.backward(
            dout, q, k, v, kept.out, kept.flash[0], spans, self.scale, packed.cos, packed.sin
        )
        return (d, *self.ops.joined_backward(d, b, column_scale, self.heads, self.kv_heads))

    def forward(self, h: Tensor, packed: Packed, again: bool = False) -> tuple[Tensor | None, Kept]:
        """h [M, h] -> the layer's output [M, h] and what backward needs. ``again``: only the
        latter, without the last product."""
        ops = self.ops
        fp8 = self.qkv.weight.column_scale is not None
        _, x, s, t1, rstd1 = ops.norm_forward(h, self.norm1, self.eps1, self.qkv.a, fp8)
        qkv = self.qkv.weight.forward(x, s)
        ops.rope_forward_(
            qkv, t1, self.qkv.b, self.bias, packed.cos, packed.sin, self.heads, self.kv_heads
        )
        out, flash = self._attend(qkv, packed)
        x, s, t2 = self._project(
            out.flatten(1), self.o, self.o.a.t() if self.o.a is not None else None, False
        )
        y = self.o.weight.forward(x, s)
        middle, x, s, t3, rstd2 = ops.norm_forward(
            h, self.norm2, self.eps2, self.gate_up.a, fp8, y, t2, self.o.b
        )
        del y
        gu = self.gate_up.weight.forward(x, s)
        if again:
            return None, Kept(qkv, out, middle, gu, rstd1, rstd2, (t1, t2, t3, None), flash)
        x, s, t4 = ops.swiglu_forward(gu, t3, self.gate_up.b, self.down.a, fp8)
        y = ops.residual_add(middle, self.down.weight.forward(x, s), t4, self.down.b)
        return y, Kept(qkv, out, middle, gu, rstd1, rstd2, (t1, t2, t3, t4), flash)

    def backward(
        self, dh: Tensor, h: Tensor, packed: Packed, kept: Kept, first: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """d(output) [M, h] -> (d(h) or None for the first layer, gradients in the order of
        ``parameters``). Spoils ``kept.gu``."""
        ops = self.ops
        t1, t2, t3, t4 = kept.t
        x, s, dt4 = self._project(dh, self.down, self.down.b, True)
        dact = self.down.weight.backward(x, s)
        column_scale = self.gate_up.weight.column_scale
        act, dgu, s, dt3 = ops.swiglu_backward(
            kept.gu, t3, self.gate_up.b, dact, dt4, self.down.a, column_scale
        )
        if t4 is None and self.down.a is not None:
            t4 = act @ self.down.a.t()
        down = self.down.gradients(
            outer(dt4, act) if dt4 is not None else None, outer(dh, t4) if t4 is not None else None
        )
        del act, dact
        d8, grad_b3 = ops.cast_outer(dgu, column_scale, s, t3)
        dx = self.gate_up.weight.backward(dgu if d8 is None else d8, s)
        dmiddle = ops.norm_backward(
            dx, dt3, t3, self.gate_up.a, kept.middle, self.norm2, kept.rstd2, dh
        )
        gate_up = self.gate_up.gradients(
            self._grad_a(dt3, kept.rstd2, kept.middle, self.norm2), grad_b3
        )
        del dgu, d8, dx

        x, s, dt2 = self._project(dmiddle, self.o, self.o.b, True)
        dout = self.o.weight.backward(x, s)
        if dt2 is not None and self.o.a is not None:
            dout.addmm_(dt2, self.o.a)
        out = kept.out.flatten(1)
        o = self.o.gradients(
            outer(dt2, out) if dt2 is not None else None,
            outer(dmiddle, t2) if t2 is not None else None,
        )
        d, d8, s, dt1 = self._attend_backward(dout.view_as(kept.out), kept, packed)
        del dout
        grads = self.qkv.gradients(
            self._grad_a(dt1, kept.rstd1, h, self.norm1), outer(d, t1) if t1 is not None else None
        )
        grads += o + gate_up + down
        if first:
            return None, grads
        dx = self.qkv.weight.backward(d if d8 is None else d8, s)
        return ops.norm_backward(dx, dt1, t1, self.qkv.a, h, self.norm1, kept.rstd1, dmiddle), grads

    @staticmethod
    def _grad_a(dt: Tensor | None, rstd: Tensor, h: Tensor, norm: Tensor) -> Tensor | None:
        """dA = dt^T x with x = h * rstd * norm, without making x: scale dt's rows before and the
        columns after. [G*R, K] fp32."""
        if dt is None:
            return None
        return outer((dt * rstd[:, None]).to(h.dtype), h) * norm.float()


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
            ctx.save_for_backward(h, *kept[:6], *kept.t, *kept.flash)
        return y

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        h, *rest = ctx.saved_tensors
        layer: FastLayer = ctx.layer
        validate_latest(layer.qkv, ctx.generation)
        if rest:
            qkv, out, middle, gu, rstd1, rstd2, t1, t2, t3, t4, *flash = rest
            kept = Kept(qkv, out, middle, gu, rstd1, rstd2, (t1, t2, t3, t4), tuple(flash))
            del rest, qkv, out, middle, gu, flash
        else:
            kept = layer.forward(h, ctx.packed, again=True)[1]
        dx, grads = layer.backward(
            dh.contiguous(), h, ctx.packed, kept, not ctx.needs_input_grad[0]
        )
        return dx, None, None, *grads


def run_layer(layer: FastLayer, h: Tensor, packed: Packed) -> Tensor:
    """h [M, h] -> [M, h], differentiable in h and in the adapters."""
    out: Tensor = _Layer.apply(h, layer, packed, *layer.parameters)  # type: ignore[no-untyped-call]
    return out


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
    """RMSNorm [M, K] of a frozen weight."""
    out: Tensor = _Norm.apply(h, weight, eps, ops)  # type: ignore[no-untyped-call]
    return out
