"""Joins this terminal, or this process's own streams, to a command on the box, like ssh."""

from __future__ import annotations

import contextlib
import math
import os
import select
import shutil
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from typing import BinaryIO

import paramiko

from ops.box.channel import Deadline, Output, read_output, send_input
from ops.box.connection import Box
from ops.errors import Lost

_PIECE = 1 << 14
_LOOK_S = 0.1
_END_S = 2.0


def interact(box: Box, script: str) -> int:
    """Run `script` on a terminal of the box, join this process's terminal to it, and return its
    exit code. Ctrl-C goes to the script. Raises Lost where the link breaks; the script is then hung
    up."""
    size = shutil.get_terminal_size()
    channel = box.terminal(script, os.environ.get("TERM") or "dumb", size.columns, size.lines)
    with contextlib.closing(channel), _raw(channel):
        _copy(channel)
        return _exit_code(channel)


def pipe(box: Box, script: str) -> int:
    """Run `script` on the box with this process's stdin, stdout and stderr, byte for byte and
    without a limit of time or size, and return its exit code. Raises Lost where the link breaks;
    BrokenPipeError where nobody reads this process's output any more."""
    channel = box.command(script)
    out = Output(0, lambda data: _write(data))
    err = Output(0, lambda data: _write(data, sys.stderr.buffer))
    deadline = Deadline(math.inf)
    typed = _typed(channel)
    threading.Thread(target=send_input, args=(channel, typed, deadline), daemon=True).start()
    with contextlib.closing(channel):
        with contextlib.suppress(EOFError):
            read_output(channel, out, err, deadline)
        return _exit_code(channel)


def _exit_code(channel: paramiko.Channel) -> int:
    if channel.exit_status < 0:  # paramiko's for none
        raise Lost("the link to the box broke")
    return int(channel.exit_status)


def _typed(channel: paramiko.Channel) -> Iterator[bytes]:
    """What comes on this process's stdin, until its end or that of the channel."""
    stdin = sys.stdin.fileno()
    while not channel.closed:
        if select.select([stdin], [], [], _LOOK_S)[0]:
            if not (data := os.read(stdin, _PIECE)):
                return
            yield data


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
        tty.setraw(sys.stdin, termios.TCSADRAIN)  # what was typed already is kept
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, handler)


def _copy(channel: paramiko.Channel) -> None:
    """Copy until the box has sent everything, and close the channel. Typed input goes to the box;
    the end of input is sent as Ctrl-D."""
    keys = threading.Thread(target=_send_keys, args=(channel,), daemon=True)
    keys.start()
    while data := channel.recv(_PIECE):
        _write(data)
    channel.status_event.wait(_END_S)
    channel.close()
    keys.join(_END_S)  # what is typed from now on is for this machine


def _send_keys(channel: paramiko.Channel) -> None:
    with contextlib.suppress(OSError, EOFError):  # the channel has ended
        for data in _typed(channel):
            channel.sendall(data)
        channel.sendall(b"\x04")


def _write(data: bytes, to: BinaryIO | None = None) -> None:
    to = to or sys.stdout.buffer
    to.write(data)
    to.flush()
