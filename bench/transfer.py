"""Number 6: transfers on loopback against OpenSSH's own sshd.
`python -m bench.transfer [--gib 1] [--files 5000] [--repeat 5]`

Prints one line a case with every sample and the median. The server is sshd on a free port with a
key and home of its own, so the ends share the machine's cores: compare the ratios, not the MB/s.
Ours includes sha256 at both ends, scp and plain SFTP do not.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paramiko

from ops.box import transfer
from ops.box.connection import Box, Endpoint
from ops.box.transfer import CHUNK, PushFile


class Sshd:
    """OpenSSH's server on a free port, with a host key and one login key of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = folder, folder / "id"
        line = Box.make_key(self.key)
        Box.make_key(folder / "host")
        (folder / "authorized").write_text(line + "\n")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        settings = {
            "Port": self.port,
            "ListenAddress": "127.0.0.1",
            "HostKey": folder / "host",
            "AuthorizedKeysFile": folder / "authorized",
            "StrictModes": "no",
            "UsePAM": "no",
            "PidFile": "none",
            "Subsystem": "sftp internal-sftp",
            "PermitRootLogin": "yes",
        }
        (folder / "conf").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        binary = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin") or "sshd"
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [binary, "-D", "-f", str(folder / "conf"), "-E", str(folder / "log")]
        )

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


