"""The CUDA lines that images/*.toml define, as the driver table judges them."""

from __future__ import annotations

from ops.errors import ConfigError
from ops.hardware.driver import NATIVE, CudaLine
from ops.image.spec import definition
from ops.image.spec.lock import Cuda
from ops.image.spec.paths import Places


def lines(places: Places = Places()) -> list[CudaLine]:
    """Every CUDA line that images/*.toml define."""
    found = [definition.read(path) for path in sorted(places.definition("x").parent.glob("*.toml"))]
    return [line_of(image.name, image.cuda) for image in found if image.cuda]


def line_of(name: str, cuda: Cuda | None) -> CudaLine:
    """Architectures are as in the definition: ``8.0``, ``sm_80``, ``9.0a``; ``12.0+PTX``,
    ``compute_120`` also run newer GPUs.

    Raises ConfigError for a toolkit that the driver table does not know."""
    if cuda is None:
        return CudaLine(name, None)
    toolkit = ".".join(cuda.toolkit.split(".")[:2])
    if toolkit not in NATIVE:
        raise ConfigError(
            f"images/{name}.toml: cuda.toolkit {cuda.toolkit} is unknown",
            hint="add its driver to NATIVE in ops/hardware/driver.py",
        )
    arches, ptx = [], []
    for text in cuda.architectures:
        number = _dotted(text.removeprefix("sm_").removeprefix("compute_").removesuffix("+PTX"))
        if not text.startswith("compute_"):
            arches.append(number)
        if text.startswith("compute_") or text.endswith("+PTX"):
            ptx.append(number)
    return CudaLine(name, toolkit, tuple(arches), tuple(ptx))


def _dotted(text: str) -> str:
    """``80`` and ``8.0`` are one; ``90a`` is ``9.0a``."""
    if "." in text:
        return text
    letter = text[-1] if text[-1].isalpha() else ""
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    return f"{digits[:-1]}.{digits[-1]}{letter}"
