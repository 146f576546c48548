"""The only polling loop, and the clock that it reads. Tests hand in a clock whose sleep costs nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Clock(Protocol):
    def now(self) -> float:
        """Unix seconds: for records and for arithmetic with the box's times."""

    def sleep(self, seconds: float) -> None: ...


class RealClock:
    def now(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds))


def until(check: Callable[[], T | None], *, every_s: float, timeout_s: float, clock: Clock) -> T | None:
    """Call `check` now and then every `every_s` until it returns something other than None; None when `timeout_s` is over.
    What `check` raises passes through. The last call is made at the deadline, not before it."""
    deadline = clock.now() + timeout_s
    while True:
        found = check()
        if found is not None:
            return found
        left = deadline - clock.now()
        if left <= 0:
            return None
        clock.sleep(min(every_s, left))
