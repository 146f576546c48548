"""The loss that keeps the experts of a mixture evenly used (Switch Transformer's), by transformers'
own function of the model's family."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer.wire.job import Job

DEFAULT = 0.001  # of families whose configuration names none


class NoBalance(ValueError):
    """A family that has no such loss."""


@dataclass(frozen=True)
class Balance:
    """What is added to the mean loss: `coefficient` times the loss of all routers' logits."""

    coefficient: float
    loss: Callable[..., Any]
    experts: int
    active: int

    def added(self, router_logits: Any, mask: Tensor | None, targets: int) -> Tensor:
        """The loss to add to the summed loss of a micro-batch with `targets` target tokens. `mask`
        (B, T) is 0 at padding."""
        found: Tensor = self.loss(router_logits, self.experts, self.active, mask)
        return self.coefficient * targets * found


def balance_of(job: Job, inner: Any) -> Balance | None:
    """The balance loss of a model of transformers; None where the job asks for none. Raises
    NoBalance."""
    asked = job.training.router_aux_loss_coef
    config = inner.config.get_text_config()
    if asked == "default":
        asked = float(getattr(config, "router_aux_loss_coef", None) or DEFAULT)
    if not asked:
        return None
    loss = getattr(sys.modules[type(inner).__module__], "load_balancing_loss_func", None)
    if loss is None:
        raise NoBalance(
            f"training.router_aux_loss_coef: {config.model_type} has no loss that balances its "
            "experts: leave the setting out"
        )
    experts = getattr(inner, "num_experts", None) or config.num_experts
    active = getattr(inner, "num_experts_per_tok", None) or config.num_experts_per_tok
    return Balance(float(asked), loss, int(experts), int(active))
