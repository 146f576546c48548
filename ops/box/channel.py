"""One command's SSH channel: its stdin, both output streams, a limit on time and on memory."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable

import paramiko

Input = str | bytes | Iterable[bytes]
MARK = "printf '\\036milktea\\n'"  # prints START
START = b"\x1emilktea\n"  # what a login's rc files print comes before this line
_MAX_NOISE = 1 << 20  # bytes before START in which START is looked for


class Flood(Exception):
    """A stream brought more bytes than any command of ours does."""


class Output:
    """What one stream brings after START: passed to `receive`, or kept, at most `limit` bytes."""

    def __init__(self, limit: int, receive: Callable[[bytes], None] | None = None) -> None:
        self.limit, self.receive = limit, receive
        self.data = bytearray()
        self._noise: bytes | None = b""  # None once START has come

    def add(self, data: bytes) -> None:
        """Raises Flood for more than `limit` bytes, or than _MAX_NOISE before START."""
        if self._noise is not None:
            self._noise += data
            _, mark, data = self._noise.partition(START)
            if not mark and len(self._noise) > _MAX_NOISE:
                raise Flood(f"{_MAX_NOISE:,} bytes before a command began")
            if not mark:
                return
            self._noise = None
        if self.receive is not None:
            self.receive(data)
            return
        self.data += data
        if len(self.data) > self.limit:
            raise Flood(f"more than {self.limit:,} bytes")


class Deadline:
    """`seconds` from now or, with `idle`, from the last byte that moved."""

    def __init__(self, seconds: float, idle: bool = False) -> None:
        self.seconds, self.idle, self.since = seconds, idle, time.monotonic()

    def moved(self) -> None:
        if self.idle:
            self.since = time.monotonic()

    def left_s(self) -> float:
        return self.since + self.seconds - time.monotonic()


def send_input(channel: paramiko.Channel, data: Input, deadline: Deadline) -> None:
    """Send `data` and then its end. Returns early when the command ended without reading it."""
    if isinstance(data, str):
        data = data.encode()
    with contextlib.suppress(OSError, EOFError):
        for piece in [data] if isinstance(data, bytes) else data:
            channel.sendall(piece)
            deadline.moved()
        channel.shutdown_write()


class _Arrivals:
    """Tells a waiting thread that a stream has brought bytes or has ended.

    paramiko's `Channel.fileno` does the same through a pipe, into which its reader still writes
    while `Channel.close` closes it: into a descriptor that may be another file by then."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._event = threading.Event()
        channel.in_buffer.set_event(self)
        channel.in_stderr_buffer.set_event(self)

    def set(self) -> None:
        """Called by paramiko's reader."""
        self._event.set()

    def clear(self) -> None:
        """Called where one of the two streams has been read to its end; the other may not be."""

    def wait(self, timeout_s: float) -> None:
        """Return once something has come since the last call, or after `timeout_s`."""
        self._event.wait(timeout_s)
        self._event.clear()


def read_output(channel: paramiko.Channel, out: Output, err: Output, deadline: Deadline) -> bool:
    """Read both streams until the channel ends (True) or the deadline has passed (False)."""
    arrivals = _Arrivals(channel)
    while True:
        ended = channel.exit_status_ready() and (channel.eof_received or channel.closed)
        moved = False
        while channel.recv_ready():
            out.add(channel.recv(1 << 20))
            moved = True
        while channel.recv_stderr_ready():
            err.add(channel.recv_stderr(1 << 20))
            moved = True
        if moved:
            deadline.moved()
        elif ended:
            return True
        elif deadline.left_s() <= 0:
            return False
        elif channel.eof_received:  # the streams tell nothing more; the exit status may be coming
            channel.status_event.wait(min(deadline.left_s(), 1.0))
        else:
            arrivals.wait(min(deadline.left_s(), 5.0))
