"""A bundle: a folder that explains itself and brings an image, its base models and an installer to
a server without a network.

    README.{en,zh}.txt  INSTALL.sh  what to read, what to run
    PLAN                            what INSTALL.sh follows, one fact a line
    SHA256SUMS  .sig  .openssl      one line a file; the signatures are over this
    parts/NN-NAME-HASH.tar[.vNNN]   `docker load` archives: a large layer each, or some small ones
    models/SET/...  image.lock  sbom/  licenses/  tools/  docs/

The sender's key is not in it: whoever installs gets the key, or its fingerprint, by another way. An
update (``base``) carries the layers that changed, whole, and those above them. The same inputs give
the same bytes, but for the signature: ECDSA draws a random number.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ops.errors import ConfigError, PreflightError
from ops.hardware.driver import CudaLine
from ops.image.bundle import archive, manifest, signature, volumes
from ops.image.bundle.contents import Contents, Options, models_beside
from ops.image.bundle.parts import Part, bundle_id, final_tag, part_name, part_tag, plan_parts
from ops.image.spec.lock import Lock, Model
from ops.image.spec.paths import safe_path


@dataclass(frozen=True)
class Bundle:
    folder: Path
    id: str
    kind: str
    size_bytes: int
    carried_layers: int

    @property
    def summary(self) -> str:
        """One line for a person."""
        size = f"{self.size_bytes / 1e6:,.1f} MB"
        return f"{self.folder}: {self.kind}, {self.carried_layers} layers, {size}, bundle {self.id}"


def of_models(name: str, models: list[Model], folders: dict[str, Path]) -> Contents:
    """The contents of a bundle of base models alone; an image that the server has brings them in.

    The bundle's identity is of the models' files.
    """
    lock = Lock(
        image=name,
        version=1,
        wire=0,
        platform="linux/amd64",
        epoch=0,
        dockerfile="",
        definition_sha256="0" * 64,
        python="",
        models=models,
    )
    config = archive.canonical_json({"models": sorted(model.set_digest for model in models)})
    image = archive.Image(config, (), f"milktea/{name}:1")
    return Contents(lock, image, folders, CudaLine(name, None))


def write_bundle(
    contents: Contents,
    out: Path,
    options: Options = Options(),
    progress: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Write the bundle into ``out``, which must be empty or absent; it appears whole (a folder
    ``out``.part is renamed).

    Raises ConfigError for an ``out`` that holds something, PreflightError for a missing layer or
    model file, or no room.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty", hint="name another folder with --out")
    parts = plan_parts(contents.image, options.base)
    _validate_room(contents, parts, options, out)
    folder = out.with_name(out.name + ".part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    progress(f"writing {len(parts)} archives")
    files = _write_parts(contents, parts, folder, options)
    files |= _write_models(contents, folder, options)
    _write_small(contents, parts, files, folder, options)
    sums = folder / "SHA256SUMS"
    sums.write_text("".join(f"{file.sha256}  {path}\n" for path, file in sorted(files.items())))
    if options.key:
        signature.sign(sums, options.key)
    if out.exists():
        out.rmdir()
    folder.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    carried = sum(len(part.carried) for part in parts)
    return Bundle(out, bundle_id(contents.image), manifest.kind(contents, options), size, carried)


def write_oci(contents: Contents, out: Path) -> Path:
    """Write the whole image as one archive for registries, skopeo, ctr and k3s; `docker load` takes
    it too.

    Raises ConfigError where ``out`` exists, PreflightError where a layer is missing.
    """
    if out.exists():
        raise ConfigError(f"{out} exists", hint="name another file with --out")
    part = out.with_name(out.name + ".part")
    shown = archive.prefix(contents.image, len(contents.image.layers), final_tag(contents.image))
    try:
        with part.open("wb") as file:
            archive.write_archive(shown, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise PreflightError(
            f"{out}: {error}", hint=f"make image IMAGE={contents.lock.image}"
        ) from error
    return part.rename(out)


def _write_parts(
    contents: Contents, parts: list[Part], folder: Path, options: Options
) -> volumes.Files:
    """Two threads: hashing releases the interpreter, and layers are large."""
    (folder / "parts").mkdir()

    def one(part: Part) -> volumes.Files:
        name = part_name(contents.image, part)
        shown = archive.prefix(contents.image, part.last, part_tag(contents.image, part))
        with volumes.Writer(folder, name, options.volume_bytes, role="part") as out:
            try:
                archive.write_archive(shown, out, carry=part.carried)  # type: ignore[arg-type]
            except OSError as error:
                raise PreflightError(
                    f"{name}: {error}", hint=f"make image IMAGE={contents.lock.image}"
                ) from error
        return out.files

    with ThreadPoolExecutor(2) as pool:
        return {name: file for found in pool.map(one, parts) for name, file in found.items()}


def _write_models(contents: Contents, folder: Path, options: Options) -> volumes.Files:
    found: volumes.Files = {}
    for model in models_beside(contents, options):
        source = contents.models.get(model.name)
        for file in model.files:
            path = source / file.path if source else None
            if path is None or not path.is_file():
                raise PreflightError(
                    f"model {model.name}: {file.path} is missing",
                    hint=f"milktea image fetch {contents.lock.image}",
                )
            name = f"models/{model.set_digest.removeprefix('sha256:')}/{safe_path(file.path)}"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (
                volumes.Writer(folder, name, options.volume_bytes, role="model") as out,
                path.open("rb") as content,
            ):
                shutil.copyfileobj(content, out, 1 << 20)
            if out.sha256 != file.sha256:
                raise PreflightError(
                    f"model {model.name}: {file.path} is not the file of the lock (half downloaded,"
                    " or changed)",
                    hint=f"milktea image fetch {contents.lock.image} brings it again",
                )
            found |= out.files
    return found


def _write_small(
    contents: Contents, parts: list[Part], files: volumes.Files, folder: Path, options: Options
) -> None:
    small = manifest.small_files(contents)
    small["PLAN"] = "".join(
        f"{line}\n" for line in manifest.plan(contents, parts, files, options)
    ).encode()
    small |= {
        f"README.{x}.txt": manifest.readme(contents, files, options, x).encode()
        for x in ("en", "zh")
    }
    for name, data in small.items():
        files |= volumes.write_small(folder, name, data)
    (folder / "INSTALL.sh").chmod(0o755)


def _validate_room(contents: Contents, parts: list[Part], options: Options, out: Path) -> None:
    need = sum(contents.image.layers[k - 1].blob_bytes for part in parts for k in part.carried)
    need += sum(
        file.size_bytes for model in models_beside(contents, options) for file in model.files
    )
    at = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(at).free) < need:
        raise PreflightError(
            f"the bundle takes {need:,} bytes, {at} has {free:,} free",
            hint="name a folder on a larger disk with --out",
        )
