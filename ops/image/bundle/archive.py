"""Image archives that plain ``docker load`` accepts, whole or one layer at a time.

A *hybrid* archive is an OCI layout (``oci-layout``, ``index.json``) and a docker archive
(``manifest.json``) over the same blobs, so engines from 20.10 on read it with either image store.
Such an archive may list k layers and carry only layer k: it loads where layers 1..k-1 are present.
That is a *part*; all parts in order are the image, the changed ones an update.

Everything here is a pure function of its arguments: no clock, no user, no file name leaks into the
bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"


@dataclass(frozen=True)
class Layer:
    """One layer. ``diff_id`` is ``sha256:HEX`` of the uncompressed tar, ``size_bytes`` its size;
    ``blob_sha256`` (hex) and ``blob_bytes`` are of the gzip blob, which lies at ``path``."""

    name: str
    diff_id: str
    blob_sha256: str
    blob_bytes: int
    path: Path
    size_bytes: int


@dataclass(frozen=True)
class Image:
    """``config_json_bytes`` is the image config as it is stored; its sha256 is the image ID on the
    classic store. ``tag`` (``name:tag``) is what the loaded image is called."""

    config_json_bytes: bytes
    layers: tuple[Layer, ...]
    tag: str = "milktea:latest"

    @property
    def config_digest(self) -> str:
        """Image ID on the classic (overlay2) store."""
        return digest(self.config_json_bytes)

    @property
    def manifest_digest(self) -> str:
        """Image ID on the containerd store, and the digest that a registry shows."""
        return digest(manifest_json(self))

    @property
    def diff_ids(self) -> list[str]:
        """What ``docker inspect -f '{{json .RootFS.Layers}}'`` prints on either store."""
        return [layer.diff_id for layer in self.layers]


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def prefix(image: Image, k: int, tag: str) -> Image:
    """The image made of layers 1..k only: same config with the lists cut. Its first k DiffIDs are
    the whole image's.
    """
    if not 1 <= k <= len(image.layers):
        raise ValueError(f"part {k} of an image with {len(image.layers)} layers")
    if k == len(image.layers):
        return replace(image, tag=tag)
    config = json.loads(image.config_json_bytes)
    config["rootfs"]["diff_ids"] = config["rootfs"]["diff_ids"][:k]
    if "history" in config:
        config["history"] = config["history"][:k]
    return Image(canonical_json(config), image.layers[:k], tag)


def manifest_json(image: Image) -> bytes:
    """The OCI manifest. It depends on the blobs (gzip bytes), while the config depends on DiffIDs
    alone.
    """
    config = {
        "mediaType": OCI_CONFIG,
        "digest": image.config_digest,
        "size": len(image.config_json_bytes),
    }
    layers = [
        {"mediaType": OCI_LAYER, "digest": f"sha256:{x.blob_sha256}", "size": x.blob_bytes}
        for x in image.layers
    ]
    return canonical_json(
        {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers}
    )


def metadata(image: Image) -> dict[str, bytes]:
    """Every small file of the archive by its path, in the order in which it is written; layers come
    after.
    """
    manifest = manifest_json(image)
    reference = _canonical(image.tag)
    names = {
        "io.containerd.image.name": reference,
        "org.opencontainers.image.ref.name": image.tag.rpartition(":")[2],
    }
    entry = {
        "mediaType": OCI_MANIFEST,
        "digest": digest(manifest),
        "size": len(manifest),
        "annotations": names,
    }
    blobs = [_blob(layer.blob_sha256) for layer in image.layers]
    docker = [{"Config": _blob(image.config_digest), "RepoTags": [image.tag], "Layers": blobs}]
    return {
        "oci-layout": canonical_json({"imageLayoutVersion": "1.0.0"}),
        "index.json": canonical_json(
            {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
        ),
        "manifest.json": canonical_json(docker),
        _blob(image.config_digest): image.config_json_bytes,
        _blob(digest(manifest)): manifest,
    }


def _canonical(tag: str) -> str:
    """The name with its registry, without which the containerd store loads an image that nobody can
    then find.
    """
    first, slash, _ = tag.partition("/")
    if slash and (first == "localhost" or "." in first or ":" in first):
        return tag
    return f"docker.io/{tag}" if slash else f"docker.io/library/{tag}"


def write_archive(image: Image, out: BinaryIO, carry: Collection[int] | None = None) -> None:
    """Write a hybrid archive that carries the layers numbered in ``carry`` (from 1; default all).

    The same arguments give the same bytes. ``out`` must tell how much was written to it."""
    wanted = range(1, len(image.layers) + 1) if carry is None else carry
    blobs = {x.blob_sha256: x for number, x in enumerate(image.layers, 1) if number in wanted}
    with tarfile.TarFile(
        fileobj=out, mode="w", format=tarfile.GNU_FORMAT, copybufsize=1 << 20
    ) as archive:
        for path, data in metadata(image).items():
            archive.addfile(_entry(path, len(data)), io.BytesIO(data))
        for name, layer in blobs.items():
            with _blob_path(layer).open("rb") as blob:
                archive.addfile(_entry(_blob(name), layer.blob_bytes), blob)


def _entry(path: str, size_bytes: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode = size_bytes, 0o644
    return entry


def _blob(name: str) -> str:
    return "blobs/sha256/" + name.removeprefix("sha256:")


def _blob_path(layer: Layer) -> Path:
    if (found := layer.path.stat().st_size) != layer.blob_bytes:
        raise OSError(
            f"{layer.path.name} has {found:,} bytes, the lock says {layer.blob_bytes:,}: run `make"
            " image` again"
        )
    return layer.path
