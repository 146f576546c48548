"""One SSH session on a box: a command or a login shell with its pipes (or terminal), or the SFTP subsystem.

Bytes go between pipe and channel as they are, in big reads, with back-pressure both ways: rsync and scp run through here.
As with OpenSSH, a session ends when its command has ended and its output is drained, and a lost connection kills nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import struct
import subprocess
import termios
from typing import TYPE_CHECKING, Any

import asyncssh
from asyncssh.stream import SSHServerStreamSession

from ops.fakevast.sftp import BoxSFTP

if TYPE_CHECKING:
    from ops.fakevast.boxes import Box

_CHUNK = 256 * 1024
_PIPE = 1024 * 1024
_F_SETPIPE_SZ = 1031


class BoxSession(SSHServerStreamSession[bytes]):
    """asyncssh's stream session for SFTP; a command is handled here."""

    def __init__(self, box: Box) -> None:
        super().__init__(None, lambda chan: BoxSFTP(chan, box), 3)
        self._box = box
        self._events = asyncio.get_running_loop()
        self._command: str | None = None
        self._runs = False
        self._terminal: tuple[str, tuple[int, int, int, int]] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stdin = -1
        self._unwritten: list[bytes] = []
        self._stdin_ends = False
        self._outputs: dict[int, Any] = {}  # fd -> channel datatype
        self._paused = False
        self._code: int | None = None

    # ---- what the client asks for ----

    def pty_requested(self, term_type: str, term_size: tuple[int, int, int, int], term_modes: Any) -> bool:
        self._terminal = (term_type, term_size)
        return True

    def exec_requested(self, command: str) -> bool:
        self._command, self._runs = command, True
        return True

    def shell_requested(self) -> bool:
        self._runs = True
        return True

    def session_started(self) -> None:
        if not self._runs:
            super().session_started()
            return
        try:
            self._start()
        except OSError as error:
            chan = self._channel()
            chan.write(f"fakevast: {error}\n".encode(), asyncssh.EXTENDED_DATA_STDERR)
            chan.exit(255)

    def _channel(self) -> Any:
        return self._chan

    def _start(self) -> None:
        env = dict(self._box.ssh_environment())
        for name, value in self._channel().get_environment().items():
            if name == "LANG" or name.startswith("LC_"):  # what sshd accepts from a client by default
                env[name] = value
        fault = self._box.exec_fault()
        if fault is not None and fault.what == "fail":
            self._channel().write(str(fault.args.get("stderr", "")).encode(), asyncssh.EXTENDED_DATA_STDERR)
            self._channel().exit(int(fault.args.get("code", 1)))
            return
        if self._terminal is not None:
            self._start_on_terminal(env, *self._terminal)
        else:
            self._start_on_pipes(env)
        self._box.watch(self._process, self._ended)
        if fault is not None and fault.what in ("cut", "host_death"):
            self._box.break_link(fault.what)

    def _start_on_pipes(self, env: dict[str, str]) -> None:
        process = self._box.spawn(self._command, env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdin and process.stdout and process.stderr
        self._process = process
        self._stdin = os.dup(process.stdin.fileno())
        self._outputs = {os.dup(process.stdout.fileno()): None, os.dup(process.stderr.fileno()): asyncssh.EXTENDED_DATA_STDERR}
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()
        for fd in (self._stdin, *self._outputs):
            os.set_blocking(fd, False)
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, _F_SETPIPE_SZ, _PIPE)
        self._read_more()

    def _start_on_terminal(self, env: dict[str, str], term: str, size: tuple[int, int, int, int]) -> None:
        master, slave = os.openpty()
        env["TERM"] = term or "dumb"
        self._process = self._box.spawn(self._command, env, stdin=slave, stdout=slave, stderr=slave, preexec_fn=lambda: os.login_tty(slave))
        os.close(slave)
        os.set_blocking(master, False)
        self._stdin, self._outputs = os.dup(master), {master: None}
        os.set_blocking(self._stdin, False)
        self.terminal_size_changed(*size)
        self._read_more()

    # ---- from the command to the client ----

    def _read_more(self) -> None:
        for fd in self._outputs:
            self._events.add_reader(fd, self._readable, fd)

    def _readable(self, fd: int) -> None:
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return
        except OSError as error:  # a terminal's other end is gone: EIO is its end of file
            data = b""
            if error.errno != errno.EIO:
                raise
        if data:
            self._channel().write(data, self._outputs[fd])
            return
        self._close_output(fd)
        self._finish()

    def _close_output(self, fd: int) -> None:
        self._events.remove_reader(fd)
        self._outputs.pop(fd, None)
        os.close(fd)

    def pause_writing(self) -> None:
        if not self._runs:
            super().pause_writing()
            return
        for fd in self._outputs:
            self._events.remove_reader(fd)

    def resume_writing(self) -> None:
        if not self._runs:
            super().resume_writing()
            return
        self._read_more()

    def _ended(self, code: int) -> None:
        self._code = code
        if self._terminal is not None:  # whoever still holds the terminal does not hold the session
            for fd in list(self._outputs):
                self._readable(fd)
                if fd in self._outputs:
                    self._close_output(fd)
        self._finish()

    def _finish(self) -> None:
        if self._code is None or self._outputs or self._chan is None:
            return
        self._close_stdin()
        if self._code < 0:
            name = signal.Signals(-self._code).name.removeprefix("SIG")
            self._channel().exit_with_signal(name)
        else:
            self._channel().exit(self._code)

    # ---- from the client to the command ----

    def data_received(self, data: bytes, datatype: Any) -> None:
        if not self._runs:
            super().data_received(data, datatype)
        elif self._stdin >= 0:
            self._unwritten.append(data)
            if len(self._unwritten) == 1:
                self._write_more()

    def _write_more(self) -> None:
        """Writes until the pipe is full; then the client's window does the waiting."""
        while self._unwritten:
            try:
                written = os.write(self._stdin, self._unwritten[0])
            except BlockingIOError:
                if not self._paused:
                    self._paused = True
                    self._events.add_writer(self._stdin, self._write_more)
                    self._channel().pause_reading()
                return
            except OSError:  # the command reads no more
                self._close_stdin()
                return
            if written < len(self._unwritten[0]):
                self._unwritten[0] = self._unwritten[0][written:]
            else:
                self._unwritten.pop(0)
        self._unpause()  # hands over what has come meanwhile, and the end perhaps: both call us again
        if self._stdin_ends and not self._unwritten:
            self._close_stdin()

    def _unpause(self) -> None:
        if self._paused:
            self._paused = False
            self._events.remove_writer(self._stdin)
            if self._chan is not None:
                self._channel().resume_reading()

    def eof_received(self) -> bool:
        if not self._runs:  # asyncssh ends SFTP without an exit status, which OpenSSH's scp takes for a failure
            self._channel().exit(0)
            return bool(super().eof_received())
        self._stdin_ends = True
        if not self._unwritten and self._terminal is None:
            self._close_stdin()
        return True

    def _close_stdin(self) -> None:
        if self._stdin >= 0:
            self._unpause()
            os.close(self._stdin)
            self._stdin = -1
            self._unwritten.clear()

    def terminal_size_changed(self, width: int, height: int, pixwidth: int, pixheight: int) -> None:
        if self._terminal is not None and self._stdin >= 0:
            fcntl.ioctl(self._stdin, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, pixwidth, pixheight))

    def signal_received(self, signal_name: str) -> None:
        if self._process is not None and self._code is None:
            with contextlib.suppress(OSError, AttributeError):
                os.killpg(self._process.pid, getattr(signal, f"SIG{signal_name}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """The command lives on, its ends of the pipes closed."""
        if not self._runs:
            super().connection_lost(exc)
            return
        self._chan = None
        self._close_stdin()
        for fd in list(self._outputs):
            self._close_output(fd)
