"""The archives of a bundle and their order: each `docker load` goes one step up, and any number of steps is a valid image."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass

from ops.image.bundle.archive import Image
from ops.image.bundle.inventory import Present, shared_prefix

SMALL_BYTES = 32_000_000
BATCH_BYTES = 256_000_000  # unchanged layers are given back to the engine in archives of about this size, or one layer's


@dataclass(frozen=True)
class Step:
    """One `docker load`: brings layers first..last, of which ``carry`` are in the file, ``reuse`` come from the server as they
    are, and ``rebuilt`` are put together there by a recipe (ops/image/update.py)."""

    first: int
    last: int
    carry: tuple[int, ...]
    reuse: tuple[int, ...] = ()
    rebuilt: tuple[int, ...] = ()

    @property
    def borrowed(self) -> tuple[int, ...]:
        """The layers that are not in the file, in the image's order."""
        return tuple(sorted(self.reuse + self.rebuilt))


def plan_steps(image: Image, base: Present | None, rebuilt: Collection[int] = ()) -> list[Step]:
    """Which archives the bundle holds. Full: every layer of SMALL_BYTES or more in its own, runs of smaller ones together (an
    engine takes a quarter of a second for any archive). Update: what lies above the layers shared with the base, each new layer
    carried or rebuilt; once an unchanged layer lies above a changed one, archives of mixed origin, of about BATCH_BYTES."""
    shared = shared_prefix(base.layers, image.diff_ids) if base else 0
    has = set(base.layers) if base else set()
    limit = max(BATCH_BYTES, max(layer.size_bytes for layer in image.layers))
    steps: list[Step] = []
    for k, layer in enumerate(image.layers[shared:], shared + 1):
        if layer.diff_id in has:
            new = Step(k, k, (), reuse=(k,))
        elif k in rebuilt:
            new = Step(k, k, (), rebuilt=(k,))
        else:
            new = Step(k, k, (k,))
        both = _joined(steps[-1], new) if steps else new
        held = image.layers[both.first - 1 : k]
        small = sum(x.blob_bytes for x in held) <= SMALL_BYTES
        joins = sum(x.size_bytes for x in held) <= limit if both.reuse else small
        steps = [*steps[:-1], both] if steps and joins else [*steps, new]
    return steps


def _joined(one: Step, two: Step) -> Step:
    return Step(one.first, two.last, one.carry + two.carry, one.reuse + two.reuse, one.rebuilt + two.rebuilt)


def step_name(image: Image, step: Step) -> str:
    """Says which layers; its last digits are of their content, so that parts of two bundles are told apart by their names."""
    held = image.layers[step.first - 1 : step.last]
    if len(held) == 1 and step.carry:
        return f"parts/{step.first:02d}-{safe(held[0].name)}-{held[0].blob_sha256[:8]}.tar"
    borrows = f"{bundle_id(image)} {step.borrowed}".encode() if step.borrowed else b""
    mark = hashlib.sha256("".join(x.blob_sha256 for x in held).encode() + borrows).hexdigest()
    return f"parts/{step.first:02d}-to-{step.last:02d}-{mark[:8]}.tar"


def step_tag(image: Image, step: Step) -> str:
    return final_tag(image) if step.last == len(image.layers) else f"{stair(image)}-{step.last:02d}"


def bundle_id(image: Image) -> str:
    """Twelve digits of the image's config digest: two bundles with the same id bring the same image."""
    return image.config_digest.removeprefix("sha256:")[:12]


def final_tag(image: Image) -> str:
    """What the loaded image is called. Made of its content, so that an update never takes the name of what runs now."""
    return f"{image.tag.rpartition(':')[0] or image.tag}:{bundle_id(image)}"


def stair(image: Image) -> str:
    """The beginning of the tags of the images that exist while a bundle is loaded."""
    return f"{image.tag.rpartition(':')[0] or image.tag}:stair-{bundle_id(image)[:8]}"


def safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)
