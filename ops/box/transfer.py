"""Files to a box and back: resumed where they stopped, compared by sha256 end to end.

Small files go as one tar stream, a big one as a stream that goes on where its `.part` ends. Each
attempt asks the box first what is whole there, so a cut link costs what was in flight.

A box's word is no limit: a pull takes at most what its caller allows, and leaves a reserve on this
disk; what moves slower than MIN_BYTES_S stands still.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Self

from ops.box.connection import Box, quoted
from ops.errors import BoxError, Lost, PreflightError, Unsuitable
from ops.wait import until

Progress = Callable[[int, int], None]  # bytes done, bytes in all

SMALL = 1 << 20  # bytes; up to here a file is cheaper inside one tar stream than on its own
PART = ".part"
MIN_BYTES_S = 8 << 10  # less, over a box's patience, is no transfer
HASH_BYTES_S = 20e6  # of a slow box
KEPT = "the box is still rented, with the file on it"
MAKE_ROOM = "make room, then `milktea resume RUN`"
ROUNDS = 5  # in which files are sent that do not arrive
RESERVE_BYTES, RESERVE_SHARE = 256 << 20, 0.02  # of this disk, whichever is less, is left free
_BLOCK = 1 << 16
_PIECE = 1 << 18
# OpenSSL's is four times coreutils' where the CPU has SHA instructions. Both print `HEX *NAME`
# for each name on stdin.
_SHA256 = """
if command -v openssl >/dev/null; then xargs -0 -r openssl dgst -sha256 -r 2>/dev/null
else xargs -0 -r sha256sum -b 2>/dev/null
fi || true"""
# free blocks and their size, then `BYTES NAME` for each name on stdin that exists
_SIZES = """stat -f -c '%a %S' .
LC_ALL=C xargs -0 -r stat -c '%s %n' 2>/dev/null || true"""


@dataclass(frozen=True)
class PushFile:
    """A local file, its place under the login's home, and the sha256 that it must have there."""

    local: Path
    remote: str
    sha256: str


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remote_sha256(box: Box, names: Sequence[str], size_bytes: int = 0) -> dict[str, str]:
    """sha256 of files on the box by name; a name that cannot be read is left out. Raises Lost when
    `size_bytes` take longer than a slow box needs."""
    if not names:
        return {}
    timeout_s = 60 + size_bytes / HASH_BYTES_S
    rows = box.run(_SHA256, input="\0".join(names), timeout_s=timeout_s).stdout.splitlines()
    return {row[66:]: row[:64] for row in rows if re.match(r"[0-9a-f]{64} \*", row)}


class _Meter:
    """Bytes done of `total`, as the user sees them, and when enough new ones last came."""

    def __init__(self, total: int, progress: Progress | None, patience_s: float) -> None:
        self.total, self.progress, self.patience_s = total, progress, patience_s
        self.done = self.due = 0  # bytes done; bytes at which something has moved
        self.moved = time.monotonic()

    def at(self, done: int) -> None:
        self.done = min(done, self.total)
        if self.done >= self.due:
            self.moved = time.monotonic()
            self.due = self.done + max(1, int(MIN_BYTES_S * self.patience_s))
        if self.progress:
            self.progress(self.done, self.total)

    @property
    def stands_still(self) -> bool:
        return time.monotonic() - self.moved > self.patience_s

    def add(self, count: int) -> None:
        self.at(self.done + count)


def _retry(box: Box, meter: _Meter, attempt: Callable[[], None]) -> None:
    """`attempt` over links that break, as long as enough new bytes come within the box's
    patience."""

    def once() -> bool | None:
        try:
            attempt()
        except Lost:
            if meter.stands_still:
                raise
            return None
        return True

    until(once, every_s=min(box.retry_s, 1.0))


def _stream(box: Box, what: str, script: str, error: type[BoxError] = BoxError, **how: Any) -> None:
    done = box.stream(script, **how)
    if done.exit_code:
        raise error(f"{what} on the box: {done.stderr.strip()[-500:]}")


# -- push ------------------------------------------------------------------------------------------


def push(box: Box, files: Sequence[PushFile], progress: Progress | None = None) -> None:
    """Send files to the box; returns when the sha256 of each, computed there, equals ours.

    Files already whole are not sent again, a big one goes on where it stopped. Raises Lost after
    the box's `patience_s` with less than MIN_BYTES_S, Unsuitable where its disk takes no files,
    BoxError with the names of files that changed here, arrived twice with other content, or do not
    stay there."""
    if len({f.remote for f in files}) != len(files):
        raise ValueError("two files go to the same place on the box")
    for f in files:
        quoted(f.remote)
    job = _Push(box, files, progress)
    _retry(box, job.meter, job.attempt)


@dataclass
class _RemoteFiles:
    """Files that the box has whole, those that had wrong content, bytes of each part, disk left."""

    complete: set[str]
    wrong: set[str]
    parts: dict[str, int]
    free_bytes: int


