"""runs/RUN/journal.jsonl: what a client is about to do, and what it has done; enough to resume,
reap and explain a run.

A line is ``{"n", "t", "kind", ...}``: its number, unix seconds, kind and data. ``append`` returns
after fsync, so only the last line can be torn, by a power cut: the next client removes it. A last
line that lacks only its newline counts, and gets one. Any other line that cannot be read is damage.

One client acts at a time: the kernel's lock on ``runs/RUN/lock`` ends with its holder. A client
whose journal was written by another one (a copy of the folder on another machine) raises Fenced at
its next line.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from ops.errors import Fenced, JournalError, disk_error
from ops.run.folders import guard, ours

VERSION = 1
FILE = "journal.jsonl"
LOCK_TRIES = 5  # `is_held` takes the lock for a moment: try again before believing it is owned


@dataclass(frozen=True)
class Line:
    n: int
    t: float
    kind: str
    data: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def __contains__(self, key: object) -> bool:
        return key in self.data

    def get(self, key: str, default: Any = None) -> Any:
        return self.data.get(key, default)


def read(folder: Path) -> list[Line]:
    """Every complete line, oldest first. Raises JournalError for a line that cannot be read, for a
    newer version's journal, and where there is none, or none for this user."""
    try:
        return _parsed(folder)[0]
    except PermissionError as e:
        raise JournalError(
            f"{folder / FILE}: closed to this user",
            money="unknown to this user",
            hint="who began the run can open it: `chmod -R g+rX` on its folder",
        ) from e


def _parsed(folder: Path) -> tuple[list[Line], bytes]:
    """(every complete line, the file's bytes that hold them)."""
    path = folder / FILE
    try:
        raw = path.read_bytes()
    except FileNotFoundError as e:
        raise JournalError(
            f"{path}: no journal there", hint="`milktea status` lists the runs"
        ) from e
    texts = raw.split(b"\n")
    lines: list[Line] = []
    for n, text in enumerate(texts):
        try:
            lines.append(_line(text, n))
        except (ValueError, KeyError, RecursionError) as e:
            if n < len(texts) - 1:
                raise _damaged(path, n + 1) from e
            raw = raw.removesuffix(text)  # what follows the last newline: nothing, or a torn line
    if lines and (version := lines[0].get("version", VERSION)) > VERSION:
        raise JournalError(
            f"{path}: written by a newer milktea (journal version {version}, this one reads "
            f"{VERSION})",
            money="unknown to this version",
            hint="use the newer milktea for this run",
        )
    return lines, raw


def _line(text: bytes, n: int) -> Line:
    """Raises ValueError, KeyError or RecursionError for what is not line `n`."""
    row = json.loads(text)
    if not isinstance(row, dict) or row.get("n") != n:
        raise ValueError("not the line that belongs here")
    if type(row["t"]) not in (int, float) or not isinstance(row["kind"], str):
        raise ValueError("no time or no kind")
    if type(row.get("version", VERSION)) is not int:
        raise ValueError("no version")
    row.pop("chain", None)  # 0.1 wrote one
    return Line(row.pop("n"), row.pop("t"), row.pop("kind"), row)


def _damaged(path: Path, line: int) -> JournalError:
    return JournalError(
        f"{path}:{line}: cannot be read as the journal's line {line}: edited, or the disk lost it",
        money="a box of this run may be billing",
        hint=f"`milktea reap` destroys by label whatever {path.parent.name} still has",
    )


