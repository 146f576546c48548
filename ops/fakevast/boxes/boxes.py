"""The boxes of a cloud: one for each instance, gone with it.

A box costs three bound sockets until it comes up and a folder until somebody connects; SSH is
spoken only to who arrives.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from ops.fakevast.boxes.box import Box, Host
from ops.fakevast.boxes.processes import kill_marked
from ops.fakevast.boxes.tools import install_milktea_image, install_tools
from ops.fakevast.cloud.cloud import Cloud
from ops.fakevast.cloud.faults import Fault
from ops.fakevast.cloud.instance import Instance

_MILKTEA_IMAGES = ("milktea/*", "*/milktea*", "milktea:*")


class Boxes:
    """All boxes of a cloud, by the number of their instance in `live`."""

    def __init__(
        self,
        cloud: Cloud,
        folder: Path,
        serve: Callable[[socket.socket, Box, Fault | None], None],
        shared_paths: tuple[str, ...] = (),
    ) -> None:
        """`shared_paths`: of this machine, which SFTP reaches too. `serve`: see Host."""
        shared = tuple(os.fsencode(path) for path in shared_paths)
        self.host = Host(cloud, folder / "boxes", folder / "tools", serve, shared)
        self.host.folder.mkdir(parents=True, exist_ok=True)
        self.live: dict[int, Box] = {}
        self._trash: list[threading.Thread] = []
        install_tools(self.host.tools)
        milktea = folder / "image-milktea"
        install_milktea_image(milktea)
        self.host.images += [(glob, milktea) for glob in _MILKTEA_IMAGES]
        cloud.on_create.append(self._create)
        cloud.on_start.append(lambda instance: self.live[instance.id].start())
        cloud.on_stop.append(lambda instance: self.live[instance.id].stop())
        cloud.on_destroy.append(self._destroy)

    def register_image(self, glob: str, folder: Path) -> None:
        """Boxes of images that match get this folder on PATH; the latest registration wins."""
        self.host.images.insert(0, (glob, folder))

    def _create(self, instance: Instance) -> None:
        self.live[instance.id] = Box(self.host, instance)

    def _destroy(self, instance: Instance) -> None:
        box = self.live.pop(instance.id)
        box.end()
        if box.folder.exists():
            self._discard(box.folder)

    def _discard(self, folder: Path) -> None:
        """Rename the folder now and delete it in the background, so that nobody waits for it."""
        grave = folder.with_name(f".gone-{folder.name}")
        folder.rename(grave)
        thread = threading.Thread(target=shutil.rmtree, args=(grave, True), daemon=False)
        thread.start()
        self._trash = [one for one in self._trash if one.is_alive()] + [thread]

    def close(self) -> None:
        """End every box. What a sudden death leaves is deleted at the next start (`sweep`)."""
        for box in list(self.live.values()):
            self._destroy(box.instance)
        for sock in self.host.hanging:
            sock.close()
        for thread in self._trash:
            thread.join()

    def sweep(self) -> int:
        """Ends processes and deletes folders that an emulator which died here left behind."""
        killed = kill_marked(f"{self.host.folder}/")
        for leftover in self.host.folder.iterdir():
            shutil.rmtree(leftover, ignore_errors=True)
        return killed
