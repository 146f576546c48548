"""The losses of pairs, pure. Where implementations differ, docs/stages.md says which is followed.

Everything is (pairs, 2), the chosen side first: `policy` and `reference` log-probabilities of the
answers, `lengths` their tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.wire.stages import Dpo

BETA, BETA_SIMPO = 0.1, 2.0


def beta_of(settings: Dpo) -> float:
    return settings.beta or (BETA_SIMPO if settings.loss_type == "simpo" else BETA)


def pair_losses(settings: Dpo, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    """The loss of each pair (pairs,). The losses without a reference do not look at it."""
    means = policy / lengths
    if settings.loss_type in ("orpo", "simpo"):
        losses = _of_means(settings, means)
    else:
        losses = _LOSSES[settings.loss_type](settings, policy - reference, lengths)
    return losses + settings.sft_weight * -means[:, 0] if settings.sft_weight else losses


def _of_means(settings: Dpo, means: Tensor) -> Tensor:
    beta = beta_of(settings)
    if settings.loss_type == "simpo":
        return -logsigmoid(beta * (means[:, 0] - means[:, 1]) - settings.simpo_gamma)
    # log(1 - e^a) by expm1: log1p(-e^a) has no digit left near a = 0
    odds = means - torch.log(-torch.expm1(means))
    return -means[:, 0] - beta * logsigmoid(odds[:, 0] - odds[:, 1])


def _sigmoid(settings: Dpo, ratios: Tensor, lengths: Tensor) -> Tensor:
    x, e = beta_of(settings) * (ratios[:, 0] - ratios[:, 1]), settings.label_smoothing
    return -(1 - e) * logsigmoid(x) - e * logsigmoid(-x)


def _robust(settings: Dpo, ratios: Tensor, lengths: Tensor) -> Tensor:
    x, e = beta_of(settings) * (ratios[:, 0] - ratios[:, 1]), settings.label_smoothing
    return (-(1 - e) * logsigmoid(x) + e * logsigmoid(-x)) / (1 - 2 * e)


def _ipo(settings: Dpo, ratios: Tensor, lengths: Tensor) -> Tensor:
    means = ratios / lengths
    return (means[:, 0] - means[:, 1] - 1 / (2 * beta_of(settings))).square()


def _hinge(settings: Dpo, ratios: Tensor, lengths: Tensor) -> Tensor:
    return torch.relu(1 - beta_of(settings) * (ratios[:, 0] - ratios[:, 1]))


def _apo_zero(settings: Dpo, ratios: Tensor, lengths: Tensor) -> Tensor:
    x = beta_of(settings) * ratios
    return 1 - x[:, 0].sigmoid() + x[:, 1].sigmoid()


def _apo_down(settings: Dpo, ratios: Tensor, lengths: Tensor) -> Tensor:
    x = beta_of(settings) * ratios
    return x[:, 0].sigmoid() + 1 - (x[:, 0] - x[:, 1]).sigmoid()


_LOSSES: dict[str, Callable[[Dpo, Tensor, Tensor], Tensor]] = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "ipo": _ipo,
    "hinge": _hinge,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}
