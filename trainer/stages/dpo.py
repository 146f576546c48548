"""Direct preference optimisation and its kin: the model learns to prefer the chosen answer.

A batch is `training.batch_size` pairs. The loss (trainer/stages/pair_losses.py) is that of the two
answers' log-probabilities, most against those of the adapter that training starts from: before the
first step they are equal, or the run refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.tokenised import Rows
from trainer.stages import compared, measured
from trainer.stages.pair_losses import beta_of, pair_losses
from trainer.wire.job import Job
from trainer.wire.stages import WITHOUT_REFERENCE


class Stage(compared.Referenced):
    metrics = ("right", "chosen", "rejected", "chosen_log_prob", "difference")

    def __init__(self, job: Job, run: Path) -> None:
        super().__init__(job, run)
        self.references = job.dpo.loss_type not in WITHOUT_REFERENCE

    def sums(self, micro: dict[str, Any]) -> Tensor:
        """Log-probability of each answer; with `dpo.ld_alpha`, tokens beyond the length of the
        pair's shorter answer count that much."""
        found = compared.answer_log_probs(self.model, micro)[0].double()
        alpha = self.job.dpo.ld_alpha
        if alpha == 1.0:
            return found.sum(1)
        shared = micro["stage/lengths"].view(-1, 2).amin(1).repeat_interleave(2)
        beyond = torch.arange(found.shape[1], device=found.device) >= shared[:, None]
        return (found * torch.where(beyond, alpha, 1.0)).sum(1)

    def loss(self, step: int, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """`micro`: compared.Stage's, of whole pairs."""
        self.keys.set(self.job.training.seed, step, micro["rows"], micro["position_ids"])
        policy = self.sums(micro).view(-1, 2)
        losses, reference, rewards = self._compared(policy, micro)
        lengths, told = micro["stage/lengths"].view(-1, 2), policy.detach()
        sums = {
            "right": (rewards[:, 0] > rewards[:, 1]).sum(),
            "chosen": rewards[:, 0].sum(),
            "rejected": rewards[:, 1].sum(),
            "chosen_log_prob": (told / lengths)[:, 0].sum(),
            "difference": (told - reference).abs().sum() / 2,
        }
        return losses.sum().float(), {k: v.float() for k, v in sums.items()}

    def _compared(self, policy: Tensor, micro: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(losses (pairs,), the reference's log-probabilities, rewards without gradient) of the
        policy's log-probabilities (pairs, 2)."""
        lengths, told = micro["stage/lengths"].view(-1, 2), policy.detach()
        reference = micro["stage/reference"].view(-1, 2) if self.references else told
        rewards = beta_of(self.job.dpo) * (told - reference if self.references else told / lengths)
        return pair_losses(self.job.dpo, policy, reference, lengths), reference, rewards

    def judgement(self, micro: dict[str, Any]) -> Tensor:
        losses, _, rewards = self._compared(self.sums(micro).view(-1, 2), micro)
        return torch.stack([losses.double().sum(), compared.right(rewards).sum()])

    def report(self, step: int, count: int, sums: dict[str, float]) -> dict[str, float]:
        self.validate_start(step, sums["difference"] / count)
        return {
            "accuracy": sums["right"] / count,
            "margin": (sums["chosen"] - sums["rejected"]) / count,
            "chosen_reward": sums["chosen"] / count,
            "rejected_reward": sums["rejected"] / count,
            "chosen_log_prob": sums["chosen_log_prob"] / count,
        }

    def measure(self, model: nn.Module, held: Rows, enter: measured.Enter) -> dict[str, float]:
        """Accuracy of the pairs' order, where equal sides are half right, and the chosen answers'
        log-probability a token."""
        policy, reference, lengths = self.held_ratios(model, held, enter)
        told = policy - reference if self.references else policy / lengths
        first, second = told.view(-1, 2).unbind(1)
        return {
            "accuracy": float(compared.right(told.view(-1, 2)).mean()),
            "margin": beta_of(self.job.dpo) * float((first - second).mean()),
            "chosen log-probability": float((policy / lengths).view(-1, 2)[:, 0].mean()),
        }
