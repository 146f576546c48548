"""``images/NAME.lock``: every byte of an image that comes from outside, by its hash. TOML, sorted,
no times, no host names.

The committed lock pins Debian packages, wheels and model files. The lock of one built image says
the layers and the image's digests too; it travels in the bundle as image.lock.
"""

from __future__ import annotations

import hashlib
import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ops.errors import ConfigError

SCHEMA = 2
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Digest = Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


T = TypeVar("T", bound=Strict)


class Deb(Strict):
    """``file`` is the path under the archive's root on any mirror; ``archive`` says which root."""

    name: str
    version: str
    architecture: str
    archive: Literal["debian", "debian-security"]
    file: str
    sha256: Sha256
    size_bytes: Size


class Wheel(Strict):
    """``layer`` is the layer that holds it; ``license`` is what its METADATA says, empty where it
    says nothing.
    """

    name: str
    version: str
    file: str
    sha256: Sha256
    size_bytes: Size
    layer: str
    license: str = ""


class ModelFile(Strict):
    path: str
    sha256: Sha256
    size_bytes: Size


class Model(Strict):
    """Files that lie beside the image. ``set_digest`` is sha256 over the sorted lines
    ``SHA256␠␠PATH\\n``: one identity whatever the packing."""

    name: str
    source: str
    revision: str
    license: str
    set_digest: Digest
    files: list[ModelFile]


class LockedLayer(Strict):
    """``holds`` names the packages, ``size_bytes`` counts the uncompressed tar."""

    name: str
    diff_id: Digest
    blob_sha256: Sha256
    blob_bytes: Size
    size_bytes: Size
    holds: list[str]


class Cuda(Strict):
    """``min_driver`` is the lowest NVIDIA driver of the line (minor-version compatibility counted
    in); ``architectures`` are the compute capabilities for which the wheels carry code."""

    line: str
    toolkit: str
    min_driver: str
    architectures: list[Annotated[str, Field(pattern=r"^\d+\.\d[a-z]?(\+PTX)?$")]]


class Identity(Strict):
    """The image ID: ``config_digest`` on the classic store, ``manifest_digest`` on containerd's."""

    tag: str
    config_digest: Digest
    manifest_digest: Digest


class Lock(Strict):
    """``epoch`` is the one time stamp of every file; ``definition_sha256`` tells a lock that is
    older than its definition. ``identity`` and ``layers`` are of a built image only."""

    schema_version: int = SCHEMA
    image: str
    version: int
    wire: int
    platform: str
    epoch: int
    dockerfile: str
    definition_sha256: Sha256
    python: str
    cuda: Cuda | None = None
    identity: Identity | None = None
    layers: list[LockedLayer] = []
    debs: list[Deb] = []
    wheels: list[Wheel] = []
    models: list[Model] = []

    @property
    def size_bytes(self) -> int:
        """What the image takes on the classic store: the uncompressed layers."""
        return sum(layer.size_bytes for layer in self.layers)


def dumps(lock: Lock) -> str:
    """The lock as text: the same lock gives the same bytes."""
    value = lock.model_dump(exclude_none=True)
    for key, order in (("debs", "name"), ("wheels", "name"), ("models", "name")):
        value[key] = sorted(value[key], key=lambda item: item[order])
    for model in value["models"]:
        model["files"] = sorted(model["files"], key=lambda file: file["path"])
    return "# Written by `make image-lock`. Not edited by hand.\n" + tomli_w.dumps(value)


def write(lock: Lock, path: Path) -> None:
    """Replace the file as a whole: a reader sees the old lock or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(dumps(lock))
    os.replace(part, path)


def read(path: Path) -> Lock:
    """Raises ConfigError that names the file and the first wrong key."""
    make = f"make image-lock IMAGE={path.stem}"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist", hint=make)
    return parse(Lock, path, make)


def parse(kind: type[T], path: Path, hint: str) -> T:
    """What a TOML file says; raises ConfigError that names the file and the first wrong key."""
    try:
        return kind.model_validate(tomllib.loads(path.read_text()))
    except (ValidationError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        where = ".".join(map(str, first["loc"])) + ": " + first["msg"] if first else str(error)
        raise ConfigError(f"{path}: {where}", hint=hint) from error


def set_digest(files: list[ModelFile]) -> str:
    lines = sorted(f"{file.sha256}  {file.path}\n" for file in files)
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()
