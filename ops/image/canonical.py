"""Comparing images of different builders: the same files, spelled the same way.

Builders differ in how they write a tar, not in what is in it. The canonical form of a layer: entries sorted by path, ``./``
and trailing slashes dropped, directories left out (each builder lists others of them), owner as numbers, mode & 07777, time
set to the epoch, no extended attributes, GNU headers. Two layers whose canonical DiffIDs are equal hold the same files.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ops.image.layers import BLOCK


@dataclass(frozen=True)
class File:
    """``content`` is the sha256 (hex) of a regular file, the target of a link."""

    kind: str
    mode: int
    owner: tuple[int, int]
    size: int
    content: str


def files(layer: Path) -> dict[str, File]:
    """Every entry of a layer (tar, gzipped or not) but its directories."""
    return {path: file for path, file in _entries(layer)}


def diff_id(layer: Path, epoch: int) -> str:
    """``sha256:HEX`` of the layer in canonical form. Reads it twice; holds no file in memory."""
    hasher = hashlib.sha256()
    with tarfile.open(layer) as tar:
        for info in sorted((info for info in tar if not info.isdir()), key=lambda info: _path(info)):
            plain = tarfile.TarInfo(_path(info))
            plain.mode, plain.uid, plain.gid, plain.mtime = info.mode & 0o7777, info.uid, info.gid, epoch
            plain.type = tarfile.REGTYPE if info.isreg() else info.type
            plain.size, plain.linkname = (info.size if info.isreg() else 0), info.linkname
            if info.islnk():
                plain.linkname = _clean(info.linkname)
            hasher.update(plain.tobuf(tarfile.GNU_FORMAT))
            if info.isreg():
                for chunk in _content(tar, info):
                    hasher.update(chunk)
                hasher.update(b"\0" * (-info.size % BLOCK))
    return "sha256:" + hasher.hexdigest()


def differences(one: Path, other: Path) -> list[str]:
    """One sentence for each file that is not the same in both layers."""
    left, right = files(one), files(other)
    found = [f"{path} is only in the first" for path in sorted(left.keys() - right.keys())]
    found += [f"{path} is only in the second" for path in sorted(right.keys() - left.keys())]
    return found + [f"{path}: {left[path]} and {right[path]}" for path in sorted(left.keys() & right.keys()) if left[path] != right[path]]


def saved_layers(archive: Path, folder: Path) -> tuple[dict, list[Path]]:
    """The config and the layers, lowest first, of what `docker save` wrote, taken out into ``folder``."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    [image] = json.loads((folder / "manifest.json").read_text())
    return json.loads((folder / image["Config"]).read_text()), [folder / path for path in image["Layers"]]


def _entries(layer: Path) -> Iterator[tuple[str, File]]:
    with tarfile.open(layer) as tar:
        for info in tar:
            if info.isdir():
                continue
            content = info.linkname
            if info.isreg():
                hasher = hashlib.sha256()
                for chunk in _content(tar, info):
                    hasher.update(chunk)
                content = hasher.hexdigest()
            kind = "file" if info.isreg() else "link" if info.islnk() or info.issym() else "other"
            yield _path(info), File(kind, info.mode & 0o7777, (info.uid, info.gid), info.size, content)


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Iterator[bytes]:
    source = tar.extractfile(info)
    assert source is not None
    while chunk := source.read(1 << 20):
        yield chunk


def _path(info: tarfile.TarInfo) -> str:
    return _clean(info.name)


def _clean(path: str) -> str:
    return path.removeprefix("./").strip("/")
