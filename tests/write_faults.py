"""Every place at which the client writes to this machine's disk fails once, or from then on, with
ENOSPC, EACCES and EIO: the box is destroyed all the same, and the run ends in words.

    python tests/write_faults.py [--every N] [--keep] [--at REGEX] [--verbose]
                            last line: `CASES cases at SITES sites, 0 boxes left, 0 tracebacks`

A site is an operation and the line of `ops` that asks for it, as a whole run shows them; the run is
that of a supervisor against the emulator, in a process of its own, in which the calls of Python
that write are wrapped. `--every N` tries every N-th case. An instance that the emulator still has
when the supervisor has ended is a box left: its DELETE was not sent. With `--keep` somebody stops
the run in the middle of its training to keep its disk: then a box may be left where it is stopped
and the run's journal says at what price and until when.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import crash_matrix  # noqa: E402
from owners import stop_in_time  # noqa: E402

import rig  # noqa: E402
from ops.market.client import Vast  # noqa: E402
from ops.market.provider import Provider  # noqa: E402
from ops.run import supervisor, wishes  # noqa: E402
from ops.run.journal import Journal, last, read  # noqa: E402
from ops.wait import RealClock  # noqa: E402

ERRORS = {"ENOSPC": errno.ENOSPC, "EACCES": errno.EACCES, "EIO": errno.EIO}
HANGS_S = 120
KEPT: dict[str, Any] = {  # a plan whose box is worth keeping: its model takes long to come again
    "workload": rig.Workload(
        1e5, 1e6, cpu_practice=True, disk_gib=16, image_bytes=4e8, model_download_bytes=3e11
    ),
    "max_usd": 50.0,
    "max_s": 360_000.0,
}
WRITES = ("write", "writelines", "truncate", "flush", "close")  # of an open file
NAMED = ("mkdir", "unlink", "rmdir", "rename", "replace", "link", "symlink", "chmod", "utime")
SHARED = ("ops/run/journal.py", "ops/run/session.py")
NUMBERED = ("write", "fsync", "ftruncate", "sendfile")  # of os, by a descriptor

Site = tuple[str, str]  # operation, FILE:LINE of ops


@dataclass
class Disk:
    """This process's writes: counted by site, and failing at one of them."""

    at: Site | None = None
    number: int = 0  # of the error
    stays: bool = False  # every write fails from then on
    seen: Counter[Site] = field(default_factory=Counter)
    failed: bool = False

    def check(self, operation: str, path: object) -> None:
        """Raises OSError where this write is to fail. Devices, pipes and sockets are no disk."""
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
        if name.startswith(("/dev/", "/proc/", "pipe:", "socket:", "anon_inode:")):
            return
        where = _line_of_ops()
        if where is None:
            return
        site = (operation, where)
        self.seen[site] += 1
        first = site == self.at and not self.failed
        self.failed |= first
        if first or (self.stays and self.failed):
            raise OSError(self.number, os.strerror(self.number), name)

    def wrap(self) -> None:
        """From now on every call that writes asks `check` first."""
        real_open, os_open = builtins.open, os.open

        def opened(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            writes = any(letter in mode for letter in "wax+")
            if not writes:
                return real_open(file, mode, *more, **named)
            if not isinstance(file, int):
                self.check("open", file)
            return File(real_open(file, mode, *more, **named), self, file)

        def os_opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.check("os.open", path)
            return os_open(path, flags, *more, **named)

        builtins.open = io.open = opened  # type: ignore[assignment]
        os.open = os_opened
        for name in NAMED:
            self._wrap(name, lambda args: args[0])
        for name in NUMBERED:
            self._wrap(name, lambda args: _path_of(args[0]))

    def _wrap(self, name: str, path_of: Callable[[Any], object]) -> None:
        real = getattr(os, name)

        def called(*args: Any, **named: Any) -> Any:
            self.check(f"os.{name}", path_of(args))
            return real(*args, **named)

        setattr(os, name, called)


class File:
    """An open file whose writes ask the disk first."""

    def __init__(self, file: Any, disk: Disk, path: object) -> None:
        self._file, self._disk, self._path = file, disk, path

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._file, name)
        if name not in WRITES:
            return found

        def called(*args: Any) -> Any:
            if name == "close" and self._file.closed:
                return None
            try:
                self._disk.check(name, self._path)
            except OSError:
                if name == "close":
                    found()
                raise
            return found(*args)

        return called

    def __enter__(self) -> File:
        return self

    def __exit__(self, *told: object) -> None:
        self.close()

    def __iter__(self) -> Any:
        return iter(self._file)


