"""The Docker engine, through the docker package: load, check, build, push. The only module that imports it.

``docker load`` may exit 0 on an image that cannot run, so nothing here trusts an exit code: what was loaded is compared with
the image's DiffIDs.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docker.client import DockerClient
from docker.errors import APIError, BuildError, DockerException, ImageNotFound

from ops.errors import PreflightError
from ops.image.bundle.archive import Image, prefix, stream_archive

Progress = Callable[[str], None]
OLDEST = (20, 10)
PART = "milktea/part"


def connect(host: str | None = None) -> DockerClient:
    """The engine at ``host``, or where DOCKER_HOST and Docker's own defaults say; raises PreflightError with the remedy."""
    try:
        client = DockerClient(base_url=host, timeout=600) if host else DockerClient.from_env(timeout=600)
        version = client.version()["Version"]
    except DockerException as error:
        raise PreflightError(f"no Docker engine answers: {error}", hint="start Docker, or set DOCKER_HOST; `docker info` must work") from error
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST:
        raise PreflightError(f"the engine is {version}; images need 20.10 or newer", hint="update Docker on this machine")
    return client


def load(client: DockerClient, image: Image, progress: Progress) -> str:
    """Load layer by layer, so that the extra disk is one layer and a broken-off load goes on where it was; return the image's ID.

    Safe to call twice. Raises PreflightError where what the engine then has is not the image.
    """
    if layers_of(client, image.tag) == image.diff_ids:
        return str(client.images.get(image.tag).id)
    total = len(image.layers)
    for k, layer in enumerate(image.layers, 1):
        tag = image.tag if k == total else f"{PART}:{image.config_digest[7:19]}-{k:03d}"
        part = prefix(image, k, tag)
        if k < total and layers_of(client, tag) == part.diff_ids:
            continue
        if layer.path is None or not layer.path.is_file() or layer.path.stat().st_size != layer.blob_bytes:
            raise PreflightError(f"layer {layer.name} ({layer.blob_sha256[:12]}) is not whole on this disk", hint="make image puts it there again")
        progress(f"loading {k} of {total}: {layer.name}, {layer.blob_bytes / 1e6:,.1f} MB")
        said = _load_stream(client, part, k)
        if layers_of(client, tag) != part.diff_ids:
            raise PreflightError(f"the engine did not take layer {layer.name}: {said or 'it gave no reason'}",
                                 hint="run it again; if it stays, delete .milktea/cache/blobs and `make image`")
    for k in range(1, total):
        _remove(client, f"{PART}:{image.config_digest[7:19]}-{k:03d}")
    return str(client.images.get(image.tag).id)


def layers_of(client: DockerClient, tag: str) -> list[str] | None:
    """DiffIDs of a loaded image, the same with either store; None where there is no such image."""
    try:
        return list(client.images.get(tag).attrs["RootFS"]["Layers"])
    except (ImageNotFound, KeyError):
        return None


def build(client: DockerClient, context: Path, tag: str, arguments: dict[str, str], buildkit: bool, progress: Progress) -> None:
    """Build a Dockerfile with no network. BuildKit speaks through the docker command; the legacy builder through its API."""
    if buildkit:
        environment = {**os.environ, "DOCKER_BUILDKIT": "1", "DOCKER_HOST": client.api.base_url.replace("http+docker://localhost", _socket(client))}
        command = ["docker", "build", "--network=none", "--tag", tag, *(f"--build-arg={k}={v}" for k, v in arguments.items()), str(context)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise PreflightError(f"docker build failed: {done.stderr.strip()[-800:]}", hint="its whole output: run the command by hand")
        return
    try:
        for line in client.api.build(path=str(context), tag=tag, buildargs=arguments, network_mode="none", rm=True, forcerm=True, decode=True):
            if "error" in line:
                raise PreflightError(f"docker build failed: {line['error'].strip()}", hint="the last lines above it say where")
            if text := line.get("stream", "").strip():
                progress(text)
    except (APIError, BuildError) as error:
        raise PreflightError(f"docker build failed: {error}", hint="docker info must work, and the engine must be 20.10 or newer") from error


def push(client: DockerClient, tag: str, target: str, progress: Progress) -> str:
    """Push a loaded image as ``target`` (REGISTRY/NAME:TAG); returns the digest that a renter can pin.

    Credentials are those of `docker login`. Raises PreflightError with the registry's own words.
    """
    name, _, version = target.rpartition(":")
    if not name or "/" in version:
        raise PreflightError(f"{target!r} names no tag", hint="write REGISTRY/NAME:TAG, as ghcr.io/me/milktea:1")
    try:
        client.images.get(tag).tag(name, version)
        digest = ""
        for line in client.api.push(name, version, stream=True, decode=True):
            if "error" in line:
                raise PreflightError(f"{target}: {line['error']}", hint=f"docker login {name.split('/')[0]}")
            digest = line.get("aux", {}).get("Digest", digest)
            if line.get("status") == "Pushed":
                progress(f"pushed {line.get('id', '')}")
    except ImageNotFound as error:
        raise PreflightError(f"{tag} is not in the engine", hint="make image loads it") from error
    return digest


def _load_stream(client: DockerClient, part: Image, k: int) -> str:
    """What the engine said that was not progress."""
    said = []
    try:
        for line in client.api.load_image(stream_archive(part, carry=[k]), quiet=True):
            said.append(line.get("error") or line.get("stream", ""))
    except APIError as error:
        said.append(str(error.explanation))
    return " ".join(text.strip() for text in said if text and not text.startswith("Loaded image"))


def _remove(client: DockerClient, tag: str) -> None:
    try:
        client.images.remove(tag, noprune=True)
    except ImageNotFound:
        pass


def _socket(client: DockerClient) -> str:
    adapter: Any = client.api.get_adapter(client.api.base_url)
    return f"unix://{adapter.socket_path}" if hasattr(adapter, "socket_path") else client.api.base_url
