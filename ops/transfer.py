"""Files to a box and back: resumed where they stopped, compared by sha256 end to end.

Many small files go as one tar stream over fabric's connection, a big one as a stream from where its part ends: through OpenSSH's
client with AES-GCM where this machine has it, else over fabric's. Not rsync: it hashes every byte once more, in one thread with its
copying, and was a third slower. Each attempt asks the box what is already whole, so a cut link costs what was in flight and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Self

from ops import openssh
from ops.box import Box, quoted
from ops.errors import BoxError, Lost, PreflightError

Progress = Callable[[int, int], None]  # bytes done, bytes in all

SMALL = 1 << 20  # bytes; up to here a file is cheaper inside one tar stream than on its own
CHUNK = 4 << 20  # bytes; what a cut link may cost
BULK = 8 << 20  # bytes; from here on a file is worth a connection of its own
_BLOCK = 1 << 16
# OpenSSL's is four times coreutils' where the CPU has SHA instructions. Both print `HEX *NAME` for each name on stdin.
_SHA256 = """
if command -v openssl >/dev/null; then xargs -0 -r openssl dgst -sha256 -r 2>/dev/null
else xargs -0 -r sha256sum -b 2>/dev/null
fi || true"""
_STILL_RENTED = "the box is still rented"


@dataclass(frozen=True)
class PushFile:
    """A local file, its place under the login's home, and the sha256 that it must have there."""

    local: Path
    remote: str
    sha256: str


def _by_openssh(size_bytes: int) -> bool:
    """Whether a file is worth a connection of OpenSSH's client, and this machine has one."""
    return size_bytes >= BULK and shutil.which("ssh") is not None


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Meter:
    """Bytes done, as the user sees them, and how long ago the last new one came."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress, self.done, self.best, self.moved = total, progress, 0, -1, time.monotonic()

    def at(self, done: int) -> None:
        self.done = min(done, self.total)
        if self.done > self.best:
            self.best, self.moved = self.done, time.monotonic()
        if self.progress:
            self.progress(self.done, self.total)

    def add(self, count: int) -> None:
        self.at(self.done + count)


def _keep_trying(box: Box, meter: _Meter, attempt: Callable[[], bool]) -> None:
    """`attempt` until it returns True. Lost is survived as long as new bytes come within the box's patience."""
    while True:
        try:
            if attempt():
                return
        except Lost:
            if time.monotonic() - meter.moved > box.patience_s:
                raise
            time.sleep(min(box.retry_s, 1.0))


# -- push -------------------------------------------------------------------------------------------------------------------


def push(box: Box, files: Sequence[PushFile], progress: Progress | None = None) -> None:
    """Send files to the box; returns when the sha256 of each, computed there, equals ours. Files already whole are not sent again, a big
    one goes on where it stopped. Raises Lost after the box's `patience_s` without a new byte, BoxError with the names."""
    sizes = {f.remote: f.local.stat().st_size for f in files}
    if len(sizes) != len(files):
        raise ValueError("two files go to the same place on the box")
    for name in sizes:
        quoted(name)
    meter = _Meter(sum(sizes.values()), progress)
    sent: set[str] = set()
    wrong: dict[str, int] = {}  # how often each was sent and arrived different

    def attempt() -> bool:
        survey = _survey(box, files, sizes)
        _settle(box, survey)
        _refuse_wrong_twice(files, survey, sent, wrong)
        left = [f for f in files if f.remote not in survey.whole]
        meter.at(sum(sizes[name] for name in survey.whole))
        if not left:
            return True
        _refuse_full_disk(survey, sizes, left)
        sent.update(f.remote for f in left)
        small = [f for f in left if sizes[f.remote] <= SMALL]
        if small:
            _push_tar(box, small, meter)
        big = [f for f in left if sizes[f.remote] > SMALL]
        if big:
            _mkdirs(box, big)  # tar makes its own
            _push_big(box, big, survey, meter)
        return False  # the next survey compares what arrived

    _keep_trying(box, meter, attempt)


@dataclass
class _Survey:
    """What the box has: sizes of names and of their `.part`; names that are whole, or whose part is; names and parts of the right
    size and the wrong content; parts longer than their file."""

    sizes: dict[str, int]
    whole: set[str]
    parts_whole: set[str]
    wrong: set[str]
    too_long: set[str]
    free_bytes: int


