"""What goes through one SSH session channel: stdin out, both output streams in, with a limit on time and on memory."""

from __future__ import annotations

import contextlib
import selectors
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import paramiko

Feed = str | bytes | Iterable[bytes] | None
Sink = Callable[[bytes], None]
MARK = "printf '\\036milktea\\n'"  # prints START
START = b"\x1emilktea\n"  # whatever a login's rc files print comes before this line


class Stream:
    """What one stream of a command brings after the start mark: kept up to `limit` bytes, or handed to `sink`."""

    def __init__(self, limit: int, sink: Sink | None = None) -> None:
        self.limit, self.sink, self.kept, self.cut, self._noise = limit, sink, bytearray(), False, bytearray()
        self._started = False

    def take(self, data: bytes) -> None:
        if not self._started:
            self._noise = (self._noise + data)[-(1 << 20) :]
            _, mark, data = bytes(self._noise).partition(START)
            if not mark:
                return
            self._started = True
        if self.sink is not None:
            self.sink(data)
            return
        room = self.limit - len(self.kept)
        self.cut |= len(data) > room
        self.kept += data[:room]


class Clock:
    """Seconds left of a command's time; with `idle`, every byte in or out winds it up again."""

    def __init__(self, seconds: float, idle: bool) -> None:
        self.seconds, self.idle, self.since = seconds, idle, time.monotonic()

    def moved(self) -> None:
        if self.idle:
            self.since = time.monotonic()

    def left(self) -> float:
        return self.since + self.seconds - time.monotonic()


def feed_all(channel: paramiko.Channel, feed: Feed, clock: Clock) -> None:
    pieces: Iterable[bytes] = [feed.encode()] if isinstance(feed, str) else [feed] if isinstance(feed, bytes) else feed or []
    with contextlib.suppress(OSError, EOFError):  # the command ended without reading all of it: its exit code tells
        for piece in pieces:
            channel.sendall(piece)
            clock.moved()
        channel.shutdown_write()


def drain(channel: paramiko.Channel, out: Stream, err: Stream, clock: Clock) -> bool:
    """Read both streams until the channel ends (True) or the time is up (False)."""
    with selectors.DefaultSelector() as ready:
        ready.register(channel.fileno(), selectors.EVENT_READ)
        while True:
            ended = channel.exit_status_ready() and (channel.eof_received or channel.closed)
            read = False
            while channel.recv_ready():
                out.take(channel.recv(1 << 20))
                read = True
            while channel.recv_stderr_ready():
                err.take(channel.recv_stderr(1 << 20))
                read = True
            if read:
                clock.moved()
            elif ended:
                return True
            elif clock.left() <= 0:
                return False
            elif channel.eof_received:  # from here on it is always readable, but the exit status may still be on its way
                channel.status_event.wait(min(clock.left(), 1.0))
            else:
                ready.select(min(clock.left(), 5.0))
