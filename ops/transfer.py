"""Files to a box and back: resumed where they stopped, compared by sha256 end to end.

Many small files go as one tar stream; a big one by rsync over OpenSSH with AES-GCM where both ends have it, else as a stream over
fabric's connection. Each attempt asks the box what is already whole, so a cut link costs what was in flight and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ops.errors import BoxError, Lost, PreflightError

if TYPE_CHECKING:
    from ops.box import Box

Progress = Callable[[int, int], None]  # bytes done, bytes in all

SMALL = 1 << 20  # bytes; up to here a file is cheaper inside one tar stream than on its own
CHUNK = 4 << 20  # bytes; what a cut link may cost, and from twice that a file is worth rsync's own connection on its way home
_BLOCK = 1 << 16
_STILL_RENTED = "the box is still rented"


@dataclass(frozen=True)
class PushFile:
    """A local file, its place under the login's home, and the sha256 that it must have there."""

    local: Path
    remote: str
    sha256: str


@dataclass(frozen=True)
class Tools:
    """What the two ends offer: `sha256` is the box's fastest hash command, printing `HEX *NAME` for each file named to it."""

    rsync: bool
    sha256: str


def quoted(path: str) -> str:
    """`path` as one shell word. Raises ValueError unless it is relative, stays under the home, and is printable."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith(("/", "~", "-")) or ".." in parts or "\\" in path or not path.isprintable():
        raise ValueError(f"not a path under the login's home: {path!r}")
    return shlex.quote(path)


def probe(box: Box) -> Tools:
    """Ask both ends once. OpenSSL's sha256 is four times coreutils' where the CPU has SHA instructions."""
    script = """
rsync --version 2>/dev/null | head -n 1
if command -v openssl >/dev/null; then echo 'openssl dgst -sha256 -r'
else echo 'sha256sum -b'; fi"""
    lines = box.run(script).stdout.splitlines()
    theirs = lines[0] if len(lines) > 1 else ""
    return Tools(rsync=bool(shutil.which("ssh")) and _rsync_3(theirs) and _rsync_3(_our_rsync()), sha256=lines[-1])


def _our_rsync() -> str:
    if not shutil.which("rsync"):
        return ""
    return subprocess.run(["rsync", "--version"], capture_output=True, text=True, check=False).stdout


def _rsync_3(banner: str) -> bool:
    """3.1 brought --info=progress2; Apple's openrsync calls itself 2.6.9 and lacks it."""
    found = re.search(r"rsync\s+version\s+v?(\d+)\.(\d+)", banner)
    return found is not None and (int(found[1]), int(found[2])) >= (3, 1)


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
    """See Box.push."""
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
            (_push_rsync if box.tools.rsync else _push_stream)(box, big, survey, meter)
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
    names = [name for f in files for name in (f.remote, f.remote + ".part")]
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
    script = f"xargs -0 -r {box.tools.sha256} 2>/dev/null || true"
    rows = box.run(script, input="\0".join(names), timeout_s=3600).stdout.splitlines()
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


def _push_stream(box: Box, files: Sequence[PushFile], survey: _Survey, meter: _Meter) -> None:
    """Bytes at their offset over the open connection: like SFTP's writes, a late duplicate changes nothing; half its CPU time."""
    for f in files:
        have = min(survey.sizes.get(f.remote + ".part", 0), f.local.stat().st_size) // _BLOCK * _BLOCK
        meter.add(have)
        part = quoted(f.remote + ".part")
        with open(f.local, "rb") as source:
            source.seek(have)
            pieces = _counted(iter(partial(source.read, 1 << 18), b""), meter)
            done = box.stream(f"exec dd of={part} bs={_BLOCK} seek={have // _BLOCK} conv=notrunc", feed=pieces)
        if done.exit_code:
            raise BoxError(f"cannot write {f.remote} on the box: {done.stderr.strip()[-300:]}", money=_STILL_RENTED)


def _counted(pieces: Iterator[bytes], meter: _Meter) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        meter.add(len(piece))


def _push_rsync(box: Box, files: Sequence[PushFile], survey: _Survey, meter: _Meter) -> None:
    """One rsync a folder, so that a folder may be a link there: inside a tree, rsync replaces or refuses links."""
    for folder in sorted({str(PurePosixPath(f.remote).parent) for f in files}):
        here = [f for f in files if str(PurePosixPath(f.remote).parent) == folder]
        before = meter.done + sum(survey.sizes.get(f.remote + ".part", 0) for f in here)
        with tempfile.TemporaryDirectory(prefix="milktea-push-") as links:  # links give every file its name on the box
            names = [PurePosixPath(f.remote).name + ".part" for f in here]
            for f, name in zip(here, names, strict=True):
                Path(links, name).symlink_to(f.local.resolve())
            listed = "".join(f"{name}\n" for name in names)
            _rsync(box, ["--copy-links", "--files-from=-", f"{links}/", f"{_login(box)}:{folder}/"], listed, before, meter)


