"""What stages share whose held-out rows are not answered but measured, before and after."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.tokenised import Rows
from trainer.loop import checkpoint
from trainer.loop.reporter import Reporter
from trainer.stages import sft
from trainer.wire import events
from trainer.wire.job import Job

MOST_ROWS = 400  # of the held-out ones that are measured
BEFORE = "before/"  # of what is kept in a checkpoint

Enter = Callable[..., Any]  # Ranks.enter, or a plain call where one process holds the whole model


def call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


class Stage(sft.Stage):
    """A stage with `measure`. What was measured before the first step is kept in checkpoints."""

    def __init__(self, job: Job, run: Path) -> None:
        super().__init__(job, run)
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    @abstractmethod
    def measure(self, model: nn.Module, held: Rows, enter: Enter) -> dict[str, float]:
        """Numbers of the held-out rows by name, without gradients. Every process measures all of
        them, in one order."""

    def probe(self) -> None:
        super().probe()
        if not self.before:
            self.before = self.measured(self.model, self.ranks.enter)

    @torch.no_grad()
    def measured(self, model: nn.Module, enter: Enter) -> dict[str, float]:
        """`measure` with dropout off; nothing where there are no held-out rows."""
        if self.held is None:
            return {}
        training = model.training
        model.eval()
        found = self.measure(model, self.held, enter)
        model.train(training)
        return found

    def settle(self) -> None:
        if self.ranks.base_in_parts:
            self.after = self.measured(self.model, self.ranks.enter)

    def state(self) -> dict[str, Tensor]:
        return {BEFORE + k: torch.tensor(v, dtype=torch.float64) for k, v in self.before.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        kept = {k: v for k, v in state.items() if k.startswith(BEFORE)}
        self.before = {k.removeprefix(BEFORE): float(v) for k, v in kept.items()}

    def finish(self, model: nn.Module, state: checkpoint.State, reporter: Reporter) -> str:
        return self.write(model, state, self.judged(model, reporter))

    def judged(self, model: nn.Module, reporter: Reporter) -> dict[str, Any]:
        """{"held_out": name -> (before, after)}, told as an event; nothing without held-out rows,
        or where the whole model does not fit the device."""
        if self.held is None:
            return {}
        if next(model.parameters()).device.type != self.ranks.device.type:
            why = "the held-out rows were not measured: the whole model does not fit one card"
            reporter.event(events.Warned, message=why)
            return {}
        after = self.after or self.measured(model, call)
        numbers = {name: (self.before[name], after[name]) for name in after}
        reporter.event(events.Measured, rows=min(MOST_ROWS, len(self.held)), numbers=numbers)
        return {"held_out": numbers}
