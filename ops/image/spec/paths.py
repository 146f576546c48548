"""Where the files of images lie: the committed ones in the checkout, what can be made again under
.milktea/.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from ops.errors import ConfigError


def checkout() -> Path:
    """The checkout that this module is in. An installed milktea is in none: then the current
    folder, which may be one."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "images").is_dir() else Path.cwd()


def link(source: Path, target: Path) -> None:
    """A hard link, so that nothing lies on the disk twice; a copy where there can be none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def safe_path(path: str) -> str:
    """The path of a file in a bundle, which a shell reads from PLAN and INSTALL.sh copies: raises
    ConfigError for one that would be cut in pieces there, leaves its folder, or is hidden.
    """
    if not re.fullmatch(r"(?!.*(^|/)[.-])[A-Za-z0-9._/+-]+", path) or path.startswith("/"):
        raise ConfigError(
            f"{path!r} cannot travel in a bundle: letters, digits and . _ / + - only",
            hint="rename it in the model's folder",
        )
    return path


@dataclass(frozen=True)
class Places:
    """``root`` is the checkout."""

    root: Path = field(default_factory=checkout)

    def validate(self) -> None:
        """Raises ConfigError where ``root`` is no checkout."""
        if not (self.root / "images").is_dir():
            raise ConfigError(
                f"images are made from a checkout of milktea: {self.root} has no images/",
                hint="run this in a checkout (git clone), where images/ and docker/ lie",
            )

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

    def built(self, name: str) -> Path:
        """The lock of the image that was exported last; its layers are blobs in the cache."""
        return self.root / ".milktea" / "images" / name / "image.lock"
