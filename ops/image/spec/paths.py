"""Where the files of images lie: the committed ones in the checkout, what can be made again under
.milktea/.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """``root`` is the checkout."""

    root: Path = Path(__file__).resolve().parents[3]

    def definition(self, name: str) -> Path:
        return self.root / "images" / f"{name}.toml"

    def lock(self, name: str) -> Path:
        return self.root / "images" / f"{name}.lock"

    def budget(self, name: str) -> Path:
        return self.root / "images" / f"{name}.budget"

    def dockerfile(self, version: str) -> Path:
        return self.root / "docker" / version

    @property
    def released(self) -> Path:
        """Lines of sha256sum: the files of docker/ that belong to a released version and are never
        edited.
        """
        return self.root / "docker" / "released"

    @property
    def cache(self) -> Path:
        return self.root / ".milktea" / "cache"

    @property
    def debs(self) -> Path:
        return self.cache / "debs"

    @property
    def wheels(self) -> Path:
        return self.cache / "wheels"

    @property
    def models(self) -> Path:
        return self.cache / "models"

    @property
    def blobs(self) -> Path:
        """Layers by the sha256 of their gzip bytes, shared by all images."""
        return self.cache / "blobs"

    def image(self, name: str) -> Path:
        """The image that was exported last: config.json and image.lock; its layers are blobs in the
        cache.
        """
        return self.root / ".milktea" / "images" / name
