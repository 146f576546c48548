"""One machine: a folder, two listening ports, and whatever processes run in it. No root needed.

It knows no SSH: accepted connections go to `Host.serve`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fnmatch
import os
import shlex
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ops.fakevast.boxes import processes
from ops.fakevast.boxes.environment import container_environment, published_ports
from ops.fakevast.boxes.tools import facts
from ops.fakevast.cloud.cloud import Cloud
from ops.fakevast.cloud.faults import Fault
from ops.fakevast.cloud.instance import Instance

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Host:
    """What the boxes of a cloud share. `serve` speaks SSH on an accepted connection to a box."""

    cloud: Cloud
    folder: Path
    tools: Path
    serve: Callable[[socket.socket, Box, Fault | None], None]
    shared_paths: tuple[bytes, ...] = ()
    images: list[tuple[str, Path]] = field(default_factory=list)  # glob of names, folder for PATH
    hanging: list[socket.socket] = field(default_factory=list)  # accepted, never answered


class Box:
    """`home` is what its root user sees as home and, over SFTP, as everything."""

    def __init__(self, host: Host, instance: Instance) -> None:
        self.host, self.instance = host, instance
        self.folder = host.folder / str(instance.id)
        self.home = self.folder / "root"
        self.ssh_options: Any = None  # made by `serve` with the first connection
        self.tasks: set[asyncio.Task[None]] = set()
        self.connections: set[Any] = set()
        self._listening: list[socket.socket] = []
        self._has_run = False
        self.bytes_per_s: float | None = None  # of each connection and way; None: as they come
        self._take_ports()

    def _take_ports(self) -> None:
        self._direct, self._proxy = _bound(), _bound()
        self._publish()
        # no other program gets the proxy's port while the box is stopped
        self._kept = _bound(self.instance.ssh_port)

    def _publish(self) -> None:
        self.instance.ssh_port = self._proxy.getsockname()[1]
        ports = published_ports(self.instance, self._direct.getsockname()[1])
        self.instance.ports |= ports

    # ---- life ----

    def start(self) -> None:
        """Start the box: listen, then run onstart (or, for an `args` container, its program)."""
        self.home.mkdir(parents=True, exist_ok=True)
        self._say(f"starting {self.instance.image}")
        if "args" in self.instance.runtype.split():
            self._run_args()
            return
        self._listen()
        if self.instance.onstart:
            script = self.home / "onstart.sh"
            script.write_text(self.instance.onstart)
            script.chmod(0o700)
            self._background(processes.script(f"exec {processes.SHELL} {shlex.quote(str(script))}"))

    def _listen(self) -> None:
        if self._direct.fileno() < 0:
            self._direct, self._proxy = _bound(), _bound(self.instance.ssh_port)
            self._publish()
        self._listening = [self._direct, self._proxy]
        if "tunnel_stuck" in self.instance.box_faults:
            port = self.instance.ssh_port
            self._say(f"Error: remote port forwarding failed for listen port {port}")
            self._listening = [self._direct]
        for sock in self._listening:
            sock.listen(128)
            asyncio.get_running_loop().add_reader(sock.fileno(), self._accept, sock)

    def stop(self) -> None:
        """Stop the box: connections break, processes die, files stay."""
        for sock in self._listening:
            asyncio.get_running_loop().remove_reader(sock.fileno())
        self._listening = []
        self._direct.close()
        self._proxy.close()
        for connection in list(self.connections):
            connection.abort()
        if self._has_run:
            processes.kill_marked(str(self.folder))

    def end(self) -> None:
        """Stop the box for good."""
        self.stop()
        self._kept.close()

    def move_ports(self) -> None:
        """What a provider does now and then: connections break, sshd is at other ports."""
        for sock in self._listening:
            asyncio.get_running_loop().remove_reader(sock.fileno())
            sock.close()
        for connection in list(self.connections):
            connection.abort()
        self._kept.close()
        self._take_ports()
        self._listen()

    def clear(self) -> None:
        """Empty the box, as recycling an instance does."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir(parents=True, exist_ok=True)

    # ---- connections ----

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        fault = self.host.cloud.fault("ssh", self.instance)
        if fault is not None and fault.what in ("reset", "host_death"):
            reset_on_close(sock)
            sock.close()
            if fault.what == "host_death":
                self.break_link("host_death")
        elif fault is not None and fault.what == "hang":
            self.host.hanging.append(sock)
        else:
            self.host.serve(sock, self, fault)

    def authorized_keys(self) -> set[bytes]:
        """Blobs of the keys that open this box now.

        Those of the instance once they have reached it, and those in its own file.
        """
        now = self.host.cloud.clock.now()
        texts = [key["public_key"] for key in self.instance.ssh_keys if key["since"] <= now]
        with contextlib.suppress(OSError):
            texts += (self.home / ".ssh" / "authorized_keys").read_text().splitlines()
        blobs = set()
        for word in " ".join(texts).split():
            if word.startswith("AAAA"):
                with contextlib.suppress(ValueError):
                    blobs.add(base64.b64decode(word))
        return blobs

    def exec_fault(self) -> Fault | None:
        """The fault that spoils the command that begins now."""
        return self.host.cloud.fault("exec", self.instance)

    def break_link(self, what: str) -> None:
        """Cut every connection; with `host_death` the whole machine is gone for good."""
        if what == "host_death":
            self.host.cloud.lose_host(self.instance.id)
            return
        for connection in list(self.connections):
            connection.cut()

    def fill_disk(self, free_bytes: int | None) -> None:
        """From now on each file takes only so many bytes, also of programs that run; None: the
        disk has room again."""
        if free_bytes is None:
            self.instance.box_faults.pop("disk_full", None)
        else:
            self.instance.box_faults["disk_full"] = {"free_bytes": free_bytes}
        processes.limit_marked(str(self.folder), free_bytes)
        self.tell_facts()

    def tell_facts(self) -> None:
        """What the box's own tools answer from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "facts").write_text(facts(self.instance, self.home))

    def free_bytes(self) -> int | None:
        """Bytes that a full disk still takes; None when it is not full."""
        fault = self.instance.box_faults.get("disk_full")
        return None if fault is None else int(fault.get("free_bytes", 0))

    # ---- processes ----

    def ssh_environment(self) -> dict[str, str]:
        """The environment of a command over SSH: a minimal PATH, no variable of the container."""
        tmp, home = self.folder / "tmp", str(self.home)
        tmp.mkdir(parents=True, exist_ok=True)
        return {
            "HOME": home,
            "USER": "root",
            "LOGNAME": "root",
            "SHELL": processes.SHELL,
            "PATH": f"{self._tools()}:{SYSTEM_PATH}",
            "PWD": home,
            "TMPDIR": str(tmp),
            processes.MARK: str(self.folder),
        }

    def _tools(self) -> str:
        """The box's own bin folder, made when the first process needs it, and its image's."""
        own = self.folder / "bin"
        if not own.exists():
            own.mkdir(parents=True)
            for tool in self.host.tools.iterdir():
                (own / tool.name).symlink_to(tool)
        self.tell_facts()
        for glob, folder in self.host.images:
            if fnmatch.fnmatchcase(self.instance.image, glob):
                return f"{own}:{folder}"
        return str(own)

    def spawn(
        self, command: str | None, env: dict[str, str], **streams: Any
    ) -> subprocess.Popen[bytes]:
        """Starts a shell command (None: a login shell) in the box's home; see processes.start."""
        self.home.mkdir(parents=True, exist_ok=True)
        words = [processes.SHELL, "-l"] if command is None else processes.script(command)
        return self._start(words, env, **streams)

    def _start(
        self, words: list[str], env: dict[str, str], **streams: Any
    ) -> subprocess.Popen[bytes]:
        self._has_run = True
        limit = self.free_bytes()
        return processes.start(words, self.home, env, max_file_bytes=limit, **streams)

    def _background(self, words: list[str], ended: Callable[[int], None] | None = None) -> None:
        """Start a program with the container's environment; its output goes to the log."""
        own = container_environment(self.instance, self.host.cloud.account.secrets)
        with open(self.folder / "log", "ab") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            process = self._start(words, self.ssh_environment() | own, **streams)
        processes.watch(process, ended or (lambda code: None))

    def _run_args(self) -> None:
        instance = self.instance
        words = [*([instance.onstart] if instance.onstart else []), *instance.args]
        if not words:
            self._say("no command: the image's own entry point is not emulated")
            return
        self._background(words, lambda code: self.host.cloud.container_exited(instance, code))

    def execute(self, words: list[str]) -> str:
        """`ls`, `rm`, `du` in the box: output and errors, as the execute call returns them."""
        self.home.mkdir(parents=True, exist_ok=True)
        paths = (word if word.startswith("-") else _inside(self.home, word) for word in words[1:])
        done = subprocess.run(
            [words[0], *paths],
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        return (done.stdout + done.stderr).replace(f"{self.home}", "/root")

    # ---- log ----

    def _say(self, line: str) -> None:
        with open(self.folder / "log", "a") as log:
            log.write(line + "\n")

    def log(self) -> list[str]:
        """What the container printed, line by line."""
        try:
            return (self.folder / "log").read_text(errors="replace").splitlines()
        except OSError:
            return []


def _bound(port: int = 0) -> socket.socket:
    """A port of our own on which nobody listens yet: connecting is refused until the box is up."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setblocking(False)
    sock.bind(("127.0.0.1", port))
    return sock


def reset_on_close(sock: Any) -> None:
    """Make closing this socket look like a pulled cable to the other side: a reset."""
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _inside(home: Path, word: str) -> str:
    path = os.path.normpath(word)
    if path == "/root" or path.startswith("/root/"):
        path = path.removeprefix("/root")
    whole = os.path.normpath(f"{home}/{path.lstrip('/')}")
    return whole if whole == str(home) or whole.startswith(f"{home}/") else str(home)
