"""What the tests of INSTALL.sh share: a PATH with few programs, a flipped bit."""

from __future__ import annotations

import shutil
from pathlib import Path

from machine import needs

COREUTILS = (
    "cat chmod cp cut date df dirname head id mkdir mktemp mv nproc printf rm sha256sum "
    "sort stat tail tr uname wc"
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
