"""`ensure`: the emulator that milktea starts for itself when there is no vast.ai key."""

from __future__ import annotations

import fcntl
import json
import time
from dataclasses import dataclass
from pathlib import Path

from ops.detached import start_detached

_PATIENCE_S = 20.0


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
    """The emulator that serves this folder now, or None. Its lock is held for as long as it lives,
    so a stale file fools nobody."""
    try:
        data = json.loads((state_dir / "server.json").read_text())
        with open(state_dir / "lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return Server(data["url"], data["api_key"])
    except (OSError, ValueError, KeyError):
        pass
    return None
