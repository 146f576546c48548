# ruff: noqa: E501, SIM905 - figures and shell text in one piece
"""Measures what a bundle costs on a real engine; not a test. Empties the engine of the bundle's images between measurements.

    python tests/image/measure.py load BUNDLE DATA_ROOT      extra disk and time: one plain `docker load` against INSTALL.sh
    python tests/image/measure.py verify BUNDLE              INSTALL.sh verify against the fastest tool on the same files
    python tests/image/measure.py repair BUNDLE              the largest volume lost and rebuilt
    python tests/image/measure.py model GIGABYTES FOLDER [FILES [IMAGE]]   copy and hash in one pass against a plain copy; IMAGE, which
                                                             the engine has and which sees FOLDER, lends its Python to a bare server
DOCKER_HOST names the engine; DATA_ROOT is a folder on the file system of its data root, which nothing else should write to.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path


def used(folder: Path) -> int:
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def peak_of(folder: Path, work: Callable[[], object]) -> tuple[float, int, int]:
    """Seconds, bytes added at the end, most bytes added at any moment (sampled every 10 ms)."""
    os.sync()
    before, most, done = used(folder), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, used(folder) - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    work()
    seconds = time.monotonic() - began
    done.set()
    watcher.join()
    os.sync()
    return seconds, used(folder) - before, most


def plan(bundle: Path, key: str) -> list[list[str]]:
    text = "".join((bundle / name).read_text() for name in ("PLAN", "FACTS"))
    return [line.split()[1:] for line in text.splitlines() if line.split()[0] == key]


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True).stdout


def empty(bundle: Path) -> None:
    repository = plan(bundle, "ref")[0][0].rpartition(":")[0]
    ids = docker("images", "-q", "--filter", f"reference={repository}").split()
    if ids:
        docker("rmi", "-f", *sorted(set(ids)))
    time.sleep(2)  # the engine frees layers after it has answered; a measurement, not a synchronisation


def load(bundle: Path, data_root: Path) -> None:
    layers = plan(bundle, "layer")
    final, largest = sum(int(x[2]) for x in layers), max(int(x[4]) for x in layers)
    whole = Path(tempfile.mkdtemp(dir=bundle.parent)) / "whole.tar"
    merge(bundle, whole)
    for turn in range(int(os.environ.get("TURNS", "2"))):
        empty(bundle)
        print(f"turn {turn + 1}: plain docker load  {show(peak_of(data_root, lambda: docker('load', '-q', '-i', str(whole))), final, largest)}", flush=True)
        empty(bundle)
        print(f"turn {turn + 1}: every part by hand {show(peak_of(data_root, lambda: by_hand(bundle)), final, largest)}", flush=True)
        empty(bundle)
        seconds, end, most = peak_of(data_root, lambda: installed(bundle))
        print(f"turn {turn + 1}: INSTALL.sh         {show((installed.seconds, max(end, 1), most), final, largest)} (all of it {seconds:.1f} s)", flush=True)  # type: ignore[attr-defined]
    empty(bundle)
    shutil.rmtree(whole.parent)


def show(measured: tuple[float, int, int], final: int, largest: int) -> str:
    seconds, end, most = measured
    return f"{seconds:6.1f} s, final +{end / 1e6:,.0f} MB, peak +{most / 1e6:,.0f} MB = {most / end:.3f} of final; layers {final / 1e6:,.0f} + largest part {largest / 1e6:,.0f} MB"


def by_hand(bundle: Path) -> None:
    for step in plan(bundle, "step"):
        docker("load", "-q", "-i", str(bundle / step[2]))


def installed(bundle: Path) -> None:
    """INSTALL.sh; `installed.seconds` is from the first layer to the proof."""
    with tempfile.TemporaryDirectory(dir=bundle.parent) as prefix:
        # --force: an image for GPUs is loaded on a machine without one too; it fails its proof, after what is measured
        command = ["sh", str(bundle / "INSTALL.sh"), "--prefix", prefix, "--no-models", "--force"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        first = last = 0.0
        for line in process.stdout:
            if line.startswith("image") and not first:
                first = time.monotonic()
            if line.startswith("prove"):
                last = time.monotonic()
        process.wait()
        installed.seconds = last - first  # type: ignore[attr-defined]


def merge(bundle: Path, out: Path) -> None:
    """One archive with every layer: the metadata of the last part and the blobs of all."""
    import tarfile

    with tarfile.open(out, "w", format=tarfile.GNU_FORMAT) as target:
        for step in reversed(plan(bundle, "step")):
            with tarfile.open(bundle / step[2]) as part:
                for member in part:
                    blobs = {x[3] for x in plan(bundle, "layer")}
                    if step[1] == plan(bundle, "step")[-1][1] or member.name.rpartition("/")[2] in blobs:
                        target.addfile(member, part.extractfile(member))


def verify(bundle: Path) -> None:
    files = [str(p) for p in bundle.rglob("*") if p.is_file()]
    size = sum(os.path.getsize(f) for f in files)
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL)  # every measurement with the same warm cache
    best: dict[str, float] = {}
    for _ in range(5):
        for name, command in {
            "INSTALL.sh verify": ["sh", str(bundle / "INSTALL.sh"), "verify", "--prefix", "/nonexistent/milktea"],
            "openssl dgst": ["openssl", "dgst", "-sha256", *files],
            "sha256sum": ["sha256sum", *files],
        }.items():
            began = time.monotonic()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            best[name] = min(best.get(name, 1e9), time.monotonic() - began)
    for name, seconds in best.items():
        print(f"{name:18} {seconds:6.2f} s  {size / seconds / 1e9:.2f} GB/s  {seconds / best['openssl dgst']:.2f} of openssl alone")


def repair(bundle: Path) -> None:
    volume = max(plan(bundle, "vol"), key=lambda v: int(v[1]))
    path = bundle / volume[0]
    hidden = path.with_suffix(".hidden")
    for tool in ("perl", "python3"):
        path.rename(hidden)
        with tempfile.TemporaryDirectory(dir=bundle.parent) as prefix, tempfile.TemporaryDirectory() as only:
            for name in "sh basename cat chmod cp cut date dd df dirname head id ln mkdir mkfifo mktemp mv nproc printf rm sha256sum sort stat sync tail tee tr uname wc openssl".split():
                os.symlink(shutil.which(name) or name, f"{only}/{name}")
            os.symlink(os.path.realpath(sys.executable if tool == "python3" else "/usr/bin/perl"), f"{only}/{tool}")
            script = (bundle / "INSTALL.sh").read_text()
            timed = script.replace('xor_files "$_size" "$_out.part" "$@" ||', 'date +%s.%N >&2; xor_files "$_size" "$_out.part" "$@"; date +%s.%N >&2; [ -s "$_out.part" ] ||')
            timed = timed.replace("verify_small\n    case", ":\n    case")
            (Path(only) / "INSTALL.sh").write_text(timed.replace('BUNDLE=$(cd "$(dirname "$0")" && pwd)', f"BUNDLE={bundle}"))
            done = subprocess.run(["sh", f"{only}/INSTALL.sh", "repair", "--prefix", prefix], capture_output=True, text=True, env={"PATH": only})
            rebuilt = next(Path(prefix).rglob(path.name), None)
            same = rebuilt is not None and rebuilt.read_bytes() == hidden.read_bytes()
            began, ended = map(float, [x for x in done.stderr.split() if x.replace(".", "").isdigit()][:2])
            group = [v for v in plan(bundle, "vol") if v[3] == volume[3]]
            read = sum(int(v[1]) for v in group)
            print(f"{tool:8} {volume[0]} of {int(volume[1]) / 1e6:.0f} MB rebuilt in {ended - began:.2f} s = {int(volume[1]) / (ended - began) / 1e6:.0f} MB/s written, {read / (ended - began) / 1e6:.0f} MB/s read ({len(group)} in the group), identical: {same}")
        hidden.rename(path)


def model(gigabytes: float, folder: Path, files: int = 2, image: str = "") -> dict[str, float]:
    """A model of some files, in the page cache, installed by INSTALL.sh, against `cp` and a sync of them; best of 5 each. With
    the best hasher of this machine, with coreutils alone, and with coreutils and the image's Python."""
    size = int(gigabytes * 1e9 / files)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        sources = [Path(work, f"source-{n}") for n in range(files)]
        rows = [f"model set {size * files} org/model MIT", "evidence python3"]
        for source in sources:
            data = b"".join(os.urandom(10_000_000) for _ in range(size // 10_000_000))
            source.write_bytes(data)
            sha256, blake2 = hashlib.sha256(data).hexdigest(), hashlib.blake2b(data, digest_size=32).hexdigest()
            rows += [f"vol {source.name} {len(data)} {sha256} - {blake2}", f"mfile set {len(data)} {sha256} {source.name} {source.name}"]
        Path(work, "PLAN").write_text("".join(f"{row}\n" for row in rows))
        install = Path(__file__).parents[2] / "ops/image/server/install"
        text = "".join((install / n).read_text() for n in ("00-head.sh", "10-plan.sh", "40-verify.sh", "50-load.sh"))
        call = f"BUNDLE={work} WORK={work} PREFIX={work}/prefix ID=x STAGES='' REF={image}\nexec 3>&1\nchoose_hasher\ninstall_models"
        Path(work, "install.sh").write_text(f"{text}\n{call}\n")
        jail, docker = Path(work, "jail"), Path(work, "docker")
        for place, tools in ((jail, "b2sum basename cat chmod cp cut dirname id ln mkdir mkfifo mv nproc rm sh sha256sum stat sync tr wc"), (docker, "docker")):
            place.mkdir()
            for name in tools.split():
                (place / name).symlink_to(shutil.which(name) or name)
        names = " ".join(map(str, sources))
        best: dict[str, float] = {}
        for _ in range(5):
            ways = {
                "openssl dgst -sha256": (["openssl", "dgst", "-sha256", *map(str, sources)], ""),
                "cp, sync": (["sh", "-c", f"mkdir -p {work}/prefix && cp {names} {work}/prefix && sync {work}/prefix/*"], ""),
                "INSTALL.sh (copy, hash, sync)": (["sh", f"{work}/install.sh"], ""),
                "INSTALL.sh, coreutils alone": (["sh", f"{work}/install.sh"], str(jail)),
                **({"INSTALL.sh, coreutils, image": (["sh", f"{work}/install.sh"], f"{jail}:{docker}")} if image else {}),
                "cp, sync, sha256sum": (["sh", "-c", f"mkdir -p {work}/prefix && cp {names} {work}/prefix && sync {work}/prefix/* && sha256sum {work}/prefix/*"], ""),
            }
            for name, (command, path) in ways.items():
                shutil.rmtree(f"{work}/prefix", ignore_errors=True)
                os.sync()
                began = time.monotonic()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PATH": path or os.environ["PATH"]})
                best[name] = min(best.get(name, 1e9), time.monotonic() - began)
        for name, seconds in best.items():
            print(f"{name:30} {seconds:6.2f} s  {size * files / seconds / 1e6:.0f} MB/s  {seconds / best['cp, sync']:.2f} of a plain copy")
    return best


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or ["help"]
    if what == "model" and len(rest) in (2, 3, 4):
        model(float(rest[0]), Path(rest[1]), *map(int, rest[2:3]), *rest[3:])
    elif what == "load" and len(rest) == 2:
        load(Path(rest[0]).resolve(), Path(rest[1]))
    elif what in ("verify", "repair") and len(rest) == 1:
        {"verify": verify, "repair": repair}[what](Path(rest[0]).resolve())
    else:
        sys.exit(__doc__)
