"""``images/NAME.toml``: what an image is, as a person decides it. The lock says which bytes that came to.

A key that is not known is refused with its path. ``images/NAME.budget`` beside it holds the most bytes that the image and
each of its layers may have.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError

from ops.errors import ConfigError
from ops.image.spec.lock import Cuda, Lock, Strict

T = TypeVar("T", bound=Strict)
Name = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9.-]{0,62}$")]


class Os(Strict):
    """Debian, made by mmdebstrap from the locked packages. ``exclude`` and ``keep`` are dpkg's path-exclude and path-include;
    ``registry_base`` is an ordinary base for those who build the base by Dockerfile, pinned by its digest."""

    suite: str
    packages: list[str]
    exclude: list[str] = []
    keep: list[str] = []
    registry_base: Annotated[str, Field(pattern="@sha256:[0-9a-f]{64}$")]


class Python(Strict):
    """``requirements`` are pip's; ``prune`` are shell patterns below site-packages that stay out of the image;
    ``index`` is the public index to ask where the configured one has no such version."""

    version: str
    requirements: list[str]
    prune: list[str] = []
    index: str | None = None


class Layers(Strict):
    """Wheels of ``own_mib`` or more have a layer each, the rest share one. ``top`` change most often and lie above all
    others, each its own, in this order: an update carries the changed layer and those above it."""

    own_mib: Annotated[float, Field(gt=0)] = 4.0
    top: list[str] = []


class ModelSource(Strict):
    """``source`` is ``hub:ID``, ``folder:PATH`` (relative to the checkout) or ``practice`` (the project's own).
    ``revision`` is the hub's commit; ``license`` overrules what the model's card says."""

    name: Name
    source: Annotated[str, Field(pattern="^(hub:.+/.+|folder:.+|practice)$")]
    revision: str = ""
    license: str | None = None
    bundled: bool = False


class Definition(Strict):
    """One image. ``dockerfile`` and ``box`` (the files of /usr/local/bin and /etc) are folders and versions under docker/;
    ``epoch`` (Unix seconds) is the stamp of every file."""

    schema_version: Literal[1]
    name: Name
    version: Annotated[int, Field(gt=0)]
    dockerfile: str
    box: str
    platform: Literal["linux/amd64"]
    wire: int
    epoch: Annotated[int, Field(gt=0)]
    os: Os
    python: Python
    layers: Layers = Layers()
    cuda: Cuda | None = None
    models: list[ModelSource] = []

    @property
    def tag(self) -> str:
        return f"milktea/{self.name}:{self.version}"

    @property
    def sha256(self) -> str:
        """Of the meaning, not of the spelling: comments and order of keys do not make a lock old."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


class Budget(Strict):
    """Most bytes, uncompressed, of the image and of its layers by name; a layer without a line has no limit of its own."""

    image_bytes: Annotated[int, Field(gt=0)]
    layers: dict[str, int] = {}


def read(path: Path) -> Definition:
    """Raises ConfigError naming the file and the first wrong key."""
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.toml"))) or "none"
        raise ConfigError(f"there is no image {path.stem!r} ({path})", hint=f"take one of {path.parent}: {known}")
    found = _parse(Definition, path)
    if found.name != path.stem:
        raise ConfigError(f"{path}: name is {found.name!r}", hint=f'write name = "{path.stem}", or rename the file')
    return found


def read_budget(path: Path) -> Budget | None:
    return _parse(Budget, path) if path.is_file() else None


def require_current(lock: Lock, definition: Definition) -> None:
    """Raises ConfigError where the lock was made from another definition."""
    if lock.definition_sha256 != definition.sha256:
        raise ConfigError(
            f"images/{definition.name}.lock is older than its definition: it was made from {lock.definition_sha256[:12]}, "
            f"images/{definition.name}.toml now is {definition.sha256[:12]}",
            hint=f"make image-lock IMAGE={definition.name}",
        )


def _parse(kind: type[T], path: Path) -> T:
    try:
        return kind.model_validate(tomllib.loads(path.read_text()))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {where}: {first['msg']}", hint=f"edit {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}", hint=f"edit {path}") from error
