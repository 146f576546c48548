"""A checkout in small: an image of tiny wheels on a tiny base, all real files, for the tests of
building images.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

from docker.client import DockerClient
from docker.errors import ImageNotFound

from ops.image.build import context
from ops.image.fetch import wheels
from ops.image.spec import definition, lock
from ops.image.spec.lock import Lock
from ops.image.spec.paths import Places

DEFINITION = """\
schema_version = 2
name = "tiny"
version = 3
dockerfile = "tiny/3"
platform = "linux/amd64"
wire = 1
epoch = 1747699200
[os]
suite = "bookworm"
base = "debian:bookworm-slim@sha256:{zeros}"
[python]
version = "3.11"
requirements = ["torch", "peft", "small"]
[layers]
torch = ["torch"]
peft = ["pe*"]
python = ["*"]
""".format(zeros="0" * 64)
DOCKERFILE = """\
ARG BASE=base:bookworm
FROM ${BASE} AS debian
FROM scratch
COPY --from=debian / /
ARG SOURCE_DATE_EPOCH=1747699200
RUN --mount=type=bind,source=docker/box,target=/mnt \\
    install -D -m 755 -t /usr/local/sbin /mnt/milktea-settle && milktea-settle box
RUN --mount=type=bind,source=docker/tiny/3/wheels/torch,target=/mnt \\
    mkdir -p /opt/site && cp /mnt/*.whl /opt/site && ln -s site /opt/link && \\
    ln /opt/site/*.whl /opt/hard && milktea-settle torch
RUN --mount=type=bind,source=trainer,target=/mnt \\
    cp -r /mnt /opt/trainer && chmod -R u=rwX,go=rX /opt/trainer && milktea-settle trainer
LABEL milktea.wire=1
ENTRYPOINT ["/bin/sh"]
"""
SETTLE = Path(__file__).parents[1] / "docker/box/2/usr/local/sbin/milktea-settle"


def make_wheel(
    folder: Path,
    name: str,
    version: str,
    files: dict[str, bytes],
    entry_points: str = "",
    executable: tuple[str, ...] = (),
) -> Path:
    """A whole wheel: METADATA, WHEEL, RECORD with hashes, what is executable marked so."""
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": (
            (
                f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
                "License-Expression: MIT\n"
            ).encode()
        ),
        f"{info}/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    if entry_points:
        files[f"{info}/entry_points.txt"] = entry_points.encode()
    digests = {
        path: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        for path, data in files.items()
    }
    rows = [f"{path},sha256={digests[path]},{len(data)}" for path, data in files.items()]
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in {
            **files,
            f"{info}/RECORD": "\n".join([*rows, f"{info}/RECORD,,"]).encode() + b"\n",
        }.items():
            entry = zipfile.ZipInfo(member, (2020, 1, 1, 0, 0, 0))
            entry.external_attr = (0o100755 if member in executable else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return path


def forget(client: DockerClient, tag: str) -> None:
    """Remove a tag from the engine; nothing happens where it is not there."""
    try:
        client.images.remove(tag, noprune=True)
    except ImageNotFound:
        pass


def noise(seed: str, size: int) -> bytes:
    """Bytes that do not compress, the same for the same seed."""
    out = b""
    while len(out) < size:
        out += hashlib.sha256(f"{seed}{len(out)}".encode()).digest()
    return out[:size]


def make_world(root: Path, peft: str = "1.0") -> Places:
    """A checkout with its lock and everything fetched."""
    places = Places(root)
    for path, text in {
        "images/tiny.toml": DEFINITION,
        "docker/tiny/3/Dockerfile": DOCKERFILE,
        "docker/tiny/3/debian/packages.txt": "python3\n",
        "docker/box/milktea-settle": SETTLE.read_text(),
        "trainer/__init__.py": "",
        "trainer/launch.py": "print('hello')\n",
        "trainer/wire/job.py": "",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    new = root / "new"
    new.mkdir(exist_ok=True)
    paths = [
        make_wheel(
            new, "torch", "2.0", {"torch/__init__.py": b"", "torch/lib.so": noise("t", 90_000)}
        ),
        make_wheel(
            new, "peft", peft, {"peft/__init__.py": b"v = 1\n", "peft/body.py": noise(peft, 9_000)}
        ),
        make_wheel(
            new, "small", "0.1", {"small.py": b"pass\n"}, "[console_scripts]\nsmall = small:main\n"
        ),
    ]
    spec = definition.read(places.definition("tiny"))
    found = [wheels.lock(path) for path in paths]
    places.wheels.mkdir(parents=True, exist_ok=True)
    for path, wheel in zip(paths, found, strict=True):
        wheels._keep(path, wheel, places.wheels)
    locked = Lock(
        image="tiny",
        version=3,
        wire=1,
        platform="linux/amd64",
        epoch=spec.epoch,
        dockerfile=spec.dockerfile,
        definition_sha256=spec.sha256,
        python="3.11",
        wheels=context.assign_layers(found, spec),
    )
    lock.write(locked, places.lock("tiny"))
    context.write_requirements(locked, spec, places)
    return places
