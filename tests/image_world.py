"""A checkout in small: an image of tiny wheels on a tiny base, all real files, for the tests of building images."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

from ops.image import assemble
from ops.image.build import dockerfile
from ops.image.fetch import wheels as packages
from ops.image.spec import definition, lock
from ops.image.spec.lock import Lock, LockedLayer
from ops.image.spec.paths import Places

DEFINITION = """\
schema_version = 1
name = "tiny"
version = 3
dockerfile = "tiny/3"
box = "box/1"
platform = "linux/amd64"
wire = 1
epoch = 1747699200
[os]
suite = "bookworm"
packages = ["python3"]
registry_base = "debian:bookworm-slim@sha256:{zeros}"
[python]
version = "3.11"
requirements = ["torch", "peft", "small"]
prune = ["torch/test/*", "*.a"]
[layers]
own_mib = 0.02
top = ["peft"]
""".format(zeros="0" * 64)


def make_wheel(folder: Path, name: str, version: str, files: dict[str, bytes], entry_points: str = "", executable: tuple[str, ...] = ()) -> Path:
    """A whole wheel: METADATA, WHEEL, RECORD with hashes, what is executable marked so."""
    info = f"{name}-{version}.dist-info"
    files = {**files, f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense-Expression: MIT\n".encode(),
             f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    if entry_points:
        files[f"{info}/entry_points.txt"] = entry_points.encode()
    digests = {path: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=") for path, data in files.items()}
    rows = [f"{path},sha256={digests[path]},{len(data)}" for path, data in files.items()]
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in {**files, f"{info}/RECORD": "\n".join([*rows, f"{info}/RECORD,,"]).encode() + b"\n"}.items():
            entry = zipfile.ZipInfo(member, (2020, 1, 1, 0, 0, 0))
            entry.external_attr = (0o100755 if member in executable else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return path


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
        "docker/box/1/usr/local/bin/milktea-train": "#!/bin/sh\n",
        "trainer/__init__.py": "",
        "trainer/launch.py": "print('hello')\n",
        "trainer/practice/pretrained/model.safetensors": "left out",
        "ops/__init__.py": "",
        "ops/job/__init__.py": "",
        "ops/job/config.py": "",
        "ops/errors.py": "",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    (root / "docker/box/1/usr/local/bin/milktea-train").chmod(0o755)
    new = root / "new"
    new.mkdir(exist_ok=True)
    paths = [
        make_wheel(new, "torch", "2.0", {"torch/__init__.py": b"", "torch/lib.so": noise("t", 90_000), "torch/test/x.py": b"1", "torch/l.a": b"2"}),
        make_wheel(new, "peft", peft, {"peft/__init__.py": b"v = 1\n", "peft/body.py": noise(peft, 9_000)}),
        make_wheel(new, "small", "0.1", {"small.py": b"pass\n"}, "[console_scripts]\nsmall = small:main\n"),
        make_wheel(new, "other", "0.2", {"other.py": b"pass\n"}),
    ]
    spec = definition.read(places.definition("tiny"))
    wheels = [packages._locked(path, packages.sha256_file(path)) for path in paths]
    tool = packages._locked(pip := make_wheel(new, "pip", "26.0", {"pip/__main__.py": b""}), packages.sha256_file(pip))
    for path, wheel in zip([*paths, pip], [*wheels, tool], strict=True):
        places.wheels.mkdir(parents=True, exist_ok=True)
        packages._keep(path, wheel, places.wheels)
    found = Lock(
        image="tiny", version=3, wire=1, platform="linux/amd64", epoch=spec.epoch, dockerfile=spec.dockerfile, definition_sha256=spec.sha256,
        python="3.11", wheels=assemble.group(wheels, spec), tools=[tool.model_copy(update={"layer": "tools"})],
    )
    layers = [make_base(places), *assemble.identify_all(assemble.contents(found, spec, places), spec.epoch, lambda line: None)]
    found = found.model_copy(update={"layers": layers})
    lock.write(found, places.lock("tiny"))
    dockerfile.write(found, spec, places)
    return places


def make_base(places: Places) -> LockedLayer:
    """A base layer that stands for Debian's."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        entry = tarfile.TarInfo("etc/debian_version")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"12.0\n"))
    tar_bytes, blob = out.getvalue(), gzip.compress(out.getvalue(), mtime=0)
    places.blobs.mkdir(parents=True, exist_ok=True)
    sha256 = hashlib.sha256(blob).hexdigest()
    (places.blobs / sha256).write_bytes(blob)
    return LockedLayer(name="os", kind="os", diff_id="sha256:" + hashlib.sha256(tar_bytes).hexdigest(), blob_sha256=sha256,
                       blob_bytes=len(blob), size_bytes=len(tar_bytes), holds=["base-files 12"])
