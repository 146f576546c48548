"""Files to a box: small ones as one tar stream, a big one as a stream that goes on where its
`.part` ends."""

from __future__ import annotations

import os
import shlex
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

from ops.box.connection import Box, quoted
from ops.box.transfer import (
    PART,
    Progress,
    PushFile,
    TransferMeter,
    remote_sha256,
    retry,
    sha256_of,
    stream,
)
from ops.errors import BoxError, Unsuitable

SMALL = 1 << 20  # bytes; up to here a file is cheaper inside one tar stream than on its own
ROUNDS = 5  # attempts to send files that do not arrive
_BLOCK = 1 << 16
_PIECE = 1 << 18
# free blocks and their size, then `BYTES NAME` for each name on stdin that exists
_SIZES = """stat -f -c '%a %S' .
LC_ALL=C xargs -0 -r stat -c '%s %n' 2>/dev/null || true"""


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
    retry(box, job.meter, job.attempt)


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
        self.meter = TransferMeter(sum(self.sizes.values()), progress, box.patience_s)
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
                stream(self.box, "cannot unpack", "exec tar -xof -", Unsuitable, input=content)
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
            stream(self.box, "cannot rename", "exec sh -e", Unsuitable, input="\n".join(lines))

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
        """Writes bytes at their offset: a late duplicate of an earlier attempt changes nothing."""
        blocks = have // _BLOCK
        folder = shlex.quote(f"./{PurePosixPath(name).parent}")
        part = quoted(name + PART)
        script = f"mkdir -p {folder} && exec dd of={part} bs={_BLOCK} seek={blocks} conv=notrunc"
        self.meter.add(blocks * _BLOCK)
        with open(self.files[name].local, "rb", buffering=0) as file:
            file.seek(blocks * _BLOCK)
            pieces = iter(partial(file.read, _PIECE), b"")
            content = _metered(pieces, self.meter)
            stream(self.box, f"cannot write {name}", script, Unsuitable, input=content)


def _metered(pieces: Iterable[bytes], meter: TransferMeter) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        meter.add(len(piece))


def _tar(files: Iterable[PushFile], meter: TransferMeter) -> Iterator[bytes]:
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
