"""KTO: the model learns from single answers that are wanted or not.

A batch is `training.batch_size` answers. Each is compared with the adapter that training starts
from, and with z, how far the policy has moved on answers to other prompts: the mean over the whole
step of the log-ratios of each prompt with another row's answer, not below 0, without gradient. The
loss is summed over the step and divided by its rows, never a mean of means.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data import batch
from trainer.data.tokenised import Rows
from trainer.stages import compared, measured
from trainer.wire.job import Job


@dataclass(frozen=True)
class KtoWork(batch.Work):
    """`mismatched`: this process's prompts with answers to other prompts."""

    mismatched: tuple[dict[str, Any], ...] = ()


class Stage(compared.Referenced):
    metrics = ("wanted", "wanted_reward", "unwanted_reward", "z", "difference")

    def __init__(self, job: Job, run: Path) -> None:
        super().__init__(job, run)
        self.held_z = torch.zeros((), dtype=torch.float64)
        self.held_mismatched: dict[int, Tensor] = {}  # the reference's, by micro-batch

    def batches(self, step: int) -> KtoWork:
        work, everything = super().batches(step), self.order.step(step)
        mine = [n for m in work.micro for n in m["stage/numbers"]]
        rows = mismatch(self.data.rows, mine, everything)
        mismatched = tuple(self.micro(rows, range(len(rows)))) if len(rows) else ()
        return KtoWork(**vars(work), mismatched=mismatched)

    @torch.no_grad()
    def prepare(self, step: int, work: batch.Work) -> batch.Work:
        """With "stage/z" (a scalar) and "stage/wanted" (rows,) in each micro-batch."""
        assert isinstance(work, KtoWork)
        work = super().prepare(step, work)
        assert isinstance(work, KtoWork)
        device = self.ranks.device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for micro in work.mismatched:
            there = batch.on(device, micro)
            now = self.ranks.enter(self.sums, there)
            with self.start.in_place():
                total[0] += (now - self.ranks.enter(self.sums, there)).sum()
            total[1] += len(now)
        total = self.ranks.sum(total)
        z = (total[0] / total[1].clamp_min(1)).clamp_min(0)
        wanted = torch.from_numpy(self.data.rows.extra["wanted"])
        made = [
            m | {"stage/z": z, "stage/wanted": wanted[list(m["stage/numbers"])].to(device)}
            for m in (*work.micro, work.filler)
        ]
        return replace(work, micro=made[:-1], filler=made[-1])

    def loss(self, step: int, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """`micro`: compared.Stage's, with what `prepare` adds."""
        self.keys.set(self.job.training.seed, step, micro["rows"], micro["position_ids"])
        wanted, z = micro["stage/wanted"], micro["stage/z"]
        ratios = self.sums(micro) - micro["stage/reference"]
        rewards = self.job.kto.beta * ratios.detach()
        sums = {
            "wanted": wanted.sum(),
            "wanted_reward": (rewards * wanted).sum(),
            "unwanted_reward": (rewards * (1 - wanted)).sum(),
            "z": z * len(wanted),
            "difference": ratios.detach().abs().sum(),
        }
        losses = self._losses(ratios, wanted, z)
        return losses.sum().float(), {k: v.float() for k, v in sums.items()}

    def _losses(self, ratios: Tensor, wanted: Tensor, z: Tensor) -> Tensor:
        settings = self.job.kto
        good = settings.desirable_weight * (1 - (settings.beta * (ratios - z)).sigmoid())
        bad = settings.undesirable_weight * (1 - (settings.beta * (z - ratios)).sigmoid())
        return torch.where(wanted > 0, good, bad)

    # -- looks at held-out answers -----------------------------------------------------------------

    def before_look(self, held: Rows, items: range) -> None:
        """z of the held-out answers; every process computes all of it."""
        rows, total = mismatch(held, list(items), list(items)), torch.zeros((), dtype=torch.float64)
        for n, micro in enumerate(self.micro(rows, range(len(rows))) if len(rows) else ()):
            there = batch.on(self.ranks.device, micro)
            if not self.has_looked:
                with self.start.in_place():
                    self.held_mismatched[n] = self.ranks.enter(self.sums, there).cpu()
            now = self.ranks.enter(self.sums, there).cpu()
            total += (now - self.held_mismatched[n]).sum()
        self.held_z = (total / max(1, len(rows))).clamp_min(0).to(self.ranks.device)

    def ready(self, held: Rows, micro: dict[str, Any]) -> dict[str, Any]:
        wanted = torch.from_numpy(held.extra["wanted"])[list(micro["stage/numbers"])]
        return super().ready(held, micro | {"stage/wanted": wanted})

    def judgement(self, micro: dict[str, Any]) -> Tensor:
        """An answer is on its right side of z."""
        wanted, z = micro["stage/wanted"], self.held_z
        ratios = self.sums(micro) - micro["stage/reference"]
        sides = torch.stack([ratios, z.expand_as(ratios)], 1)
        found = torch.where(wanted > 0, compared.right(sides), compared.right(sides.flip(1)))
        return torch.stack([self._losses(ratios, wanted, z).double().sum(), found.sum()])

    def report(self, step: int, count: int, sums: dict[str, float]) -> dict[str, float]:
        self.validate_start(step, sums["difference"] / count)
        wanted = sums["wanted"]
        told = {"z": sums["z"] / count, "wanted_share": wanted / count}
        if wanted:
            told["wanted_reward"] = sums["wanted_reward"] / wanted
        if count > wanted:
            told["unwanted_reward"] = sums["unwanted_reward"] / (count - wanted)
        return told

    def measure(self, model: nn.Module, held: Rows, enter: measured.Enter) -> dict[str, float]:
        """Mean rewards of wanted and unwanted answers, and how often a wanted one has more than an
        unwanted one (equal ones are half right)."""
        policy, reference, _ = self.held_ratios(model, held, enter)
        rewards = self.job.kto.beta * (policy - reference)
        wanted = torch.from_numpy(held.extra["wanted"][: len(rewards)]) > 0
        good, bad = rewards[wanted], rewards[~wanted]
        more = (good[:, None] > bad[None]).double() + (good[:, None] == bad[None]).double() / 2
        return {
            "wanted above unwanted": float(more.mean()),
            "reward of wanted": float(good.mean()),
            "reward of unwanted": float(bad.mean()),
        }


def mismatch(rows: Rows, mine: list[int], everything: list[int]) -> Rows:
    """Each row of `mine` with the answer of the next row of `everything` that has another prompt;
    a row that finds none, or none that is short enough, is left out."""
    longest, parts, marks = max(rows.lengths), [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)]
    where = []
    places = {row: k for k, row in enumerate(everything)}
    for row in mine:
        prompt, _ = _cut(rows, row)
        begin = places[row] + 1
        for other in (
            everything[(begin + k) % len(everything)] for k in range(len(everything) - 1)
        ):
            theirs, answer = _cut(rows, other)
            if len(prompt) + len(answer) <= longest and not np.array_equal(theirs, prompt):
                parts.append(np.concatenate([prompt, answer]))
                marks.append(np.arange(len(parts[-1])) >= len(prompt))
                where.append(rows.where[row])
                break
    ends = np.concatenate([[0], np.cumsum([len(p) for p in parts[1:]])]).astype(np.int64)
    prompted = np.ones(len(where), np.bool_)
    return Rows(np.concatenate(parts), np.concatenate(marks), ends, prompted, where)


def _cut(rows: Rows, row: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids before the answer, and those of the answer."""
    span = slice(rows.starts[row], rows.starts[row + 1])
    ids, on = rows.ids[span], np.flatnonzero(rows.trained[span])
    return ids[: on[0]], ids[on[0] : on[-1] + 1]
