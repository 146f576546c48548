"""The emulator's time. Everything that depends on time (boot, bill, rate limits, end dates) asks
one of these two."""

from __future__ import annotations

import time


class ScaledClock:
    """Wall-clock time, shifted by what `advance` added and sped up by `scale` (emulated seconds for
    one real second)."""

    virtual = False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self._start = time.time()
        self._monotonic = time.monotonic()
        self._added_s = 0.0

    def now(self) -> float:
        """Seconds since the epoch; never goes backwards."""
        return self._start + (time.monotonic() - self._monotonic) * self.scale + self._added_s

    def advance(self, seconds: float) -> None:
        self._added_s += max(0.0, seconds)


class VirtualClock:
    """Time that only `advance` moves: a simulated day costs nothing and every run of it is the
    same."""

    virtual = True
    scale = 1.0

    def __init__(self, start: float = 1_790_000_000.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += max(0.0, seconds)


Clock = ScaledClock | VirtualClock
