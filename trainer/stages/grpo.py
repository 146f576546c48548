"""GRPO and its kin: the model answers prompts, and learns from which of its answers are better.

A batch is `training.batch_size` prompts with `grpo.num_generations` answers each, drawn from the
model as it is (trainer/model/decode.py) by a counter, so that a resumed run draws the same. A group
whose rewards are all equal teaches nothing, and is not trained on. The loss says little: look at
the reward, the advantages' size, the entropy and the share of truncated answers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data import batch, packing, stage_rows
from trainer.data.prepare import Rows
from trainer.loop.guards import Expected, Stopped
from trainer.loop.ranks import Ranks
from trainer.model.decode import Answer, Sampling, generate
from trainer.stages import compared, measured
from trainer.stages.group_losses import advantages, count, group_losses
from trainer.stages.rewards import reward
from trainer.wire.job import DataFile, Job

DRIFT = 0.05  # nats a token by which decoding and training may differ, a mean
HELD_OUT = 64  # prompts that are answered before and after
ROLLOUT = "rollout/"  # of what is kept in a checkpoint


@dataclass
class Rollout:
    """The answers of one batch of prompts, of all processes: rows of prompt and answer, in which
    the answer is trained; by row an advantage, and by token what decoding said (padded)."""

    number: int
    rows: Rows
    advantages: np.ndarray  # (rows,)
    said: Tensor  # log-probabilities of the answers' tokens (rows, longest), 0 behind
    told: dict[str, float]
    old: Tensor | None = None  # as `said`, by the training's own forward pass

    @property
    def tokens(self) -> int:
        return int(self.rows.trained.sum())


class Stage(compared.Stage):
    metrics = ("entropy", "drift", "clipped", "tokens")

    def __init__(self, job: Job, run: Path) -> None:
        super().__init__(job, run)
        self.settings = job.grpo
        self.total_steps = self.order.total_steps * self.settings.num_iterations
        self.expected = Expected(still_steps=True)
        self.answers = self._expected(job.data.files)
        if job.data.held_out is not None:
            self.answers |= self._expected([job.data.held_out])
        self.rollout: Rollout | None = None
        self.told: dict[int, dict[str, float]] = {}  # of steps that are not reported yet

    def _expected(self, files: list[DataFile]) -> dict[str, str]:
        """file:line -> the answer that a reward may look for."""
        found, _ = stage_rows.read(self.job, [(self.run / f.path, f.name) for f in files])
        return {row.where: row.turns[-1].text for row in found}

    def validate(self, rows: Rows) -> None:
        """Prompts have no labels."""

    @property
    def longest(self) -> int:
        return max(self.lengths) + self.job.grpo.max_completion_length

    def load(self, ranks: Ranks) -> None:
        super().load(ranks)
        self.start = compared.Start(self.trained())

    # -- a step ----------------------------------------------------------------------------------

    def batches(self, step: int) -> batch.Work:
        """The prompts' places alone: their answers are not there yet."""
        prompts = self.order.step(step // self.settings.num_iterations)
        where = [self.data.rows.where[p] for p in prompts]
        return batch.Work([], {}, 1, sum(self.lengths[p] for p in prompts), where)

    @torch.no_grad()
    def prepare(self, step: int, work: batch.Work) -> batch.Work:
        number = step // self.settings.num_iterations
        if self.rollout is None or self.rollout.number != number:
            self.rollout = self._answered(number)
        made = self.rollout
        taught = (
            np.flatnonzero(made.advantages != 0)
            if not self.settings.beta
            else np.arange(len(made.rows))
        )
        micro = self._micro(made, taught)
        if self.settings.num_iterations > 1 and made.old is None:
            self._remember(made, micro)
        self.told[step + 1] = made.told | {"answers_taught": len(taught) / len(made.rows)}
        return replace(
            work,
            micro=[self._with_references(m, made) for m in micro],
            filler=self._with_references(self._rows_as_micro(made, [0])[0], made),
            count=count(self.settings, len(made.rows), made.tokens),
            tokens=int(made.rows.starts[-1]),
        )

    def _answered(self, number: int) -> Rollout:
        """Answers to the prompts of batch `number`, of all processes, with their rewards."""
        settings, prompts = self.settings, self.order.step(number)
        asked = [p for p in prompts for _ in range(settings.num_generations)]
        keys = [
            p * settings.num_generations + k
            for p in prompts
            for k in range(settings.num_generations)
        ]
        mine = range(self.ranks.rank, len(asked), self.ranks.world)
        sampling = Sampling(settings.temperature, self.job.training.seed, number)
        found = generate(
            self.model,
            [self._prompt(self.data.rows, asked[k]) for k in mine],
            {self.data.stop_id},
            self.ranks.device,
            settings.max_completion_length,
            sampling,
            [keys[k] for k in mine],
        )
        parts = self.ranks.gather(found)
        answers = [parts[k % self.ranks.world][k // self.ranks.world] for k in range(len(asked))]
        rewards = [
            self._reward(a, self.data.rows.where[p]) for a, p in zip(answers, asked, strict=True)
        ]
        return self._rollout(number, asked, answers, torch.tensor(rewards))

    def _rollout(
        self, number: int, asked: list[int], answers: list[Answer], rewards: Tensor
    ) -> Rollout:
        settings, ids, marks = self.settings, [], []
        grouped = rewards.view(-1, settings.num_generations)
        size = advantages(settings, grouped)
        ended = torch.tensor([a.ended for a in answers])
        taught = size.flatten() * (ended if settings.mask_truncated else 1)
        for p, one in zip(asked, answers, strict=True):
            prompt = self._prompt(self.data.rows, p)
            ids.append(np.asarray([*prompt, *one.ids], np.int32))
            marks.append(np.arange(len(ids[-1])) >= len(prompt))
        lengths = [len(i) for i in ids]
        rows = Rows(
            np.concatenate(ids),
            np.concatenate(marks),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.ones(len(ids), np.bool_),
            [self.data.rows.where[p] for p in asked],
        )
        said = torch.zeros(len(answers), max(len(a.ids) for a in answers))
        for k, one in enumerate(answers):
            said[k, : len(one.ids)] = torch.tensor(one.log_probs)
        told = {
            "reward": float(rewards.mean()),
            "reward_deviation": float(rewards.std()),
            "advantage": float(size.abs().mean()),
            "equal_groups": float((grouped.std(1) == 0).float().mean()),
            "truncated": float((~ended).float().mean()),
            "answer_tokens": float(rows.trained.sum() / len(answers)),
        }
        return Rollout(number, rows, taught.float().numpy(), said, told)

    def _prompt(self, rows: Rows, number: int) -> list[int]:
        ids: list[int] = rows.ids[rows.starts[number] : rows.starts[number + 1]].tolist()
        return ids

    def _reward(self, found: Answer, where: str) -> float:
        ids = found.ids[:-1] if found.ended else found.ids
        text = self.data.vocabulary.tokenizer.decode(ids, skip_special_tokens=True)
        return reward(self.settings.rewards, text, len(found.ids), self.answers[where])

    def _micro(self, made: Rollout, taught: np.ndarray) -> list[dict[str, Any]]:
        """This process's share of the answers that teach."""
        lengths = made.rows.lengths
        mine = packing.share(taught.tolist(), lengths, self.ranks.world)[self.ranks.rank]
        return self._rows_as_micro(made, mine)

    def _rows_as_micro(self, made: Rollout, rows: list[int]) -> list[dict[str, Any]]:
        found = self.micro(made.rows, rows)
        for micro in found:
            at = list(micro["stage/numbers"])
            micro["stage/advantages"] = torch.from_numpy(made.advantages[at])
            micro["stage/said"] = made.said[at, : micro["stage/longest"]]
        return found

    def _log_probs(self, micro: dict[str, Any]) -> Tensor:
        return compared.answer_log_probs(self.model, micro, self.settings.temperature)[0]

    def _remember(self, made: Rollout, micro: list[dict[str, Any]]) -> None:
        """What the policy says of the answers before it is trained on them, of all processes."""
        old = torch.zeros_like(made.said, device=self.ranks.device)
        for one in micro:
            found = self.ranks.enter(self._log_probs, batch.on(self.ranks.device, one))
            old[list(one["stage/numbers"]), : found.shape[1]] = found
        made.old = self.ranks.sum(old).cpu()

    def _with_references(self, micro: dict[str, Any], made: Rollout) -> dict[str, Any]:
        at, longest = list(micro["stage/numbers"]), micro["stage/longest"]
        if made.old is not None:
            micro["stage/old"] = made.old[at, :longest]
        if self.settings.beta:
            there = batch.on(self.ranks.device, micro)
            with self.start.in_place():
                micro["stage/reference"] = self.ranks.enter(self._log_probs, there)
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
        told = self.told.pop(step, {})
        if sums["drift"] / tokens > DRIFT:
            raise Stopped(
                f"step {step}: decoding and training differ by {sums['drift'] / tokens:.3f} nats a "
                "token: the answers were drawn from another model than the one that learns",
                [],
                "report this, with the model's name and model.precision",
            )
        shown = {k: sums[k] / tokens for k in ("entropy", "drift", "clipped")}
        return told | shown

    # -- between runs, and held out --------------------------------------------------------------

    def measure(self, model: nn.Module, held: Rows, enter: measured.Enter) -> dict[str, float]:
        """The mean reward of greedy answers to the first prompts, and their tokens."""
        chosen = range(min(HELD_OUT, len(held)))
        asked = [self._prompt(held, k) for k in chosen]
        stops, most = {self.data.stop_id}, self.settings.max_completion_length
        found = generate(model, asked, stops, self.ranks.device, most)
        rewards = [self._reward(a, held.where[k]) for k, a in zip(chosen, found, strict=True)]
        return {
            "reward": sum(rewards) / len(rewards),
            "answer tokens": sum(len(a.ids) for a in found) / len(found),
        }

    def state(self) -> dict[str, Tensor]:
        """The answers too, where several steps learn from them."""
        made, kept = self.rollout, super().state()
        if made is None or made.old is None:
            return kept
        arrays = {
            "ids": made.rows.ids,
            "trained": made.rows.trained,
            "starts": made.rows.starts,
            "advantages": made.advantages,
            "number": np.asarray(made.number),
            "told": np.asarray([made.told[k] for k in sorted(made.told)]),
        }
        tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
        tensors |= {"said": made.said, "old": made.old}
        return kept | {ROLLOUT + k: v for k, v in tensors.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        kept = {k.removeprefix(ROLLOUT): v for k, v in state.items() if k.startswith(ROLLOUT)}
        if not kept:
            return
        starts = kept["starts"].numpy()
        number, size = int(kept["number"]), self.settings.num_generations
        asked = [p for p in self.order.step(number) for _ in range(size)]
        rows = Rows(
            kept["ids"].numpy(),
            kept["trained"].numpy(),
            starts,
            np.ones(len(starts) - 1, np.bool_),
            [self.data.rows.where[p] for p in asked],
        )
        names = (
            "advantage",
            "answer_tokens",
            "equal_groups",
            "reward",
            "reward_deviation",
            "truncated",
        )
        told = dict(zip(names, kept["told"].tolist(), strict=True))
        self.rollout = Rollout(
            number, rows, kept["advantages"].numpy(), kept["said"], told, kept["old"]
        )