def _survey(box: Box, files: Sequence[PushFile], sizes: dict[str, int]) -> _Survey:
    names = [name for f in files for name in ((f.remote, f.remote + ".part") if sizes[f.remote] > SMALL else (f.remote,))]
    script = "df -Pk . | tail -n 1\nLC_ALL=C xargs -0 -r stat -c '%s %n' 2>/dev/null || true"
    first, *rows = box.run(script, input="\0".join(names), timeout_s=120).stdout.splitlines()
    there = {name: int(size) for size, name in (row.split(" ", 1) for row in rows)}
    free = re.search(r"\s(\d+)\s+\d+%\s", first)
    candidates = [n for n in names if there.get(n) == sizes[n.removesuffix(".part") if n not in sizes else n]]
    hashes = remote_sha256(box, candidates)
    ours = {f.remote: f.sha256 for f in files}
    whole = {n for n in candidates if n in ours and hashes.get(n) == ours[n]}
    parts = {n for n in ours if n not in whole and n + ".part" in hashes and hashes[n + ".part"] == ours[n]}
    wrong = {n for n in candidates if n not in whole and n.removesuffix(".part") not in parts | whole}
    too_long = {n + ".part" for n in ours if there.get(n + ".part", 0) > sizes[n]}
    return _Survey(there, whole, parts, wrong, too_long, int(free[1]) * 1024 if free else 1 << 62)


def remote_sha256(box: Box, names: Sequence[str]) -> dict[str, str]:
    """sha256 of files on the box by name; a name that cannot be read is left out."""
    if not names:
        return {}
    rows = box.run(_SHA256, input="\0".join(names), timeout_s=3600).stdout.splitlines()
    return {row[66:]: row[:64] for row in rows if re.match(r"[0-9a-f]{64} \*", row)}


def _settle(box: Box, survey: _Survey) -> None:
    """Rename parts that are whole, remove what has the right size and the wrong content."""
    lines = [f"mv -f {quoted(name + '.part')} {quoted(name)}" for name in sorted(survey.parts_whole)]
    lines += [f"rm -f {quoted(name)}" for name in sorted(survey.wrong | survey.too_long)]
    if lines:
        done = box.run("exec sh -e", input="\n".join(lines), timeout_s=120)
        if done.exit_code:
            raise BoxError(f"the box cannot rename what was pushed: {done.stderr.strip()}", money=_STILL_RENTED)
    survey.whole |= survey.parts_whole
    for name in survey.wrong | survey.too_long:
        survey.sizes.pop(name, None)


def _refuse_wrong_twice(files: Sequence[PushFile], survey: _Survey, sent: set[str], wrong: dict[str, int]) -> None:
    """A link that flips a bit deserves a second chance; a file that changes under our hands does not."""
    for name in {name.removesuffix(".part") for name in survey.wrong} & sent:
        wrong[name] = wrong.get(name, 0) + 1
    changed = [f.remote for f in files if f.remote in wrong and sha256_of(f.local) != f.sha256]
    twice = sorted(name for name, times in wrong.items() if times > 1)
    if changed or twice:
        why = "changed on this disk after it was hashed" if changed else "arrived twice with another sha256"
        names = ", ".join((changed or twice)[:10])
        raise BoxError(f"{names}: {why}", money=_STILL_RENTED, hint="run it again: what is whole is not sent twice")


def _refuse_full_disk(survey: _Survey, sizes: dict[str, int], left: Sequence[PushFile]) -> None:
    need = sum(sizes[f.remote] - survey.sizes.get(f.remote + ".part", 0) for f in left)
    if need > survey.free_bytes:
        what = f"the box has {survey.free_bytes / 2**30:.2f} GiB of disk left, the files need {need / 2**30:.2f} GiB"
        raise BoxError(what, money=_STILL_RENTED, hint="raise the disk in [offer] of the job file")


def _mkdirs(box: Box, files: Sequence[PushFile]) -> None:
    folders = sorted({str(PurePosixPath(f.remote).parent) for f in files} - {"."})
    done = box.run("xargs -0 -r mkdir -p", input="\0".join(folders))
    if done.exit_code:
        raise BoxError(f"the box cannot make the folders: {done.stderr.strip()}", money=_STILL_RENTED)


def _push_tar(box: Box, files: Sequence[PushFile], meter: _Meter) -> None:
    done = box.stream("exec tar -xof -", feed=_tar(files, meter))
    if done.exit_code:
        raise BoxError(f"tar on the box: {done.stderr.strip()[-500:]}", money=_STILL_RENTED)


