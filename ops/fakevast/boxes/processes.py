"""The processes of a box: started, waited for, and found again however they detached themselves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SURVIVES = "trap '' XFSZ"  # a write that finds no room fails; it does not end its program
MARK = "FAKEVAST_BOX"  # in the environment of each: the box that it belongs to
SHELL = "/bin/bash" if Path("/bin/bash").exists() else "/bin/sh"


def start(
    words: list[str],
    cwd: Path,
    env: dict[str, str],
    *,
    max_file_bytes: int | None = None,
    terminal: int | None = None,
    **streams: Any,
) -> subprocess.Popen[bytes]:
    """Starts a program in a session of its own.

    On a terminal, given by the descriptor of its slave side, or on `streams` as subprocess takes
    them. No file may grow past `max_file_bytes`: the nearest thing to a full disk without root.
    """

    def prepare() -> None:
        if max_file_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
        if terminal is not None:
            os.login_tty(terminal)

    if terminal is not None:
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    bare = max_file_bytes is None and terminal is None
    return subprocess.Popen(
        words,
        cwd=cwd,
        env=env,
        start_new_session=terminal is None,
        preexec_fn=None if bare else prepare,
        **streams,
    )


def script(text: str) -> list[str]:
    """The words of a shell that runs `text` and survives a full disk, as all that it starts."""
    return [SHELL, "-c", f"{_SURVIVES}\n{text}"]


def limit_marked(mark: str, max_file_bytes: int | None) -> None:
    """From now on no process of this box writes past `max_file_bytes` of a file; None: as much as
    it likes."""
    soft = resource.RLIM_INFINITY if max_file_bytes is None else max_file_bytes
    for number in _marked(mark):
        with contextlib.suppress(OSError):
            resource.prlimit(number, resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))


def _marked(mark: str) -> list[int]:
    numbers = map(int, filter(str.isdigit, os.listdir("/proc")))
    return [number for number in numbers if _belongs(number, mark)]


def watch(process: subprocess.Popen[bytes], ended: Callable[[int], None]) -> None:
    """Calls back with the exit code (negative: a signal) when the process is gone, and reaps it."""
    loop = asyncio.get_running_loop()
    fd = os.pidfd_open(process.pid)

    def gone() -> None:
        loop.remove_reader(fd)
        os.close(fd)
        ended(process.wait())

    loop.add_reader(fd, gone)


def kill_marked(mark: str) -> int:
    """Kills every process whose environment says that it belongs to this box; returns how many.

    `mark` ending in "/": to any box below it. Reads /proc. A process may fork while the others
    die, and one that is just then replacing itself shows no environment (its folder tells then):
    so it looks again until two looks in a row find nothing.
    """
    killed = quiet = 0
    while quiet < 2 and killed < 10_000:
        found = _marked(mark)
        for number in found:
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)
        killed += len(found)
        quiet = 0 if found else quiet + 1
    return killed


def _belongs(number: int, mark: str) -> bool:
    wanted = f"{MARK}={mark}".encode()
    try:
        with open(f"/proc/{number}/environ", "rb") as file:
            environment = file.read()
        if not environment:
            cwd = os.readlink(f"/proc/{number}/cwd")
            return f"{cwd}/".startswith(mark.rstrip("/") + "/")
    except OSError:
        return False
    words, below = environment.split(b"\0"), mark.endswith("/")
    return any(word == wanted or (below and word.startswith(wanted)) for word in words)
