"""The emulator's alarm: on a real clock it runs each event when it is due."""

from __future__ import annotations

import asyncio

from ops.fakevast.cloud.cloud import Cloud

_MAX_SLEEP_S = 3600.0


class Alarm:
    """Runs the cloud's events when they are due. Must be made on the loop that it runs on."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def advance(self, seconds: float) -> None:
        """Move the clock and run the events that were due."""
        self._cloud.clock.advance(seconds)
        self.wake()

    def wake(self) -> None:
        """Run the events that are due and set the timer for the next one."""
        self._cloud.tick()
        self.cancel()
        due, clock = self._cloud.next_event(), self._cloud.clock
        if due is not None and not clock.virtual:
            wait_s = max(0.0, (due - clock.now()) / clock.scale)
            self._timer = self._loop.call_later(min(wait_s, _MAX_SLEEP_S) + 0.001, self.wake)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
