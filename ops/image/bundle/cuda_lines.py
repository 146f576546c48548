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
    """Architectures are as in the definition: ``8.0``, ``9.0a``; ``12.0+PTX`` also runs newer GPUs.

    Raises ConfigError for a toolkit that the driver table does not know."""
    if cuda is None:
        return CudaLine(name, None)
    toolkit = ".".join(cuda.toolkit.split(".")[:2])
    if toolkit not in NATIVE:
        raise ConfigError(
            f"images/{name}.toml: cuda.toolkit {cuda.toolkit} is unknown",
            hint="add its driver to NATIVE in ops/hardware/driver.py",
        )
    plain = [text.removesuffix("+PTX") for text in cuda.architectures]
    ptx = [one for one, text in zip(plain, cuda.architectures, strict=True) if one != text]
    return CudaLine(name, toolkit, tuple(plain), tuple(ptx))
