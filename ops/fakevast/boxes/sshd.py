"""A box's SSH server, on asyncssh: keys only, bytes counted both ways, commands as real processes,
SFTP kept inside the box.

Only accepted sockets come here (box.py listens), so that a box costs nothing until somebody
connects.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from typing import Any

import asyncssh

from ops.fakevast.boxes.box import Box, reset_on_close
from ops.fakevast.boxes.session import BoxProcess
from ops.fakevast.cloud.faults import Fault

BANNER = (
    "Welcome to vast.ai. If authentication fails, try again after a few seconds, and double "
    "check your ssh key.\r\nHave fun!\r\n"
)
_WINDOW = 16 * 1024 * 1024
_CIPHERS = [
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "aes128-ctr",
    "aes256-ctr",
    "chacha20-poly1305@openssh.com",
]


def serve(sock: socket.socket, box: Box, fault: Fault | None) -> None:
    """Speaks SSH on a connection that has been accepted."""
    if box.ssh_options is None or (fault is not None and fault.what == "new_host_key"):
        box.ssh_options = _options()
    loop = asyncio.get_running_loop()
    task = loop.create_task(_start(loop, sock, box, fault))
    box.tasks.add(task)
    task.add_done_callback(box.tasks.discard)


def _options() -> asyncssh.SSHServerConnectionOptions:
    """With a host key of its own: made when first needed, the same for the life of the box."""
    return asyncssh.SSHServerConnectionOptions(
        server_factory=_Login,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
        encryption_algs=_CIPHERS,
        encoding=None,
        line_editor=False,
        window=_WINDOW,
        max_pktsize=32768,
        login_timeout=60,
        gss_host=None,
        agent_forwarding=False,
        compression_algs=["none"],
        password_auth=False,
        kbdint_auth=False,
        config=None,
    )


async def _start(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, box: Box, fault: Fault | None
) -> None:
    try:
        await loop.connect_accepted_socket(lambda: BoxConnection(loop, box, fault), sock)
    except OSError:
        sock.close()


class _Pace:
    """When the next byte of one way of a slow link may pass."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def wait_s(self, count: int, bytes_per_s: float | None) -> float:
        """Seconds until `count` bytes have passed behind those that are on their way."""
        now = asyncio.get_running_loop().time()
        took_s = count / bytes_per_s if bytes_per_s else 0.0
        self._free_at = max(now, self._free_at) + took_s
        return self._free_at - now


class _Metered:
    """The transport under a connection, counting what leaves."""

    def __init__(self, transport: Any, connection: BoxConnection) -> None:
        self._transport = transport
        self._connection = connection
        self._pace = _Pace()
        self._waiting: deque[bytes] = deque()  # on a slow link, in order

    def write(self, data: bytes) -> None:
        self._connection.count(out=len(data))
        wait_s = self._pace.wait_s(len(data), self._connection.box.bytes_per_s)
        if wait_s > 0 or self._waiting:
            self._waiting.append(bytes(data))
            asyncio.get_running_loop().call_later(wait_s, self._send_next)
        else:
            self._send(data)

    def _send_next(self) -> None:
        self._send(self._waiting.popleft())

    def _send(self, data: bytes) -> None:
        if not self._connection.broken:  # what crosses a `cut` does not arrive
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class BoxConnection(asyncssh.SSHServerConnection):
    """One connection to a box. A `cut` fault breaks it after so many bytes (`every_bytes`) or
    seconds (`every_s`)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, box: Box, fault: Fault | None) -> None:
        super().__init__(loop, box.ssh_options)
        self.box = box
        self.denies = fault is not None and fault.what == "denied"
        self._bytes, self.broken = 0, False
        self._pace = _Pace()
        cut = fault.args if fault is not None and fault.what == "cut" else {}
        self._cut_at: int | None = cut.get("every_bytes")
        self._cut_timer = (
            loop.call_later(float(cut["every_s"]), self.cut) if "every_s" in cut else None
        )

    def connection_made(self, transport: Any) -> None:
        self.box.connections.add(self)
        self._sock_transport = transport
        super().connection_made(_Metered(transport, self))  # type: ignore[arg-type]

    def data_received(self, data: bytes, datatype: Any = None) -> None:
        self.count(into=len(data))
        wait_s = self._pace.wait_s(len(data), self.box.bytes_per_s)
        if wait_s > 0:
            self._sock_transport.pause_reading()
            self._loop.call_later(wait_s, self._late, data, datatype)
        else:
            super().data_received(data, datatype)

    def _late(self, data: bytes, datatype: Any) -> None:
        """A slow link lets the next bytes in once these have passed."""
        if not self.broken and not self.is_closed():
            super().data_received(data, datatype)
            self._sock_transport.resume_reading()

    def connection_lost(self, exc: Exception | None = None) -> None:
        if self._cut_timer is not None:
            self._cut_timer.cancel()
        self.box.connections.discard(self)
        super().connection_lost(exc)

    def internal_error(self, exc_info: Any = None, error_logger: Any = None) -> None:
        """What fails because nobody is at the other end any more is no error."""
        if not self.broken and not self.is_closed():
            super().internal_error(exc_info, error_logger)

    def count(self, into: int = 0, out: int = 0) -> None:
        self.box.instance.carry(into, out)
        if self._cut_at is not None:
            self._bytes += into + out
            if self._bytes >= self._cut_at:
                self._cut_at = None
                self.cut()

    def cut(self) -> None:
        """The link breaks as a pulled cable looks to the client's next write: a reset, no
        goodbye."""
        self.broken = True
        reset_on_close(self.get_extra_info("socket"))
        self.abort()


class _Login(asyncssh.SSHServer):
    """Lets root in with a key that the instance knows by now; nothing else, nobody else."""

    _conn: BoxConnection

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        assert isinstance(conn, BoxConnection)
        self._conn = conn

    def begin_auth(self, username: str) -> bool:
        self._conn.send_auth_banner(BANNER)
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return (
            username == "root"
            and not self._conn.denies
            and key.public_data in self._conn.box.authorized_keys()
        )

    def session_requested(self) -> BoxProcess:
        return BoxProcess(self._conn.box)

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> bool:
        """ssh -L to a port of the box, which is this machine's loopback."""
        return dest_host in ("localhost", "127.0.0.1")
