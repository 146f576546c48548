"""How a run goes: each step's numbers read when the device has them, looked at, and told in
events.jsonl and on the boards.

Reading a number waits for everything that the device was given before it. So a step's numbers are
sent to the host when it is launched and read after the next one was launched: the device always has
something to do. Where it matters (the first step, a checkpoint, the end) they are read at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.loop import checkpoint
from trainer.loop.guards import TrainingMonitor
from trainer.loop.reporter import Reporter
from trainer.wire import events

EVENT_EVERY_S = 0.25
# of a step, its count, its metrics' sums
Report = Callable[[int, int, list[float]], dict[str, float]]


class Readback:
    """Numbers on their way to the host; `read` waits for them and for nothing that was launched
    later."""

    def __init__(self, numbers: Tensor) -> None:
        self._host, self._arrived = numbers, None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


@dataclass(frozen=True)
class Launched:
    """A step whose update was launched, or in fp16 skipped. `step` counts from 1; `count`, `tokens`
    and `where` are its Work's; `numbers` are its loss, its wishes to stop, its metrics' sums and
    its gradient norm; `scaling` is LossScale's `facts` after it."""

    step: int
    rate: float
    count: int
    tokens: int
    where: Sequence[str]
    numbers: Readback
    taken: bool = True
    scaling: Mapping[str, float] = field(default_factory=dict)


class Progress:
    """Takes each step when it is launched, and settles it: the monitor looks, the stage makes its
    metrics of the sums (`report`), the curve grows, events tell."""

    def __init__(
        self,
        state: checkpoint.State,
        total: int,
        monitor: TrainingMonitor,
        report: Report,
        reporter: Reporter,
        device: torch.device,
    ) -> None:
        self._state, self._total, self._monitor = state, total, monitor
        self._report, self._reporter, self._device = report, reporter, device
        self._unread: Launched | None = None
        self._begun_at = state.step
        self._began = self._settled = time.monotonic()
        self._told = 0.0

    def launched(self, step: Launched) -> None:
        self._unread = step

    def settle(self) -> bool:
        """Reads the numbers of the step that was launched last, if they are unread. Returns whether
        a process wished to stop in it. Raises Stopped when they are those of a run that goes
        wrong."""
        if self._unread is None:
            return False
        done, self._unread = self._unread, None
        loss, wishes, *sums, norm = done.numbers.read()
        if not done.taken:
            self._skipped(done, loss)
            return wishes > 0
        if warning := self._monitor.look(done.step, loss, norm, done.where):
            self._reporter.event(events.Warned, message=warning)
        metrics = self._report(done.step, done.count, sums)
        self._state.curve.append([done.step, loss])
        now = time.monotonic()
        speed, self._settled = done.tokens / (now - self._settled), now
        if now - self._told > EVENT_EVERY_S or done.step in (1, self._total):
            self._told = now
            values = {"loss": loss, "learning_rate": done.rate, "grad_norm": norm}
            values |= {"tokens_per_second": round(speed, 1), "gpu_memory_gib": self._held_gib()}
            values |= done.scaling
            self._reporter.step(done.step, values | metrics, eta_s=self._eta_s(done.step, now))
        return wishes > 0

    def _skipped(self, done: Launched, loss: float) -> None:
        self._settled = time.monotonic()
        if math.isfinite(loss):
            self._state.curve.append([done.step, loss])
        scale, skipped = done.scaling["loss_scale"], done.scaling["skipped_steps"]
        message = (
            f"step {done.step}: gradients overflow fp16; it is skipped ({skipped:.0f} so far), and "
            f"the loss scale halved to {scale:g}"
        )
        self._reporter.event(events.Warned, message=message)

    def _eta_s(self, step: int, now: float) -> float:
        return round((now - self._began) / (step - self._begun_at) * (self._total - step), 1)

    def _held_gib(self) -> float:
        if self._device.type != "cuda":
            return 0.0
        return round(torch.cuda.max_memory_allocated(self._device) / 2**30, 3)
