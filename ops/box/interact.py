"""Joins this terminal to one on the box, byte by byte, like ssh."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import termios
import tty
from collections.abc import Iterator

import paramiko

from ops.box.connection import Box
from ops.errors import Lost

_PIECE = 1 << 14
_LOOK_S = 0.5


def interact(box: Box, script: str) -> int:
    """Run `script` on a terminal of the box, join this process's terminal to it, and return its
    exit code. Ctrl-C goes to the script. Raises Lost where the link breaks; the script is then hung
    up."""
    size = shutil.get_terminal_size()
    channel = box.terminal(script, os.environ.get("TERM") or "dumb", size.columns, size.lines)
    with contextlib.closing(channel), _raw(channel):
        _copy(channel)
        if not channel.exit_status_ready():
            raise Lost("the link to the conversation broke")
        return int(channel.recv_exit_status())


@contextlib.contextmanager
def _raw(channel: paramiko.Channel) -> Iterator[None]:
    """Send keys to the box as they are pressed, and tell it when the window's size changes."""

    def resize(number: int, frame: object) -> None:
        size = shutil.get_terminal_size()
        with contextlib.suppress(OSError, paramiko.SSHException):
            channel.resize_pty(size.columns, size.lines)

    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    handler = signal.signal(signal.SIGWINCH, resize)
    try:
        tty.setraw(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, handler)


def _copy(channel: paramiko.Channel) -> None:
    """Copy until the box has sent everything. Typed input goes to the box; the end of input is sent
    as Ctrl-D."""
    keys: list[int] = [sys.stdin.fileno()]
    while True:
        ready, _, _ = select.select([channel.fileno(), *keys], [], [], _LOOK_S)
        while channel.recv_ready():
            _write(channel.recv(_PIECE))
        if channel.closed or channel.eof_received:
            channel.status_event.wait(_LOOK_S * 4)
            return
        if keys and keys[0] in ready:
            typed = os.read(keys[0], _PIECE)
            channel.sendall(typed or b"\x04")
            keys = keys if typed else []


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
