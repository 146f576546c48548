"""SFTP into a box: an absolute path is taken inside the box's own folder, whether or not it is spelled with it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import asyncssh

if TYPE_CHECKING:
    from ops.fakevast.boxes import Box


class BoxSFTP(asyncssh.SFTPServer):
    """The session's home is the box's folder, and so is its root. A full disk refuses writes."""

    def __init__(self, chan: Any, box: Box) -> None:
        super().__init__(chan)
        self._box = box
        self._home = os.fsencode(os.path.realpath(box.home))

    def map_path(self, path: bytes) -> bytes:
        """The real path of what the client names; `..` cannot climb out. Shared paths (see Boxes) are as they are."""
        if path == self._home or path.startswith(self._home + b"/"):
            path = path[len(self._home) :]
        whole = os.path.normpath(b"/" + path.lstrip(b"/"))
        if any(whole == shared or whole.startswith(shared + b"/") for shared in self._box.shared_paths):
            return whole
        return self._home + whole if whole != b"/" else self._home

    def reverse_map_path(self, path: bytes) -> bytes:
        return path

    def realpath(self, path: bytes) -> bytes:
        return self.map_path(path)

    def write(self, file_obj: object, offset: int, data: bytes) -> int:
        free = self._box.free_bytes()
        if free is not None and free < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(file_obj, offset, data)  # type: ignore[return-value]
