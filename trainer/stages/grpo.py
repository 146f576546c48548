"""GRPO and its kin: the model answers prompts, and learns from which of its answers are better.

A batch is `training.batch_size` prompts with `grpo.num_generations` answers each
(trainer/stages/rollout.py). A group whose rewards are all equal teaches nothing, and is not trained
on. The loss says little: look at the reward, the advantages' size, the entropy and the share of
truncated answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data import batch, packing
from trainer.data.sharing import LEAST, beginnings
from trainer.data.tokenised import Rows
from trainer.loop.ranks import Ranks
from trainer.model.decode import Answer
from trainer.stages import compared, rollout
from trainer.stages.group_losses import advantages, count, group_losses
from trainer.stages.rollout import Rollout
from trainer.wire.job import Job
from trainer.wire.stages import Grpo

MADE_UP = 24  # tokens of the answers by which sharing is tried before the first step


class Stage(rollout.Stage):
    metrics = ("entropy", "drift", "clipped", "tokens")
    settings: Grpo

    def __init__(self, job: Job, run: Path) -> None:
        super().__init__(job, run, job.grpo, job.grpo.num_iterations)

    def load(self, ranks: Ranks) -> None:
        super().load(ranks)
        self.start = compared.Reference(self.trained())

    @torch.no_grad()
    def prepare(self, step: int, work: batch.Work) -> batch.Work:
        made = self.answers_of(step)
        taught = self._taught(made)
        micro = self.micro(made.rows, self._mine(made, taught))
        self.told[step + 1] = self._facts(made) | {"answers_taught": len(taught) / len(made.rows)}
        return replace(
            work,
            micro=[self._with_references(m, made) for m in micro],
            filler=self._with_references(self.micro(made.rows, [0])[0], made),
            count=self._count(made),
            tokens=int(made.rows.starts[-1]),
        )

    def complete(self, made: Rollout) -> None:
        grouped = made.made["reward"].view(-1, self.settings.num_generations)
        taught = advantages(self.settings, grouped).flatten()
        if self.settings.mask_truncated:
            taught = taught * made.made["ended"]
        made.made["advantages"] = taught
        if self.updates > 1:
            mine = self._mine(made, self._taught(made))
            made.made["old"] = self.asked_of(made, mine, self.log_probs)

    def _taught(self, made: Rollout) -> list[int]:
        """The answers that teach something."""
        every = range(len(made.rows))
        if self.settings.beta:
            return list(every)
        return np.flatnonzero(made.made["advantages"].numpy() != 0).tolist()

    def _count(self, made: Rollout) -> int:
        """What the step's losses are divided by; answers that are masked do not count."""
        lengths = made.lengths
        if self.settings.mask_truncated:
            lengths = lengths[made.made["ended"]]
        return max(1, count(self.settings, len(lengths), int(lengths.sum())))

    def _mine(self, made: Rollout, taught: list[int]) -> list[int]:
        """The answers of this process; where they share their prompts, those of one prompt stay
        together as far as a micro-batch holds them."""
        if not self.shares:
            return packing.share(taught, made.rows.lengths, self.ranks.world)[self.ranks.rank]
        groups = self.grouped(made.rows, taught)
        tokens = [group.tokens for group in groups]
        mine = packing.share(range(len(groups)), tokens, self.ranks.world)[self.ranks.rank]
        return [row for k in mine for row in groups[k].rows]

    def together(self, rows: Rows, items: Sequence[int]) -> list[list[int]]:
        """Answers to one prompt, as many as fit a micro-batch with their prompt once."""
        if not self.shares:
            return super().together(rows, items)
        made: dict[int, list[list[int]]] = {}
        tokens: dict[int, int] = {}
        lengths = rows.lengths
        for row in items:
            prompt = row // self.settings.num_generations
            lists = made.setdefault(prompt, [])
            if lists:
                tokens[prompt] += lengths[row] - beginnings(rows, [lists[-1][0], row])[1]
            if lists and tokens[prompt] <= self.budget:
                lists[-1].append(row)
            else:
                lists.append([row])
                tokens[prompt] = lengths[row]
        return [group for lists in made.values() for group in lists]

    def example(self) -> tuple[Rows, list[int]] | None:
        """Two answers, made up of the data's tokens, to a prompt that is long enough."""
        rows = self.data.rows
        long = next((k for k, n in enumerate(rows.lengths) if n > LEAST), None)
        if long is None:
            return None
        said = [int(token) for token in rows.ids[: 2 * MADE_UP]]
        answers = [Answer(ids, [], False) for ids in (said[:MADE_UP], said[MADE_UP:])]
        return self.as_rows(rows, [long, long], answers), [0, 1]

    def _facts(self, made: Rollout) -> dict[str, float]:
        grouped = made.made["reward"].view(-1, self.settings.num_generations)
        size = advantages(self.settings, grouped).abs().mean()
        equal = (grouped.std(1) == 0).double().mean()
        return self.facts_of(made) | {"advantage": float(size), "equal_groups": float(equal)}

    def _with_references(self, micro: dict[str, Any], made: Rollout) -> dict[str, Any]:
        old = ("old",) if "old" in made.made else ()
        micro = self.with_made(made, micro, "said", "advantages", *old)
        if self.settings.beta:
            there = batch.on(self.ranks.device, micro)
            with self.start.in_place():
                micro["stage/reference"] = self.ranks.enter(self.log_probs, there)
        return micro

    def loss(self, step: int, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """`micro`: compared.Stage's, with what `prepare` adds."""
        self.keys.set(self.job.training.seed, step, micro["rows"], micro["position_ids"])
        settings, lengths = self.settings, micro["stage/lengths"]
        policy, entropies = compared.answer_log_probs(self.model, micro, settings.temperature)
        places = torch.arange(policy.shape[1], device=policy.device)
        mask = (places < lengths[:, None]).float()
        old = micro.get("stage/old", policy.detach())
        losses = group_losses(
            settings, policy, old, micro.get("stage/reference"), micro["stage/advantages"], mask
        )
        ratio = (policy.detach() - old).exp()
        high = settings.epsilon_high or settings.epsilon
        outside = (ratio < 1 - settings.epsilon) | (ratio > 1 + high)
        sums = {
            "entropy": (entropies * mask).sum(),
            "drift": ((old - micro["stage/said"]).abs() * mask).sum(),
            "clipped": (outside * mask).sum(),
            "tokens": mask.sum(),
        }
        return losses.sum(), sums

    def report(self, step: int, count: int, sums: dict[str, float]) -> dict[str, float]:
        tokens = max(1.0, sums["tokens"])
        self.validate_drift(step, sums["drift"] / tokens)
        shown = {k: sums[k] / tokens for k in ("entropy", "drift", "clipped")}
        return self.told.pop(step, {}) | shown
