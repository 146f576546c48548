"""The loop of every stage: steps, guards, checkpoints, resume, and the wish to stop.

A step is one global batch. Every process computes the summed losses of its share, each divided by
the count of the whole step, and the gradients are added up: the result does not depend on the
number of processes, on micro-batches, or on where a run was resumed (beyond the order of
floating-point additions).
"""

from __future__ import annotations

import time
from contextlib import closing, nullcontext
from pathlib import Path

import torch

from trainer.data import batch
from trainer.kernels.backend import half
from trainer.loop import checkpoint
from trainer.loop.guards import Stopped, TrainingMonitor
from trainer.loop.held_out import EarlyStopping
from trainer.loop.loss_scale import LossScale
from trainer.loop.optim import EXTRA, LOSS, WISHES, optimizer_of, set_rates
from trainer.loop.progress import Launched, Progress, Readback
from trainer.loop.ranks import Gone, Ranks
from trainer.loop.reporter import Ended, Reporter
from trainer.loop.stage import Stage
from trainer.model.parts import ends
from trainer.wire import events
from trainer.wire.job import Job


class Loop:
    """Trains a loaded stage. All processes make one and call `run`, in step."""

    def __init__(self, job: Job, run: Path, stage: Stage, ranks: Ranks, reporter: Reporter) -> None:
        """Goes on from the newest whole checkpoint, if there is one. Raises CheckpointError when
        that is another job's, Stopped when the model is not sound."""
        self.job, self.stage, self.ranks, self.reporter = job, stage, ranks, reporter
        self.stop, self.total, self.checkpoints = ranks.stop, stage.total_steps, run / "checkpoints"
        self.named = stage.trained()
        self.gradients = ranks.gradients(self.named.values(), EXTRA + len(stage.metrics))
        groups = [[self.named[name] for name in names] for names in stage.groups()]
        tables = [p for layer in ends(stage.model) for p in layer.parameters()]
        self.optimizer = optimizer_of(groups, job.training, ranks.device, tables)
        lower, two_bytes = job.model.precision != "fp32", half(job.model.precision, ranks.device)
        mixed = lower and job.training.trains_base
        self.precise = torch.autocast(ranks.device.type, two_bytes) if mixed else nullcontext()
        self.scaling = LossScale(on=lower and two_bytes is torch.float16)
        self.state = self._resume()
        self.scaling.restore(self.state.stage)
        self.held_out = EarlyStopping(self.state, job.training)
        if self.state.step:
            stage.restore(self.state.stage)
        stage.probe()
        local = ranks.local(self.named)
        self.monitor = TrainingMonitor(local, stage.model, stage.expected, ranks.sum_parts)
        self.progress = Progress(
            self.state, self.total, self.monitor, self._report, reporter, ranks.device
        )
        self._tell_start()
        self.begun_at, self.last_save = self.state.step, time.monotonic()

    def run(self) -> checkpoint.State | None:
        """Trains to the last step and returns the run's state; or None when it was asked to stop: a
        whole checkpoint is on disk then. Raises Stopped when the run goes wrong or its deadline
        passes."""
        ahead = batch.Prefetcher(self.stage.batches, self.state.step, self.total)
        try:
            with closing(ahead):
                while self.state.step < self.total and not self.stop.asked:
                    self._look_when_due()
                    if self.stop.asked or self.held_out.exhausted:
                        break
                    if not self._step(ahead.take()):
                        break
                    self._save_when_due()
            self.progress.settle()
            self._look()
        except Gone:  # while the held-out rows were looked at
            self.progress.settle()
        if self.stop.asked and not self._ended:
            self._leave()
            return None
        self.ranks.wait()
        self.scaling.validate_trained(self.state.step)
        self.state.stage |= self.scaling.state()
        self.held_out.take_best(self.named)
        self.monitor.validate_base(self.state.step)
        self.optimizer.state.clear()  # the device's memory is the result's now
        self.gradients.zero()
        return self.state

    # -- held-out rows ---------------------------------------------------------------------------

    @property
    def _ended(self) -> bool:
        """Whether nothing is left to do but the result."""
        last = self.state.step >= self.total or self.held_out.exhausted
        return last and (not self.held_out.looks or self.held_out.looked_at(self.state.step))

    def _look_when_due(self) -> None:
        """Before a step: what is seen is of the last whole one, and a run that goes on from its
        checkpoint sees it too."""
        every, step = self.stage.look_every, self.state.step
        if step == 0 or (every and step % every == 0):
            self._look()

    def _look(self) -> None:
        self.stop.asked |= self.progress.settle()
        if self.stop.asked or self.held_out.looked_at(self.state.step):
            return
        with self.precise:
            found = self.stage.look()
        if found is not None:
            self.held_out.saw(self.state.step, found, self.named)
            self.reporter.looked(self.state.step, found)

    # -- a step ----------------------------------------------------------------------------------

    def _step(self, work: batch.Work) -> bool:
        """One update of the parameters; False when it was dropped because of a wish to stop: they
        are still those of the last whole step."""
        step = self.state.step
        try:
            work = self.stage.prepare(step, work)
            if not self._accumulate(step, work):
                return False
            self.ranks.reduce(self.gradients)
        except Gone:
            return False
        if self.progress.settle():  # the step before is on the host by now
            self.stop.asked = True
            return False
        self._update(step, work)
        return True

    def _accumulate(self, step: int, work: batch.Work) -> bool:
        """The gradients of this process's share, micro-batch by micro-batch; False when it
        leaves."""
        self.gradients.zero()
        extra = self.gradients.extra
        for micro, weight in self.ranks.level(work.micro, work.filler):
            if self.ranks.may_leave:
                return False
            micro = batch.on(self.ranks.device, micro)
            with self.precise:
                total, sums = self.ranks.enter(self.stage.loss, step, micro)
                loss = total / work.count * weight  # this micro-batch's part of the step's mean
            self.scaling.scaled(loss).backward()
            extra[LOSS] += loss.detach()
            if sums:
                metrics = [sums[name].detach() for name in self.stage.metrics]
                extra[EXTRA:] += torch.stack(metrics) * weight
        if self.ranks.may_leave:
            return False
        extra[WISHES] += self.stop.asked
        return True

    def _update(self, step: int, work: batch.Work) -> None:
        """Clips the summed gradients and updates the parameters; the monitor looks at both. In fp16
        a step whose gradients overflow is skipped."""
        rates, taken = self.stage.rates(step), True
        if self.scaling.on:
            self.gradients.divide(self.scaling.scale)
        self.monitor.before_update(self.gradients.views)
        norm = self.gradients.clip(self.job.training.max_grad_norm)
        numbers = Readback(torch.cat([self.gradients.extra, norm[None]]))
        if self.scaling.on:  # waits for the device
            taken = self.scaling.takes(step + 1, float(norm), work.where)
        if taken:
            set_rates(self.optimizer, rates)
            self.optimizer.step()
            self.monitor.after_update(step + 1, min(rates), work.where)
            if self.monitor.compares_ranks:
                self.ranks.compare(self.monitor.checksum, step + 1)
        self.state.step = step + 1
        facts = (work.count, work.tokens, work.where, numbers, taken, self.scaling.facts)
        self.progress.launched(Launched(self.state.step, rates[0], *facts))

    def _report(self, step: int, count: int, sums: list[float]) -> dict[str, float]:
        return self.stage.report(step, count, dict(zip(self.stage.metrics, sums, strict=True)))

    # -- checkpoints and the end -----------------------------------------------------------------

    def _resume(self) -> checkpoint.State:
        fingerprint = checkpoint.fingerprint_of(self.job)
        found = self.ranks.newest(self.checkpoints)
        if found is None:
            return checkpoint.State(fingerprint=fingerprint)
        return self.ranks.restore(found, self.named, self.optimizer, fingerprint)

    def _save_when_due(self) -> None:
        """After a step: looks at the deadline and the clock, and saves when it is time. The first
        step and every saved one are settled at once: what goes wrong there is known before it is
        kept."""
        deadline, training = self.job.limits.deadline_unix_s, self.job.training
        ready = not self.ranks.saving and self.state.step < self.total
        due = ready and time.monotonic() - self.last_save >= training.save_every_s
        if deadline is not None and time.time() > deadline:
            self.stop.hear(late=True)
        save = self.ranks.agree(due)
        if save or self.state.step == self.begun_at + 1:
            self.stop.asked |= self.progress.settle()
        if save:
            self._save()
            self.last_save = time.monotonic()

    def _save(self) -> None:
        self.state.stage = self.stage.state() | self.held_out.kept() | self.scaling.state()
        trained = (self.named, self.optimizer, self.state)
        self.ranks.save(self.checkpoints, *trained, self.reporter.checkpoint)

    def _leave(self) -> None:
        """Saves before the run ends unfinished. Raises Stopped when it was its deadline."""
        self._save()
        self.ranks.wait()
        if self.stop.late:
            raise Stopped(
                f"the deadline passed after {self.state.step} of {self.total} steps; "
                "the checkpoint is whole",
                [],
                "`milktea resume RUN`",
            )

    def _tell_start(self) -> None:
        device = self.ranks.device
        self.reporter.started(
            self.stage.notes,
            step=self.state.step,
            total_steps=self.total,
            processes=self.ranks.world,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            trainable_parameters=sum(p.numel() for p in self.named.values()),
            kernels=self.stage.kernels,
            weights_read=self.stage.kept.reads,
        )


def train(job: Job, run: Path, stage: Stage, ranks: Ranks, reporter: Reporter) -> Ended | None:
    """Loads the stage's model, trains it and writes its result; None when it was asked to stop
    before."""
    reporter.event(events.Loading, what="loading the model")
    stage.load(ranks)
    state = Loop(job, run, stage, ranks, reporter).run()
    if state is None:
        return None
    stage.settle()
    model, digest = ranks.whole(job, stage.base, on_device=stage.answers_at_end), ""
    if ranks.rank == 0 and model is not None:
        digest = stage.finish(model, state, reporter)
    return Ended(state.step, state.curve[-1][1], digest)
