"""A user's reward function, asked in a process of its own that has limits."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

RUNNER = Path(__file__).with_name("reward_runner.py")
MEMORY = 4 << 30  # bytes of address space
GRACE_S = 20.0  # beside what its answers may take: to start, and to be told
MOST_REPLY = 4 << 20  # bytes


class RewardFault(RuntimeError):
    """The function cannot be asked; the text says why."""


class RewardProcess:
    """`ask` gives each answer a number. The process is started when it is first asked, without our
    environment, in an empty folder; it ends with this object."""

    def __init__(self, file: Path, seconds: float) -> None:
        self.file, self.seconds = file.resolve(), seconds
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, asked: Sequence[tuple[str, str, str]]) -> list[float | str]:
        """Of each (prompt, answer, expected) the number that the function gives, or what went wrong
        with it. Raises RewardFault where no reply comes in time."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([list(one) for one in asked]).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process.stdout.fileno(), self.seconds * len(asked) + GRACE_S)
            told = json.loads(line)
            assert len(told) == len(asked)
            return [fault if number is None else float(number) for number, fault in told]
        except (OSError, ValueError, TypeError, AssertionError) as why:
            self.close()
            raise RewardFault(f"the function's process ended or hung: {why}") from why

    def _line(self, pipe: int, seconds: float) -> bytes:
        """One line from a pipe. Raises OSError where none comes in time, or a very long one."""
        end, line = time.monotonic() + seconds, bytearray()
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise OSError(f"no reply in {seconds:.0f} s")
            part = os.read(pipe, 1 << 16)
            if not part:
                raise OSError("it ended")
            line += part
            if len(line) > MOST_REPLY:
                raise OSError("its reply is too long")
        return bytes(line)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            words = [sys.executable, "-I", str(RUNNER), str(self.file)]
            self._folder = tempfile.TemporaryDirectory(prefix="reward")
            self._process = subprocess.Popen(
                [*words, str(self.seconds), str(MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=self._folder.name,
                env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            self._end = weakref.finalize(self, _end, self._process, self._folder)
        return self._process

    def close(self) -> None:
        """Ends the process; `ask` starts it again."""
        if self._process is not None:
            self._end()
            self._process = None


def _end(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what the function started
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # what was not sent yet
                continue
    folder.cleanup()
