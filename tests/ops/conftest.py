"""A rig with the emulator that its runs rent from; a real sshd (asyncssh) on loopback with its own
home, and a TCP proxy that cuts links. All end with the test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import asyncssh
import pytest
from machine import needs

import rig
from ops.box.connection import Box, Endpoint
from ops.fakevast import FakeVast

TOOLS = (
    "bash cat cp date dd df env head ln ls mkdir mv openssl rm sh sha256sum sleep stat tail "
    "tar touch wc xargs"
)


@pytest.fixture
def own(tmp_path: Path) -> rig.Rig:
    return rig.Rig(tmp_path)


@pytest.fixture
def fake(own: rig.Rig) -> Iterator[FakeVast]:
    with own.emulator() as cloud:
        yield cloud
        assert cloud.instances() == [], "a box survived the test"


@dataclass
class SshServer:
    """`home` is the login's home; `bin` its whole PATH; `allowed` the public lines that may log
    in."""

    home: Path
    bin: Path
    allowed: list[str] = field(default_factory=list)
    host_key: asyncssh.SSHKey = field(
        default_factory=lambda: asyncssh.generate_private_key("ssh-ed25519")
    )
    port: int = 0
    logins: int = 0
    noise: str = ""  # what a login's rc files print
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _listener: asyncssh.SSHAcceptor | None = None
    _thread: threading.Thread | None = None
    _links: set[asyncssh.SSHServerConnection] = field(default_factory=set)
    # process groups; like sshd, a cut link does not end them, `close` does
    _children: set[int] = field(default_factory=set)

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
            self._thread.start()
        self._listener = self._wait(self._listen())
        self.port = self._listener.get_port()

    def stop(self) -> None:
        """Refuse new links and cut those that are open."""
        self._wait(self._shut())

    def cut(self) -> None:
        """Cut every open link; new ones are welcome."""
        self._loop.call_soon_threadsafe(lambda: [link.abort() for link in list(self._links)])

    def close(self) -> None:
        self.stop()
        self._wait(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        assert self._thread is not None
        self._thread.join(60)
        self._loop.close()

    def _wait(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _listen(self) -> asyncssh.SSHAcceptor:
        server = self

        class Login(asyncssh.SSHServer):
            def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
                self.conn = conn
                server._links.add(conn)

            def connection_lost(self, exc: Exception | None) -> None:
                server._links.discard(self.conn)

            def begin_auth(self, username: str) -> bool:
                return True

            def public_key_auth_supported(self) -> bool:
                return True

            def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
                good = key.export_public_key().decode().split()[:2] in [
                    line.split()[:2] for line in server.allowed
                ]
                server.logins += good
                return good

        return await asyncssh.listen(
            "127.0.0.1",
            self.port,
            reuse_address=True,
            server_factory=Login,
            server_host_keys=[self.host_key],
            process_factory=self._run,
            sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=str(self.home)),
            encoding=None,
            login_timeout=60,
        )

    async def _shut(self) -> None:
        if self._listener is not None:
            self._listener.close()
            for link in list(self._links):
                link.abort()
            await self._listener.wait_closed()
            self._listener = None
        for pid in list(self._children):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.wait(others, timeout=20) if others else None

    async def _run(self, process: asyncssh.SSHServerProcess) -> None:
        child = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            self.noise + (process.command or ""),
            cwd=self.home,
            env={"HOME": str(self.home), "PATH": str(self.bin)},
            start_new_session=True,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self._children.add(child.pid)
        try:
            feeder = asyncio.create_task(_copy_stream(process.stdin, child.stdin))
            await asyncio.gather(
                _copy_stream(child.stdout, process.stdout),
                _copy_stream(child.stderr, process.stderr),
            )
            process.exit(await child.wait())
        except (OSError, asyncssh.Error):
            process.exit(255)
        finally:
            feeder.cancel()
            child._transport.close()

    def without(self, tool: str) -> None:
        (self.bin / tool).unlink(missing_ok=True)


async def _copy_stream(source, sink) -> None:
    """Until the source ends; a child that reads no more loses its stdin and nothing else."""
    try:
        while data := await source.read(1 << 18):
            sink.write(data)
            await sink.drain()
    except (BrokenPipeError, ConnectionResetError):
        return
    if isinstance(sink, asyncio.StreamWriter):
        sink.close()


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., SshServer]]:
    needs("tar")  # as every image of a box has
    made: list[SshServer] = []

    def make(**settings) -> SshServer:
        folder = tmp_path / f"box{len(made)}"
        (folder / "home").mkdir(parents=True)
        (folder / "bin").mkdir()
        for tool in TOOLS.split():
            if found := shutil.which(tool):
                (folder / "bin" / tool).symlink_to(found)
        server = SshServer(folder / "home", folder / "bin", **settings)
        server.start()
        made.append(server)
        return server

    yield make
    for server in made:
        server.close()


@pytest.fixture
def server(make_server: Callable[..., SshServer], public_line: str) -> SshServer:
    return make_server(allowed=[public_line])


@pytest.fixture
def public_line(tmp_path: Path) -> str:
    return Box.make_key(tmp_path / "key")


@pytest.fixture
def make_box(tmp_path: Path, public_line: str) -> Iterator[Callable[..., Box]]:
    made: list[Box] = []

    def make(*ports: int, **settings) -> Box:
        kinds = ["direct", "proxy"]
        endpoints = [
            Endpoint("127.0.0.1", port, kind) for port, kind in zip(ports, kinds, strict=False)
        ]
        quick = {"retry_s": 0.05, "connect_timeout_s": 5.0, "patience_s": 10.0}
        made.append(
            Box(endpoints, "root", tmp_path / "key", tmp_path / "known_hosts", **(quick | settings))
        )
        return made[-1]

    yield make
    for box in made:
        box.close()


@pytest.fixture
def box(server: SshServer, make_box: Callable[..., Box]) -> Box:
    box = make_box(server.port)
    box.connect(10)
    return box


class CuttingProxy:
    """Forwards to `target`; once `budget` bytes have passed on one link in one direction, that link
    is reset. With `spoils` set, the next bytes that come down are changed, once.

    `up` and `down` count every byte taken from either side, also those of links that were cut."""

    def __init__(self, target: int, budget: int | None = None) -> None:
        self.target, self.budget = target, budget
        self.up = self.down = self.cuts = 0
        self.spoils = False
        self._stop = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.2)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                near, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            self._sockets |= {near, far}
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._copy, args=(source, sink, way), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.spoils and way == "down":
                    self.spoils, data = False, data[:-1] + bytes([data[-1] ^ 1])
                sink.sendall(data)
                passed += len(data)
                setattr(self, way, getattr(self, way) + len(data))
                if self.budget is not None and passed >= self.budget:
                    self.cuts += 1
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._stop.set()
        self._listener.close()
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._thread.join(60)


@pytest.fixture
def make_proxy() -> Iterator[Callable[..., CuttingProxy]]:
    made: list[CuttingProxy] = []

    def make(target: int, budget: int | None = None) -> CuttingProxy:
        made.append(CuttingProxy(target, budget))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()
