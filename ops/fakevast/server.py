"""The emulator as a whole: cloud, boxes and HTTP on one event loop; and `FakeVast`, which runs it in a thread for tests."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ops.fakevast.boxes.boxes import Boxes
from ops.fakevast.cloud.clock import Clock, RealClock
from ops.fakevast.cloud.cloud import Cloud, Settings
from ops.fakevast.cloud.faults import Faults
from ops.fakevast.cloud.instance import Instance
from ops.fakevast.http.rate_limits import RateLimits

T = TypeVar("T")
_SESSIONS_END_S = 5.0


class Emulator:
    """One cloud with its boxes and its HTTP server. Everything runs on the loop that `start` is called on."""

    def __init__(
        self, state_dir: Path, cloud: Cloud, *, rate_limits: bool = True, shared_paths: tuple[str, ...] = (), results_late: int = 1,
    ) -> None:  # fmt: skip
        self.state_dir = state_dir
        self.cloud = cloud
        self.boxes = Boxes(cloud, state_dir, shared_paths)
        self.rate_limits = RateLimits(on=rate_limits)
        self.requests: list[dict[str, Any]] = []
        self.results: dict[str, Any] = {}
        self.results_late = results_late
        self.on_recycle: list[Callable[[Instance], None]] = [lambda instance: self.boxes.live[instance.id].clear()]
        self.key_count = 0
        self.started_at = cloud.clock.now()
        self.url = ""
        self._runner: Any = None
        self._alarm: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.last_request = 0.0

    async def start(self, sock: socket.socket) -> None:
        """Serves on this listening socket until `close`."""
        from aiohttp import web

        from ops.fakevast.http.app import application

        self._loop = asyncio.get_running_loop()
        self.last_request = self._loop.time()
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        self._runner = web.AppRunner(application(self), access_log=None, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.SockSite(self._runner, sock).start()
        threading.Thread(target=_preload, daemon=True).start()

    async def close(self) -> None:
        """Ends every box and the server."""
        if self._alarm:
            self._alarm.cancel()
        self.boxes.close()
        await self._runner.cleanup()

    # ---- time ----

    def touch(self) -> None:
        assert self._loop is not None
        self.last_request = self._loop.time()

    def idle_s(self) -> float:
        """Real seconds since the last request; 0 while an instance exists."""
        assert self._loop is not None
        return 0.0 if self.cloud.instances else self._loop.time() - self.last_request

    def advance(self, seconds: float) -> None:
        """Moves the clock and lets happen what was due."""
        self.cloud.clock.advance(seconds)
        self.wake()

    def wake(self) -> None:
        """Brings the state up to now and sets the alarm for what comes next by itself."""
        assert self._loop is not None
        self.cloud.tick()
        if self._alarm:
            self._alarm.cancel()
            self._alarm = None
        due = self.cloud.next_event()
        if due is not None and not self.cloud.clock.virtual:
            wait = max(0.0, (due - self.cloud.clock.now()) / self.cloud.clock.scale)
            self._alarm = self._loop.call_later(min(wait, 3600.0) + 0.001, self.wake)

    # ---- what handlers need of the boxes ----

    def box_log(self, instance: Instance) -> list[str]:
        return self.boxes.live[instance.id].log()

    def run_in_box(self, instance: Instance, words: list[str]) -> str:
        return self.boxes.live[instance.id].execute(words)

    def keep_result(self, text: str) -> str:
        """Keeps a text for whoever fetches the URL that is returned; the first reads find nothing."""
        from ops.fakevast.http.app import Kept, new_token

        token = new_token()
        self.results[token] = Kept(text, self.results_late)
        return f"{self.url}/_results/{token}"


def _preload() -> None:
    """asyncssh takes half a second to import; nobody should wait for it."""
    import ops.fakevast.boxes.sshd  # noqa: F401


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
    """The emulator's clock for another thread: `advance` returns when all that was due has happened."""

    def __init__(self, fake: FakeVast) -> None:
        self._fake = fake

    def now(self) -> float:
        return self._fake.cloud.clock.now()

    def advance(self, seconds: float) -> None:
        self._fake.do(lambda: self._fake.emulator.advance(seconds))


class FakeVast:
    """The emulator in a thread, for tests: `with FakeVast(tmp_path) as cloud:`. Several may live side by side.

    Boots take `boot_s` real seconds (0: at once; None: as long as the image takes over the machine's link, for virtual clocks);
    rate limits are off unless asked for. Nothing survives the `with`: no process, no port, no file of a box.
    """

    def __init__(
        self, state_dir: Path, *, clock: Clock | None = None, market: list[dict[str, Any]] | None = None, rate_limits: bool = False,
        settings: Settings | None = None, faults: list[dict[str, Any]] | None = None, shared_paths: tuple[str, ...] = (), **more: Any,
    ) -> None:  # fmt: skip
        state_dir.mkdir(parents=True, exist_ok=True)
        self.state_dir = state_dir
        self.cloud = Cloud(clock or RealClock(), settings=settings or Settings(**{"boot_s": 0.0, **more}), market=market)
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
        self.url = self.emulator.url
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
        """Runs this on the emulator's own thread and returns what it returns: the way to touch `cloud` from a test."""

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
        """The machines by id; fields may be changed in place (call `relist` on the cloud after changing `slices`)."""
        return self.cloud.machines

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Every API request so far: t, method, path, route, status (None: cut), fault."""
        return self.emulator.requests

    def register_image(self, glob: str, folder: Path) -> None:
        self.emulator.boxes.register_image(glob, folder)

    def instances(self) -> list[dict[str, Any]]:
        """The records of what exists now, faults of the API notwithstanding."""

        def rows() -> list[dict[str, Any]]:
            self.cloud.tick()
            return [instance.row(self.cloud.clock.now()) for instance in self.cloud.instances.values()]

        return self.do(rows)

    def charges(self) -> list[dict[str, Any]]:
        return self.do(self.cloud.charges)

    def home(self, instance_id: int) -> Path:
        """The folder that is the box's home."""
        return self.emulator.boxes.live[instance_id].home
