"""A reward model: a score that is higher for the chosen answer of a pair.

A batch is `training.batch_size` pairs. The score is a linear head on the hidden state of the stop
token of the answer, a position found where the pack is made; the head of the vocabulary is not
asked. The head is trained and saved beside the LoRA under the names that stock PEFT and
AutoModelForSequenceClassification read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from trainer.data import batch
from trainer.data.tokenised import Rows
from trainer.loop.ranks import Ranks
from trainer.model.forward import hidden_states, model_inputs
from trainer.model.parts import causal
from trainer.model.roles import SCORE
from trainer.stages import compared, measured
from trainer.wire.chain import WEIGHTS

QUARTILES = 4


def add_score(model: nn.Module, seed: int) -> None:
    """The head, as `model.score`: fp32, normal with a variance of 1 / (h + 1), so that first scores
    are of the order of 1."""
    hidden: int = causal(model).config.get_text_config().hidden_size
    device = next(model.parameters()).device
    dice = torch.Generator().manual_seed(seed)
    head = nn.Linear(hidden, 1, bias=False, device=device)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, hidden, generator=dice) / (hidden + 1) ** 0.5)
    model.score = head


def take_score(model: nn.Module, folder: Path) -> None:
    """Lets the head go on from that of the adapter in `folder`, if it is a reward model's."""
    head = load_file(folder / WEIGHTS).get(SCORE)
    if head is not None:
        model.get_submodule("score").load_state_dict({"weight": head})


def scores(model: nn.Module, micro: dict[str, Any]) -> Tensor:
    """The score of each row, fp32 (rows,)."""
    states = hidden_states(model, **model_inputs(micro)).flatten(0, 1)
    head: Any = model.score
    found: Tensor = head(states.index_select(0, micro["stage/ends"]).float())[:, 0]
    return found


def margins(rows: Rows, micro: dict[str, Any]) -> Tensor:
    """By how much the chosen score is to be larger, for each pair of a micro-batch: fp64 (pairs,)
    in host memory."""
    found = torch.from_numpy(rows.extra["margin"])
    return found[list(micro["stage/numbers"])[::2]]


class Stage(compared.Judged):
    metrics = ("right", "margin", "reward")

    def load(self, ranks: Ranks) -> None:
        super().load(ranks)
        add_score(self.model, self.job.training.seed)
        if self.job.start is not None:
            take_score(self.model, self.run / self.job.start.path)

    def batches(self, step: int) -> batch.Work:
        """With "stage/margin" (pairs,) in each micro-batch."""
        work = super().batches(step)
        for micro in (*work.micro, work.filler):
            micro["stage/margin"] = margins(self.data.rows, micro)
        return work

    def ready(self, held: Rows, micro: dict[str, Any]) -> dict[str, Any]:
        return super().ready(held, micro | {"stage/margin": margins(held, micro)})

    def loss(self, step: int, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """`micro`: compared.Stage's, of whole pairs."""
        self.keys.set(self.job.training.seed, step, micro["rows"], micro["position_ids"])
        losses, (chosen, rejected) = self._judged(micro)
        told = (chosen - rejected).detach()
        sums = {
            "right": (told > 0).sum().float(),
            "margin": told.sum(),
            "reward": (chosen + rejected).detach().sum() / 2,
        }
        return losses.sum(), sums

    def _judged(self, micro: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(losses, (scores of the chosen answers, of the rejected)), each (pairs,)."""
        chosen, rejected = scores(self.model, micro).view(-1, 2).unbind(1)
        losses = -logsigmoid(chosen - rejected - micro["stage/margin"])
        if center := self.job.rm.center_rewards_coefficient:
            losses = losses + center * (chosen + rejected).square()
        return losses, (chosen, rejected)

    def judgement(self, micro: dict[str, Any]) -> Tensor:
        losses, sides = self._judged(micro)
        return torch.stack([losses.double().sum(), compared.right(torch.stack(sides, 1)).sum()])

    def report(self, step: int, count: int, sums: dict[str, float]) -> dict[str, float]:
        return {
            "accuracy": sums["right"] / count,
            "margin": sums["margin"] / count,
            "reward": sums["reward"] / count,
        }

    def measure(self, model: nn.Module, held: Rows, enter: measured.Enter) -> dict[str, float]:
        """Accuracy, the same by quartile of the two answers' difference in length, how far scores
        follow length, and the scores' mean and deviation, by which a policy's rewards are read."""
        items = range(min(measured.MOST_ROWS, len(held)) // 2)
        found = torch.zeros(2, 2 * len(items), dtype=torch.float64)
        for micro in self.micro(held, items):
            at = list(micro["stage/numbers"])
            found[0, at] = enter(scores, model, batch.on(self.ranks.device, micro)).double().cpu()
            found[1, at] = micro["stage/lengths"].double()
        return describe(found[0].view(-1, 2), found[1].view(-1, 2))


def describe(rewards: Tensor, lengths: Tensor) -> dict[str, float]:
    """The numbers of `measure`, from the answers' scores and tokens (pairs, 2), fp64, the chosen
    side first."""
    right = compared.right(rewards)
    told = {"accuracy": float(right.mean())}
    order = (lengths[:, 0] - lengths[:, 1]).abs().argsort(stable=True)
    if len(order) >= QUARTILES:
        for k, part in enumerate(order.tensor_split(QUARTILES), 1):
            told[f"accuracy, quartile {k} of length difference"] = float(right[part].mean())
    both = torch.stack([rewards.flatten(), lengths.flatten()])
    spread = both.std(1)
    told["correlation with length"] = (
        float(torch.corrcoef(both)[0, 1]) if bool((spread > 0).all()) else 0.0
    )
    return told | {"reward mean": float(both[0].mean()), "reward deviation": float(spread[0])}
