"""The optimizer, and the gradients of all trained parameters in one buffer that is reduced once a
step."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.loop.muon import Muon
from trainer.wire.job import Training

LOSS, WISHES = 0, 1  # slots behind the gradients that are summed over ranks with them
EXTRA = 2  # of them; a stage's own metrics come after


class FlatGradients:
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

    def divide(self, by: float) -> None:
        """Divides the gradients, without `extra`."""
        self.gradients.div_(by)

    def clip(self, max_norm: float) -> Tensor:
        """Scales to a norm of at most `max_norm` (torch.nn.utils.clip_grad_norm_'s formula);
        returns the norm before, on the device."""
        norm: Tensor = torch.linalg.vector_norm(self.gradients)
        self.gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


def optimizer_of(
    groups: Iterable[Iterable[nn.Parameter]],
    training: Training,
    device: torch.device,
    tables: Collection[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """What training.optim says, over `groups` of parameters, each of which has a learning rate of
    its own; `set_rates` takes the groups' rates. Vectors (norms, biases) do not decay, as with
    transformers. Muon moves matrices, but for `tables` (the embedding and the head), AdamW the
    rest."""
    made, matrices, decay = list[dict[str, Any]](), list[dict[str, Any]](), training.weight_decay
    apart = {id(p) for p in tables}
    for number, parameters in enumerate(groups):
        held = list(parameters)
        if training.optim == "muon":
            inner = [p for p in held if p.ndim == 2 and id(p) not in apart]
            matrices.append({"params": inner, "weight_decay": decay, "rate": number})
            held = [p for p in held if p.ndim != 2 or id(p) in apart]
        parts = [(decay, held)]
        if decay:
            parts = [(decay, [p for p in held if p.ndim > 1])]
            parts += [(0.0, [p for p in held if p.ndim <= 1])]
        made += [{"params": p, "weight_decay": d, "rate": number} for d, p in parts if p]
    rate, betas = training.learning_rate, (training.adam_beta1, training.adam_beta2)
    if training.optim == "adamw_8bit":
        return _adamw_8bit(made, training)
    fused = device.type == "cuda"
    plain = torch.optim.AdamW(made, rate, betas, training.adam_epsilon, 0.0, fused=fused)
    return Muon(matrices, plain, rate) if matrices else plain


def _adamw_8bit(groups: list[dict[str, Any]], training: Training) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW, whose moments take a byte each; of tensors below 4096 numbers, four."""
    import bitsandbytes

    kind: Any = vars(bitsandbytes.optim)["AdamW8bit"]
    betas, epsilon = (training.adam_beta1, training.adam_beta2), training.adam_epsilon
    made: torch.optim.Optimizer = kind(groups, training.learning_rate, betas, epsilon, 0.0)
    return made


def set_rates(optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
    """One for each group that `optimizer_of` was given."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["rate"]]
