"""What the tests of INSTALL.sh share: a PATH with few programs, a flipped bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from machine import needs

from ops.hardware.driver import CudaLine
from ops.image.bundle import signature

CU130 = CudaLine("train-cu130", "13.0", ("7.5", "8.0", "9.0", "12.0"), ("12.0",))
CU126 = CudaLine("train-cu126", "12.6", ("5.0", "6.0", "7.0", "7.5", "8.0", "9.0"))
COREUTILS = (
    "cat chmod cp cut date df dirname head id mkdir mktemp mv nproc printf rm sha256sum "
    "sort stat tail timeout tr uname wc"
)


def jail(folder: Path, *more: str) -> str:
    """A PATH with sh, coreutils and nothing else."""
    folder.mkdir(exist_ok=True)
    names = ["sh", *COREUTILS.split(), *more]
    needs(*names)
    for name in names:
        (folder / name).symlink_to(shutil.which(name) or "")
    return str(folder)


def flip(file: Path, at: int, bit: int = 0) -> None:
    """Turn one bit of a file over; never through a hard link."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.unlink()
    file.write_bytes(data)


def script(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n" + text)
    (folder / name).chmod(0o755)


def docker_says(
    folder: Path,
    version: str = "24.0.7",
    runtimes: str = '{"nvidia":{},"runc":{}}',
    root: str = "/",
    store: str = "[]",
    cdi: str = "null",
) -> None:
    """A docker command with an engine's recorded answers and no images."""
    script(
        folder,
        "docker",
        f"""case "$*" in
    *Server.Version*) echo '{version}' ;; *DriverStatus*) echo '{store}' ;;
    *Runtimes*) echo '{runtimes}' ;; *CDISpecDirs*) echo '{cdi}' ;;
    *DockerRootDir*) echo '{root}' ;; *"{{{{.Driver}}}}"*) echo overlay2 ;; esac\n""",
    )


def checks(ran: Any) -> dict[str, dict[str, str]]:
    return read_checks(ran.out)


def read_checks(facts: str) -> dict[str, dict[str, str]]:
    """The checks of the facts of a preflight, by name."""
    rows = [
        line.removeprefix("check ").split("|", 4)
        for line in facts.splitlines()
        if line.startswith("check ")
    ]
    return {
        row[0]: dict(zip(("check", "verdict", "measured", "needed", "remedy"), row, strict=True))
        for row in rows
    }


def pinned(prefix: Path, key: Path, pem: bool = False) -> None:
    """A server that installed a bundle of this key."""
    (prefix / "keys").mkdir(parents=True)
    (prefix / "keys" / "sender").write_text(signature.fingerprint(Path(f"{key}.pub")) + "\n")
    if pem:
        shutil.copy(f"{key}.pem", prefix / "keys" / "sender.pem")
