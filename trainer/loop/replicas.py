"""Processes that hold the whole model each: one alone, or several with an adapter to train. Or the
whole adapter each and, of the frozen base, a part.

They take shares of every step's rows and add up their gradients once a step. Each may stop by
itself: rank 0 saves, and the others find it gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.loop import checkpoint, optim
from trainer.loop.guards import Stopped
from trainer.loop.ranks import Ranks, StopSignal, Together, Written
from trainer.wire.job import Job


class Replicas(Ranks):
    """The same model on every process. Checkpoints are rank 0's, written beside the training."""

    def __init__(
        self, stop: StopSignal, device: torch.device, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(stop, device, rank, world)
        self._model: nn.Module | None = None
        self._writer = checkpoint.Background()

    def place(self, model: nn.Module) -> None:
        self._model = model

    def enter(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def level(self, micro: list[Any], filler: Any) -> list[tuple[Any, float]]:
        return [(batch, 1.0) for batch in micro]  # none waits for another before the step's end

    def gradients(self, parameters: Iterable[nn.Parameter], extra: int) -> optim.FlatGradients:
        return optim.FlatGradients(parameters, extra)

    def local(self, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        return dict(named)

    def sum_parts(self, values: Tensor) -> Tensor:
        return values

    def compare(self, checksum: Callable[[], float], step: int) -> None:
        if self.world == 1:
            return
        mine = torch.tensor([checksum()], dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        self.meet(lambda: dist.all_gather(everyone, mine))
        sums = [float(t) for t in everyone]
        if len(set(sums)) > 1:
            raise Stopped(
                f"step {step}: the ranks hold different parameters (checksums {sums})",
                [],
                "report this, with the log of every rank",
            )

    def whole(self, job: Job, base: Path, on_device: bool) -> nn.Module | None:
        return self._model

    def agree(self, due: bool) -> bool:
        return due and self.rank == 0

    def save(
        self,
        root: Path,
        named: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        state: checkpoint.State,
        written: Written,
    ) -> None:
        if self.rank == 0:
            self._writer.submit(root, checkpoint.snapshot(named, optimizer), state, written)

    @property
    def saving(self) -> bool:
        return self._writer.busy

    def wait(self) -> None:
        self._writer.wait()

    def restore(
        self,
        folder: Path,
        named: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        fingerprint: str,
    ) -> checkpoint.State:
        return checkpoint.restore(folder, named, optimizer, fingerprint)


class BaseInParts(Together, Replicas):
    """Replicas of an adapter on one base, of whose decoder layers each process keeps a part:
    trainer/kernels/base_parts.py. They need a process group."""

    base_in_parts = True
