"""From an image in the engine to the image that is carried: ``docker save``, then every layer in
canonical form.

A layer that was exported before is not written again: .milktea/cache/exported remembers what became
of each DiffID.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ops.errors import PreflightError
from ops.image.build.layers import Blob, write_layer
from ops.image.bundle.archive import Image, Layer, canonical_json
from ops.image.spec.lock import Identity, Lock, LockedLayer
from ops.image.spec.paths import Places

Progress = Callable[[str], None]
# of the engine's config, what says how a container starts; the rest is of the machine that built it
RUNTIME = (
    "Cmd",
    "Entrypoint",
    "Env",
    "ExposedPorts",
    "Healthcheck",
    "Labels",
    "User",
    "WorkingDir",
)
SETTLE = re.compile(r"milktea-settle ([a-z0-9-]+)")
FORMAT = 2  # counts up when write_layer makes other bytes


def export(
    saved: Iterable[bytes], tag: str, lock: Lock, places: Places, progress: Progress
) -> tuple[Image, Lock]:
    """The image of a ``docker save`` stream with its layers as blobs in the cache, and the lock of
    this build.

    Needs room for the uncompressed image and its blobs. Raises PreflightError where there is none.
    """
    places.blobs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=places.cache, prefix="save-") as folder:
        path = Path(folder) / "image.tar"
        progress("taking the image from the engine")
        try:
            with path.open("wb") as file:
                for chunk in saved:
                    file.write(chunk)
        except OSError as error:
            raise PreflightError(
                f"the image cannot be written to {places.cache}: {error}", hint="free some space"
            ) from error
        with tarfile.open(path) as archive:
            entry = json.loads(_member(archive, "manifest.json"))[0]
            config = json.loads(_member(archive, entry["Config"]))
        diff_ids: list[str] = config["rootfs"]["diff_ids"]
        remembered = {diff_id: _remembered(diff_id, lock.epoch, places) for diff_id in diff_ids}
        missing = [
            (d, m) for d, m in zip(diff_ids, entry["Layers"], strict=True) if remembered[d] is None
        ]
        progress(f"writing {len(missing)} of {len(diff_ids)} layers")
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            jobs = {
                d: pool.submit(_write_one, path, member, lock.epoch, places.blobs)
                for d, member in missing
            }
            for diff_id, job in jobs.items():
                remembered[diff_id] = job.result()
                _remember(diff_id, lock.epoch, job.result(), places)
    blobs = [blob for diff_id in diff_ids if (blob := remembered[diff_id])]
    names = layer_names(config)
    locked = [_locked(name, blob, lock) for name, blob in zip(names, blobs, strict=True)]
    image = Image(config_json(config, locked, lock.epoch), layers_of(locked, places), tag)
    identity = Identity(
        tag=tag, config_digest=image.config_digest, manifest_digest=image.manifest_digest
    )
    return image, lock.model_copy(update={"layers": locked, "identity": identity})


def layers_of(locked: Iterable[LockedLayer], places: Places) -> tuple[Layer, ...]:
    """The layers of a lock, with their blobs on this disk."""
    return tuple(
        Layer(
            x.name,
            x.diff_id,
            x.blob_sha256,
            x.blob_bytes,
            places.blobs / x.blob_sha256,
            x.size_bytes,
        )
        for x in locked
    )


def config_json(config: dict[str, Any], layers: list[LockedLayer], epoch: int) -> bytes:
    """The image config: how a container starts as the Dockerfile says, the layers, and nothing of
    the building machine.
    """
    created = datetime.datetime.fromtimestamp(epoch, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return canonical_json(
        {
            "architecture": config["architecture"],
            "config": {key: config["config"][key] for key in RUNTIME if config["config"].get(key)},
            "created": created,
            "history": [
                {"created": created, "created_by": f"milktea layer {layer.name}"}
                for layer in layers
            ],
            "os": config["os"],
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        }
    )


def layer_names(config: dict[str, Any]) -> list[str]:
    """A name for each layer: what its RUN told milktea-settle; ``debian`` for the lowest;
    ``layer-NN`` for others.
    """
    names: list[str] = []
    steps = [
        step.get("created_by", "")
        for step in config.get("history", [])
        if not step.get("empty_layer")
    ]
    total = len(config["rootfs"]["diff_ids"])
    for number, step in enumerate([*steps, *[""] * total][:total], 1):
        found = SETTLE.search(step)
        name = found[1] if found else "debian" if number == 1 else f"layer-{number:02d}"
        names.append(name if name not in names else f"{name}-{number:02d}")
    return names


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise PreflightError(
            f"the engine's archive has no {name}",
            hint="docker save IMAGE | tar t shows what it has",
        )
    return file.read()


def _write_one(path: Path, member: str, epoch: int, blobs: Path) -> Blob:
    with tarfile.open(path) as archive:
        file = archive.extractfile(member)
        assert file is not None
        return write_layer(file, epoch, blobs)  # type: ignore[arg-type]


def _memory(diff_id: str, epoch: int, places: Places) -> Path:
    return places.cache / "exported" / f"{diff_id.removeprefix('sha256:')}-{epoch}-{FORMAT}.json"


def _remember(diff_id: str, epoch: int, blob: Blob, places: Places) -> None:
    path = _memory(diff_id, epoch, places)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(blob)))


def _remembered(diff_id: str, epoch: int, places: Places) -> Blob | None:
    path = _memory(diff_id, epoch, places)
    if not path.is_file():
        return None
    blob = Blob(**json.loads(path.read_text()))
    at = places.blobs / blob.sha256
    return blob if at.is_file() and at.stat().st_size == blob.blob_bytes else None


def _locked(name: str, blob: Blob, lock: Lock) -> LockedLayer:
    holds = [f"{x.name} {x.version}" for x in lock.wheels if x.layer == name]
    if name == "debian":
        holds = [f"{x.name} {x.version}" for x in lock.debs]
    return LockedLayer(
        name=name,
        diff_id=blob.diff_id,
        blob_sha256=blob.sha256,
        blob_bytes=blob.blob_bytes,
        size_bytes=blob.size_bytes,
        holds=holds or [f"milktea {name}"],
    )
