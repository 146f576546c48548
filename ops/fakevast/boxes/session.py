"""One command on a box: its pipes, or its terminal, joined to an SSH channel by asyncssh.

A session ends as with OpenSSH: when its command has ended and its output is drained. A lost
connection closes the command's pipes and hangs up its terminal; what was detached lives on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from functools import partial
from typing import Any

import asyncssh

from ops.fakevast.boxes.box import Box
from ops.fakevast.boxes.processes import watch
from ops.fakevast.boxes.sftp import BoxSFTP

Process = asyncssh.SSHServerProcess[bytes]
_STREAMS = ("stdin", "stdout", "stderr")
_SFTP_VERSION = 3  # OpenSSH's
_TERMINAL_DRAIN_S = 1.0  # whoever still holds the terminal does not hold the session


class _Stdin(asyncio.StreamWriter):
    """A command's standard input. As with sshd, what it does not read any more is dropped.

    A bare pipe would not do: asyncio forgets what is buffered when the end of the input is
    written from `resume_writing`, which is when asyncssh hands it over.
    """

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.transport.is_closing():
            super().write(data)

    async def drain(self) -> None:
        with contextlib.suppress(ConnectionError):
            await super().drain()


class BoxProcess(Process):
    """What a client asked for on a channel: a command, a login shell, or SFTP."""

    def __init__(self, box: Box) -> None:
        super().__init__(partial(_run, box), partial(BoxSFTP, box), _SFTP_VERSION, False)
        self._lost = False  # nobody is at the other end any more

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        super().connection_lost(exc)

    def resume_feeding(self, datatype: Any) -> None:
        """More is asked for while somebody can send it."""
        if not self._lost:
            super().resume_feeding(datatype)

    def feed_data(self, data: bytes, datatype: Any) -> None:
        """What the command says once the link broke is dropped."""
        with contextlib.suppress(BrokenPipeError):
            super().feed_data(data, datatype)

    def signal_received(self, signal_name: str) -> None:
        """Send the signal to the command's whole process group."""
        number = getattr(signal, f"SIG{signal_name}", None)
        if self.redirect_pid is not None and number is not None:
            with contextlib.suppress(OSError):
                os.killpg(self.redirect_pid, number)


async def _run(box: Box, process: Process) -> None:
    """Runs the command (or a login shell) of this channel and sends how it ended."""
    fault = box.exec_fault()
    try:
        if fault is not None and fault.what == "fail":
            process.stderr.write(str(fault.args.get("stderr", "")).encode())
            process.exit(int(fault.args.get("code", 1)))
            return
        ended = await (_on_pipes if process.term_type is None else _on_terminal)(box, process)
        if fault is not None and fault.what in ("cut", "host_death"):
            box.break_link(fault.what)
        code = await ended
        process.set_redirect_pid(None)
        await _drained(process)
        if code < 0:
            process.exit_with_signal(signal.Signals(-code).name.removeprefix("SIG"))
        else:
            process.exit(code)
    except OSError as error:
        process.stderr.write(f"fakevast: {error}\n".encode())
        process.exit(255)
    finally:
        await process.wait_closed()


async def _drained(process: Process) -> None:
    """Wait until all output is sent, or nobody is there to read it."""
    with contextlib.suppress(OSError, asyncssh.Error):  # TimeoutError is an OSError
        async with asyncio.timeout(None if process.term_type is None else _TERMINAL_DRAIN_S):
            await process.stdout.drain()
            await process.stderr.drain()


async def _on_pipes(box: Box, process: Process) -> asyncio.Future[int]:
    child, ended = _spawn(box, process, **dict.fromkeys(_STREAMS, subprocess.PIPE))
    loop = asyncio.get_running_loop()
    made = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, child.stdin)
    stdin = _Stdin(*made, None, loop)
    await process.redirect(stdin, child.stdout, child.stderr, send_eof=False)
    if process.is_closing():  # the link broke meanwhile: closes the pipes
        process.connection_lost(None)
    return ended


async def _on_terminal(box: Box, process: Process) -> asyncio.Future[int]:
    """Run the command on a terminal. The terminal is joined first, so that its size is known."""
    master, slave = os.openpty()
    try:
        await process.redirect(os.dup(master), master, send_eof=False)
        return _spawn(box, process, terminal=slave)[1]
    finally:
        os.close(slave)


def _spawn(
    box: Box, process: Process, **streams: Any
) -> tuple[subprocess.Popen[bytes], asyncio.Future[int]]:
    """Starts the command; the future is its exit code. Signals reach it from here on."""
    env = box.ssh_environment()
    for name, value in process.env.items():
        if name == "LANG" or name.startswith("LC_"):  # what sshd accepts from a client by default
            env[name] = value
    if process.term_type is not None:
        env["TERM"] = process.term_type or "dumb"
    child = box.spawn(process.command, env, **streams)
    process.set_redirect_pid(child.pid)
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    watch(child, lambda code: None if ended.done() else ended.set_result(code))
    return child, ended
