"""Every byte of an image attributed, and a limit that fails the build on growth
(images/NAME.budget).
"""

from __future__ import annotations

from pathlib import Path

from ops.errors import ConfigError
from ops.image.spec.definition import Budget
from ops.image.spec.lock import Lock


def over(lock: Lock, budget: Budget) -> list[str]:
    """What is over its limit, one sentence each."""
    sizes = {layer.name: layer.size_bytes for layer in lock.layers} | {"image": lock.size_bytes}
    limits = budget.layers | {"image": budget.image_bytes}
    return [
        f"{name} has {sizes[name]:,} bytes, {sizes[name] - most:,} more than its {most:,}"
        for name, most in sorted(limits.items())
        if sizes.get(name, 0) > most
    ]


def require(lock: Lock, budget: Budget | None, path: Path) -> None:
    """Raises ConfigError where the image has grown over its budget; an image without a budget file
    has no limit.
    """
    if budget is not None and (found := over(lock, budget)):
        hint = (
            f"milktea image size {lock.image} says what holds the bytes; prune, or raise the limit"
        )
        raise ConfigError(f"{path}: {'; '.join(found)}", hint=hint)


def attribution(lock: Lock) -> list[tuple[str, int, int, str]]:
    """Layer, bytes uncompressed, bytes that travel, what they are: they add up to the image, none
    is left over.
    """
    return [
        (layer.name, layer.size_bytes, layer.blob_bytes, ", ".join(layer.holds))
        for layer in lock.layers
    ]
