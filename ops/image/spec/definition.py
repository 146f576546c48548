"""``images/NAME.toml``: what an image is, as a person decides it. The lock says which bytes that
came to.

A key that is not known is refused with its path. ``images/NAME.budget`` holds the most bytes that
the image and each of its layers may have.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ops.errors import ConfigError
from ops.image.spec.lock import Cuda, Lock, Strict, parse

Name = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9.-]{0,62}$")]
MODEL_NAME = "^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$"
ModelName = Annotated[str, Field(pattern=MODEL_NAME, max_length=96)]


class Os(Strict):
    """Debian. ``base`` is the image that the Dockerfile starts from, by digest. ``packages`` are
    read from docker/NAME/VERSION/debian/packages.txt."""

    suite: str
    base: Annotated[str, Field(pattern="@sha256:[0-9a-f]{64}$")]
    packages: list[str] = []


class Python(Strict):
    """``requirements`` are pip's, of wheels; ``sources`` those of packages that are published as
    source alone, which pip builds inside the image. ``index`` is the public index to ask where the
    configured one has no such version.
    """

    version: str
    requirements: list[str]
    sources: list[str] = []
    index: str | None = None


class ModelSource(Strict):
    """``source`` is ``hub:ID`` or ``folder:PATH`` (relative to the checkout). ``revision`` is the
    hub's commit; ``license`` overrules what the model's card says."""

    name: ModelName
    source: Annotated[str, Field(pattern="^(hub:.+/.+|folder:.+)$")]
    revision: str = ""
    license: str | None = None


class Definition(Strict):
    """One image. ``dockerfile`` is a folder under docker/; ``epoch`` (Unix seconds) is the time
    stamp of every file; ``layers`` names the RUN that installs a wheel by shell patterns, the first
    that fits."""

    schema_version: Literal[2]
    name: Name
    version: Annotated[int, Field(gt=0)]
    dockerfile: Annotated[str, Field(pattern="^[a-z0-9][a-z0-9.-]*/[0-9]+$")]
    platform: Literal["linux/amd64"]
    wire: int
    epoch: Annotated[int, Field(gt=0)]
    os: Os
    python: Python
    layers: dict[Name, list[str]]
    cuda: Cuda | None = None
    models: list[ModelSource] = []

    @property
    def tag(self) -> str:
        """What the built image is called in the engine."""
        return f"milktea/{self.name}:{self.version}"

    @property
    def sha256(self) -> str:
        """Of the meaning, not of the spelling: comments and the order of keys do not make a lock
        old.
        """
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


class Budget(Strict):
    """Most bytes, uncompressed, of the image and of its layers by name; a layer without a line has
    no limit of its own.
    """

    image_bytes: Annotated[int, Field(gt=0)]
    layers: dict[str, int] = {}


def read(path: Path) -> Definition:
    """The definition with its Debian packages; raises ConfigError naming the file and the first
    wrong key.
    """
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.toml"))) or "none"
        raise ConfigError(
            f"there is no image {path.stem!r} ({path})", hint=f"take one of {path.parent}: {known}"
        )
    definition = parse(Definition, path, f"edit {path}")
    if definition.name != path.stem:
        raise ConfigError(
            f"{path}: name is {definition.name!r}",
            hint=f'write name = "{path.stem}", or rename the file',
        )
    packages = path.parent.parent / "docker" / definition.dockerfile / "debian" / "packages.txt"
    if not packages.is_file():
        raise ConfigError(
            f"{path}: dockerfile: {packages} does not exist",
            hint="list the Debian packages there, one a line",
        )
    wanted = definition.os.model_copy(update={"packages": packages.read_text().split()})
    return definition.model_copy(update={"os": wanted})


def is_model_name(name: str) -> bool:
    return re.match(MODEL_NAME, name) is not None and len(name) <= 96


def read_budget(path: Path) -> Budget | None:
    return parse(Budget, path, f"edit {path}") if path.is_file() else None


def validate_current(lock: Lock, definition: Definition) -> None:
    """Raises ConfigError where the lock was made from another definition."""
    if lock.definition_sha256 != definition.sha256:
        raise ConfigError(
            f"images/{definition.name}.lock is older than its definition: it was made from"
            f" {lock.definition_sha256[:12]}, images/{definition.name}.toml now is"
            f" {definition.sha256[:12]}",
            hint=f"make image-lock IMAGE={definition.name}",
        )