def _login(box: Box) -> str:
    assert box.endpoint is not None
    return f"{box.user}@[{box.endpoint.host}]" if ":" in box.endpoint.host else f"{box.user}@{box.endpoint.host}"


def _rsync(box: Box, arguments: list[str], stdin: str, before: int, meter: _Meter) -> None:
    """Run rsync; `--append` sends only what is missing, and the sha256 afterwards judges the whole. Raises Lost, BoxError."""
    rsh = shlex.join(["ssh", *box.ssh_options()])
    how = ["--protect-args", "--inplace", "--append", "--times", "--timeout=30", "--info=progress2", "--no-h"]
    command = ["rsync", "-e", rsh, *how, *arguments]
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=os.environ | {"LC_ALL": "C"}
        )
        assert child.stdin is not None and child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(stdin.encode())
                child.stdin.close()
            while text := os.read(child.stdout.fileno(), 4096):
                seen = re.findall(rb"(\d+)\s+\d+%", text)
                if seen:
                    meter.at(before + int(seen[-1]))
        finally:
            if child.poll() is None:
                child.terminate()
            code = child.wait()
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace").strip()[-500:]
    if code == 0:
        return
    if code in (3, 11, 23):  # file selection, file I/O, partial: the far disk or its rights, not the link
        raise BoxError(f"rsync: {said}", money=_STILL_RENTED)
    box.close()  # the same link carried it; the next call finds out who answers now
    raise Lost(f"rsync ended with {code}: {said}", money=_STILL_RENTED)


# -- pull -------------------------------------------------------------------------------------------------------------------


def pull(box: Box, remote: str, local: Path, sha256: str | None = None, progress: Progress | None = None) -> Path:
    """See Box.pull."""
    name, part = quoted(remote), local.with_name(local.name + ".part")
    meter = _Meter(1 << 62, progress)
    tries = 0

    def attempt() -> bool:
        nonlocal sha256, tries
        asked = box.run(f"stat -c %s {name}")
        if asked.exit_code:
            raise BoxError(f"the box has no {remote}", money=_STILL_RENTED)
        meter.total = size = int(asked.stdout)
        have = part.stat().st_size if part.exists() else 0
        if have > size:
            part.unlink()
            have = 0
        meter.at(have)
        if have < size or not part.exists():
            _refuse_full_disk_here(part, size - have)
            (_pull_rsync if box.tools.rsync and size - have > 2 * CHUNK else _pull_stream)(box, remote, part, have, size, meter)
        sha256 = sha256 or remote_sha256(box, [remote]).get(remote)
        if part.stat().st_size == size and sha256_of(part) == sha256:
            return True
        part.unlink()
        tries += 1
        if tries > 1:
            what = f"{remote} came home twice with another sha256 than {sha256}"
            raise BoxError(what, money=_STILL_RENTED, hint="the box is kept: look at the file there before it is destroyed")
        return False

    _keep_trying(box, meter, attempt)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, local)
    return local


def _refuse_full_disk_here(part: Path, need: int) -> None:
    part.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(part.parent).free
    if need > free:
        what = f"{part.parent} has {free / 2**30:.2f} GiB left, {part.stem} needs {need / 2**30:.2f} GiB"
        raise PreflightError(what, money=f"{_STILL_RENTED}, with the file on it", hint="make room, then `milktea resume RUN`")


def _pull_stream(box: Box, remote: str, part: Path, have: int, size: int, meter: _Meter) -> None:
    """From byte `have` to the end, over the open connection. Not SFTP: paramiko's prefetch thread dies loudly on a cut link."""
    with open(part, "ab") as target:

        def sink(data: bytes) -> None:
            target.write(data)
            meter.add(len(data))

        done = box.stream(f"exec tail -c +{have + 1} {quoted(remote)}", sink=sink)
    if done.exit_code:
        raise BoxError(f"cannot read {remote} on the box: {done.stderr.strip()[-300:]}", money=_STILL_RENTED)


def _pull_rsync(box: Box, remote: str, part: Path, have: int, size: int, meter: _Meter) -> None:
    box.reconnect()
    _rsync(box, [f"{_login(box)}:{remote}", str(part)], "", have, meter)
