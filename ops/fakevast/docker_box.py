"""A box that is a container of the image that was asked for, with that image's own sshd. For who wants to try a real image.

The ports, the faults of the link and the meter are those of every box: what arrives is relayed to the container's sshd, which
listens on loopback. The container shares this machine's network, so that its watchdog reaches the API; keys are checked by its
sshd, so the faults `denied`, `new_host_key` and those at `exec` do not apply.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import shutil
import socket
import threading
from typing import TYPE_CHECKING, Any

from ops.fakevast.boxes import Box, free_port, reset_on_close
from ops.fakevast.boxtools import facts
from ops.fakevast.faults import Fault
from ops.fakevast.instance import Instance

if TYPE_CHECKING:
    from ops.fakevast.boxes import Boxes

LABEL = "fakevast.boxes"
_CHUNK = 256 * 1024

# What vast.ai's own start does in an ssh container: keys, onstart with the container's environment, sshd.
_LAUNCH = r"""
mkdir -p /root/.ssh /run/sshd && chmod 700 /root/.ssh
for tool in nvidia-smi df; do
  printf '#!/bin/sh\nexec /fakevast/bin/%s "$@"\n' $tool >/usr/local/bin/$tool && chmod 755 /usr/local/bin/$tool
done
cp /fakevast/keys /root/.ssh/authorized_keys && chmod 600 /root/.ssh/authorized_keys
ssh-keygen -A >/dev/null
if [ -s /fakevast/onstart.sh ]; then
  cp /fakevast/onstart.sh /root/ && cd /root && $(command -v bash || echo sh) /root/onstart.sh &
fi
exec $(command -v sshd || echo /usr/sbin/sshd) -D -e -p "$FAKEVAST_SSHD" -o ListenAddress=127.0.0.1 \
  -o PermitRootLogin=prohibit-password -o PasswordAuthentication=no
