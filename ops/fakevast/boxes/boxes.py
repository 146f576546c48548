"""The machines behind the instances: for each a folder, two listening ports, and whatever processes run in it. No root needed.

A box costs two bound sockets until it comes up and a folder until somebody connects; SSH is spoken only to who arrives.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fnmatch
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ops.fakevast.boxes.tools import facts, install_milktea_image, install_tools
from ops.fakevast.cloud.cloud import Cloud
from ops.fakevast.cloud.faults import Fault
from ops.fakevast.cloud.instance import Instance

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MARK = "FAKEVAST_BOX"
_BASH = "/bin/bash" if Path("/bin/bash").exists() else "/bin/sh"


def kill_marked(mark: str) -> int:
    """Kills every process whose environment says that it belongs to this box (`mark` ending in "/": to any below it), however it
    detached itself; returns how many.

    Reads /proc. A process may fork while the others die, and one that is just then replacing itself shows no environment (its
    folder tells then): so it looks again until two looks in a row find nothing.
    """
    killed = quiet = 0
    while quiet < 2 and killed < 10_000:
        found = [number for number in map(int, filter(str.isdigit, os.listdir("/proc"))) if _belongs(number, mark)]
        for number in found:
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)
        killed += len(found)
        quiet = 0 if found else quiet + 1
    return killed


def _belongs(number: int, mark: str) -> bool:
    wanted = f"{MARK}={mark}".encode()
    try:
        with open(f"/proc/{number}/environ", "rb") as file:
            environment = file.read()
        if not environment:
            return f"{os.readlink(f'/proc/{number}/cwd')}/".startswith(mark.rstrip("/") + "/")
    except OSError:
        return False
    return any(word == wanted or (mark.endswith("/") and word.startswith(wanted)) for word in environment.split(b"\0"))


class Box:
    """One machine. `home` is what its root user sees as home and, over SFTP, as everything."""

    def __init__(self, boxes: Boxes, instance: Instance) -> None:
        self._boxes = boxes
        self.instance = instance
        self.folder = boxes.folder / str(instance.id)
        self.home = self.folder / "root"
        self.shared_paths = boxes.shared_paths
        self.ssh_options: Any = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.connections: set[Any] = set()
        self._direct, self._proxy = _bound(), _bound()
        self._listening: list[socket.socket] = []
        self._has_run = False
        self._publish_ports()

    @property
    def mark(self) -> str:
        return f"{self._boxes.folder}/{self.instance.id}"

    def _publish_ports(self) -> None:
        direct = str(self._direct.getsockname()[1])
        self.instance.ssh_port = self._proxy.getsockname()[1]
        direct_wanted = "direc" in self.instance.runtype or self.instance.runtype == "ssh"
        if direct_wanted and self.instance.offer.get("direct_port_count", 1) > 0:
            self.instance.ports = {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": direct}, {"HostIp": "::", "HostPort": direct}]}
        for key in self.instance.env:
            if key.startswith("-p "):
                inside = key[3:].strip().rsplit(":", 1)[-1]
                port, _, kind = inside.partition("/")
                self.instance.ports[f"{port}/{kind or 'tcp'}"] = [{"HostIp": "0.0.0.0", "HostPort": port}]

    # ---- life ----

    def start(self) -> None:
        """Comes up: listens, then runs onstart (or, for an `args` container, its program)."""
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
            self._background([_BASH, str(script)])

    def _listen(self) -> None:
        if self._direct.fileno() < 0:
            self._direct, self._proxy = _bound(), _bound(self.instance.ssh_port)
            self._publish_ports()
        loop = asyncio.get_running_loop()
        both = [self._direct, self._proxy]
        if "tunnel_stuck" in self.instance.box_faults:
            self._say(f"Error: remote port forwarding failed for listen port {self.instance.ssh_port}")
            both = [self._direct]
        for sock in both:
            sock.listen(128)
            loop.add_reader(sock.fileno(), self._accept, sock)
        self._listening = both

    def stop(self) -> None:
        """Goes down: connections break, processes die, files stay."""
        loop = asyncio.get_running_loop()
        for sock in self._listening:
            loop.remove_reader(sock.fileno())
        self._listening = []
        self._direct.close()
        self._proxy.close()
        for connection in list(self.connections):
            connection.abort()
        if self._has_run:
            kill_marked(self.mark)

    def remove(self) -> None:
        """Gone, with its files."""
        self.stop()
        if self.folder.exists():
            self._boxes.discard(self.folder)

    # ---- connections ----

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        instance = self.instance
        fault = self._boxes.cloud.faults.take("ssh", label=instance.label, id=instance.id, machine_id=instance.machine_id)
        if fault is not None and fault.what in ("reset", "host_death"):
            reset_on_close(sock)
            sock.close()
            if fault.what == "host_death":
                self.break_link("host_death")
            return
        if fault is not None and fault.what == "hang":
            self._boxes.hanging.append(sock)
            return
        self._serve(sock, fault)

    def _serve(self, sock: socket.socket, fault: Fault | None) -> None:
        from ops.fakevast.boxes import sshd  # asyncssh is half a second of imports: a thread has begun on it when the emulator started

        sshd.serve(sock, self, fault)

    def authorized_keys(self) -> set[bytes]:
        """Blobs of the keys that open this box now: those of the instance once they have reached it, and those in its own file."""
        now = self._boxes.cloud.clock.now()
        texts = [key["public_key"] for key in self.instance.ssh_keys if key["since"] <= now]
        with contextlib.suppress(OSError):
            texts += (self.home / ".ssh" / "authorized_keys").read_text().splitlines()
        blobs = set()
        for text in texts:
            for word in text.split():
                if word.startswith("AAAA"):
                    with contextlib.suppress(ValueError):
                        blobs.add(base64.b64decode(word))
        return blobs

    def carry(self, into: int, out: int) -> None:
        self.instance.carry(into, out)

    def exec_fault(self) -> Fault | None:
        instance = self.instance
        return self._boxes.cloud.faults.take("exec", label=instance.label, id=instance.id, machine_id=instance.machine_id)

    def break_link(self, what: str) -> None:
        """Cuts every connection; `host_death` for good."""
        if what == "host_death":
            self._boxes.cloud.lose_host(self.instance.id)
            return
        for connection in list(self.connections):
            connection.cut()

    def free_bytes(self) -> int | None:
        """What a full disk still takes; None when it is not full."""
        fault = self.instance.box_faults.get("disk_full")
        return None if fault is None else int(fault.get("free_bytes", 0))

    # ---- processes ----

    def _tools(self) -> str:
        """The box's own bin folder on PATH, made when the first process needs it, then what its image brings."""
        own = self.folder / "bin"
        if not own.exists():
            own.mkdir(parents=True)
            for tool in self._boxes.tools.iterdir():
                (own / tool.name).symlink_to(tool)
        (self.folder / "facts").write_text(facts(self.instance, self.home))
        image = self._boxes.image_folder(self.instance.image)
        return f"{own}:{image}" if image else str(own)

    def ssh_environment(self) -> dict[str, str]:
        """What a command over SSH sees: not the container's environment, and a minimal PATH."""
        home = str(self.home)
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        return {"HOME": home, "USER": "root", "LOGNAME": "root", "SHELL": _BASH, "PATH": f"{self._tools()}:{SYSTEM_PATH}",
                "PWD": home, "TMPDIR": str(self.folder / "tmp"), MARK: self.mark}  # fmt: skip

    def container_environment(self) -> dict[str, str]:
        """What onstart sees besides: the instance's own key, number and ports, the account's secrets, the renter's env."""
        instance = self.instance
        given = {key: value for key, value in instance.env.items() if not key.startswith("-")}
        ports = {f"VAST_TCP_PORT_{name.split('/')[0]}": rows[0]["HostPort"] for name, rows in instance.ports.items() if name.endswith("/tcp")}
        return {
            **self.ssh_environment(), **self._boxes.cloud.account.secrets, "CONTAINER_API_KEY": instance.key, "CONTAINER_ID": str(instance.id),
            "VAST_CONTAINERLABEL": f"C.{instance.id}", "PUBLIC_IPADDR": "127.0.0.1", "GPU_COUNT": str(instance.num_gpus),
            "DATA_DIRECTORY": "/workspace", "JUPYTER_TOKEN": instance.key[:32], "OPEN_BUTTON_TOKEN": instance.key[:32],
            "SSH_PUBLIC_KEY": "\n".join(key["public_key"] for key in instance.ssh_keys), **ports, **given,
        }  # fmt: skip

    def spawn(self, command: str | None, env: dict[str, str], terminal: int | None = None, **streams: Any) -> subprocess.Popen[bytes]:
        """Starts a shell command (None: a login shell) in the box's home, in a session of its own.

        On a terminal, given by the descriptor of its slave side, or on `streams` as subprocess takes them.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        words = [_BASH, "-c", command] if command is not None else [_BASH, "-l"]
        if terminal is not None:
            streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
        return self._popen(words, env, terminal, **streams)

    def _popen(self, words: list[str], env: dict[str, str], terminal: int | None = None, **streams: Any) -> subprocess.Popen[bytes]:
        self._has_run = True
        limit = self.free_bytes()

        def prepare() -> None:
            if limit is not None:
                _no_room(limit)
            if terminal is not None:
                os.login_tty(terminal)

        bare = limit is None and terminal is None
        return subprocess.Popen(
            words, cwd=self.home, env=env, start_new_session=terminal is None, preexec_fn=None if bare else prepare, **streams
        )

    def _background(self, words: list[str], ended: Callable[[int], None] | None = None) -> None:
        with open(self.folder / "log", "ab") as log:
            process = self._popen(words, self.container_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        self.watch(process, ended or (lambda code: None))

    def _run_args(self) -> None:
        words = [self.instance.onstart] if self.instance.onstart else []
        words += self.instance.args
        if not words:
            self._say("no command: the image's own entry point is not emulated")
            return
        self._background(words, lambda code: self._boxes.cloud.container_exited(self.instance, code))

    def watch(self, process: subprocess.Popen[bytes] | None, ended: Callable[[int], None]) -> None:
        """Calls back with the exit code (negative: a signal) when the process is gone, and reaps it."""
        assert process is not None
        loop = asyncio.get_running_loop()
        fd = os.pidfd_open(process.pid)

        def gone() -> None:
            loop.remove_reader(fd)
            os.close(fd)
            ended(process.wait())

        loop.add_reader(fd, gone)

    def clear(self) -> None:
        """Recycle: the container's files go."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir(parents=True, exist_ok=True)

    def execute(self, words: list[str]) -> str:
        """`ls`, `rm`, `du` in the box: output and errors, as the execute call returns them."""
        self.home.mkdir(parents=True, exist_ok=True)
        inside = [words[0], *(word if word.startswith("-") else _inside(self.home, word) for word in words[1:])]
        done = subprocess.run(inside, cwd=self.home, capture_output=True, text=True, timeout=10, check=False)
        return (done.stdout + done.stderr).replace(f"{self.home}", "/root")

    # ---- log ----

    def _say(self, line: str) -> None:
        with open(self.folder / "log", "a") as log:
            log.write(line + "\n")

    def log(self) -> list[str]:
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
    """Closing it will look like a pulled cable to the other side: a reset, no goodbye."""
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _no_room(limit: int) -> None:
    """The nearest thing to a full disk that needs no root: no file may grow past what is left."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


class Boxes:
    """All boxes of a cloud. `images` maps image globs to folders whose programs come first on PATH."""

    def __init__(self, cloud: Cloud, folder: Path, shared_paths: tuple[str, ...] = ()) -> None:
        self.cloud = cloud
        self.folder = folder / "boxes"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tools = folder / "tools"
        self.shared_paths = tuple(os.fsencode(path) for path in shared_paths)
        self.images: list[tuple[str, Path]] = []
        self.hanging: list[socket.socket] = []
        self.live: dict[int, Box] = {}
        self._trash: list[threading.Thread] = []
        install_tools(self.tools)
        milktea = folder / "image-milktea"
        install_milktea_image(milktea)
        for glob in ("milktea/*", "*/milktea*", "milktea:*"):
            self.images.append((glob, milktea))
        cloud.on_create.append(self._create)
        cloud.on_start.append(lambda instance: self.live[instance.id].start())
        cloud.on_stop.append(lambda instance: self.live[instance.id].stop())
        cloud.on_destroy.append(self._destroy)

    def register_image(self, glob: str, folder: Path) -> None:
        """Boxes of images that match get this folder on PATH; the latest registration wins."""
        self.images.insert(0, (glob, folder))

    def image_folder(self, image: str) -> Path | None:
        return next((folder for glob, folder in self.images if fnmatch.fnmatchcase(image, glob)), None)

    def _create(self, instance: Instance) -> None:
        self.live[instance.id] = Box(self, instance)

    def _destroy(self, instance: Instance) -> None:
        self.live.pop(instance.id).remove()

    def discard(self, folder: Path) -> None:
        """Out of sight at once, deleted by a thread: a box with a model in it must not hold up the others."""
        grave = folder.with_name(f".gone-{folder.name}")
        folder.rename(grave)
        thread = threading.Thread(target=shutil.rmtree, args=(grave, True), daemon=False)
        thread.start()
        self._trash = [one for one in self._trash if one.is_alive()] + [thread]

    def close(self) -> None:
        """Ends every box; what a sudden death of the emulator left is swept at the next start."""
        for box in list(self.live.values()):
            box.remove()
        self.live.clear()
        for sock in self.hanging:
            sock.close()
        for thread in self._trash:
            thread.join()

    def sweep(self) -> int:
        """Ends processes and deletes folders that an emulator which died here left behind."""
        killed = kill_marked(f"{self.folder}/")
        for leftover in self.folder.iterdir():
            shutil.rmtree(leftover, ignore_errors=True)
        return killed


def _inside(home: Path, word: str) -> str:
    path = os.path.normpath(word)
    path = path.removeprefix("/root") if path == "/root" or path.startswith("/root/") else path
    whole = os.path.normpath(f"{home}/{path.lstrip('/')}")
    return whole if whole == str(home) or whole.startswith(f"{home}/") else str(home)
