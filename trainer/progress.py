"""How a run goes: each step's numbers read when the device has them, looked at, and told in events.jsonl and on the boards.

Reading a number waits for everything that the device was given before it. So a step's numbers are sent to the host when it is launched and
read after the next one was launched: the device always has something to do. Where it matters (the first step, a checkpoint, the end) they
are read at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer import checkpoint, events, report
from trainer.watchdog import Watchdog

EVENT_EVERY_S = 0.25


class Reading:
    """Numbers on their way to the host; `read` waits for them and for nothing that was launched later."""

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
    """A step whose update was launched. `step` counts from 1; `numbers` are its loss, wishes to stop, gradient norm; `tokens` of all ranks."""

    step: int
    rate: float
    tokens: int
    rows: Sequence[int]
    numbers: Reading


class Progress:
    """Takes each step when it is launched, and settles it: the watchdog looks, the curve grows, events tell."""

    def __init__(
        self, state: checkpoint.State, total: int, watchdog: Watchdog, where: Sequence[str], device: torch.device,
        log: events.Writer | None, boards: report.Boards | None,
    ) -> None:  # fmt: skip
        self._state, self._total, self._watchdog, self._where, self._device = state, total, watchdog, where, device
        self._log, self._boards = log, boards
        self._unread: Launched | None = None
        self._begun_at = state.step
        self._began = self._settled = time.monotonic()
        self._told = 0.0

    def launched(self, step: Launched) -> None:
        self._unread = step

    def settle(self) -> bool:
        """Reads the numbers of the step that was launched last, if they are unread. Returns whether a process wished to stop in it. Raises
        Stopped when they are those of a run that goes wrong."""
        if self._unread is None:
            return False
        done, self._unread = self._unread, None
        loss, wishes, norm = done.numbers.read()
        self._watchdog.look(done.step, loss, norm, [self._where[r] for r in done.rows])
        self._state.curve.append([done.step, loss])
        now = time.monotonic()
        speed, self._settled = done.tokens / (now - self._settled), now
        if self._log is not None and (now - self._told > EVENT_EVERY_S or done.step in (1, self._total)):
            self._told = now
            self._tell(done, loss, norm, speed, (now - self._began) / (done.step - self._begun_at) * (self._total - done.step))
        return wishes > 0

    def _tell(self, done: Launched, loss: float, norm: float, speed: float, eta: float) -> None:
        held = torch.cuda.max_memory_allocated(self._device) / 2**30 if self._device.type == "cuda" else 0.0
        values = {"loss": loss, "learning_rate": done.rate, "grad_norm": norm, "tokens_per_second": round(speed, 1), "gpu_memory_gib": round(held, 3)}
        assert self._log is not None and self._boards is not None
        self._log.write(events.Step, step=done.step, eta_s=round(eta, 1), **values)
        self._boards.step(done.step, values)


def tell_checkpoint(log: events.Writer | None, run: Path) -> Callable[[int, Path, str], None]:
    """What a checkpoint's writer calls when step, folder and the sha256 of its manifest are on disk."""

    def tell(step: int, folder: Path, digest: str) -> None:
        if log is not None:
            log.write(events.Checkpoint, step=step, path=folder.relative_to(run).as_posix(), manifest_sha256=digest)

    return tell
