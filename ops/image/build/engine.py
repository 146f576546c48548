"""The Docker engine, through the docker package: build, save, push. The only module that imports
it.

Building goes through the docker command, because BuildKit does not speak through the engine's plain
API.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from docker.client import DockerClient
from docker.errors import APIError, DockerException, ImageNotFound
from docker.models.images import Image

from ops.errors import PreflightError

Progress = Callable[[str], None]
OLDEST = (20, 10)


def connect() -> DockerClient:
    """The engine where DOCKER_HOST and Docker's own defaults say; raises PreflightError with the
    remedy.
    """
    try:
        client = DockerClient.from_env(timeout=600)
        version = client.version()["Version"]
    except DockerException as error:
        raise PreflightError(
            f"no Docker engine answers: {error}",
            hint="start Docker, or set DOCKER_HOST; `docker info` must work",
        ) from error
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST:
        raise PreflightError(
            f"the engine is {version}; images need 20.10 or newer",
            hint="update Docker on this machine",
        )
    return client


def build(
    client: DockerClient,
    root: Path,
    dockerfile: str,
    tag: str,
    arguments: dict[str, str],
    progress: Progress,
) -> None:
    """``docker build --network=none`` of ROOT/DOCKERFILE by BuildKit.

    ``progress`` hears the builder's own lines. Raises PreflightError with its last words.
    """
    environment = {
        **os.environ,
        "DOCKER_BUILDKIT": "1",
        "BUILDKIT_PROGRESS": "plain",
        "DOCKER_HOST": _host(client),
    }
    command = [
        docker_with_buildkit(),
        "build",
        "--network=none",
        "--file",
        dockerfile,
        "--tag",
        tag,
    ]
    command += [f"--build-arg={key}={value}" for key, value in arguments.items()]
    last: deque[str] = deque(maxlen=12)
    with subprocess.Popen(
        [*command, "."], cwd=root, env=environment, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line.rstrip())
            progress(line.rstrip())
    if process.returncode:
        raise PreflightError(
            f"docker build failed: {' | '.join(last)[-900:]}",
            hint="the lines above are its own words",
        )


def docker_with_buildkit() -> str:
    """The first docker command on PATH that can use BuildKit: one before 23, or one with buildx."""
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        program = Path(folder) / "docker"
        if program.is_file() and os.access(program, os.X_OK):
            version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
            number = re.search(r"(\d+)\.", version)
            if number and int(number[1]) < 23:
                return str(program)
            if subprocess.run([program, "buildx", "version"], capture_output=True).returncode == 0:
                return str(program)
    raise PreflightError(
        "no docker command here can use BuildKit",
        hint="install docker-buildx (Debian: docker-buildx-plugin)",
    )


def prove(client: DockerClient, tag: str, lock: Path, command: Sequence[str]) -> str:
    """Run the image's self-test as INSTALL.sh does, without a GPU; returns its JSON.

    No network, a read-only root, no rights. Raises PreflightError with the failed checks' words.
    """
    made = client.containers.create(
        image_id(client, tag),
        list(command[1:]),
        entrypoint=command[0],
        network_mode="none",
        read_only=True,
        tmpfs={"/tmp": "rw,exec,mode=1777"},
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        shm_size="1g",
        environment={"HOME": "/tmp"},
        volumes={str(lock.resolve()): {"bind": "/run/milktea/image.lock", "mode": "ro"}},
    )
    try:
        made.start()
        code = made.wait()["StatusCode"]
        words = made.logs(stdout=not code, stderr=bool(code)).decode(errors="replace")
    except APIError as error:  # nothing of that name in the image, such as python3
        code, words = 127, str(error)
    finally:
        made.remove(force=True)
    if not code:
        return str(words)
    lines = words.splitlines()
    failed = [line for line in lines if "FAILED" in line] or lines[-3:]
    raise PreflightError(
        f"{tag} does not prove itself (exit code {code}): {' | '.join(failed)[:900]}",
        hint="mend what it names, make image, and bundle again",
    )


def save(client: DockerClient, tag: str) -> Iterator[bytes]:
    """The stream of ``docker save``. Raises PreflightError where there is no such image."""
    return iter(_image(client, tag).save(chunk_size=1 << 20, named=True))


def image_id(client: DockerClient, tag: str) -> str:
    """The image's ID; raises PreflightError where there is no such image."""
    return str(_image(client, tag).id)


def _image(client: DockerClient, tag: str) -> Image:
    try:
        return client.images.get(tag)
    except ImageNotFound as error:
        raise PreflightError(f"{tag} is not in the engine", hint="make image builds it") from error


def import_base(client: DockerClient, tar: Path, tag: str) -> str:
    """Make an image of one layer of a root file system's tar; returns the tag."""
    name, _, version = tag.rpartition(":")
    with tar.open("rb") as file:
        client.api.import_image_from_data(file, repository=name, tag=version)
    return tag


def push(client: DockerClient, tag: str, target: str, progress: Progress) -> str:
    """Push a loaded image as ``target`` (REGISTRY/NAME:TAG); returns the digest that a renter can
    pin.

    Credentials are those of `docker login`. Raises PreflightError with the registry's own words.
    """
    name, _, version = target.rpartition(":")
    if not name or "/" in version:
        raise PreflightError(
            f"{target!r} names no tag", hint="write REGISTRY/NAME:TAG, as ghcr.io/me/milktea:1"
        )
    _image(client, tag).tag(name, version)
    digest = ""
    for line in client.api.push(name, version, stream=True, decode=True):
        if "error" in line:
            raise PreflightError(
                f"{target}: {line['error']}", hint=f"docker login {name.split('/')[0]}"
            )
        digest = line.get("aux", {}).get("Digest", digest)
        if line.get("status") == "Pushed":
            progress(f"pushed {line.get('id', '')}")
    return digest


def _host(client: DockerClient) -> str:
    adapter: Any = client.api.get_adapter(client.api.base_url)
    return (
        f"unix://{adapter.socket_path}"
        if hasattr(adapter, "socket_path")
        else str(client.api.base_url)
    )
