"""The processes of a run: what the loop and the stages ask of them, whatever each of them holds.

Replicas (trainer/loop/replicas.py) hold the whole model each, or the whole adapter and a part of
the base; Shards (trainer/loop/sharded.py) a part of it all. One process is Replicas with a world
of 1.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.loop import checkpoint
from trainer.wire.job import Job

Written = Callable[[int, Path, str], None]  # step, folder, sha256 of its manifest: it is on disk


class Gone(Exception):
    """The other processes have ended: all were asked to stop, and rank 0 has saved."""


class StopSignal:
    """A wish to stop, by SIGTERM or `hear`.

    `heard` is this process's own wish, `late` that it was the deadline's. The loop stops when
    `asked` is set: at once, unless the processes must stop together (`together`), then by
    Ranks.agree."""

    def __init__(self) -> None:
        self.heard = self.asked = self.late = self.together = False
        signal.signal(signal.SIGTERM, self.hear)

    def hear(self, *_: Any, late: bool = False) -> None:
        self.heard, self.late = True, self.late or late
        if not self.together:
            self.asked = True


class Gradients(Protocol):
    """The gradients of the trained parameters. `extra` are fp32 slots that are summed with them."""

    extra: Tensor

    @property
    def views(self) -> list[Tensor]:
        """The gradient of each parameter, in order; of a sharded model this process's part."""

    def zero(self) -> None:
        """Begins a step."""

    def reduce(self) -> None:
        """Adds up over all processes. Collective; call Ranks.reduce."""

    def divide(self, by: float) -> None:
        """Divides the gradients, without `extra`."""

    def clip(self, max_norm: float) -> Tensor:
        """Scales to a norm of at most `max_norm`; returns the norm before, 0-d on the device."""


class Ranks(ABC):
    """`world` processes, of which this one is `rank`, with its `device`. Methods are collective
    where they say so: every process calls them, in one order."""

    shard: int | None = None  # for model.load: this process's rank, where it is to hold a part
    base_in_parts = False  # whether a pass of one process alone would wait for the others for ever

    def __init__(
        self, stop: StopSignal, device: torch.device, rank: int = 0, world: int = 1
    ) -> None:
        self.stop, self.device, self.rank, self.world = stop, device, rank, world

    # -- the data of all processes ---------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """Adds `values` up, in place, over what all processes computed from their rows. Collective;
        raises Gone."""
        if self.world > 1:
            self.meet(lambda: dist.all_reduce(values))
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value` (it is pickled: small, in host memory), by rank. Collective;
        raises Gone."""
        values = [value] * self.world
        if self.world > 1:
            self.meet(lambda: dist.all_gather_object(values, value))
        return values

    def reduce(self, gradients: Gradients) -> None:
        """Adds up a step's gradients, and what is summed with them. Collective; raises Gone."""
        if self.world > 1:
            self.meet(gradients.reduce)

    def meet(self, collective: Callable[[], Any]) -> None:
        """Runs a collective operation. Raises Gone when it fails because others were asked to
        stop."""
        try:
            collective()
        except RuntimeError as error:
            if self.stop.asked:
                raise Gone from error
            raise

    @property
    def may_leave(self) -> bool:
        """Whether this process may drop the step under way: the parameters are still those of the
        last whole step, it saves them, and the others find it gone."""
        return self.stop.asked and self.rank == 0

    # -- the model -------------------------------------------------------------------------------

    @abstractmethod
    def place(self, model: nn.Module) -> None:
        """Takes the model that model.load made with `shard`. Collective."""

    @abstractmethod
    def enter(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """function(*args, **kwargs), which calls the model. Collective."""

    @abstractmethod
    def level(self, micro: list[Any], filler: Any) -> list[tuple[Any, float]]:
        """The micro-batches of a step, each with the weight of its loss: a filler's is 0.
        Collective."""

    @abstractmethod
    def gradients(self, parameters: Iterable[nn.Parameter], extra: int) -> Gradients:
        """The gradients of these parameters, with `extra` slots."""

    @abstractmethod
    def local(self, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """What this process holds of each parameter, sharing its storage."""

    @abstractmethod
    def sum_parts(self, values: Tensor) -> Tensor:
        """Adds up, in place, what was computed from `local` tensors. Collective."""

    @abstractmethod
    def compare(self, checksum: Callable[[], float], step: int) -> None:
        """Raises Stopped, on all, unless all hold the same trained parameters. Collective."""

    @abstractmethod
    def whole(self, job: Job, base: Path, on_device: bool) -> nn.Module | None:
        """The trained model in one piece; on rank 0, on others maybe None. `on_device`: on the
        device, if it fits there. Collective."""

    # -- checkpoints -----------------------------------------------------------------------------

    @abstractmethod
    def agree(self, due: bool) -> bool:
        """Between two steps: whether to save now, which is as rank 0 finds it due. Collective."""

    @abstractmethod
    def save(
        self,
        root: Path,
        named: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        state: checkpoint.State,
        written: Written,
    ) -> None:
        """Writes the checkpoint root/STEP. Returns at once or when it is on disk; `wait` waits.
        Collective."""

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return False

    def wait(self) -> None:  # noqa: B027 - where `save` returns late there is nothing to do
        """Returns when what `save` began is on disk. Raises what writing it raised."""

    @abstractmethod
    def restore(
        self,
        folder: Path,
        named: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        fingerprint: str,
    ) -> checkpoint.State:
        """Puts a checkpoint's tensors into parameters and optimizer, whoever wrote it. Collective.
        Raises CheckpointError when it belongs to another job or model."""

    def newest(self, root: Path) -> Path | None:
        """The newest whole checkpoint, the same on all. Collective. Raises CheckpointError, on all,
        where one of them does not see it."""
        if self.world == 1:
            return checkpoint.newest(root)
        return checkpoint.newest_for_all(root, self.rank, self.device)


class Together(Ranks):
    """Processes that each keep a part of the model: all take part in gathering every layer. They
    make as many passes as each other, and stop together."""

    def __init__(
        self, stop: StopSignal, device: torch.device, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(stop, device, rank, world)
        self.shard = rank
        stop.together, stop.asked = True, False

    def level(self, micro: list[Any], filler: Any) -> list[tuple[Any, float]]:
        """The same number of micro-batches on every process."""
        longest = torch.tensor(len(micro), device=self.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        fillers = [(filler, 0.0)] * (int(longest) - len(micro))
        return [(batch, 1.0) for batch in micro] + fillers

    def agree(self, due: bool) -> bool:
        """Also agrees to stop, where one of them was asked to."""
        stop, first = self.stop, due and self.rank == 0
        wishes = torch.tensor([stop.heard, stop.late, first], dtype=torch.int32, device=self.device)
        dist.all_reduce(wishes, dist.ReduceOp.MAX)
        asked, late, save = (bool(w) for w in wishes.tolist())
        stop.asked, stop.late = stop.asked or asked, late
        return save
