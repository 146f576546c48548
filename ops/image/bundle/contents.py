"""What is put into a bundle, and how it is to be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ops.hardware.driver import CudaLine
from ops.image.bundle import archive
from ops.image.bundle.inventory import Present
from ops.image.spec.lock import Lock, Model

PROVE = ("python3", "-m", "trainer.checkup")  # the image's self-test


@dataclass(frozen=True)
class Contents:
    """What goes in: the lock of one built image, the image with its layers on disk, a folder for
    each model of the lock.

    ``line`` is the CUDA line of the image, ``lines`` every line of the project (for remedies).
    ``prove`` is the command by which the image proves itself, ``python`` its Python. ``documents``
    are files for docs/ in the bundle, by name.
    """

    lock: Lock
    image: archive.Image
    models: dict[str, Path]
    line: CudaLine
    lines: tuple[CudaLine, ...] = ()
    prove: tuple[str, ...] = PROVE
    python: str = "python3"
    memory_bytes: int = 4_000_000_000
    documents: dict[str, Path] | None = None


@dataclass(frozen=True)
class Options:
    """``release`` orders the bundles of one image: a server takes no smaller one without
    --allow-older. ``volume_bytes`` 0 leaves files whole (FAT32 holds 4 GiB less one byte). ``base``
    is what the server has: the bundle brings the layers that changed and those above them.
    ``base_models`` are the set digests of models that it has. ``key`` signs."""

    release: int = 1
    volume_bytes: int = 0
    base: Present | None = None
    base_models: frozenset[str] = frozenset()
    key: Path | None = None


def models_beside(contents: Contents, options: Options) -> list[Model]:
    """The models that travel as files: those that the server has not."""
    return [model for model in contents.lock.models if model.set_digest not in options.base_models]
