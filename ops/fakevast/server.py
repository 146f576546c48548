"""The emulator as a whole: cloud, boxes and HTTP on one event loop.

`FakeVast` runs it in a thread, for tests.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from ops.fakevast.alarm import Alarm
from ops.fakevast.boxes import sshd
from ops.fakevast.boxes.boxes import Boxes
from ops.fakevast.cloud.clock import Clock, ScaledClock
from ops.fakevast.cloud.cloud import Cloud
from ops.fakevast.cloud.faults import Faults
from ops.fakevast.cloud.settings import Settings
from ops.fakevast.http.app import Api
from ops.fakevast.http.call import StoredResults
from ops.fakevast.http.rate_limits import RateLimits
from ops.fakevast.weather import Event, Weather

T = TypeVar("T")
_SESSIONS_END_S = 5.0


class Emulator:
    """One cloud with its boxes and its HTTP server, on the loop that it is made on."""

    def __init__(
        self,
        state_dir: Path,
        cloud: Cloud,
        *,
        rate_limits: bool = True,
        shared_paths: tuple[str, ...] = (),
    ) -> None:
        self.cloud = cloud
        self.boxes = Boxes(cloud, state_dir, sshd.serve, shared_paths)
        self.rate_limits = RateLimits(on=rate_limits)
        self.results = StoredResults()
        self.alarm = Alarm(cloud)
        self.weather = Weather(cloud, self.boxes)
        self.api = Api(cloud, self.boxes, self.alarm, self.rate_limits, self.results)
        self._runner = web.AppRunner(self.api.application(), access_log=None, shutdown_timeout=0.2)

    async def start(self, sock: socket.socket) -> None:
        """Serves on this listening socket until `close`."""
        self.results.base_url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        await self._runner.setup()
        await web.SockSite(self._runner, sock).start()

    async def close(self) -> None:
        """Ends every box and the server."""
        self.weather.clear()
        self.alarm.cancel()
        self.boxes.close()
        await self._runner.cleanup()

    def idle_s(self) -> float:
        """Real seconds since the last request; 0 while an instance exists."""
        if self.cloud.instances:
            return 0.0
        return asyncio.get_running_loop().time() - self.api.last_request


def listening_socket(port: int = 0) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(256)
    return sock


def write_atomically(path: Path, data: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(data))
    part.replace(path)


class _ThreadClock:
    """The emulator's clock for another thread.

    `advance` returns when all that was due has happened.
    """

    def __init__(self, fake: FakeVast) -> None:
        self._fake = fake

    def now(self) -> float:
        return self._fake.cloud.clock.now()

    def advance(self, seconds: float) -> None:
        self._fake.do(lambda: self._fake.emulator.alarm.advance(seconds))


class FakeVast:
    """The emulator in a thread, for tests: `with FakeVast(tmp_path) as cloud:`.

    Several may live side by side. Boots take `boot_s` real seconds (0: at once; None: as long as
    the image takes over the machine's link, for virtual clocks); rate limits are off unless asked
    for. Nothing survives the `with`: no process, no port, no file of a box.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        clock: Clock | None = None,
        market: list[dict[str, Any]] | None = None,
        rate_limits: bool = False,
        settings: Settings | None = None,
        faults: list[dict[str, Any]] | None = None,
        shared_paths: tuple[str, ...] = (),
        **more: Any,
    ) -> None:
        """`more`: fields of Settings, where `settings` is not given."""
        state_dir.mkdir(parents=True, exist_ok=True)
        self.state_dir = state_dir
        settings = settings or Settings(**{"boot_s": 0.0, **more})
        self.cloud = Cloud(clock or ScaledClock(), settings=settings, market=market)
        for fault in faults or []:
            self.cloud.faults.add(fault)
        self._options: dict[str, Any] = {"rate_limits": rate_limits, "shared_paths": shared_paths}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fakevast", daemon=True)
        self.emulator: Emulator
        self.url = ""

    def __enter__(self) -> FakeVast:
        self._thread.start()
        sock = listening_socket()

        async def start() -> None:
            self.emulator = Emulator(self.state_dir, self.cloud, **self._options)
            await self.emulator.start(sock)

        asyncio.run_coroutine_threadsafe(start(), self._loop).result()
        self.url = self.emulator.results.base_url
        return self

    def __exit__(self, *error: object) -> None:
        async def stop() -> None:
            await self.emulator.close()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            if left:  # sessions of boxes that have just ended
                await asyncio.wait(left, timeout=_SESSIONS_END_S)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def do(self, action: Callable[[], T]) -> T:
        """Runs this on the emulator's own thread and returns what it returns.

        The way to touch `cloud` from a test.
        """

        async def run() -> T:
            return action()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    @property
    def api_key(self) -> str:
        return self.cloud.account.key

    @property
    def clock(self) -> _ThreadClock:
        return _ThreadClock(self)

    @property
    def faults(self) -> Faults:
        return self.cloud.faults

    @property
    def catalogue(self) -> dict[int, dict[str, Any]]:
        """The machines by id; fields may be changed in place."""
        return self.cloud.machines

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Every API request so far: t, method, path, route, status (None: cut), fault."""
        return self.emulator.api.requests

    def forecast(self, events: list[Event]) -> None:
        """Weather to come, see ops/fakevast/weather.py."""
        self.do(lambda: self.emulator.weather.add(events))

    def register_image(self, glob: str, folder: Path) -> None:
        self.emulator.boxes.register_image(glob, folder)

    def instances(self) -> list[dict[str, Any]]:
        """The records of what exists now, faults of the API notwithstanding."""
        return self.do(self.cloud.rows)

    def charges(self) -> list[dict[str, Any]]:
        return self.do(self.cloud.charges)

    def home(self, instance_id: int) -> Path:
        """The folder that is the box's home."""
        return self.emulator.boxes.live[instance_id].home