"""


class DockerBox(Box):
    """`home` is /root in the container. Starting takes the engine a moment, in a thread; until then the ports are closed."""

    def __init__(self, boxes: Boxes, instance: Instance) -> None:
        super().__init__(boxes, instance)
        from docker.client import DockerClient

        self._engine = DockerClient.from_env()
        self._container: Any = None
        self._inside = free_port()
        self._keys: set[bytes] = set()
        self._loop = asyncio.get_running_loop()
        self._turn = threading.Lock()  # the engine's calls for one box, one after another

    def start(self) -> None:
        self._prepare()
        threading.Thread(target=self._start_container, name=f"box-{self.instance.id}").start()

    def _prepare(self) -> None:
        """What the container sees of us, under /fakevast."""
        (self.folder / "bin").mkdir(parents=True, exist_ok=True)
        for tool in ("nvidia-smi", "df"):
            shutil.copy(self._boxes.tools / tool, self.folder / "bin" / tool)
        (self.folder / "facts").write_text(facts(self.instance, self.home).replace(str(self.home), "/root"))
        (self.folder / "onstart.sh").write_text(self.instance.onstart or "")
        self._write_keys()

    def _write_keys(self) -> None:
        now = self._boxes.cloud.clock.now()
        lines = [key["public_key"] for key in self.instance.ssh_keys if key["since"] <= now]
        (self.folder / "keys").write_text("\n".join(lines) + "\n")
        self._keys = {line.encode() for line in lines}

    def _start_container(self) -> None:
        import docker.errors

        with self._turn:
            try:
                if self._container is None:
                    self._container = self._create()
                self._container.start()
            except docker.errors.DockerException as error:
                self._loop.call_soon_threadsafe(self._failed, str(error))
                return
        self._loop.call_soon_threadsafe(self._up)

    def _create(self) -> Any:
        args = "args" in self.instance.runtype.split()
        given: dict[str, Any] = {} if args else {"entrypoint": ["sh", "-c", _LAUNCH]}
        if args and self.instance.args:
            given = {"entrypoint": [self.instance.onstart] if self.instance.onstart else None, "command": self.instance.args}
        env = {key: value for key, value in self.container_environment().items() if key not in ("HOME", "PATH", "PWD", "TMPDIR", "SHELL")}
        return self._engine.containers.create(
            self.instance.image, environment={**env, "FAKEVAST_SSHD": str(self._inside)}, network_mode="host", user="0", working_dir="/root",
            volumes={str(self.folder): {"bind": "/fakevast", "mode": "ro"}}, labels={LABEL: str(self._boxes.folder)}, **given,
        )  # fmt: skip

    def _tools(self) -> str:
        return ""  # on the image's own PATH, by _LAUNCH

    def _failed(self, why: str) -> None:
        if self.instance.destroyed_at is None:
            self.instance.actual_status, self.instance.running_since = "loading", None
            self.instance.status_msg = f"Error response from daemon: manifest for {self.instance.image} not found: manifest unknown ({why})"

    def _up(self) -> None:
        if self.instance.destroyed_at is None and self.instance.running_since is not None:
            self._listen()

    def _serve(self, sock: socket.socket, fault: Fault | None) -> None:
        task = self._loop.create_task(self._relay(sock, fault))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _relay(self, sock: socket.socket, fault: Fault | None) -> None:
        """Both directions of one connection, counted, until either side ends it."""
        await self._loop.run_in_executor(None, self._refresh_keys)
        reader, writer = await asyncio.open_connection(sock=sock)
        link = _Link(self, writer, fault)
        self.connections.add(link)
        try:
            inside_reader, inside_writer = await self._reach_sshd()
            link.inside = inside_writer
            await asyncio.gather(link.pump(reader, inside_writer, into=True), link.pump(inside_reader, writer, into=False))
        except OSError:
            pass
        finally:
            self.connections.discard(link)
            link.abort()

    async def _reach_sshd(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The container's sshd comes up a moment after the container."""
        for _ in range(100):
            with contextlib.suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", self._inside, limit=_CHUNK)
            await asyncio.sleep(0.05)
        raise ConnectionRefusedError("the container's sshd does not listen")

    def _refresh_keys(self) -> None:
        before = self._keys
        self._write_keys()
        if self._keys != before and self._container is not None:
            with self._turn:
                self._container.exec_run(["sh", "-c", "cat /fakevast/keys >>/root/.ssh/authorized_keys"])

    def stop(self) -> None:
        super().stop()
        container = self._container
        if container is not None:
            threading.Thread(target=self._kill, args=(container,)).start()

    def _kill(self, container: Any) -> None:
        import docker.errors

        with self._turn, contextlib.suppress(docker.errors.DockerException):
            container.kill()

    def remove(self) -> None:
        Box.stop(self)
        with self._turn, contextlib.suppress(Exception):
            if self._container is not None:
                self._container.remove(force=True, v=True)
        if self.folder.exists():
            self._boxes.discard(self.folder)

    def clear(self) -> None:
        with self._turn:
            if self._container is not None:
                self._container.remove(force=True, v=True)
                self._container = None

    def execute(self, words: list[str]) -> str:
        if self._container is None:
            return ""
        return str(self._container.exec_run(["sh", "-c", f"cd /root; {shlex.join(words)}"]).output.decode(errors="replace"))

    def log(self) -> list[str]:
        return [] if self._container is None else self._container.logs().decode(errors="replace").splitlines()


class _Link:
    """One relayed connection; cut as other connections to boxes are."""

    def __init__(self, box: DockerBox, writer: asyncio.StreamWriter, fault: Fault | None) -> None:
        self._box = box
        self._writer = writer
        self.inside: asyncio.StreamWriter | None = None
        cut = fault.args if fault is not None and fault.what == "cut" else {}
        self._left: int | None = cut.get("every_bytes")
        self._timer = asyncio.get_running_loop().call_later(float(cut["every_s"]), self.cut) if "every_s" in cut else None

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, into: bool) -> None:
        while data := await reader.read(_CHUNK):
            self._box.carry(len(data) if into else 0, 0 if into else len(data))
            if self._left is not None:
                self._left -= len(data)
                if self._left <= 0:
                    self.cut()
                    return
            writer.write(data)
            await writer.drain()
        writer.close()

    def cut(self) -> None:
        reset_on_close(self._writer.get_extra_info("socket"))
        self.abort()

    def abort(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for writer in (self._writer, self.inside):
            if writer is not None:
                writer.transport.abort()


def sweep(folder: str) -> int:
    """Removes containers that an emulator which died in this folder left behind."""
    from docker.client import DockerClient

    left = DockerClient.from_env().containers.list(all=True, filters={"label": f"{LABEL}={folder}"})
    for container in left:
        container.remove(force=True, v=True)
    return len(left)
