"""Files of a bundle, hashed while they are written, and cut into volumes where the disk that
carries them is small.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

Role = Literal["part", "model", "small"]


@dataclass(frozen=True)
class File:
    size_bytes: int
    sha256: str
    role: Role


Files = dict[str, File]  # by path, relative to the bundle


class Writer:
    """A binary file opened for writing, cut every `limit` bytes into NAME.v001, NAME.v002 ... (0:
    never cut).

    Afterwards ``files`` describes what was written and ``sha256`` is of the whole content. Has no
    fileno() on purpose: the bytes must pass through here to be hashed.
    """

    def __init__(self, folder: Path, name: str, limit: int, role: Role) -> None:
        self.files: Files = {}
        self.sha256 = ""
        self._folder, self._name, self._limit, self._role = folder, name, limit, role
        self._whole = hashlib.sha256()
        self._volume = hashlib.sha256()
        self._bytes = 0
        self._file = (folder / self._volume_name(1)).open("wb")

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close_volume()
        self.sha256 = self._whole.hexdigest() if self._limit else self.files[self._name].sha256
        if list(self.files) == [f"{self._name}.v001"]:  # it fits one volume: no need of a number
            (self._folder / f"{self._name}.v001").rename(self._folder / self._name)
            self.files = {self._name: self.files[f"{self._name}.v001"]}

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view:
            room = self._limit - self._bytes if self._limit else len(view)
            if room == 0:
                self._close_volume()
                self._file = (self._folder / self._volume_name(len(self.files) + 1)).open("wb")
                self._volume, self._bytes, room = hashlib.sha256(), 0, self._limit
            piece = view[:room]
            self._file.write(piece)
            self._volume.update(piece)
            self._bytes += len(piece)
            view = view[room:]
        if self._limit:
            self._whole.update(data)
        return len(data)

    def tell(self) -> int:
        """Bytes written to all volumes."""
        return self._bytes + sum(file.size_bytes for file in self.files.values())

    def _volume_name(self, number: int) -> str:
        return f"{self._name}.v{number:03d}" if self._limit else self._name

    def _close_volume(self) -> None:
        self._file.close()
        self.files[self._volume_name(len(self.files) + 1)] = File(
            self._bytes, self._volume.hexdigest(), self._role
        )


def write_small(folder: Path, name: str, data: bytes) -> Files:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return {name: File(len(data), hashlib.sha256(data).hexdigest(), "small")}


def joined(files: Files, name: str) -> str:
    """The volumes that make up `name`, in order, with commas between."""
    if name in files:
        return name
    found = sorted(path for path in files if path.startswith(name + ".v"))
    if not found:
        raise KeyError(f"{name} was not written")
    return ",".join(found)