def _tar(files: Sequence[PushFile], meter: _Meter) -> Iterator[bytes]:
    """A tar stream of about 256 KiB pieces; names and contents only, since owners mean nothing there."""
    piece = bytearray()
    for f in files:
        data = f.local.read_bytes()
        info = tarfile.TarInfo(f.remote)
        info.size, info.mtime = len(data), int(f.local.stat().st_mtime)
        info.mode = 0o755 if os.access(f.local, os.X_OK) else 0o644
        piece += info.tobuf(tarfile.GNU_FORMAT, "utf-8") + data + bytes(-len(data) % 512)
        if len(piece) >= 1 << 18:
            yield bytes(piece)
            piece.clear()
        meter.add(len(data))
    yield bytes(piece) + bytes(1024)


def _push_big(box: Box, files: Sequence[PushFile], survey: _Survey, meter: _Meter) -> None:
    """Bytes at their offset: like SFTP's writes, a late duplicate changes nothing; half its CPU time."""
    for f in files:
        size = f.local.stat().st_size
        have = min(survey.sizes.get(f.remote + ".part", 0), size) // _BLOCK * _BLOCK
        before = meter.done
        script = f"exec dd of={quoted(f.remote + '.part')} bs={_BLOCK} seek={have // _BLOCK} conv=notrunc"
        with open(f.local, "rb", buffering=0) as source:
            source.seek(have)
            if _by_openssh(size - have):
                openssh.pour(box, script, source, moved=partial(_moved, meter, before))
            else:
                meter.add(have)
                done = box.stream(script, feed=_counted(iter(partial(source.read, 1 << 18), b""), meter))
                if done.exit_code:
                    raise BoxError(f"cannot write {f.remote} on the box: {done.stderr.strip()[-300:]}", money=_STILL_RENTED)
        meter.at(before + size)


def _moved(meter: _Meter, before: int, position: int) -> None:
    meter.at(before + position)


def _counted(pieces: Iterator[bytes], meter: _Meter) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        meter.add(len(piece))


# -- pull -------------------------------------------------------------------------------------------------------------------


def pull(box: Box, remote: str, local: Path, sha256: str | None = None, progress: Progress | None = None) -> Path:
    """Fetch one file to `local`.part, compare its sha256 with `sha256` (default: what the box computes), rename. Goes on where an earlier
    call stopped. Raises Lost after the box's `patience_s` without a new byte, BoxError when missing or wrong twice."""
    name = quoted(remote)
    meter = _Meter(1 << 62, progress)
    tries = 0
    local.parent.mkdir(parents=True, exist_ok=True)
    with _Part(local.with_name(local.name + ".part"), meter) as part:

        def attempt() -> bool:
            nonlocal sha256, tries
            asked = box.run(f"stat -c %s {name}")
            if asked.exit_code:
                raise BoxError(f"the box has no {remote}", money=_STILL_RENTED)
            meter.total = size = int(asked.stdout)
            if part.size > size:
                part.empty()
            meter.at(part.size)
            if part.size < size:
                _refuse_full_disk_here(part.path, size - part.size)
                _pull_rest(box, remote, part, size)
            sha256 = sha256 or remote_sha256(box, [remote]).get(remote)
            if part.size == size and part.sha256 == sha256:
                return True
            part.empty()
            tries += 1
            if tries > 1:
                part.path.unlink()
                what = f"{remote} came home twice with another sha256 than {sha256}"
                raise BoxError(what, money=_STILL_RENTED, hint="the box is kept: look at the file there before it is destroyed")
            return False

        _keep_trying(box, meter, attempt)
        part.sync()
        os.replace(part.path, local)
    return local


class _Part:
    """A file on its way home, hashed as it grows, beginning with what an earlier call left of it."""

    def __init__(self, path: Path, meter: _Meter) -> None:
        self.path, self.meter, self.size, self._digest = path, meter, 0, hashlib.sha256()
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

    def take(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]
        self._count(data)
        self.meter.add(len(data))

    def empty(self) -> None:
        self._file.truncate(0)
        self.size, self._digest = 0, hashlib.sha256()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def _refuse_full_disk_here(part: Path, need: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if need > free:
        what = f"{part.parent} has {free / 2**30:.2f} GiB left, {part.stem} needs {need / 2**30:.2f} GiB"
        raise PreflightError(what, money=f"{_STILL_RENTED}, with the file on it", hint="make room, then `milktea resume RUN`")


def _pull_rest(box: Box, remote: str, part: _Part, size: int) -> None:
    """From where the part ends. Not SFTP: paramiko's prefetch thread dies loudly on a cut link."""
    script = f"exec tail -c +{part.size + 1} {quoted(remote)}"
    if _by_openssh(size - part.size):
        openssh.draw(box, script, part.take)
        return
    done = box.stream(script, sink=part.take)
    if done.exit_code:
        raise BoxError(f"cannot read {remote} on the box: {done.stderr.strip()[-300:]}", money=_STILL_RENTED)
