"""Forwards one port of this machine's loopback to a port of the box's loopback, over SSH and the
pinned host key, like `ssh -L`. No other machine can connect to either end."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self

import paramiko

from ops.box.connection import Box
from ops.errors import Lost, MilkteaError

_PIECE = 1 << 16
_BACKLOG = 64


class Forward:
    """Listens at `port` inside the `with` block, at a free port for 0. It has an SSH connection of
    its own and reopens it after a break; until then new clients are disconnected."""

    def __init__(self, box: Box, remote_port: int, port: int = 0) -> None:
        self._box, self._remote_port = box.twin(), remote_port
        self._story = box  # learns the box's new ports
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=_BACKLOG)
        self.port = int(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        self._ended = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="forward", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._ended = True
        with contextlib.suppress(OSError):  # wakes the thread that waits in accept
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in list(self._open):
            _close(one)
        self._box.end(Lost("the forward has ended"))

    def _accept(self) -> None:
        while not self._ended:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            self._open.add(here)
            threading.Thread(target=self._join, args=(here,), daemon=True).start()

    def _join(self, here: socket.socket) -> None:
        """Copy bytes in both directions until the box has sent everything."""
        there: paramiko.Channel | None = None
        try:
            with self._lock:
                self._box.endpoints = self._story.endpoints
                there = self._box.channel_to(self._remote_port)
            up = threading.Thread(target=_send, args=(here, there), daemon=True)
            up.start()
            while data := there.recv(_PIECE):
                here.sendall(data)
        except (OSError, EOFError, MilkteaError):
            pass
        finally:
            self._open.discard(here)
            _close(here)
            if there is not None:
                with contextlib.suppress(OSError, EOFError):
                    there.close()


def _send(here: socket.socket, there: paramiko.Channel) -> None:
    """Copy from here to there. A client that disconnects closes the channel, so that the server
    notices."""
    with contextlib.suppress(OSError, EOFError):
        while data := here.recv(_PIECE):
            there.sendall(data)
    with contextlib.suppress(OSError, EOFError):
        there.shutdown_write()


def _close(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
