"""Programs of ours that outlive the command that starts them, and files that only we may read."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

started: list[subprocess.Popen[bytes]] = []  # of this process; nobody waits for them


def start_detached(
    module: str,
    words: Sequence[str],
    folder: Path,
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `python -m module words` in `folder`, in a session of its own, without a terminal; what
    it prints is appended to `log`. `env` is added to this process's environment."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with open(log, "ab", opener=only_ours) as file:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *words],  # -P: nothing in `folder` is imported
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            pass_fds=pass_fds,
            env=os.environ | dict(env or {}) | {"PYTHONPATH": path},
            cwd=folder,
        )
    started[:] = [one for one in started if one.poll() is None]  # no zombie stays
    started.append(child)
    return child


@atexit.register
def _leave() -> None:
    """Let go of what runs on: Python warns of a process that was not waited for."""
    for child in started:
        if child.poll() is None:
            child.returncode = 0


def only_ours(path: str, flags: int) -> int:
    """An opener for `open`: no other user may read a file that it makes."""
    return os.open(path, flags, 0o600)
