"""`ensure`: the emulator that milktea starts for itself when there is no vast.ai key."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_PATIENCE_S = 20.0
_started: list[subprocess.Popen[bytes]] = []  # detached: nobody waits for them


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
    command = [
        sys.executable,
        "-m",
        "ops.fakevast",
        "--state",
        str(state_dir),
        "--idle-exit-s",
        str(idle_exit_s),
        *options,
    ]
    root = str(Path(__file__).resolve().parents[2])
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    }
    with open(state_dir / "server.log", "ab", opener=_only_ours) as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=env,
            cwd=state_dir,
        )
    _started.append(child)
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


def _only_ours(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


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