def _line_of_ops() -> str | None:
    """The line that writes; of what many write by, with the line that asked for it."""
    lines: list[str] = []
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(str(ROOT / "ops")):
            lines.append(f"{os.path.relpath(name, ROOT)}:{frame.f_lineno}")
            if not name.endswith(SHARED):
                break
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join([lines[0], *lines[1:][-1:]]) if lines else None


def _path_of(descriptor: Any) -> str:
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    return os.readlink(f"/proc/self/fd/{number}")


def run(
    runs: Path, url: str, key: str, own: rig.Rig, disk: Disk, keep: bool = False
) -> dict[str, Any]:
    """A whole run by a supervisor in a process of its own: how it ended, and the sites it met."""
    plan = own.plan(**(KEPT if keep else {"max_usd": 5.0}))
    with Journal(runs / plan.run_id) as journal:
        journal.append("planned", **plan.to_line())
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(HANGS_S)
        os.setsid()
        log = os.open(runs / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        ended: dict[str, Any] = {}
        try:
            disk.wrap()
            ended["code"] = supervisor.own(
                runs / plan.run_id, Vast(Provider(url, key), RealClock(rig.PACE))
            )
        except BaseException:
            ended["traceback"] = traceback.format_exc()
        disk.at, disk.stays = None, False
        ended |= {"seen": [[*site] for site in disk.seen], "failed": disk.failed}
        os.write(writes, json.dumps(ended).encode())
        os._exit(0)
    os.close(writes)
    person = ended_by_a_person(runs / plan.run_id) if keep else None
    with open(reads, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if person is not None:
        os.kill(person, signal.SIGKILL)
        os.waitpid(person, 0)
    ended = json.loads(said) if said else {"traceback": "killed", "seen": [], "failed": True}
    lines = read(runs / plan.run_id)
    return ended | {"kept": bool(lines) and lines[-1].kind == "kept"}


def ended_by_a_person(folder: Path) -> int:
    """A process that wishes the run's disk to be kept once its training has begun, and waits to be
    killed."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            while last(read(folder), "event") is None:
                time.sleep(0.05)
            wishes.send(folder, wishes.KEEP)
        signal.pause()
    return child


def cases(sites: list[Site]) -> list[tuple[Site, str, bool]]:
    """Each site with each error, once and for good; each begins with another of these, so that
    every N-th has some of all."""
    ways = [(name, stays) for name in ERRORS for stays in (False, True)]
    turned = [ways[n % len(ways) :] + ways[: n % len(ways)] for n in range(len(sites))]
    return [(site, *way) for site, order in zip(sites, turned, strict=True) for way in order]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--at", default="", help="only sites that match, such as kept.py")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    began, left, broken, met = time.monotonic(), 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="write-faults-") as name:
        folder = Path(name)
        own = rig.Rig(folder)
        if options.keep:
            stop_in_time(own)
        commands, server = multiprocessing.Pipe()
        emulator = multiprocessing.get_context("spawn").Process(
            target=crash_matrix.serve, args=(folder, server), daemon=True
        )
        emulator.start()
        url, key = commands.recv()

        def tried(n: int, disk: Disk) -> tuple[dict[str, Any], list[str]]:
            commands.send([])
            commands.recv()
            (folder / f"runs{n}").mkdir()
            ended = run(folder / f"runs{n}", url, key, own, disk, options.keep)
            commands.send("what is left")
            boxes = commands.recv()
            return ended, [b for b in boxes if not (ended["kept"] and b.endswith(" stopped"))]

        whole, _ = tried(0, Disk())
        assert whole.get("code") == 0 and whole["kept"] == options.keep, whole
        sites = sorted(
            (operation, line) for operation, line in whole["seen"] if re.search(options.at, line)
        )
        chosen = cases(sites)[:: options.every]
        for n, (site, error, stays) in enumerate(chosen, 1):
            ended, boxes = tried(n, Disk(site, ERRORS[error], stays))
            met += ended["failed"]
            case = f"{site[0]} at {site[1]}, {error}{' for good' if stays else ''}"
            if boxes:
                left += 1
                print(f"left: {case}: {boxes}", flush=True)
            if "traceback" in ended:
                broken += 1
                print(f"traceback: {case}: {ended['traceback']}", flush=True)
            if options.verbose:
                print(f"{ended.get('code')} {case}", flush=True)
        commands.send(None)
        emulator.join(60)
    print(f"{met} of the failures were met, {time.monotonic() - began:.0f} s")
    print(f"{len(chosen)} cases at {len(sites)} sites, {left} boxes left, {broken} tracebacks")
    return 1 if left or broken else 0


if __name__ == "__main__":
    sys.exit(main())
