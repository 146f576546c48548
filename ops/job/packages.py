"""Packages of the user's own on a rented box: `image.packages`, a requirements file of pip's in
which every package is pinned, installed beside the trainer's."""

from __future__ import annotations

import re
from pathlib import Path

from ops.box.transfer import PushFile, sha256_of
from ops.errors import PreflightError
from ops.job.job_file import JobFile

REMOTE = "packages/requirements.txt"  # in the run's folder; ops/box/bootstrap/trainer-start.sh
_BOX = Path(__file__).parents[1] / "box" / "bootstrap" / "trainer-requirements.txt"
_PIN = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[0-9][A-Za-z0-9.!+_-]*)"
    r"(?P<hashes>(?:\s+--hash=sha256:[0-9a-f]{64})*)"
)
_OF_THE_IMAGE = re.compile(r"torch|triton|torchvision|torchaudio|nvidia-.+|cuda-.+|pip|setuptools")


def packages(job: JobFile) -> list[PushFile]:
    """The requirements file as it is sent; none without one. Raises PreflightError for a file that
    is not there, for what is not pinned, and for a package that the trainer or the image has: those
    stay as they were tested."""
    path = job.image.packages
    if path is None:
        return []
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise PreflightError(f"image.packages: {path} cannot be read: {e}") from e
    pins = [_pin(line, path) for line in _lines(text)]
    known = {_plain(_pin(line, _BOX)["name"]) for line in _lines(_BOX.read_text("utf-8"))}
    taken = [
        name for p in pins if (name := _plain(p["name"])) in known or _OF_THE_IMAGE.fullmatch(name)
    ]
    if taken:
        raise PreflightError(
            f"image.packages: the trainer or the image has these: {', '.join(taken)}",
            hint="leave them out; what is installed there is not replaced",
        )
    if len({bool(p["hashes"]) for p in pins}) > 1:
        raise PreflightError(
            f"image.packages: some packages of {path} have hashes and some have none",
            hint="pip wants hashes of all or of none: `pip-compile --generate-hashes`",
        )
    return [PushFile(path, REMOTE, sha256_of(path))] if pins else []


def _lines(text: str) -> list[str]:
    """Without comments, continued lines joined."""
    joined = re.sub(r"\\\r?\n", " ", text)
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


def _pin(line: str, path: Path) -> re.Match[str]:
    """A line of a requirements file. Only ours has markers."""
    found = _PIN.fullmatch(re.sub(r"\s*;[^-]*(?=--hash|$)", " ", line) if path == _BOX else line)
    if found is None:
        raise PreflightError(
            f"image.packages: {path}: {line[:100]!r} is no pinned package",
            hint="NAME==VERSION, one a line, dependencies too (none is fetched by itself); no "
            "address, option or range",
        )
    return found


def _plain(name: str) -> str:
    """As PyPI compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()
