"""The polling loop, and the clocks that it reads. Tests pass a clock whose sleep costs nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")
ASLEEP_S = 60.0  # longer than a wait was to last: this machine slept meanwhile


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
    tries: int = 1,
) -> T | None:
    """Call `check` every `every_s` seconds until it returns something other than None.

    Returns that, or None when `timeout_s` is over and `tries` calls were made; the last call is
    made at the deadline, not before it. Both are scaled by the clock's pace, and what this machine
    slept counts in neither. What `check` raises passes through."""
    deadline = clock.steady() + timeout_s * clock.pace
    while True:
        found, tries = check(), tries - 1
        if found is not None:
            return found
        left_s = (deadline - clock.steady()) / clock.pace
        if left_s <= 0 and tries <= 0:
            return None
        began, wait_s = clock.steady(), min(every_s, left_s if left_s > 0 else every_s)
        clock.sleep(wait_s)
        over_s = clock.steady() - began - wait_s * clock.pace
        deadline += over_s if over_s > ASLEEP_S else 0.0


class Patience:
    """How long something is missed, in `seconds` of looking: what this machine slept between two
    looks counts as ASLEEP_S, and a look may say that it does not count."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._looked, self.seconds = clock, clock.steady(), 0.0

    def look(self, *, counts: bool = True) -> None:
        """It is missed still."""
        now = self._clock.steady()
        self.seconds += min(now - self._looked, ASLEEP_S) if counts else 0.0
        self._looked = now

    def renew(self) -> None:
        """It is there."""
        self._looked, self.seconds = self._clock.steady(), 0.0