class TimedCuts(threading.Thread):
    """A TCP proxy that resets every link when it is `every_s` old, and counts the bytes that came
    from each side."""

    def __init__(self, target: int, every_s: float) -> None:
        super().__init__(daemon=True)
        self.target, self.every_s, self.up, self.down, self.cuts = target, every_s, 0, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                ways = ((near, far, "up"), (far, near, "down"))
                pumps = [threading.Thread(target=self._pump, args=way, daemon=True) for way in ways]
                for pump in pumps:
                    pump.start()
                threading.Thread(target=self._cut, args=(near, far, pumps), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                sink.sendall(data)
                setattr(self, way, getattr(self, way) + len(data))
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _cut(self, near: socket.socket, far: socket.socket, pumps: list[threading.Thread]) -> None:
        pumps[0].join(self.every_s)
        self.cuts += pumps[0].is_alive()
        for end in (near, far):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


Case = tuple[str, Callable[[], object]]


def compare(repeat: int, cases: list[Case], clean: Callable[[], None]) -> None:
    """Median seconds of each, against the first. Taken in turns, so that a busy machine slows all
    of them alike."""
    seconds: dict[str, list[float]] = {label: [] for label, _ in cases}
    for _ in range(repeat):
        for label, work in cases:
            clean()
            began = time.perf_counter()
            work()
            seconds[label].append(time.perf_counter() - began)
    base = statistics.median(seconds[cases[0][0]])
    for label, took in seconds.items():
        middle = statistics.median(took)
        print(
            f"{label:44} median {middle:7.2f} s  {base / middle:5.2f} x  "
            f"({', '.join(f'{s:.2f}' for s in took)})",
            flush=True,
        )


@contextlib.contextmanager
def box_at(sshd: Sshd, port: int) -> Iterator[Box]:
    user = os.environ.get("USER") or "root"
    with Box(
        [Endpoint("127.0.0.1", port)], user, sshd.key, sshd.folder / "known_hosts", retry_s=0.1
    ) as box:
        box.connect(20)
        yield box


@contextlib.contextmanager
def through(way: str) -> Iterator[None]:
    """With "paramiko", as on a machine that has no ssh."""
    kept = transfer.BULK
    transfer.BULK = 1 << 62 if way == "paramiko" else kept
    try:
        yield
    finally:
        transfer.BULK = kept


def push(box: Box, files: list[PushFile], way: str = "OpenSSH") -> None:
    with through(way):
        transfer.push(box, files)


def pull(box: Box, file: PushFile, home: Path, way: str = "OpenSSH") -> None:
    with through(way):
        transfer.pull(box, file.remote, home, file.sha256)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--gib", type=float, default=1.0)
    ask.add_argument("--files", type=int, default=5000)
    ask.add_argument("--repeat", type=int, default=5)
    ask.add_argument("--cut-every", type=float, default=5.0)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    ask.add_argument(
        "--folder",
        default=memory,
        help="both ends' files lie here; memory, so that no disk is measured",
    )
    ask.add_argument("--only", choices=["big", "small", "cut"])
    asked = ask.parse_args()
    home = Path(os.path.expanduser("~"))
    with contextlib.ExitStack() as folders:
        temporary = folders.enter_context(
            tempfile.TemporaryDirectory(dir=asked.folder, prefix="milktea-bench-")
        )
        far = folders.enter_context(
            tempfile.TemporaryDirectory(dir=asked.folder, prefix="milktea-bench-far-")
        )
        sshd = Sshd(Path(temporary))
        remote = "." + Path(far).name
        (home / remote).symlink_to(far)
        folders.callback((home / remote).unlink)
        try:
            with box_at(sshd, sshd.port) as box:
                if asked.only in (None, "big"):
                    big(box, Path(temporary), Path(far), remote, asked)
                if asked.only in (None, "small"):
                    small(box, Path(temporary), Path(far), remote, asked)
                if asked.only in (None, "cut"):
                    cut(sshd, Path(temporary), Path(far), remote, asked)
        finally:
            sshd.close()


def big(box: Box, near: Path, far: Path, remote: str, asked: argparse.Namespace) -> None:
    source = random_file(near / "big", int(asked.gib * 2**30))
    file = PushFile(source, f"{remote}/big", sha256(source))
    flags = ["-P" if word == "-p" else word for word in box.ssh_options()]
    scp = [
        "scp",
        "-q",
        "-c",
        "aes128-gcm@openssh.com",
        *flags,
        str(source),
        f"{box.user}@127.0.0.1:{remote}/big",
    ]

    def clean() -> None:
        for path in far.iterdir():
            path.unlink()

    home = near / "home"
    cases: list[Case] = [
        (f"scp aes128-gcm, {asked.gib} GiB", lambda: subprocess.run(scp, check=True)),
        ("push through OpenSSH, sha256 included", lambda: push(box, [file])),
        ("push through paramiko, sha256 included", lambda: push(box, [file], "paramiko")),
    ]
    compare(asked.repeat, cases, clean)
    subprocess.run(scp, check=True)
    back: list[Case] = [
        ("scp home", lambda: subprocess.run([*scp[:-2], scp[-1], str(home)], check=True)),
        ("pull through OpenSSH, sha256 included", lambda: pull(box, file, home)),
        ("pull through paramiko, sha256 included", lambda: pull(box, file, home, "paramiko")),
    ]
    compare(asked.repeat, back, lambda: home.unlink(missing_ok=True))
    clean()
    home.unlink()


def small(box: Box, near: Path, far: Path, remote: str, asked: argparse.Namespace) -> None:
    (near / "small").mkdir()
    files = [
        random_file(near / "small" / f"{i:05}", 500 + 7 * (i % 500)) for i in range(asked.files)
    ]
    pushes = [PushFile(f, f"{remote}/{f.name}", sha256(f)) for f in files]

    def one_by_one() -> None:
        session: paramiko.SFTPClient = box._fabric.sftp()  # type: ignore[union-attr]
        for f in files:
            session.put(str(f), f"{remote}/{f.name}")

    def clean() -> None:
        for path in far.iterdir():
            path.unlink()

    cases: list[Case] = [
        (f"paramiko put, {asked.files} files", one_by_one),
        ("push, sha256 included", lambda: push(box, pushes)),
    ]
    compare(asked.repeat, cases, clean)
    clean()


def cut(sshd: Sshd, near: Path, far: Path, remote: str, asked: argparse.Namespace) -> None:
    source = random_file(near / "cut", int(2 * asked.gib * 2**30))
    file = PushFile(source, f"{remote}/cut", sha256(source))
    for through_what in ("OpenSSH", "paramiko"):
        for way in ("push", "pull"):
            proxy = TimedCuts(sshd.port, asked.cut_every)
            with box_at(sshd, proxy.port) as box:
                began = time.perf_counter()
                push(box, [file], through_what) if way == "push" else pull(
                    box, file, near / "home", through_what
                )
                seconds = time.perf_counter() - began
            proxy.listener.close()
            extra = (proxy.up if way == "push" else proxy.down) - source.stat().st_size
            each = extra / max(proxy.cuts, 1) / 2**20
            print(
                f"{way}, {through_what}, cut each {asked.cut_every:.0f} s: {proxy.cuts} "
                f"cuts, {seconds:.1f} s, "
                f"{extra / 2**20:.2f} MiB more than the file on the wire, {each:.2f} a cut "
                f"(one chunk: {CHUNK / 2**20:.0f})",
                flush=True,
            )
            (near / "home" if way == "pull" else source.with_name("none")).unlink(missing_ok=True)
        for path in far.iterdir():
            path.unlink()


def random_file(path: Path, size: int) -> Path:
    with open(path, "wb") as file:
        for at in range(0, size, 1 << 24):
            file.write(os.urandom(min(1 << 24, size - at)))
    return path


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
