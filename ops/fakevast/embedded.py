"""`ensure`: the emulator that milktea starts for itself when there is no vast.ai key."""

from __future__ import annotations

import fcntl
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ops.detached import start_detached

_PATIENCE_S = 60.0
_LOCK_TRIES = 50  # one each 0.02 s


@dataclass(frozen=True)
class Server:
    url: str
    api_key: str


def ensure(state_dir: Path, *, idle_exit_s: float = 900.0, options: tuple[str, ...] = ()) -> Server:
    """The emulator of this folder: the one that runs, or else one started now, detached, which ends
    by itself when idle.

    Safe to call twice, and from two processes at once: one emulator a folder. Raises RuntimeError,
    with the end of its log, when it does not come up.
    """
    state_dir = state_dir.resolve()
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (server := running(state_dir)) is not None:
        return server
    words = ["--state", str(state_dir), "--idle-exit-s", str(idle_exit_s), *options]
    child = start_detached("ops.fakevast", words, state_dir, state_dir / "server.log")
    deadline = time.monotonic() + _PATIENCE_S
    while (server := running(state_dir)) is None:
        if child.poll() not in (None, 0) or time.monotonic() > deadline:
            tail = (state_dir / "server.log").read_text(errors="replace")[-2000:]
            raise RuntimeError(
                f"fakevast did not start (exit code {child.poll()}); {state_dir}/server.log "
                f"ends with:\n{tail}"
            )
        time.sleep(0.005)
    return server


def running(state_dir: Path) -> Server | None:
    """The emulator that serves this folder now, or None. It holds its lock for as long as it lives;
    the file that a killed one left is removed."""
    file = state_dir / "server.json"
    try:
        file.stat()
        with open(state_dir / "lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                data = json.loads(file.read_text())
                return Server(data["url"], data["api_key"])
            file.unlink()
    except (OSError, ValueError, KeyError):
        pass
    return None


def lock_folder(state_dir: Path) -> IO[str] | None:
    """The lock of the emulator that serves this folder, held until it is closed; None where another
    emulator has it."""
    lock = open(state_dir / "lock", "a")  # noqa: SIM115 - its life is the lock's
    for _ in range(_LOCK_TRIES):  # `running` of another process holds it for a moment
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        time.sleep(0.02)
    lock.close()
    return None
