"""Muon: momentum made orthogonal, for the matrices inside a model that trains whole.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), its step sized as AdamW's (Liu et al. 2025,
arXiv 2502.16982), so that one learning rate serves both. The same numbers as torch.optim.Muon with
adjust_lr_fn="match_rms_adamw", which torch has since 2.9.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trainer.kernels.backend import is_old

MOMENTUM, ITERATIONS, EPSILON = 0.95, 5, 1e-7
A, B, C = 3.4445, -4.7750, 2.0315  # of the quintic iteration


class Muon(torch.optim.Optimizer):
    """Moves the 2-d parameters of `matrices` (param groups); `beside` moves the others, in the same
    step and with its state kept here."""

    def __init__(
        self, matrices: list[dict[str, Any]], beside: torch.optim.AdamW, rate: float
    ) -> None:
        super().__init__(matrices, {"lr": rate, "weight_decay": 0.0})
        self._matrices, self._beside = list(self.param_groups), beside
        self.param_groups += beside.param_groups
        beside.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """`closure` is not called."""
        for group in self._matrices:
            for parameter in group["params"]:
                self._move(parameter, group["lr"], group["weight_decay"])
        self._beside.step()

    def _move(self, parameter: Tensor, rate: float, decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        if gradient is None:
            return
        held = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
        held.lerp_(gradient, 1 - MOMENTUM)
        update = orthogonal(gradient.lerp(held, MOMENTUM))
        size = 0.2 * math.sqrt(max(parameter.shape))
        parameter.mul_(1 - rate * decay)
        parameter.add_(update, alpha=-rate * size)


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T, by Newton and Schulz's iteration, in bf16 where there is
    any."""
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.float() if is_old(matrix.device) else matrix.bfloat16()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.T if tall else x
