"""SFTP into a box: an absolute path is taken inside the box's own folder."""

from __future__ import annotations

import errno
import os
import posixpath
from typing import Any

import asyncssh

from ops.fakevast.boxes.box import Box


class BoxSFTP(asyncssh.SFTPServer):
    """asyncssh's server in the box's home; paths are spelled as the box's commands spell them.

    A shared path (see Boxes) is what it is on this machine. A full disk refuses writes.
    """

    def __init__(self, box: Box, chan: Any) -> None:
        self._home = os.fsencode(os.path.realpath(box.home))
        super().__init__(chan, chroot=self._home)
        self._box = box

    def map_path(self, path: bytes) -> bytes:
        whole = posixpath.normpath(path)
        if any(_is_below(shared, whole) for shared in self._box.host.shared_paths):
            return whole
        inside = path[len(self._home) :] if _is_below(self._home, path) else path
        return super().map_path(inside).rstrip(b"/")

    def reverse_map_path(self, path: bytes) -> bytes:
        return path

    def exit(self) -> None:
        """Sends an exit status, as OpenSSH does: without one its scp reports a failure."""
        self.channel.exit(0)

    def write(self, file_obj: object, offset: int, data: bytes) -> Any:
        free = self._box.free_bytes()
        if free is not None and free < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(file_obj, offset, data)


def _is_below(folder: bytes, path: bytes) -> bool:
    return path == folder or path.startswith(folder + b"/")
