"""Comparing images of different builders: the same files, spelled the same way.

Builders differ in how they write a tar, not in what is in it. The canonical form of a layer is a line for each file: path
without ``./``, kind, mode & 07777, owner as numbers, size, sha256 of the content or target of the link; sorted. Times and
extended attributes are left out, and so are directories, of which each builder lists others. Equal digests: the same files.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


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


def digest(layer: Path) -> str:
    """``sha256:HEX`` of the layer in canonical form: of its sorted lines, one a file. One pass, no file in memory."""
    lines = sorted(f"{path}\0{x.kind} {x.mode:o} {x.owner[0]}:{x.owner[1]} {x.size} {x.content}\n" for path, x in _entries(layer))
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


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
            content = _clean(info.linkname) if info.islnk() else info.linkname
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
