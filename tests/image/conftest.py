"""A tiny image with real layers, its lock, a tiny base model, and bundles made of them; no torch,
no engine, no network.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from image_engines import Engine, modern_engines
from machine import needs

from ops.hardware.driver import CudaLine
from ops.image.bundle import archive, bundle, parts
from ops.image.bundle.contents import Contents, Options
from ops.image.spec import lock

CPU = CudaLine("tiny", None)
EPOCH = 1_700_000_000


def _tar(files: dict[str, bytes | str], mode: int = 0o755) -> bytes:
    """A deterministic layer; a str is the target of a symbolic link."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        folders = sorted({str(p) for f in files for p in Path(f).parents if str(p) != "."})
        for folder in folders:
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, EPOCH
            tar.addfile(entry)
        for name, data in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.mtime, entry.mode = EPOCH, mode
            if isinstance(data, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, data
                tar.addfile(entry)
            else:
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def _shell() -> dict[str, bytes | str]:
    """This machine's own sh and what it is linked with: enough for an image that runs a script."""
    needs("ldd")
    files: dict[str, bytes | str] = {}
    program = os.path.realpath(shutil.which("dash") or "/bin/sh")
    files["bin/sh"] = Path(program).read_bytes()
    for line in subprocess.run(
        ["ldd", program], capture_output=True, text=True
    ).stdout.splitlines():
        for word in line.split():
            if word.startswith("/"):
                files[word.lstrip("/")] = Path(word).read_bytes()
    return files


def _python() -> dict[str, bytes | str]:
    """This machine's Debian Python with as much of its library as the installer imports."""
    files: dict[str, bytes | str] = {"usr/bin/python3": Path("/usr/bin/python3").read_bytes()}
    for word in subprocess.run(
        ["ldd", "/usr/bin/python3"], capture_output=True, text=True
    ).stdout.split():
        if word.startswith("/"):
            files[word.lstrip("/")] = Path(word).read_bytes()
    library = Path(f"/usr/lib/{Path('/usr/bin/python3').resolve().name}")
    for pattern in (
        "*.py",
        *(
            f"{x}/*.py"
            for x in ("collections", "encodings", "html", "importlib", "json", "re", "urllib")
        ),
    ):
        files |= {str(path).lstrip("/"): path.read_bytes() for path in library.glob(pattern)}
    return files


@dataclass
class TinyImage:
    """Layers by name, bottom up. Change one and build again, as the next release would."""

    folder: Path
    contents: dict[str, dict[str, bytes | str]] = field(default_factory=dict)
    models: dict[str, Path] = field(default_factory=dict)
    prove_says: str = (
        '{"milktea_selftest":1,"ok":true,'
        '"checks":[{"check":"tiny","ok":true,"found":"said hello"}]}'
    )
    name: str = "tiny"
    environment: tuple[str, ...] = ()

    def default(self) -> TinyImage:
        dice = random.Random(1)
        blob = lambda n: dice.randbytes(n)  # noqa: E731
        self.contents = {
            "os": _shell(),
            "cublas": {"lib/cublas.so": blob(900_000)},
            "wheel-a": {"lib/a.py": blob(40_000)},
            "wheel-b": {"lib/b.py": blob(60_000)},
            "wheel-c": {"lib/c.py": blob(30_000)},
            "trainer": {"app/train.py": b"print('one')\n"},
            "config": {
                "bin/prove": (
                    b'#!/bin/sh\ncat_() { while read -r l; do echo "$l"; done; }\ncat_ <<X\n'
                    + self.prove_says.encode()
                    + b"\nX\n"
                )
            },
        }
        return self

    def add_model(
        self, name: str = "org/Tiny-1B", sizes: tuple[int, ...] = (300_000, 200_000)
    ) -> TinyImage:
        dice = random.Random(2)
        folder = self.folder / "source-model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "tiny"}')
        for n, size in enumerate(sizes, 1):
            (folder / f"model-{n:05d}-of-{len(sizes):05d}.safetensors").write_bytes(
                dice.randbytes(size)
            )
        self.models[name] = folder
        return self

    def with_python(self) -> TinyImage:
        """The installer's part that runs inside the image needs one."""
        self.contents = {"os": self.contents["os"], "python": _python(), **self.contents}
        return self

    def made(self, line: CudaLine = CPU, lines: tuple[CudaLine, ...] = ()) -> Contents:
        layers, locked = [], []
        store = self.folder / "blobs"
        store.mkdir(parents=True, exist_ok=True)
        for name, files in self.contents.items():
            raw = _tar(files)
            blob = gzip.compress(raw, 1, mtime=0)
            digest = hashlib.sha256(blob).hexdigest()
            (store / digest).write_bytes(blob)
            layer = archive.Layer(
                name, archive.digest(raw), digest, len(blob), store / digest, len(raw)
            )
            layers.append(layer)
            locked.append(
                lock.LockedLayer(
                    name=name,
                    diff_id=layer.diff_id,
                    blob_sha256=digest,
                    blob_bytes=len(blob),
                    size_bytes=len(raw),
                    holds=[name],
                )
            )
        config = {
            "architecture": "amd64",
            "os": "linux",
            "created": "2023-11-14T22:13:20Z",
            "config": {
                "Env": ["PATH=/bin:/usr/bin", *self.environment],
                "Labels": {"milktea.wire": "1"},
                "Cmd": ["/bin/sh"],
            },
            "rootfs": {"type": "layers", "diff_ids": [x.diff_id for x in layers]},
            "history": [
                {"created": "2023-11-14T22:13:20Z", "created_by": "milktea"} for _ in layers
            ],
        }
        image = archive.Image(archive.canonical_json(config), tuple(layers), f"mtb/{self.name}:1")
        models = []
        for name, folder in self.models.items():
            files = [
                lock.ModelFile(
                    path=p.name,
                    sha256=hashlib.sha256(p.read_bytes()).hexdigest(),
                    size_bytes=p.stat().st_size,
                )
                for p in sorted(folder.iterdir())
            ]
            models.append(
                lock.Model(
                    name=name,
                    source="local",
                    revision="r1",
                    license="Apache-2.0",
                    set_digest=lock.set_digest(files),
                    files=files,
                )
            )
        whole = lock.Lock(
            image=self.name,
            version=1,
            wire=1,
            platform="linux/amd64",
            epoch=EPOCH,
            dockerfile="docker/tiny/1",
            definition_sha256="0" * 64,
            python="3.11",
            identity=lock.Identity(
                tag=image.tag,
                config_digest=image.config_digest,
                manifest_digest=image.manifest_digest,
            ),
            layers=locked,
            models=models,
            wheels=[
                lock.Wheel(
                    name="a",
                    version="1.0",
                    file="a-1.0-py3-none-any.whl",
                    sha256="a" * 64,
                    size_bytes=40_000,
                    layer="wheel-a",
                    license="MIT",
                )
            ],
        )
        return Contents(
            whole,
            image,
            dict(self.models),
            line,
            lines,
            prove=("/bin/sh", "/bin/prove"),
            python="/usr/bin/python3",
            memory_bytes=1_000_000,
        )

    def pack(self, out: Path, options: Options = Options(), **more: object) -> bundle.Bundle:
        return bundle.write_bundle(self.made(**more), out, options)  # type: ignore[arg-type]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyImage:
    """Its layers are kilobytes; as with real ones, the larger have parts of their own and the
    smaller share some.
    """
    monkeypatch.setattr(parts, "SMALL_BYTES", 80_000)
    return TinyImage(tmp_path / "tiny").default()


@pytest.fixture(scope="session")
def release_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ops.image.bundle import signature as sign

    needs("ssh-keygen", "openssl")
    key = tmp_path_factory.mktemp("keys") / "release"
    sign.make_key(key)
    return key


@pytest.fixture(scope="session")
def modern() -> Iterator[Callable[[str], Engine]]:
    """The newer engine with the store "overlay2" or "containerd"."""
    yield from modern_engines()


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., Ran]:
    """Runs INSTALL.sh of a bundle; `shell` is the shell, `path` the PATH (default: the one of this
    process).
    """

    def run(
        folder: Path,
        *arguments: str,
        shell: str = "sh",
        path: str | None = None,
        prefix: Path | None = None,
        **env: str,
    ) -> Ran:
        environment = {
            "PATH": path or os.environ["PATH"],
            "HOME": str(tmp_path),
            **{k: v for k, v in os.environ.items() if k == "DOCKER_HOST"},
            **env,
        }
        command = [
            *shell.split(),
            str(folder / "INSTALL.sh"),
            *arguments,
            "--prefix",
            str(prefix or tmp_path / "prefix"),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=170,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


__all__ = ["Ran", "TinyImage", "replace"]
