"""The polling loop, and the clocks that it reads. Tests pass a clock whose sleep costs nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Clock(Protocol):
    """`pace` scales all waiting: 1 for vast.ai, less for an emulator that needs no patience."""

    pace: float

    def now(self) -> float:
        """Seconds of unix time, for records. They are never scaled."""

    def steady(self) -> float:
        """Seconds since some moment, for every interval: no change of the date moves them, and
        they run on while the machine sleeps. They are never scaled."""

    def sleep(self, seconds: float) -> None:
        """Wait `seconds * pace`."""


# CLOCK_MONOTONIC stands still while a Linux machine sleeps, and runs on while a Mac does.
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class RealClock:
    """This machine's two clocks."""

    def __init__(self, pace: float = 1.0) -> None:
        self.pace = pace

    def now(self) -> float:
        return time.time()

    def steady(self) -> float:
        return time.clock_gettime(_STEADY)

    def sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds * self.pace))


REAL = RealClock()


def until(
    check: Callable[[], T | None],
    *,
    every_s: float,
    timeout_s: float = math.inf,
    clock: Clock = REAL,
) -> T | None:
    """Call `check` every `every_s` seconds until it returns something other than None.

    Returns that, or None when `timeout_s` is over; the last call is made at the deadline, not
    before it. Both are scaled by the clock's pace. What `check` raises passes through."""
    deadline = clock.steady() + timeout_s * clock.pace
    while True:
        found = check()
        if found is not None:
            return found
        left_s = (deadline - clock.steady()) / clock.pace
        if left_s <= 0:
            return None
        clock.sleep(min(every_s, left_s))
