"""Python packages: resolved by pip into a closed set of wheels, pinned by hash, fetched through
whatever index pip is told to use.

An index, a proxy or a certificate is pip's own configuration on this machine (pip.conf, PIP_*): it
reaches no lock and no layer.
"""

from __future__ import annotations

import email
import email.message
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ops.errors import PreflightError
from ops.image.spec.definition import Python
from ops.image.spec.lock import Wheel
from trainer.wire.digest import sha256_of

Progress = Callable[[str], None]
GLIBC = 36  # Debian 12 has glibc 2.36: wheels for an older one run too (PEP 600)


def normalize(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _one(names: list[str], pattern: str) -> str:
    found = [name for name in names if re.fullmatch(pattern, name)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} files {pattern} in it, not one")
    return found[0]


def resolve(
    spec: Python, requirements: Sequence[str], cache: Path, progress: Progress
) -> list[Wheel]:
    """The closure of ``requirements`` as wheels in ``cache``, and the sources of ``spec``; sorted
    by name, not yet given to layers.

    Downloads what pip chooses today. Raises PreflightError with pip's last words.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        progress(f"resolving {len(requirements)} requirements for Python {spec.version}")
        _download(spec, ["--only-binary=:all:", *requirements], Path(folder))
        if spec.sources:
            _download(spec, ["--no-deps", *spec.sources], Path(folder))
        found = sorted(Path(folder).iterdir())
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            locked = list(pool.map(lock, found))
        for path, wheel in zip(found, locked, strict=True):
            _keep(path, wheel, cache)
    return sorted(locked, key=lambda wheel: wheel.name)


def fetch(spec: Python, locked: Iterable[Wheel], cache: Path, progress: Progress) -> None:
    """Every wheel into ``cache``, checked against the lock. Only what is missing is fetched."""
    if missing := [wheel for wheel in locked if not is_whole(wheel, cache)]:
        progress(
            f"fetching {len(missing)} wheels,"
            f" {sum(wheel.size_bytes for wheel in missing) / 1e6:,.0f} MB"
        )
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            pins = Path(folder) / "requirements.txt"
            pins.write_text("".join(f"{pin(wheel)}\n" for wheel in missing))
            _download(spec, ["--no-deps", "--require-hashes", "-r", str(pins)], Path(folder))
            for wheel in missing:
                path = Path(folder) / wheel.file
                if not path.is_file() or sha256_of(path) != wheel.sha256:
                    raise PreflightError(
                        f"{wheel.name} {wheel.version}: the index has no {wheel.file} with sha256"
                        f" {wheel.sha256[:12]}",
                        hint="use an index that has it, or make image-lock and read the difference",
                    )
                _keep(path, wheel, cache)


def pin(wheel: Wheel) -> str:
    """One line of a requirements file that pip checks with --require-hashes."""
    return f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}"


def where(wheel: Wheel, cache: Path) -> Path:
    return cache / wheel.sha256[:16] / wheel.file


def is_whole(wheel: Wheel, cache: Path) -> bool:
    """Is the cached file the locked one? Hashed once; after that its size, time and inode are
    compared.
    """
    path = where(wheel, cache)
    if not path.is_file():
        return False
    stamp, facts = path.with_name("checked"), path.stat()
    seen = f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ino} {wheel.sha256}"
    if stamp.is_file() and stamp.read_text() == seen:
        return True
    if facts.st_size != wheel.size_bytes or sha256_of(path) != wheel.sha256:
        return False
    stamp.write_text(seen)
    return True


def _keep(path: Path, wheel: Wheel, cache: Path) -> None:
    target = where(wheel, cache)
    target.parent.mkdir(exist_ok=True)
    shutil.move(path, target)


def lock(path: Path) -> Wheel:
    """What a wheel, or a source, is and says of itself. Raises PreflightError where its METADATA is
    missing, which is how a half-downloaded file shows too.
    """
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                meta = archive.read(_one(archive.namelist(), r"[^/]+\.dist-info/METADATA"))
        else:
            with tarfile.open(path) as source:
                file = source.extractfile(_one(source.getnames(), r"[^/]+/PKG-INFO"))
                meta = file.read() if file else b""
        said = email.message_from_bytes(meta)
        return Wheel(
            name=normalize(said["Name"]),
            version=said["Version"],
            file=path.name,
            sha256=sha256_of(path),
            size_bytes=path.stat().st_size,
            layer="",
            license=_license(said),
        )
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError, TypeError, OSError) as why:
        raise PreflightError(
            f"{path.name} is not a whole package: {why}",
            hint="run it again: the download broke off",
        ) from why


def _download(spec: Python, what: list[str], folder: Path) -> None:
    """pip as it is configured here; then, where that has no answer, with the definition's public
    index as well. pip asks a source for its name, by running its setup.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
    ]
    index = ["--extra-index-url", spec.index] if spec.index else []
    for more in [[], index] if index else [[]]:
        done = subprocess.run(
            [*command, *_target(spec.version), *what, *more],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if not done.returncode:
            return
    errors = [
        line for line in done.stderr.splitlines() if line.startswith("ERROR")
    ] or done.stderr.strip().splitlines()
    raise PreflightError(
        f"pip cannot get the packages: {' '.join(errors[-2:])[-600:]}",
        hint=(
            "point pip at an index that has them: pip config set global.index-url URL, or"
            " PIP_INDEX_URL=URL"
        ),
    )


def _target(python: str) -> list[str]:
    """pip's words for Debian 12 on x86-64 with this Python."""
    platforms = [
        "linux_x86_64",
        *(f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)),
        "manylinux2014_x86_64",  # pip takes the older names for it along
    ]
    tags = ["--implementation", "cp", "--python-version", python]
    tags += [
        part for abi in (f"cp{python.replace('.', '')}", "abi3", "none") for part in ("--abi", abi)
    ]
    return tags + [part for platform in platforms for part in ("--platform", platform)]


def _license(meta: email.message.Message) -> str:
    if expression := str(meta.get("License-Expression") or ""):
        return " ".join(expression.split())
    classifiers = [str(line) for line in meta.get_all("Classifier", [])]
    named = [
        line.rpartition("::")[2].strip() for line in classifiers if line.startswith("License ::")
    ]
    named = [name for name in named if name != "OSI Approved"]
    first = str(meta.get("License") or "").strip().splitlines()
    return " AND ".join(sorted(named)) or (first[0][:80] if first else "")
