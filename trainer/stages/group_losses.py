"""GRPO's advantages and losses, pure. docs/stages.md says where implementations differ."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.wire.stages import Grpo

SMALL = 1e-4  # beside a deviation, as TRL
CISPO_HIGH = 5.0


def advantages(settings: Grpo, rewards: Tensor) -> Tensor:
    """The advantage of each answer, fp64, from rewards (groups, answers)."""
    rewards = rewards.double()
    apart = rewards - rewards.mean(1, keepdim=True)
    if settings.scale_rewards == "none":
        return apart
    if settings.scale_rewards == "rloo":  # less the mean of the others
        return apart * rewards.shape[1] / (rewards.shape[1] - 1)
    spread = rewards.std(1, keepdim=True) if settings.scale_rewards == "group" else rewards.std()
    return apart / (spread + SMALL)


def count(settings: Grpo, rows: int, tokens: int) -> int:
    """What the summed losses of a step of `rows` answers with `tokens` tokens are divided by."""
    if settings.loss_type in ("grpo", "gspo"):
        return rows
    if settings.loss_type == "dr_grpo":
        return rows * settings.max_completion_length
    return tokens


def group_losses(
    settings: Grpo,
    policy: Tensor,
    old: Tensor,
    reference: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
) -> Tensor:
    """The summed loss of each answer (rows,), of log-probabilities (rows, tokens), advantages
    (rows,) and a mask of 1 and 0; to be divided by `count`."""
    logs = (policy - old) * mask
    if settings.loss_type == "gspo":
        logs = (logs.sum(1) / mask.sum(1).clamp_min(1))[:, None].expand_as(logs)
    weights, a = logs.exp(), advantage[:, None]
    if settings.loss_type == "cispo":
        high = settings.epsilon_high or CISPO_HIGH
        losses = -weights.clamp(max=high).detach() * a * policy
    else:
        high = settings.epsilon_high or settings.epsilon
        clipped = weights.clamp(1 - settings.epsilon, 1 + high)
        losses = -torch.minimum(weights * a, clipped * a)
    if reference is not None:
        apart = reference - policy
        # k3, weighted: without the weight it has the gradient of another divergence
        losses = losses + settings.beta * (apart.exp() - apart - 1) * weights
    summed = (losses * mask).sum(1)
    if settings.loss_type in ("grpo", "gspo"):
        summed = summed / mask.sum(1).clamp_min(1)
    return summed