class _Push:
    """One push. Its files are named by their place on the box."""

    def __init__(self, box: Box, files: Sequence[PushFile], progress: Progress | None) -> None:
        self.box, self.files = box, {f.remote: f for f in files}
        self.sizes = {f.remote: f.local.stat().st_size for f in files}
        self.part_of = {name + PART: name for name in self.files if self.sizes[name] > SMALL}
        self.meter = _Meter(sum(self.sizes.values()), progress, box.patience_s)
        self.sent: set[str] = set()
        self.arrived_wrong: Counter[str] = Counter()

    def attempt(self) -> None:
        """Send what is not whole and look at what arrived, until all is. Raises Lost."""
        for _ in range(ROUNDS):
            remote = self._inspect()
            self._validate_content(remote.wrong & self.sent)
            self.meter.at(sum(self.sizes[name] for name in remote.complete))
            missing = [name for name in self.files if name not in remote.complete]
            if not missing:
                return
            self._validate_space(remote, missing)
            self.sent.update(missing)
            small = [self.files[name] for name in missing if self.sizes[name] <= SMALL]
            if small:
                content = _tar(small, self.meter)
                _stream(self.box, "cannot unpack", "exec tar -xof -", Unsuitable, input=content)
            for name in missing:
                if self.sizes[name] > SMALL:
                    self._send_rest(name, remote.parts.get(name, 0))
        raise BoxError(
            f"{', '.join(missing[:10])}: sent {ROUNDS} times and not there: the box keeps no files"
        )

    def _inspect(self) -> _RemoteFiles:
        """What the box has, after `_finalise_parts`."""
        owner = {name: name for name in self.files} | self.part_of
        answer = self.box.run(_SIZES, input="\0".join(owner), timeout_s=120).stdout.splitlines()
        try:
            free_blocks, block_bytes = map(int, answer[0].split())
            rows = (row.partition(" ") for row in answer[1:])
            there = {name: int(size) for size, _, name in rows if name in owner}
        except (ValueError, IndexError) as e:
            raise BoxError(f"the box does not say what it holds: {answer[:2]!r:.200}") from e
        full = [name for name in there if there[name] == self.sizes[owner[name]]]
        hashes = remote_sha256(self.box, full, sum(there[name] for name in full))
        right = {name for name in full if hashes.get(name) == self.files[owner[name]].sha256}
        wrong = {n for n in there if n not in right and there[n] >= self.sizes[owner[n]]}
        self._finalise_parts(right, wrong)
        complete = {owner[name] for name in right}
        return _RemoteFiles(
            complete,
            {owner[name] for name in wrong} - complete,
            {self.part_of[n]: there[n] for n in there if n in self.part_of and n not in wrong},
            free_blocks * block_bytes,
        )

    def _finalise_parts(self, right: set[str], wrong: set[str]) -> None:
        """Remove wrong content, give parts that are whole their file's name."""
        lines = [f"rm -f {quoted(name)}" for name in sorted(wrong)]
        for name in sorted(right & self.part_of.keys()):
            lines.append(f"mv -f {quoted(name)} {quoted(self.part_of[name])}")
        if lines:
            _stream(self.box, "cannot rename", "exec sh -e", Unsuitable, input="\n".join(lines))

    def _validate_content(self, wrong: set[str]) -> None:
        """A link that flips a bit gets a second try; a file that changed here does not."""
        self.arrived_wrong.update(wrong)
        changed = [n for n in wrong if sha256_of(self.files[n].local) != self.files[n].sha256]
        twice = [name for name in wrong if self.arrived_wrong[name] > 1]
        if changed or twice:
            why = "changed on this disk after it was hashed"
            raise BoxError(
                f"{', '.join(sorted(changed or twice)[:10])}: "
                f"{why if changed else 'arrived twice with another sha256'}",
                hint="run it again: what is whole is not sent twice",
            )

    def _validate_space(self, remote: _RemoteFiles, missing: Iterable[str]) -> None:
        need = sum(self.sizes[name] - remote.parts.get(name, 0) for name in missing)
        if need > remote.free_bytes:
            raise BoxError(
                f"the box has {remote.free_bytes / 2**30:.2f} GiB of disk left, "
                f"the files need {need / 2**30:.2f} GiB",
                hint="raise the disk in [offer] of the job file",
            )

    def _send_rest(self, name: str, have: int) -> None:
        """Bytes at their offset: a late duplicate of an earlier attempt changes nothing."""
        blocks = have // _BLOCK
        folder = shlex.quote(f"./{PurePosixPath(name).parent}")
        part = quoted(name + PART)
        script = f"mkdir -p {folder} && exec dd of={part} bs={_BLOCK} seek={blocks} conv=notrunc"
        self.meter.add(blocks * _BLOCK)
        with open(self.files[name].local, "rb", buffering=0) as file:
            file.seek(blocks * _BLOCK)
            pieces = iter(partial(file.read, _PIECE), b"")
            content = _metered(pieces, self.meter)
            _stream(self.box, f"cannot write {name}", script, Unsuitable, input=content)


def _metered(pieces: Iterable[bytes], meter: _Meter) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        meter.add(len(piece))


def _tar(files: Iterable[PushFile], meter: _Meter) -> Iterator[bytes]:
    """A tar stream of pieces; names and contents only, since owners mean nothing there."""
    piece = bytearray()
    for f in files:
        data = f.local.read_bytes()
        info = tarfile.TarInfo(f.remote)
        info.size, info.mtime = len(data), int(f.local.stat().st_mtime)
        info.mode = 0o755 if os.access(f.local, os.X_OK) else 0o644
        piece += info.tobuf(tarfile.GNU_FORMAT, "utf-8") + data + bytes(-len(data) % 512)
        if len(piece) >= _PIECE:
            yield bytes(piece)
            piece.clear()
        meter.add(len(data))
    yield bytes(piece) + bytes(1024)


# -- pull ------------------------------------------------------------------------------------------


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
        pulled = _Pull(box, remote, part, _Meter(0, progress, box.patience_s))
        try:
            _retry(box, pulled.meter, lambda: pulled.attempt(sha256, max_bytes))
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
    meter: _Meter

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
                _stream(box, f"cannot read {remote}", script, receive=self._receive)
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
            f"{local.parent} has {free / 2**30:.2f} GiB left, "
            f"{local.name.removesuffix(PART)} needs {need / 2**30:.2f} GiB, and "
            f"{reserve / 2**30:.2f} GiB are kept free",
            money=KEPT,
            hint=MAKE_ROOM,
        )
