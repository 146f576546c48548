"""What is put into a bundle, and how it is to be."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ops.image.bundle import archive
from ops.image.bundle.inventory import Present
from ops.image.driver import Line
from ops.image.spec.lock import Lock, Model
from ops.image.update import Kept


@dataclass(frozen=True)
class Cargo:
    """What goes in: the whole lock of one build, the image with its layers on disk, and a folder for each model of the lock
    that is not in the image. ``line`` is the CUDA line of the image, ``lines`` every line of the project (for remedies).
    ``prove`` is the command that the image proves itself with, ``evidence`` its Python, or None."""

    lock: Lock
    image: archive.Image
    models: dict[str, Path]
    line: Line
    lines: tuple[Line, ...] = ()
    prove: tuple[str, ...] = ("python3", "-m", "trainer.checkup")
    evidence: str | None = "python3"
    memory_bytes: int = 4_000_000_000


@dataclass(frozen=True)
class Options:
    """``volume_bytes`` 0 leaves files whole (FAT32 holds 4 GiB less one byte). ``parity_members`` volumes share one parity file;
    0 writes none. ``base`` is what the server has: the bundle brings the rest; ``base_models`` are set digests that it has,
    ``kept`` the small files of its last bundle."""

    volume_bytes: int = 0
    parity_members: int = 8
    base: Present | None = None
    base_models: frozenset[str] = frozenset()
    kept: Kept = field(default_factory=dict)
    key: Path | None = None


def models_beside(cargo: Cargo, options: Options) -> list[Model]:
    """The models that travel as files: not in the image, and not on the server."""
    return [m for m in cargo.lock.models if not m.bundled and m.set_digest not in options.base_models]
