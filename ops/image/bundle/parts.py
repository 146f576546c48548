"""The archives of a bundle and their order: each is one ``docker load``, and any number of them
from the first is an image.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from ops.image.bundle.archive import Image
from ops.image.bundle.inventory import Present, shared_prefix

# neighbours share an archive up to this size: an engine takes a quarter of a second for any
SMALL_BYTES = 32_000_000


@dataclass(frozen=True)
class Part:
    """One archive: carries the layers ``first`` to ``last``, counted from 1, and lists all below
    them.
    """

    first: int
    last: int

    @property
    def carried(self) -> range:
        return range(self.first, self.last + 1)


def plan_parts(image: Image, base: Present | None) -> list[Part]:
    """The archives of a bundle, bottom up: all layers, or those above what the image has in common
    with ``base``.

    A bundle of models alone has none. An update whose layers are all there carries the last one
    again, because that archive brings the image's config.
    """
    if not image.layers:
        return []
    shared = shared_prefix(base.layers, image.diff_ids) if base else 0
    shared = min(shared, len(image.layers) - 1)
    parts: list[Part] = []
    for number in range(shared + 1, len(image.layers) + 1):
        if parts:
            joined = Part(parts[-1].first, number)
            if sum(image.layers[k - 1].blob_bytes for k in joined.carried) <= SMALL_BYTES:
                parts[-1] = joined
                continue
        parts.append(Part(number, number))
    return parts


def part_name(image: Image, part: Part) -> str:
    """Says which layers; its last digits are of their content, so that parts of two bundles are
    told apart by name.
    """
    held = [image.layers[k - 1] for k in part.carried]
    digest = hashlib.sha256("".join(layer.blob_sha256 for layer in held).encode()).hexdigest()[:8]
    names = safe(held[0].name) if len(held) == 1 else f"to-{part.last:02d}"
    return f"parts/{part.first:02d}-{names}-{digest}.tar"


def part_tag(image: Image, part: Part) -> str:
    """What the image is called once this part is loaded."""
    return (
        final_tag(image)
        if part.last == len(image.layers)
        else f"{intermediate_tag(image)}-{part.last:02d}"
    )


def bundle_id(image: Image) -> str:
    """Twelve digits of the image's config digest: two bundles with the same id bring the same
    image.
    """
    return image.config_digest.removeprefix("sha256:")[:12]


def final_tag(image: Image) -> str:
    """What the loaded image is called. Made of its content, so that an update never takes the name
    of what runs now.
    """
    return f"{image.tag.rpartition(':')[0] or image.tag}:{bundle_id(image)}"


def intermediate_tag(image: Image) -> str:
    """The beginning of the tags of the images that exist while a bundle is loaded."""
    return f"{image.tag.rpartition(':')[0] or image.tag}:part-{bundle_id(image)[:8]}"


def safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)