class Journal:
    """One run's journal, locked and open for appending. Use as a context manager. Raises Fenced
    when another client has it, DiskError when the disk does not, JournalError when it is
    damaged."""

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._now = now
        self.lines: list[Line] = []
        self._size = 0
        self._torn = False  # half a line of ours is in the file, and could not be cut off
        self._file: IO[bytes] | None = None
        self._lock: IO[str] | None = None
        self._writing = threading.Lock()  # the story and the listener both append

    @property
    def run_id(self) -> str:
        return self.folder.name

    def __enter__(self) -> Self:
        try:
            return self._entered()
        except OSError as e:
            if said := disk_error(e):
                raise said from e
            raise

    def _entered(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        guard(self.folder)
        self._lock = lock_run(self.folder)
        try:
            self._open()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _open(self) -> None:
        path = self.folder / FILE
        complete = b""
        if path.exists():
            self.lines, complete = _parsed(self.folder)
        # unbuffered: what a full disk did not take must not be written later
        self._file = open(path, "ab", buffering=0, opener=ours)  # noqa: SIM115 - closed in __exit__
        self._file.truncate(len(complete))
        self._size = len(complete)
        if complete and not complete.endswith(b"\n"):
            self._write(b"\n")
        for folder in (self.folder, self.folder.parent):
            _sync_folder(folder)

    def __exit__(self, *exc: object) -> None:
        for f in (self._file, self._lock):
            if f:
                with suppress(OSError):  # each line reached the disk when it was written
                    f.close()

    def _write(self, text: bytes) -> None:
        assert self._file is not None, "the journal is open only inside `with`"
        if self._torn:
            self._file.truncate(self._size)
            self._torn = False
        try:
            left = memoryview(text)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._torn = True
            with suppress(OSError):
                self._file.truncate(self._size)
                self._torn = False
            raise
        self._size += len(text)

    def taken_over(self) -> bool:
        """Whether another client wrote to this journal since ours did. False where the disk does
        not say."""
        with self._writing:  # our own line may be half written
            return self._grew()

    def _grew(self) -> bool:
        assert self._file is not None, "the journal is open only inside `with`"
        try:
            return not self._torn and os.fstat(self._file.fileno()).st_size != self._size
        except OSError:
            return False

    def append(self, kind: str, **data: Any) -> Line:
        """Write one line and return once it is on the disk; from any thread. Raises Fenced if
        another client wrote meanwhile, OSError where the disk does not take it."""
        with self._writing:
            return self._append(kind, data)

    def _append(self, kind: str, data: dict[str, Any]) -> Line:
        if self._grew():
            raise Fenced(f"{self.run_id}: another client has taken this run over; this one stops")
        row = {"n": len(self.lines), "t": round(self._now(), 3), "kind": kind, **data}
        if not self.lines:
            row["version"] = VERSION
        text = json.dumps(row, ensure_ascii=False) + "\n"
        self._write(text.encode("utf-8", "backslashreplace"))
        n, t, _ = row.pop("n"), row.pop("t"), row.pop("kind")
        self.lines.append(Line(n, t, kind, row))
        return self.lines[-1]

    def last(self, *kinds: str) -> Line | None:
        return last(self.lines, *kinds)


def last(lines: list[Line], *kinds: str) -> Line | None:
    """The newest line of one of `kinds`; None without one."""
    return next((line for line in reversed(lines) if line.kind in kinds), None)


def is_held(folder: Path) -> bool:
    """Whether a process owns this run. False where its lock cannot be opened."""
    return is_locked(folder / "lock", fcntl.LOCK_SH)


def is_locked(path: Path, how: int) -> bool:
    """Whether another process's lock on the file or folder excludes `how` (LOCK_SH or LOCK_EX).
    False where it cannot be opened."""
    lock = -1
    try:
        lock = os.open(path, os.O_RDONLY)
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        if lock >= 0:
            os.close(lock)
    return False


def lock_run(folder: Path) -> IO[str]:
    """Take the run's lock, which is held until the returned file is closed or this process ends.
    Raises Fenced when another client has it."""
    lock = open(folder / "lock", "a+", opener=ours)  # noqa: SIM115 - its life is the lock's
    try:
        _locked(lock)
    except OSError as e:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise Fenced(
            f"{folder.name}: another milktea (process {holder}) is acting on this run",
            hint=f"`milktea logs -f {folder.name}` follows along without acting",
        ) from e
    with suppress(OSError):  # the process id is for people; a full disk may not take it
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), str(os.getpid()).encode())
    return lock


def _locked(lock: IO[str]) -> None:
    """Raises OSError where another process holds the lock for longer than `is_held` does."""
    for _ in range(LOCK_TRIES):
        with suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.02)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def runs(root: Path) -> list[Path]:
    """Folders under `root` that have a journal, sorted by name: by job, then by time."""
    return sorted(p.parent for p in root.glob(f"*/{FILE}"))


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
