"""From a proven image, or a model's folder, to a bundle: what `milktea image bundle` and its
neighbours call. None prints: each takes a ``progress`` for its lines.
"""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path

from ops.errors import ConfigError
from ops.image.bundle import bundle as bundles
from ops.image.bundle import inventory, signature
from ops.image.bundle.archive import Image
from ops.image.bundle.bundle import Bundle
from ops.image.bundle.contents import Contents, Options
from ops.image.bundle.cuda_lines import line_of, lines
from ops.image.bundle.inventory import Present
from ops.image.fetch import models
from ops.image.spec import definition
from ops.image.spec import lock as locks
from ops.image.spec.definition import ModelSource
from ops.image.spec.paths import Places
from ops.image.workflow import Progress, prove, quiet, take

VOLUMES = {
    "fat32": 4_294_967_295,
    "dvd": 4_700_000_000,
    "dvd-dl": 8_500_000_000,
    "bd": 25_000_000_000,
}
DOCUMENTS = (
    "jobs/*.toml",
    "docs/*.md",
)  # what a person on the server reads, where it is in the checkout


def bundle(
    name: str,
    out: Path | None = None,
    *,
    since: Path | None = None,
    server: Path | None = None,
    volume: str = "",
    key: Path | None = None,
    signed: bool = True,
    image: str | None = None,
    whole: bool = False,
    proved: bool = True,
    places: Places = Places(),
    progress: Progress = quiet,
) -> Bundle | Path:
    """Write the built image, or ``image`` made FROM it, as a folder to carry; ``whole`` writes one
    OCI archive instead.

    ``out`` is a new folder of its own name where it is None. ``since`` is the bundle that the
    server has, or its image.lock, ``server`` the facts of its preflight; either makes an update.
    ``volume`` is a number of bytes, or one of VOLUMES. ``key`` signs; without it a key of this
    user, made once. Raises ConfigError, PreflightError.
    """
    if proved:
        prove(name, places, progress, image)
    built, lock = take(name, places, progress, image)
    release = _release()
    contents = Contents(
        lock,
        built,
        {model.name: models.where(model, places.models) for model in lock.models},
        line_of(name, lock.cuda),
        tuple(lines(places)),
        documents=_documents(places),
    )
    if whole:
        return bundles.write_oci(contents, out or Path(f"{lock.image}-{release}.oci.tar"))
    base, base_models = _base(built, since, server)
    key = (key or _own_key(progress)) if signed else None
    options = Options(release, volume_bytes(volume), base, base_models, key)
    kind = "update" if base else "bundle"
    return bundles.write_bundle(
        contents, out or Path(f"{kind}-{lock.image}-{release}"), options, progress
    )


def bundle_model(
    folder: Path,
    name: str = "",
    out: Path | None = None,
    *,
    volume: str = "",
    key: Path | None = None,
    signed: bool = True,
    places: Places = Places(),
    progress: Progress = quiet,
) -> Bundle:
    """Write the base model in ``folder`` as a bundle of its own, for a server that has an image.

    ``name`` is what jobs call it; the folder's name without. ChatGLM2 and 3 and the original LLaMA
    layout are converted. Raises ConfigError, PreflightError.
    """
    name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")
    if not definition.is_model_name(name):
        raise ConfigError(
            f"{name!r} is no name of a model", hint="--name company/Model-7B, of A-Z a-z 0-9 . _ -"
        )
    source = ModelSource(name=name, source=f"folder:{folder.resolve()}")
    model = models.resolve(source, places.root, places.models, progress)
    short = f"models-{re.sub(r'[^a-z0-9.-]', '-', name.lower())}"
    release = _release()
    contents = bundles.of_models(short, [model], {name: models.where(model, places.models)})
    key = (key or _own_key(progress)) if signed else None
    options = Options(release, volume_bytes(volume), key=key)
    return bundles.write_bundle(contents, out or Path(f"{short}-{release}"), options, progress)


def keygen(path: Path) -> str:
    """A key to sign bundles with; returns its fingerprint, which whoever installs must get by
    another way than the disk.
    """
    return signature.make_key(path)


def compatible(server: Path, places: Places = Places()) -> list[str]:
    """The images of this project that the server of these facts runs as they are."""
    places.validate()
    return inventory.read(server).compatible_lines(lines(places))


def volume_bytes(text: str) -> int:
    """0 for "", bytes for a number, else one of VOLUMES; raises ConfigError."""
    if not text or text in VOLUMES:
        return VOLUMES.get(text, 0)
    if not text.isdigit() or int(text) < 1_000_000:
        raise ConfigError(
            f"volume size {text!r} is neither a number of bytes from 1,000,000 on nor one of"
            f" {', '.join(VOLUMES)}"
        )
    return int(text)


def _release() -> int:
    """Now, in UTC: later bundles have larger numbers."""
    return int(datetime.datetime.now(datetime.UTC).strftime("%Y%m%d%H%M%S"))


def _own_key(progress: Progress) -> Path:
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    path = home / "milktea" / "release-key"
    if not path.is_file():
        signature.make_key(path)
        progress(f"made a signing key: {path}")
    public = path.with_name(path.name + ".pub")
    progress(
        f"signing with {path}; tell the other side by telephone: {signature.fingerprint(public)}"
    )
    return path


def _documents(places: Places) -> dict[str, Path]:
    return {path.name: path for pattern in DOCUMENTS for path in sorted(places.root.glob(pattern))}


def _base(
    built: Image, since: Path | None, server: Path | None
) -> tuple[Present | None, frozenset[str]]:
    """The image and the models that the server has. A layer of the same files and other gzip bytes
    counts as changed.
    """
    if since and server:
        raise ConfigError(
            "SINCE and INVENTORY exclude each other: the inventory says what the server has",
            hint="give one of them",
        )
    if server:
        found = inventory.read(server)
        return found.base_for(built.diff_ids), found.models
    if not since:
        return None, frozenset()
    old = locks.read(since / "image.lock" if since.is_dir() else since)
    if not old.layers or old.identity is None:
        raise ConfigError(
            f"{since} is not the lock of a built image",
            hint="take the image.lock of the bundle that was carried",
        )
    blobs = {layer.diff_id: layer.blob_sha256 for layer in built.layers}
    same = [x.diff_id for x in old.layers if blobs.get(x.diff_id, x.blob_sha256) == x.blob_sha256]
    ref = f"{old.identity.tag.rpartition(':')[0]}:{old.identity.config_digest[7:19]}"
    return Present(ref, same), frozenset(model.set_digest for model in old.models)
