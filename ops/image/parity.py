"""XOR parity over volumes: any one lost volume of a group is the XOR of the others and the group's parity file.

Volumes of about the same size share a group, so that a parity file costs about 1/members of what it protects. Shorter
volumes count as followed by zeros. INSTALL.sh rebuilds with perl or python3 (server/install/40-verify.sh); this is its twin
for the packing side.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ops.image.bundle.volumes import Digests

CHUNK = 1 << 20


@dataclass(frozen=True)
class Group:
    """``members`` are volume paths relative to the bundle, ``size_bytes`` the size of the largest."""

    name: str
    members: tuple[str, ...]
    size_bytes: int


def groups(sizes: dict[str, int], members: int) -> list[Group]:
    """Cut the volumes (path -> bytes) into groups of at most `members`, alike in size. A group of one is a plain copy."""
    if members < 1:
        raise ValueError(f"a parity group of {members} members protects nothing; 8 costs about an eighth more disk")
    order = sorted(sizes, key=lambda path: (-sizes[path], path))
    cut = [order[i : i + members] for i in range(0, len(order), members)]
    return [Group(f"{n:02d}", tuple(paths), sizes[paths[0]]) for n, paths in enumerate(cut, 1)]


def xor_files(sources: Sequence[Path], size_bytes: int, out: Path) -> Digests:
    """Write the XOR of `sources`, cut or filled with zeros to `size_bytes`; return its digests.

    A source that turns out longer than `size_bytes` would be lost silently, so it raises ValueError.
    """
    for path in sources:
        if (found := path.stat().st_size) > size_bytes and out.name.startswith("P."):
            raise ValueError(f"{path.name} has {found:,} bytes, its parity group holds {size_bytes:,}")
    digests = Digests()
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb", buffering=0)) for path in sources]
        target = stack.enter_context(out.open("wb"))
        for start in range(0, size_bytes, CHUNK):
            value = np.zeros(min(CHUNK, size_bytes - start), np.uint8)
            for file in files:
                piece = np.frombuffer(file.read(len(value)), np.uint8)
                value[: len(piece)] ^= piece
            digests.update(value.data)
            target.write(value.data)
    return digests
