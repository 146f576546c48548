from __future__ import annotations

import time
from itertools import pairwise

import pytest

from ops.wait import RealClock, until


class Jumping(RealClock):
    """Jumps over what it is told to sleep."""

    def __init__(self, pace: float) -> None:
        super().__init__(pace)
        self.slept: list[float] = []

    def now(self) -> float:
        return sum(self.slept)

    def steady(self) -> float:
        return self.now()

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds * self.pace)


@pytest.mark.parametrize("pace", [1.0, 0.1])
def test_waiting_is_scaled_by_the_clocks_pace_and_the_last_call_is_at_the_deadline(
    pace: float,
) -> None:
    clock, called = Jumping(pace), []
    assert until(lambda: called.append(clock.now()), every_s=4, timeout_s=10, clock=clock) is None
    assert called == pytest.approx([0, 4 * pace, 8 * pace, 10 * pace])


def test_what_is_found_first_is_returned_even_when_it_is_false() -> None:
    clock, answers = Jumping(1.0), [None, None, False, True]
    assert until(lambda: answers.pop(0), every_s=1, clock=clock) is False
    assert answers == [True]


def test_the_real_clock_sleeps_its_share_of_the_seconds_and_tells_unix_time_unscaled() -> None:
    clock = RealClock(pace=0.001)
    assert abs(clock.now() - time.time()) < 60
    began = time.monotonic()
    clock.sleep(20)
    assert 0.02 <= time.monotonic() - began < 60


def test_no_check_comes_earlier_than_its_interval() -> None:
    clock, times = RealClock(pace=0.001), []
    until(lambda: times.append(time.monotonic()), every_s=20, timeout_s=60, clock=clock)
    assert len(times) >= 2 and all(b - a >= 0.015 for a, b in pairwise(times[:-1]))


def test_a_check_that_takes_longer_than_the_patience_is_made_as_often_as_is_asked_for() -> None:
    clock, called = Jumping(1.0), []

    def slowly() -> None:
        clock.sleep(60)
        called.append(clock.now())

    assert until(slowly, every_s=4, timeout_s=10, clock=clock, tries=3) is None
    assert len(called) == 3
