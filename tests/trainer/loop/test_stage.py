"""A new stage is one class: this one compares answers as dpo will, and the loop does the rest.

It has what later stages need of the loop: two forward passes for each micro-batch, a reference with
the adapter off, work between steps that meets the other processes, sums of its own beside the loss,
a learning rate for each group of parameters, and tensors that a resumed run must find again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import adapter_sha256, events_of, finish, start
from torch import Tensor, nn

from trainer.data import batch, packing
from trainer.loop.guards import ExpectedMetrics
from trainer.loop.ranks import StopSignal
from trainer.loop.replicas import Replicas
from trainer.model.forward import target_loss
from trainer.stages import sft
from trainer.train import run_job
from trainer.wire.job import Job
from trainer.wire.stages import STAGES, StageFacts

Make = Callable[..., Path]
BETA, HOST = 0.1, torch.device("cpu")
SETTINGS = {"training": {"num_train_epochs": 3, "save_every_s": 0.01}}  # 12 steps of 3 pairs


class Pairs(sft.Stage):
    """Rows 2k and 2k + 1 are a pair: the answer of the first is preferred."""

    metrics = ("right", "margin")

    def __init__(self, job: Job, run: Path) -> None:
        super().__init__(job, run)
        training, count = job.training, len(self.data.rows) // 2
        epochs, seed, size = training.num_train_epochs, training.seed, training.batch_size // 2
        self.order = packing.Order(count, size, epochs, seed)
        self.total_steps = self.order.total_steps
        self.expected = ExpectedMetrics()
        self.mean_margin = torch.zeros(())  # of the references, over the steps so far: a state

    def groups(self) -> list[list[str]]:
        names = list(self.trained())
        return [[n for n in names if "lora_A" in n], [n for n in names if "lora_A" not in n]]

    def rates(self, step: int) -> list[float]:
        first, second = super().rates(step)
        return [first, 2 * second]

    def batches(self, step: int) -> batch.Work:
        pairs, data = self.order.step(step), self.data.rows
        mine = pairs[self.ranks.rank :: self.ranks.world]
        micro = [self._sides(pair) for pair in mine]
        rows = [row for pair in pairs for row in (2 * pair, 2 * pair + 1)]
        tokens = sum(self.lengths[r] for r in rows)
        where = [data.where[r] for r in rows]
        return batch.Work(micro, self._sides(pairs[0]), len(pairs), tokens, where)

    def _sides(self, pair: int) -> dict[str, Any]:
        made = {}
        for side, row in (("chosen", 2 * pair), ("rejected", 2 * pair + 1)):
            made |= {f"{side}/{k}": v for k, v in batch.packed(self.data.rows, [row], HOST).items()}
        return made

    def log_ratio(self, micro: dict[str, Any]) -> Tensor:
        """log p(chosen) - log p(rejected), by two passes."""
        sums = []
        for side in ("chosen", "rejected"):
            inputs = {k.split("/")[1]: v for k, v in micro.items() if k.startswith(side)}
            sums.append(-target_loss(self.model, inputs))
        return sums[0] - sums[1]

    @torch.no_grad()
    def prepare(self, step: int, work: batch.Work) -> batch.Work:
        made = []
        with self.model.disable_adapter():  # type: ignore[operator]
            for micro in work.micro:
                reference = self.ranks.enter(self.log_ratio, batch.on(self.ranks.device, micro))
                made.append(micro | {"reference": reference, "shift": self.mean_margin})
        total = self.ranks.sum(sum((m["reference"] for m in made), torch.zeros(())).clone())
        self.mean_margin = self.mean_margin + total / work.count / self.total_steps
        assert set(self.ranks.gather(float(self.mean_margin))) == {float(self.mean_margin)}
        return replace(work, micro=made)

    def loss(self, step: int, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        margin = self.log_ratio(micro) - micro["reference"]
        loss = -nn.functional.logsigmoid(BETA * (margin - 0.1 * micro["shift"]))
        return loss, {"right": (margin > 0).float(), "margin": margin}

    def report(self, step: int, count: int, sums: dict[str, float]) -> dict[str, float]:
        return {"accuracy": sums["right"] / count, "margin": sums["margin"] / count}

    def state(self) -> dict[str, Tensor]:
        return {"mean_margin": self.mean_margin}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.mean_margin = state["mean_margin"]


def deadline(job: Path, unix_s: float | None) -> None:
    told = json.loads(job.read_text()) | {"limits": {"deadline_unix_s": unix_s}}
    job.write_text(json.dumps(told))


def steps(job: Path) -> list[dict[str, Any]]:
    return [e for e in events_of(job) if e["event"] == "step"]


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's stage is the file that it names: here with another class in it."""
    monkeypatch.setattr(sft, "Stage", Pairs)
    monkeypatch.setattr("trainer.loop.progress.EVENT_EVERY_S", 0.0)


def test_a_stage_that_compares_answers_starts_at_ln_two_and_learns_to_prefer(
    run_folder: Make, pairs: None
) -> None:
    job = run_folder(**SETTINGS)
    assert run_job(job) == 0
    told = steps(job)
    assert len(told) == 12
    assert told[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and told[0]["margin"] == 0.0
    assert told[-1]["loss"] < 0.5 and told[-1]["accuracy"] == 1.0 and told[-1]["margin"] > 1.0


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(run_folder: Make, pairs: None) -> None:
    one, two = run_folder(**SETTINGS), run_folder(**SETTINGS)
    assert finish(start(one)) == [0] and finish(start(two, 2)) == [0, 0]
    for name in ("loss", "accuracy", "margin", "grad_norm"):
        expected = [e[name] for e in steps(one)]
        assert [e[name] for e in steps(two)] == pytest.approx(expected, abs=1e-4), name


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_stage_finds_its_own_tensors_again_and_ends_in_the_same_bytes(
    run_folder: Make, pairs: None, world: int
) -> None:
    whole, stopped = run_folder(**SETTINGS), run_folder(**SETTINGS)
    assert finish(start(whole, world)) == [0] * world
    deadline(stopped, 1.0)
    assert finish(start(stopped, world))[0] == 4
    [kept] = (stopped.parent / "checkpoints").glob("[0-9]*/stage.tensors")
    assert load_file(kept)["mean_margin"].abs() > 0
    deadline(stopped, None)
    assert finish(start(stopped, world)) == [0] * world
    assert adapter_sha256(stopped) == adapter_sha256(whole)


def test_each_group_of_parameters_has_its_own_rate(run_folder: Make, pairs: None) -> None:
    job = run_folder(**SETTINGS)
    stage = Pairs(Job.model_validate_json(job.read_bytes()), job.parent)
    stage.load(Replicas(StopSignal(), HOST))
    names = stage.groups()
    assert sorted(names[0] + names[1]) == sorted(stage.trained()) and all(names)
    first, second = stage.rates(0)
    assert second == 2 * first > 0


def test_a_stage_refuses_rows_of_a_format_that_it_does_not_train_on(
    run_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = json.loads(run_folder().read_text())
    job["data"]["format"] = "text"
    assert Job.model_validate(job).stage == "sft"
    monkeypatch.setitem(STAGES, "sft", StageFacts(formats=("messages",)))  # type: ignore[misc]
    with pytest.raises(
        ValueError, match="does not train on rows of format text: it takes messages"
    ):
        Job.model_validate(job)
