"""PPO: the model answers prompts, a value model predicts the reward, and answers that are better
than predicted become likelier.

One frozen base serves all: the policy is the adapter that is trained, the reference what it was at
the start; the reward model and the value are adapters beside it, with a linear head each. A batch
is `training.batch_size` prompts (trainer/stages/rollout.py). Each optimizer step learns from some
of the answers, first the policy, then the value, in micro-batches of their own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data import batch, packing
from trainer.loop.ranks import Ranks
from trainer.loop.schedule import learning_rate
from trainer.model.forward import hidden_states, model_inputs
from trainer.model.roles import MAIN
from trainer.stages import compared, rollout
from trainer.stages.ppo_losses import (
    gae,
    next_kl_coef,
    policy_loss,
    token_rewards,
    value_loss,
    whitened,
)
from trainer.stages.rollout import Rollout
from trainer.wire.job import Job
from trainer.wire.stages import Ppo

VALUE = "value"
VALUE_RATE = 3.0  # times the policy's
KL_COEF = "kl_coef"  # of what is kept in a checkpoint
POLICY_SUMS = ("entropy", "drift", "clipped", "tokens")
VALUE_SUMS = ("error", "returns", "returns_squared")


class Stage(rollout.Stage):
    metrics = POLICY_SUMS + VALUE_SUMS
    settings: Ppo

    def __init__(self, job: Job, run: Path) -> None:
        told = job.ppo
        super().__init__(job, run, told, told.num_ppo_epochs * told.num_mini_batches)
        self.kl_coef = told.kl_coef

    def load(self, ranks: Ranks) -> None:
        super().load(ranks)
        self.start = compared.Reference(self.trained())
        judge = self.job.judge
        self.roles.add(VALUE, self.run / judge.path if judge else None, trained=True)

    def groups(self) -> list[list[str]]:
        """The policy's parameters (in two groups with LoRA+) and the value's."""
        theirs = set(self.roles.parameters(VALUE))
        mine = [[n for n in names if n not in theirs] for names in super().groups()]
        return [*mine, [n for n in self.trained() if n in theirs]]

    def rates(self, step: int) -> list[float]:
        """0 for the policy while the value alone learns."""
        training, ratio = self.job.training, self.job.lora.loraplus_lr_ratio
        rate = learning_rate(step, self.total_steps, training)
        own = self.settings.value_learning_rate
        value = rate * (VALUE_RATE if own is None else own / training.learning_rate)
        if step // self.updates < self.settings.value_warmup:
            rate = 0.0
        return [rate, value] if ratio is None else [rate, ratio * rate, value]

    # -- answers ---------------------------------------------------------------------------------

    def complete(self, made: Rollout) -> None:
        """What the policy, the reference and the value say of each token, and what follows of it
        for all answers together."""
        mine = packing.share(range(len(made.rows)), made.rows.lengths, self.ranks.world)
        numbers = mine[self.ranks.rank]
        found = made.made
        found["old"] = self.asked_of(made, numbers, self.log_probs)
        with self.start.in_place():
            found["reference"] = self.asked_of(made, numbers, self.log_probs)
        found["old_values"] = self.asked_of(made, numbers, self.values)
        mask, kl = made.mask, (found["old"] - found["reference"]).double()
        rewards = token_rewards(self._scores(made), kl, mask, self.kl_coef)
        settings, values = self.settings, found["old_values"].double()
        advantages = gae(rewards, values, mask, settings.gamma, settings.lam)
        found["returns"] = (advantages + values) * mask
        found["advantages"] = whitened(advantages, mask)
        found["kl_coef"] = torch.tensor(self.kl_coef, dtype=torch.float64)
        found["kl"] = (kl * mask).sum(1)
        self.kl_coef = next_kl_coef(settings, self.kl_coef, float(found["kl"].mean()), len(mask))

    def _scores(self, made: Rollout) -> Tensor:
        """Rewards, less where an answer has no stop token."""
        penalty = self.settings.missing_eos_penalty
        if penalty is None:
            penalty = 2 * self.judge.deviation * self.judge.weight if self.judge else 1.0
        return made.made["reward"] - penalty * (~made.made["ended"]).double()

    def values(self, micro: dict[str, Any]) -> Tensor:
        """The value before each token of each answer, fp32 (rows, longest)."""
        self.roles.take(VALUE)
        states = hidden_states(self.model, **model_inputs(micro)).flatten(0, 1)
        found: Tensor = self.roles.head(VALUE)(states.index_select(0, micro["targets_at"]).float())[
            :, 0
        ]
        shape = (len(micro["stage/lengths"]), micro["stage/longest"])
        return (
            found.new_zeros(shape[0] * shape[1]).scatter(0, micro["stage/slots"], found).view(shape)
        )

    # -- a step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, step: int, work: batch.Work) -> batch.Work:
        made = self.answers_of(step)
        chosen = self._mini_batch(made, step)
        lengths = np.asarray(made.rows.lengths)
        mine = packing.share(chosen, lengths.tolist(), self.ranks.world)[self.ranks.rank]
        plain = [*self.micro(made.rows, mine)]
        names = ("said", "old", "advantages", "old_values", "returns")
        micro = [self.with_made(made, m, *names) for m in plain]
        learns = made.number >= self.settings.value_warmup
        both = [m | {"stage/role": MAIN} for m in micro] if learns else []
        both += [m | {"stage/role": VALUE} for m in micro]
        self.told[step + 1] = self._facts(made)
        return replace(
            work,
            micro=both,
            filler=self.with_made(made, self.micro(made.rows, chosen[:1])[0], *names)
            | {"stage/role": VALUE},
            count=int(made.lengths[chosen].sum()),
            tokens=int(lengths[chosen].sum()),
        )

    def _mini_batch(self, made: Rollout, step: int) -> list[int]:
        """The answers of step `step`: each pass over them has an order of its own."""
        passed, place = divmod(step % self.updates, self.settings.num_mini_batches)
        dice = np.random.default_rng([self.job.training.seed, made.number, passed])
        order = dice.permutation(len(made.rows))
        found: list[int] = np.array_split(order, self.settings.num_mini_batches)[place].tolist()
        return found or [0]

    def _facts(self, made: Rollout) -> dict[str, float]:
        return self.facts_of(made) | {
            "kl": float(made.made["kl"].mean()),
            "kl_coef": float(made.made["kl_coef"]),
        }

    def loss(self, step: int, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """`micro`: compared.Stage's, with what `prepare` adds, of the policy or of the value."""
        self.keys.set(self.job.training.seed, step, micro["rows"], micro["position_ids"])
        lengths, longest = micro["stage/lengths"], micro["stage/longest"]
        places = torch.arange(longest, device=lengths.device)
        mask = (places < lengths[:, None]).float()
        ours = self._value if micro["stage/role"] == VALUE else self._policy
        losses, sums = ours(micro, mask)
        zero = mask.new_zeros(())
        return (losses * mask).sum(), {name: sums.get(name, zero) for name in self.metrics}

    def _policy(self, micro: dict[str, Any], mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.roles.take(MAIN)
        settings, old = self.settings, micro["stage/old"]
        policy, entropies = compared.answer_log_probs(self.model, micro, settings.temperature)
        losses = policy_loss(settings, policy, old, micro["stage/advantages"])
        apart = ((policy.detach() - old).exp() - 1).abs() > settings.cliprange
        sums = {
            "entropy": (entropies * mask).sum(),
            "drift": ((old - micro["stage/said"]).abs() * mask).sum(),
            "clipped": (apart * mask).sum(),
            "tokens": mask.sum(),
        }
        return losses, sums

    def _value(self, micro: dict[str, Any], mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        values, returns = self.values(micro), micro["stage/returns"]
        losses = value_loss(self.settings, values, micro["stage/old_values"], returns)
        error = (micro["stage/old_values"] - returns).square() * mask
        sums = {
            "error": error.sum(),
            "returns": returns.sum(),
            "returns_squared": returns.square().sum(),
        }
        return self.settings.vf_coef * losses, sums

    def report(self, step: int, count: int, sums: dict[str, float]) -> dict[str, float]:
        tokens = max(1.0, sums["tokens"])
        self.validate_drift(step, sums["drift"] / tokens)
        shown = {k: sums[k] / tokens for k in ("entropy", "drift", "clipped")}
        spread = sums["returns_squared"] / count - (sums["returns"] / count) ** 2
        shown["explained_variance"] = 1 - sums["error"] / count / max(spread, 1e-8)
        return self.told.pop(step, {}) | shown

    # -- between runs ----------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        return super().state() | {KL_COEF: torch.tensor(self.kl_coef, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.kl_coef = float(state[KL_COEF])
