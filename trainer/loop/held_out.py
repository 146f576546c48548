"""What a run has seen of its held-out rows: when to end early, and which parameters were best.

All of it follows from the looks, which checkpoints keep, so that a run that goes on decides as one
that was never stopped. The best parameters are kept in host memory, and in checkpoints, only where
the result is to be made of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.loop import checkpoint
from trainer.wire.job import Training

BEST = "best/"  # before the names of parameters, in a checkpoint


class Look(NamedTuple):
    """What held-out rows give: the mean loss of a target token in nats, and the share of target
    tokens that are the likeliest; or, of `rows` pairs or judged answers, the mean loss of one and
    the share on its right side."""

    rows: int
    loss: float
    accuracy: float


class EarlyStopping:
    """Ends a run whose held-out loss no longer falls, and keeps its best parameters. `state` is the
    run's: each look is added to it."""

    def __init__(self, state: checkpoint.State, training: Training) -> None:
        self._state, self._patience = state, training.early_stopping_patience
        self._keeps = training.load_best_model_at_end
        kept = [name for name in state.stage if name.startswith(BEST)]
        self._best = {name.removeprefix(BEST): state.stage.pop(name) for name in kept}

    @property
    def looks(self) -> list[list[float]]:
        """[step, loss, accuracy] of each look."""
        return self._state.looks

    def looked_at(self, step: int) -> bool:
        return bool(self.looks) and self.looks[-1][0] == step

    @property
    def best_step(self) -> int | None:
        """As `State.best_step`."""
        return self._state.best_step

    @property
    def exhausted(self) -> bool:
        """Whether `early_stopping_patience` looks in a row saw no smaller loss than before them."""
        best = self.best_step
        if self._patience is None or best is None:
            return False
        return sum(step > best for step, _, _ in self.looks) >= self._patience

    def saw(self, step: int, look: Look, named: Mapping[str, nn.Parameter]) -> None:
        self.looks.append([step, look.loss, look.accuracy])
        if self._keeps and self.best_step == step:
            self._best = {n: p.detach().to("cpu", copy=True) for n, p in named.items()}

    def kept(self) -> dict[str, Tensor]:
        """The best parameters, as tensors for the checkpoint."""
        return {BEST + name: tensor for name, tensor in self._best.items()}

    @torch.no_grad()
    def take_best(self, named: Mapping[str, nn.Parameter]) -> None:
        """Puts the best parameters into the model, where they were to be kept."""
        for name, tensor in self._best.items():
            named[name].copy_(tensor)
