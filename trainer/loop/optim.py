"""The optimizer, and the gradients of all trained parameters in one buffer that is reduced once a
step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.wire.job import Training

LOSS, WISHES = 0, 1  # slots behind the gradients that are summed over ranks with them
EXTRA = 2  # of them; a stage's own metrics come after


class Gradients:
    """`parameter.grad` of every trained parameter is a view into one fp32 buffer, so that ranks add
    up with a single all-reduce and the norm is one reduction. Autograd adds into the views; `zero`
    begins a step."""

    def __init__(self, parameters: Iterable[nn.Parameter], extra: int = EXTRA) -> None:
        self.parameters = list(parameters)
        sizes = [p.numel() for p in self.parameters]
        self.buffer = torch.zeros(sum(sizes) + extra, device=self.parameters[0].device)
        self.gradients, self.extra = self.buffer[:-extra], self.buffer[-extra:]
        self.views = [
            v.view_as(p) for v, p in zip(self.gradients.split(sizes), self.parameters, strict=True)
        ]
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view

    def zero(self) -> None:
        self.buffer.zero_()
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view

    def reduce(self) -> None:
        """Adds up over all processes."""
        torch.distributed.all_reduce(self.buffer)

    def clip(self, max_norm: float) -> Tensor:
        """Scales to a norm of at most `max_norm` (torch.nn.utils.clip_grad_norm_'s formula);
        returns the norm before, on the device."""
        norm: Tensor = torch.linalg.vector_norm(self.gradients)
        self.gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


def adamw(parameters: Iterable[Any], training: Training, device: torch.device) -> torch.optim.AdamW:
    """AdamW with torch's own betas and epsilon, and no decay: an adapter that starts at zero is
    regularised by its rank. `parameters` may be groups, as torch takes them."""
    return torch.optim.AdamW(
        parameters, lr=training.learning_rate, weight_decay=0.0, fused=device.type == "cuda"
    )
