"""How fast push and pull are: `python -m bench.transfer [--rate 100mbit] [--only big]`

Against OpenSSH's own sshd on loopback, with a key and a home of its own. `--rate` shapes loopback
with tc in a network namespace of this process; data and acknowledgements share the rate. Both ends
share the machine's cores. Prints one line a case: the median, MB/s, this side's mean CPU time,
every sample. Ours includes sha256 at both ends, scp and plain SFTP do not. The first pull is
the first on its connection. Needs sshd, and scp as the yardstick; for `--rate` unshare, ip and tc.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paramiko

from ops.box.connection import Box, Endpoint
from ops.box.pull import pull
from ops.box.push import push
from ops.box.transfer import PushFile, sha256_of
from ops.box.transport import HOST_ALIAS

SHAPED = """ip link set lo up mtu 1500 &&
tc qdisc add dev lo root tbf rate "$0" burst 256kb latency 100ms &&
exec "$@" """


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


def fetch(box: Box, file: PushFile, home: Path) -> None:
    pull(box, file.remote, home, file.sha256, max_bytes=file.local.stat().st_size)


def compare(repeat: int, size_bytes: int, cases: list[Case], clean: Callable[[], None]) -> None:
    """Median seconds of each. Taken in turns, so that a busy machine slows all of them alike."""
    seconds: dict[str, list[float]] = {label: [] for label, _ in cases}
    cpu_s = dict.fromkeys(seconds, 0.0)
    for _ in range(repeat):
        for label, work in cases:
            clean()
            began, spent = time.perf_counter(), sum(os.times()[:4])
            work()
            seconds[label].append(time.perf_counter() - began)
            cpu_s[label] += (sum(os.times()[:4]) - spent) / repeat
    for label, took in seconds.items():
        middle = statistics.median(took)
        samples = ", ".join(f"{s:.2f}" for s in took)
        rate = size_bytes / middle / 1e6
        cpu = f"{cpu_s[label]:5.2f} s of CPU here"
        print(f"{label:27}{middle:7.2f} s {rate:6.1f} MB/s  {cpu}  ({samples})", flush=True)


@contextlib.contextmanager
def box_at(sshd: Sshd, port: int) -> Iterator[Box]:
    user = os.environ.get("USER") or "root"
    with Box(
        [Endpoint("127.0.0.1", port)], user, sshd.key, sshd.folder / "known_hosts", retry_s=0.1
    ) as box:
        box.connect(20)
        yield box


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--gib", type=float, default=1.0)
    ask.add_argument("--files", type=int, default=5000)
    ask.add_argument("--repeat", type=int, default=5)
    ask.add_argument("--cut-every", type=float, default=5.0)
    ask.add_argument("--rate", help="shape loopback to this, as tc writes it: 100mbit, 1gbit")
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    ask.add_argument("--folder", default=memory, help="of both ends' files; memory by default")
    ask.add_argument("--only", choices=["big", "small", "cut"])
    args = ask.parse_args()
    if args.rate:
        sys.exit(run_shaped(args))
    cases = {"big": big, "small": small, "cut": cut}
    with contextlib.ExitStack() as stack:
        near = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder)))
        far = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder)))
        remote = f".milktea-bench-{far.name}"
        (Path.home() / remote).symlink_to(far)
        stack.callback((Path.home() / remote).unlink)
        sshd = Sshd(near)
        stack.callback(sshd.close)
        for name, measure in cases.items():
            if args.only in (None, name):
                measure(sshd, near, far, remote, args)


def run_shaped(args: argparse.Namespace) -> int:
    """This same command without `--rate`, where loopback has that rate. Returns its exit code."""
    flags = {k.replace("_", "-"): v for k, v in vars(args).items() if v and k != "rate"}
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    alone = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    command = [sys.executable, "-m", "bench.transfer", *words]
    print(f"loopback at {args.rate}", flush=True)
    return subprocess.run([*alone, "sh", "-c", SHAPED, args.rate, *command]).returncode


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def scp_command(box: Box) -> list[str]:
    options = {
        "IdentityFile": box.key_path,
        "IdentitiesOnly": "yes",
        "UserKnownHostsFile": box.known_hosts,
        "HostKeyAlias": HOST_ALIAS,
        "Ciphers": "aes128-gcm@openssh.com",
    }
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    return ["scp", "-q", "-F", "/dev/null", "-P", str(box.endpoints[0].port), *words]


def big(sshd: Sshd, near: Path, far: Path, remote: str, args: argparse.Namespace) -> None:
    source, home = random_file(near / "big", int(args.gib * 2**30)), near / "home"
    size = source.stat().st_size
    file = PushFile(source, f"{remote}/big", sha256_of(source))
    with box_at(sshd, sshd.port) as box:
        scp, there = scp_command(box), f"{box.user}@127.0.0.1:{remote}/big"
        cases: list[Case] = [
            ("scp there", lambda: subprocess.run([*scp, str(source), there], check=True)),
            ("push, sha256 included", lambda: push(box, [file])),
        ]
        compare(args.repeat, size, cases, lambda: empty(far))
        back: list[Case] = [
            ("scp home", lambda: subprocess.run([*scp, there, str(home)], check=True)),
            ("pull, sha256 included", lambda: fetch(box, file, home)),
        ]
        compare(args.repeat, size, back, lambda: home.unlink(missing_ok=True))
    home.unlink()
    empty(far)


def small(sshd: Sshd, near: Path, far: Path, remote: str, args: argparse.Namespace) -> None:
    (near / "small").mkdir()
    names = [near / "small" / f"{i:05}" for i in range(args.files)]
    files = [random_file(name, 500 + 7 * (i % 500)) for i, name in enumerate(names)]
    pushes = [PushFile(f, f"{remote}/{f.name}", sha256_of(f)) for f in files]
    with box_at(sshd, sshd.port) as box:

        def one_by_one() -> None:
            session: paramiko.SFTPClient = box._fabric.sftp()  # type: ignore[union-attr]
            for f in files:
                session.put(str(f), f"{remote}/{f.name}")

        cases: list[Case] = [
            (f"paramiko put, {args.files} files", one_by_one),
            ("push, sha256 included", lambda: push(box, pushes)),
        ]
        size = sum(f.stat().st_size for f in files)
        compare(args.repeat, size, cases, lambda: empty(far))
    empty(far)


def cut(sshd: Sshd, near: Path, far: Path, remote: str, args: argparse.Namespace) -> None:
    source, home = random_file(near / "cut", int(2 * args.gib * 2**30)), near / "home"
    file = PushFile(source, f"{remote}/cut", sha256_of(source))
    for way in ("push", "pull"):
        proxy = TimedCuts(sshd.port, args.cut_every)
        with box_at(sshd, proxy.port) as box:
            began = time.perf_counter()
            if way == "push":
                push(box, [file])
            else:
                fetch(box, file, home)
            seconds = time.perf_counter() - began
        proxy.listener.close()
        extra = (proxy.up if way == "push" else proxy.down) - source.stat().st_size
        print(
            f"{way}, cut each {args.cut_every:.0f} s: {proxy.cuts} cuts, {seconds:.1f} s, "
            f"{extra / 2**20:.2f} MiB more than the file on the wire, "
            f"{extra / max(proxy.cuts, 1) / 2**20:.2f} a cut",
            flush=True,
        )
    home.unlink()
    empty(far)


def random_file(path: Path, size: int) -> Path:
    with open(path, "wb") as file:
        for at in range(0, size, 1 << 24):
            file.write(os.urandom(min(1 << 24, size - at)))
    return path


if __name__ == "__main__":
    main()
