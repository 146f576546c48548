"""What a stage of training is to the loop: which numbers it makes of which rows.

The loop (trainer/loop/step.py) calls, in this order:

    Stage(job, run)   reads and checks the data; nothing of it needs a device
    load(ranks)       the model, its adapters, its micro-batches' size
    restore(state)    where the run goes on from a checkpoint
    probe()           looks whether the model is sound
    each step:        batches(step)        in a thread, a step ahead
                      prepare(step, work)  with the model as it is now, before any gradient
                      loss(step, micro)    for each micro-batch
                      report(...)          what its sums mean
    settle()          what all processes are needed for at the end
    finish(...)       on rank 0, with the whole model

Accumulation, clipping, guards, checkpoints, resume, signals and deadlines are the loop's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.data.batch import Work
from trainer.loop import checkpoint
from trainer.loop.guards import ExpectedMetrics, Stopped
from trainer.loop.held_out import Look
from trainer.loop.loss_scale import skipped_in
from trainer.loop.ranks import Ranks
from trainer.loop.reporter import Reporter, versions
from trainer.loop.schedule import learning_rate
from trainer.model import likeness
from trainer.model.kept import KeptBase
from trainer.wire.job import Job


class Stage(ABC):
    """A kind of training. What it does not override is what fine-tuning on answers needs."""

    metrics: tuple[str, ...] = ()  # names of what `loss` sums beside the loss
    expected = ExpectedMetrics()  # for the monitor
    look_every = 0  # steps from one look at held-out rows to the next
    answers_at_end = False  # whether `finish` wants the model on the device
    notes: tuple[str, ...] = ()  # on rows that were changed or left out

    total_steps: int
    base: Path  # the folder of the base model
    model: nn.Module
    kernels: dict[str, str]  # what computes the model, by name
    ranks: Ranks
    kept: KeptBase  # the base, which an earlier stage of the run may have read

    def __init__(self, job: Job, run: Path) -> None:
        """Reads the data and sets `total_steps`. Raises InvalidJob, TemplateError, Stopped."""
        self.job, self.run = job, run
        self.kept = KeptBase()

    @abstractmethod
    def load(self, ranks: Ranks) -> None:
        """Sets `base`, `model`, `kernels` and `ranks`, and places the model. Raises ModelError,
        InvalidJob."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row that the model reads; 0 where that is not known."""
        return 0

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters to train, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def groups(self) -> list[list[str]]:
        """Names of `trained` in groups, each of which has a learning rate of its own: with LoRA+
        every B."""
        names = list(self.trained())
        if self.job.lora.loraplus_lr_ratio is None or self.job.training.method != "lora":
            return [names]
        return [[n for n in names if not is_b(n)], [n for n in names if is_b(n)]]

    def rates(self, step: int) -> list[float]:
        """The learning rate of each group in optimizer step `step` (from 0)."""
        rate = learning_rate(step, self.total_steps, self.job.training)
        groups = len(self.groups())
        ratio = self.job.lora.loraplus_lr_ratio or 1.0
        return [rate] if groups == 1 else [rate, ratio * rate]

    def probe(self) -> None:  # noqa: B027 - a stage may have nothing to look at
        """Raises Stopped when the model, before the first step, cannot be right. Collective."""

    def compare_with_stock(self, ranks: Ranks, packed: bool) -> dict[str, str]:
        """Looks, before the model takes the device's memory, whether what will compute it is what
        transformers computes: for `kernels`. Raises Stopped with the module that differs."""
        try:
            told = likeness.compare(self.job, self.base, ranks.device, packed)
        except likeness.Unlike as why:
            hint = "report this with the model's config.json; training.packing = false may serve"
            raise Stopped(str(why), [], hint) from why
        return {"compared": told}

    # -- a step ----------------------------------------------------------------------------------

    @abstractmethod
    def batches(self, step: int) -> Work:
        """This process's rows of step `step` (from 0) as micro-batches in host memory. Runs in a
        thread while the step before is computed: it must not touch the model. A function of the
        step alone."""

    def prepare(self, step: int, work: Work) -> Work:
        """The work as the loss needs it, made with the model as it is now: rollouts, scores,
        log-probabilities of a reference. Without gradients; calls the model through Ranks.enter.
        Collective. Where `ranks.may_leave` becomes true it may return at once: the step is
        dropped."""
        return work

    @abstractmethod
    def loss(self, step: int, micro: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """(summed loss, fp32 scalar; sums of `metrics`, scalars without gradient) of a micro-batch
        on the device. The loop divides the loss by the step's count; metrics are summed as they
        are, over micro-batches and processes. Forward passes without gradient come before the one
        with."""

    def report(self, step: int, count: int, sums: dict[str, float]) -> dict[str, float]:
        """What events and boards show of finished step `step` (from 1): by name, of the summed
        metrics of its `count` items. Raises Stopped when they cannot be right. Called on every
        process."""
        return {}

    def look(self) -> Look | None:
        """What the held-out rows give now; None where the stage looks at none. Changes nothing.
        Collective; raises Gone."""
        return None

    # -- between runs ----------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """What the stage must find again to go on bit for bit, after the last step: equal on all
        processes, and saved with the checkpoint."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - nor anything to keep
        """Takes back what `state` gave, in host memory."""

    def settle(self) -> None:  # noqa: B027 - most stages need no other process at the end
        """Makes, after the last step, what `finish` cannot make alone. Collective."""

    @abstractmethod
    def finish(self, model: nn.Module, state: checkpoint.State, reporter: Reporter) -> str:
        """Tells what was reached and writes the verified result; returns the sha256 of its archive.
        Raises ResultError."""

    def facts(self, state: checkpoint.State) -> dict[str, Any]:
        """Facts of the finished run, for the manifest and the report."""
        return (
            self._seen(state)
            | skipped_in(state.stage)
            | {
                "steps": state.step,
                "final_loss": state.curve[-1][1],
                "data_sha256": [f.sha256 for f in self.job.data.files],
                "versions": versions(),
                "kernels": self.kernels,
                "curve": state.curve,
            }
        )

    def _seen(self, state: checkpoint.State) -> dict[str, Any]:
        """What the looks at held-out rows gave, before and in the result."""
        if not state.looks:
            return {}
        taken = state.best_step if self.job.training.load_best_model_at_end else state.looks[-1][0]
        first, last = state.looks[0], next(look for look in state.looks if look[0] == taken)
        numbers = {"loss": (first[1], last[1]), "accuracy": (first[2], last[2])}
        return {"held_out": numbers, "held_out_curve": state.looks, "result_step": taken}


def is_b(name: str) -> bool:
    """Whether a parameter is the B of an adapter."""
    return "lora_B" in name or "lora_embedding_B" in name
