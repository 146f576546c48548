"""The shared expert as one autograd function: frozen gate, up and down with their adapters, without
a norm or a residual stream.

Per token it saves gate, up and x A^T; PEFT's own forward saves several copies of the input in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.kernels.lora import Group, outer, validate_latest


@dataclass
class SharedMlp:
    """down(silu(gate x) up x); ``ops`` as in FastLayer."""

    ops: ModuleType
    gate_up: Group
    down: Group

    @property
    def groups(self) -> list[Group]:
        return [self.gate_up, self.down]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.groups for p in group.parameters]

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., h] -> [..., h], differentiable in x and in the adapters."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        apply: Any = _SharedMlp.apply
        out: Tensor = apply(flat, self, *self.parameters)
        return out.view(x.shape)

    def project(
        self, x: Tensor, group: Group, p: Tensor | None, fold: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(``x`` as the frozen product takes it, its FP8 row scales or None, ``x p`` or None)."""
        if group.weight.column_scale is None:
            return x, None, None if p is None else x @ p
        scale = group.weight.column_scale if fold else None
        return cast(tuple[Tensor, Tensor, Tensor | None], self.ops.quantise_rows(x, scale, p))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x [M, h] -> (the output [M, h], gate and up [M, 2F], x A^T of both groups)."""
        ops, fp8 = self.ops, self.gate_up.weight.column_scale is not None
        a = None if self.gate_up.a is None else self.gate_up.a.t()
        given, s, t = self.project(x, self.gate_up, a, False)
        gu = self.gate_up.weight.forward(given, s)
        act, s, inner = ops.swiglu_forward(gu, t, self.gate_up.b, self.down.a, fp8)
        y = self.down.weight.forward(act, s)
        if inner is not None and self.down.b is not None:
            y.addmm_(inner, self.down.b.t())
        return y, gu, t, inner

    def backward(
        self, dy: Tensor, x: Tensor, gu: Tensor, t: Tensor | None, inner: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """(d(x), gradients in the order of ``parameters``). Overwrites ``gu``."""
        ops, scale = self.ops, self.gate_up.weight.column_scale
        given, s, dinner = self.project(dy, self.down, self.down.b, True)
        dact = self.down.weight.backward(given, s)
        act, dgu, s, dt = ops.swiglu_backward(
            gu, t, self.gate_up.b, dact, dinner, self.down.a, scale
        )
        down = self.down.gradients(
            None if dinner is None else outer(dinner, act),
            None if inner is None else outer(dy, inner),
        )
        d8, grad_b = ops.cast_outer(dgu, scale, s, t)
        dx = self.gate_up.weight.backward(dgu if d8 is None else d8, s)
        if dt is not None and self.gate_up.a is not None:
            dx.addmm_(dt, self.gate_up.a)
        grad_a = None if dt is None else outer(dt, x)
        return dx, self.gate_up.gradients(grad_a, grad_b) + down


class _SharedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: SharedMlp, *parameters: Tensor) -> Tensor:
        ctx.mlp, ctx.generation = mlp, mlp.gate_up.generation
        y, *kept = mlp.forward(x)
        ctx.save_for_backward(x, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        validate_latest(ctx.mlp.gate_up, ctx.generation)
        dx, grads = ctx.mlp.backward(dy.contiguous(), *ctx.saved_tensors)
        return dx, None, *grads
