"""What a server has, from the lines of ``sh INSTALL.sh preflight --facts`` carried home: the next
bundle holds the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from ops.errors import ConfigError
from ops.hardware import driver

HOW = "on the server: sh INSTALL.sh preflight --facts > server.txt"
MAX_BYTES = 4_000_000


@dataclass(frozen=True)
class Gpu:
    name: str
    driver: str
    capability: str


@dataclass(frozen=True)
class Present:
    """One image on the server; ``layers`` are its DiffIDs from the bottom up."""

    ref: str
    layers: list[str]


@dataclass(frozen=True)
class Inventory:
    gpus: tuple[Gpu, ...] = ()
    images: tuple[Present, ...] = ()
    models: frozenset[str] = frozenset()

    def base_for(self, diff_ids: list[str]) -> Present | None:
        """The image that shares the most lowest layers with ``diff_ids``; None where none shares
        any.
        """
        best = max(
            self.images, key=lambda image: shared_prefix(image.layers, diff_ids), default=None
        )
        return best if best and shared_prefix(best.layers, diff_ids) else None

    def compatible_lines(self, lines: list[driver.CudaLine]) -> list[str]:
        """The CUDA lines that every GPU of the server runs. A GPU that nvidia-smi did not describe
        fits none.
        """
        known = [gpu for gpu in self.gpus if gpu.capability != "?"]
        if not known or len(known) < len(self.gpus):
            return []
        return [line.name for line in lines if line.cuda and all(_runs(gpu, line) for gpu in known)]


def read(path: Path) -> Inventory:
    """Raises ConfigError that says what the file is not."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist", hint=HOW)
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(
            f"{path} is no inventory of a server: {path.stat().st_size:,} bytes", hint=HOW
        )
    lines = path.read_text("utf-8", "replace").splitlines()
    if not lines or lines[0] != "milktea-server 1":
        raise ConfigError(
            f"{path} is no inventory of a server: its first line is not 'milktea-server 1'",
            hint=HOW,
        )
    gpus: list[Gpu] = []
    images: list[Present] = []
    models: set[str] = set()
    for line in lines[1:]:
        key, _, rest = line.partition(" ")
        if key == "gpu" and len(fields := [field.strip() for field in rest.split(",")]) >= 3:
            gpus.append(Gpu(fields[0], fields[1], fields[2]))
        elif key == "image":
            images.append(Present(rest, []))
        elif key == "layer" and images:
            images[-1].layers.append(rest)
        elif key == "model":
            models.add(f"sha256:{rest}")
    return Inventory(tuple(gpus), tuple(images), frozenset(models))


def shared_prefix(a: list[str], b: list[str]) -> int:
    """How many leading items two lists share."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return len(list(same))


def _runs(gpu: Gpu, line: driver.CudaLine) -> bool:
    return driver.judge(gpu.driver, gpu.capability, driver.is_data_center(gpu.name), line).runs
