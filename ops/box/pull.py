"""A file from a box: it goes on where it stopped, and is compared by sha256.

A box's word is no limit: a pull takes at most what its caller allows, and leaves a reserve on this
disk."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ops.box.connection import Box, quoted
from ops.box.transfer import (
    MIN_BYTES_S,
    PART,
    Progress,
    TransferMeter,
    remote_sha256,
    retry,
    stream,
)
from ops.errors import BoxError, Lost, PreflightError

KEPT = "the box is still rented, with the file on it"
MAKE_ROOM = "make room, then `milktea resume RUN`"
RESERVE_BYTES, RESERVE_SHARE = 256 << 20, 0.02  # of this disk, whichever is less, is left free


def pull(
    box: Box,
    remote: str,
    local: Path,
    sha256: str | None = None,
    progress: Progress | None = None,
    *,
    max_bytes: int,
) -> Path:
    """Fetch one file of at most `max_bytes` to `local`.part, compare its sha256, rename it to
    `local`; returns `local`.

    `sha256` is by default what the box computes. Goes on where an earlier call stopped; no more is
    taken than the box said it has. Raises Lost after the box's `patience_s` with less than
    MIN_BYTES_S, BoxError when missing, too large or wrong twice (nothing of it stays here),
    PreflightError when this disk is full."""
    local.parent.mkdir(parents=True, exist_ok=True)
    with _Part(local.with_name(local.name + PART)) as part:
        pulled = _Pull(box, remote, part, TransferMeter(0, progress, box.patience_s))
        try:
            retry(box, pulled.meter, lambda: pulled.attempt(sha256, max_bytes))
            part.sync()
        except BoxError as e:
            if not isinstance(e, Lost):
                part.truncate()
            raise
        except OSError as e:  # of this disk: what breaks on the way is Lost
            raise PreflightError(
                f"{local} cannot be written: {e}", money=KEPT, hint=MAKE_ROOM
            ) from e
        os.replace(part.path, local)
    return local


@dataclass
class _Pull:
    """One pull."""

    box: Box
    remote: str
    part: _Part
    meter: TransferMeter

    def attempt(self, sha256: str | None, max_bytes: int) -> None:
        """Raises Lost, and what `pull` raises."""
        box, remote, part, name = self.box, self.remote, self.part, quoted(self.remote)
        for _ in range(2):
            self.meter.total = size = self._size(max_bytes)
            if part.size > size:
                part.truncate()
            self.meter.at(part.size)
            if part.size < size:
                _validate_space_here(part.path, size - part.size)
                script = f"exec tail -c +{part.size + 1} {name}"
                stream(box, f"cannot read {remote}", script, receive=self._receive)
            expected = sha256 or remote_sha256(box, [remote], size).get(remote)
            if part.size == size and part.sha256 == expected:
                return
            part.truncate()
        raise BoxError(
            f"{remote} came home twice with another sha256 than {expected}",
            hint="the box is kept: look at the file there before it is destroyed",
        )

    def _size(self, max_bytes: int) -> int:
        asked = self.box.run(f"stat -c %s {quoted(self.remote)}")
        if asked.exit_code:
            raise BoxError(f"the box has no {self.remote}")
        size = asked.stdout.strip()
        if not re.fullmatch(r"[0-9]{1,18}", size):
            raise BoxError(f"the box says that {self.remote} has {size[:40]!r} bytes")
        if int(size) > max_bytes:
            raise BoxError(
                f"{self.remote} has {int(size):,} bytes, and this job can have made no more than "
                f"{max_bytes:,}: it is left there"
            )
        return int(size)

    def _receive(self, data: bytes) -> None:
        if self.part.size + len(data) > self.meter.total:
            raise BoxError(f"{self.remote} goes on after its {self.meter.total:,} bytes")
        self.part.write(data)
        self.meter.add(len(data))
        if self.meter.stands_still:
            raise Lost(f"{self.remote} comes slower than {MIN_BYTES_S >> 10} KiB a second")


class _Part:
    """A file on its way home, hashed as it grows; begins with what an earlier call left of it."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self._digest = path, 0, hashlib.sha256()
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._file.seek(0)
        while data := self._file.read(1 << 20):
            self._count(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self.size == 0:
            self.path.unlink(missing_ok=True)

    def _count(self, data: bytes) -> None:
        self._digest.update(data)
        self.size += len(data)

    def write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]
        self._count(data)

    def truncate(self) -> None:
        self._file.truncate(0)
        self.size, self._digest = 0, hashlib.sha256()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def reserve_bytes(folder: Path) -> int:
    """What a pull leaves free of this disk: other programs run on it, and so does the journal."""
    return min(RESERVE_BYTES, int(RESERVE_SHARE * shutil.disk_usage(folder).total))


def _validate_space_here(local: Path, need: int) -> None:
    free, reserve = shutil.disk_usage(local.parent).free, reserve_bytes(local.parent)
    if need > free - reserve:
        raise PreflightError(
            f"{local.parent} has {free / 1e6:,.1f} MB left, "
            f"{local.name.removesuffix(PART)} needs {need / 1e6:,.1f} MB, and "
            f"{reserve / 1e6:,.1f} MB are kept free",
            money=KEPT,
            hint=MAKE_ROOM,
        )
