"""Layers in one canonical form: the only place that decides the bytes of what is carried.

Engines differ in how they spell the tar of a layer (order, time stamps of folders, owner names,
extended headers). Here the same files always give the same tar and, by the same zlib, the same gzip
blob.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

GZIP_LEVEL = 1  # 3 times as fast as 6 and 8 % larger on the disk that is carried
KEPT_XATTRS = (
    "SCHILY.xattr.security.capability"  # what Debian gives files; the engine's own marks stay out
)


@dataclass(frozen=True)
class Blob:
    """A written layer. ``diff_id`` is ``sha256:HEX`` of the tar and ``size_bytes`` its size;
    ``sha256`` (hex) and ``blob_bytes`` are of the gzip file."""

    diff_id: str
    size_bytes: int
    sha256: str
    blob_bytes: int


class _Hashed:
    """A file opened for writing that counts and hashes what passes."""

    def __init__(self, out: BinaryIO) -> None:
        self.out, self.hash, self.size = out, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.out.write(data)
        self.hash.update(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.out.flush()


def canonical(member: tarfile.TarInfo, epoch: int) -> tarfile.TarInfo:
    """The same entry with one time, permission bits alone, owners by number alone."""
    made = tarfile.TarInfo(member.name.removeprefix("./").strip("/"))
    made.type, made.linkname, made.size = member.type, member.linkname, member.size
    made.mode, made.uid, made.gid, made.mtime = member.mode & 0o7777, member.uid, member.gid, epoch
    made.devmajor, made.devminor = member.devmajor, member.devminor
    made.pax_headers = {
        key: value for key, value in member.pax_headers.items() if key == KEPT_XATTRS
    }
    return made


def write_layer(raw: BinaryIO, epoch: int, folder: Path) -> Blob:
    """Write the canonical gzip blob of a layer's tar (``raw``, seekable) into ``folder``, named by
    its sha256 (hex).

    Raises tarfile.TarError where ``raw`` is not a tar.
    """
    part = folder / f"layer.{os.getpid()}.part"
    try:
        with part.open("wb") as file:
            blob = _Hashed(file)
            with gzip.GzipFile("", "wb", GZIP_LEVEL, blob, mtime=0) as packer:
                tar = _Hashed(packer)  # type: ignore[arg-type]
                _copy_entries(raw, epoch, tar)
        written = Blob("sha256:" + tar.hash.hexdigest(), tar.size, blob.hash.hexdigest(), blob.size)
        os.replace(part, folder / written.sha256)
    finally:
        part.unlink(missing_ok=True)
    return written


def _copy_entries(raw: BinaryIO, epoch: int, out: _Hashed) -> None:
    with (
        tarfile.open(fileobj=raw, mode="r:*") as source,
        tarfile.open(  # type: ignore[call-overload]
            fileobj=out, mode="w", format=tarfile.PAX_FORMAT, copybufsize=1 << 20
        ) as target,
    ):
        # folder before content, siblings by name: a hard link comes after its file, as in the
        # engine's own order
        for member in sorted(
            source.getmembers(), key=lambda member: member.name.removeprefix("./").split("/")
        ):
            made = canonical(member, epoch)
            # of Debian's device nodes some engines make empty files; every container gets its own
            if made.name in ("", ".") or made.name.startswith("dev/"):
                continue
            target.addfile(made, source.extractfile(member) if member.isreg() else None)
