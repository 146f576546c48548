"""What came home, opened and compared with its manifest before the box may go."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.errors import AdapterError


@dataclass(frozen=True)
class Expect:
    base_model: str
    r: int
    data_sha256: tuple[str, ...]


@dataclass(frozen=True)
class Verified:
    sha256: str
    size_bytes: int
    tensors: int


def verify(path: Path, manifest: dict[str, Any], expect: Expect) -> Verified:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != manifest["adapter_sha256"]:
        raise AdapterError(f"adapter.zip has sha256 {found[:16]}, its manifest says {manifest['adapter_sha256'][:16]}")
    with zipfile.ZipFile(path) as z:
        if (bad := z.testzip()) is not None:
            raise AdapterError(f"adapter.zip: {bad} is damaged")
    return Verified(found, path.stat().st_size, len(manifest["tensors"]))
