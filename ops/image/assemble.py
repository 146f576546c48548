"""An image from its lock, without an engine and without root: each layer is written once, in parallel, by splicing wheels.

``contents`` says what each layer holds, in the order of the image. Identities (DiffIDs) cost one inflation of everything and
are then in the lock; with them a build is a copy, and the image's digests are known before it (:func:`predict`).
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ops.errors import PreflightError
from ops.image import layers, wheels
from ops.image.build.container_config import config_json
from ops.image.bundle.archive import Image, Layer
from ops.image.fetch import debian
from ops.image.fetch import models as model
from ops.image.fetch import wheels as packages
from ops.image.layers import Entry
from ops.image.spec.definition import Definition
from ops.image.spec.lock import Identity, LayerKind, Lock, LockedLayer, Wheel
from ops.image.spec.paths import Places

Progress = Callable[[str], None]
SOURCES = ("trainer", "ops/__init__.py", "ops/job/__init__.py", "ops/job/config.py", "ops/errors.py")
LEFT_OUT = ("__pycache__", "pretrained")
MIB = 1 << 20
CHAPTER_BYTES = 1000  # the layer is a third larger than whole files packed, an update a quarter smaller
BLANK_LINES = re.compile(rb"\n\n\n")
CHANGED: dict[str, tuple[str, str]] = {
    "config": ("docker/box was edited after the lock", "make image-lock; a released box gets a new number"),
    "model": ("the model's files changed", "delete .milktea/cache/models and run `make image` again"),
}


@dataclass(frozen=True)
class Content:
    """A layer to be. ``make`` gives its entries, in the process that writes it; ``weight`` is about how many bytes they take.
    The blob is spliced, or ``packed`` by zlib where it is all small text."""

    name: str
    kind: LayerKind
    holds: tuple[str, ...]
    make: Callable[[], Iterable[Entry]]
    weight: int = 0
    packed: bool = False

    def entries(self) -> list[Entry]:
        return layers.with_parents(self.make())


def group(locked: Iterable[Wheel], definition: Definition) -> list[Wheel]:
    """The wheels with their layers' names, in the image's order: GPU libraries, torch, other large ones, the small ones together,
    and on top what changes most."""
    own = definition.layers.own_mib * MIB
    ranked = []
    for wheel in locked:
        if wheel.name in definition.layers.top:
            rank, layer = 4 + definition.layers.top.index(wheel.name), wheel.name
        elif wheel.size_bytes < own:
            rank, layer = 3, "python"
        else:
            gpu = wheel.name.startswith(("nvidia-", "triton", "cuda-"))
            rank, layer = (0 if gpu else 1 if wheel.name == "torch" else 2), wheel.name
        ranked.append((rank, wheel.name, wheel.model_copy(update={"layer": layer})))
    return [wheel for _, _, wheel in sorted(ranked, key=lambda item: item[:2])]


def contents(lock: Lock, definition: Definition, places: Places) -> list[Content]:
    """Every layer above the base, in order, except the trainer's. Reads nothing yet but whether each wheel is there."""
    version = definition.python.version
    found = [Content("venv", "venv", ("python " + version,), partial(wheels.venv_skeleton, version))]
    found.append(_box(definition, places))
    by_layer: dict[str, list[Wheel]] = {}
    for wheel in group(lock.wheels, definition):
        by_layer.setdefault(wheel.layer, []).append(wheel)
    made = {name: _wheel_layer(name, held, definition, places) for name, held in by_layer.items()}
    top = [made.pop(name) for name in definition.layers.top if name in made]
    return [*found, *made.values(), *_model_layers(lock, places), *top]


def trainer_content(definition: Definition, places: Places) -> Content:
    """Our own code as it is in the checkout now, importable by the image's Python. Read once: an edit during a build is for the next."""
    files = _copied(sources(places), places.root, wheels.site_packages(definition.python.version))
    return Content("trainer", "trainer", ("milktea",), partial(list, files), packed=True)


def sources(places: Places) -> list[Path]:
    """The files of the checkout that go into an image as code."""
    return [path for source in SOURCES for path in _files(places.root / source)]


def identify(content: Content, epoch: int) -> LockedLayer:
    """The layer's hashes, computed from its contents; nothing is written."""
    sink = _Sink()
    if content.packed:
        pieces = _tar(content, epoch)
        blob, tar = _pack(pieces), b"".join(pieces)
        return _locked(content, "sha256:" + hashlib.sha256(tar).hexdigest(), hashlib.sha256(blob).hexdigest(), len(blob), len(tar))
    entries = content.entries()
    written = layers.write_blob(entries, epoch, sink)  # type: ignore[arg-type]
    return _locked(content, layers.diff_id(entries, epoch), written.sha256, written.blob_bytes, written.size_bytes)


def identify_all(found: Sequence[Content], epoch: int, progress: Progress) -> list[LockedLayer]:
    """:func:`identify` on every core, the largest first."""
    order = sorted(range(len(found)), key=lambda i: -found[i].weight)
    progress(f"hashing {len(found)} layers, {sum(content.weight for content in found) / 1e9:.1f} GB")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        done = dict(zip(order, pool.map(identify, [found[i] for i in order], [epoch] * len(found)), strict=True))
    return [done[i] for i in range(len(found))]


def complete(lock: Lock, definition: Definition, places: Places, trainer: Content) -> Lock:
    """The whole lock of a build with this trainer: its layer and the image's digests. Milliseconds; writes nothing."""
    found = [*lock.layers, identify(trainer, lock.epoch)]
    image = _image(lock, definition, found, places)
    digests = Identity(tag=definition.tag, config_digest=image.config_digest, manifest_digest=image.manifest_digest)
    return lock.complete(found, digests)


def predict(lock: Lock, definition: Definition, places: Places) -> Identity:
    """The digests that a build will have, known before it."""
    identity = complete(lock, definition, places, trainer_content(definition, places)).identity
    assert identity is not None
    return identity


def write(whole: Lock, definition: Definition, places: Places, trainer: Content, progress: Progress) -> Image:
    """Make every blob that is not there yet and return the image; each blob is checked against the lock while it is written."""
    places.blobs.mkdir(parents=True, exist_ok=True)
    wanted = {layer.name: layer for layer in whole.layers if not _is_there(layer, places)}
    todo = [content for content in [*contents(whole, definition, places), trainer] if content.name in wanted]
    require_space(sum(layer.blob_bytes for layer in wanted.values()), places.blobs)
    progress(f"writing {len(wanted)} of {len(whole.layers)} layers, {sum(x.blob_bytes for x in wanted.values()) / 1e6:,.0f} MB")
    if "os" in wanted:
        base(wanted["os"], whole, definition, places, progress)
    todo.sort(key=lambda content: -wanted[content.name].blob_bytes)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for name in pool.map(_write_one, todo, [wanted[c.name] for c in todo], [whole.epoch] * len(todo), [places] * len(todo)):
            progress(f"layer {name}")
    return _image(whole, definition, whole.layers, places)


def base(locked: LockedLayer | None, lock: Lock, definition: Definition, places: Places, progress: Progress) -> LockedLayer:
    """Build the Debian layer from the fetched packages and keep its blob; raises where it is not the locked one.

    What was made from the same packages and settings before is taken again."""
    remembered = places.cache / f"{_base_key(lock, definition)}.base"
    if remembered.is_file() and _is_there(made := LockedLayer.model_validate_json(remembered.read_text()), places):
        return made
    progress(f"making Debian {definition.os.suite} from {len(lock.debs)} packages (about 30 s)")
    places.blobs.mkdir(parents=True, exist_ok=True)
    tar = places.blobs / f"os.{os.getpid()}.tar"
    try:
        debian.build(definition.os, lock.debs, places.debs, lock.epoch, tar)
        diff_id = "sha256:" + packages.sha256_file(tar)
        if locked is not None and diff_id != locked.diff_id:
            raise PreflightError(
                f"Debian's layer came out as {diff_id[7:19]}, the lock says {locked.diff_id[7:19]}: another mmdebstrap, or another order",
                hint="the locks were made by mmdebstrap 1.3; make image-lock takes what this machine makes",
            )
        size, blob = tar.stat().st_size, _gzip_file(tar, places)
    finally:
        tar.unlink(missing_ok=True)
    sha256 = packages.sha256_file(blob)
    made = LockedLayer(name="os", kind="os", diff_id=diff_id, blob_sha256=sha256, blob_bytes=blob.stat().st_size, size_bytes=size,
                       holds=[f"{deb.name} {deb.version}" for deb in lock.debs])
    if locked is not None and sha256 != locked.blob_sha256:
        blob.unlink()
        raise PreflightError(
            f"the files of Debian's layer are the locked ones, its gzip bytes are not ({sha256[:12]}): this Python has another zlib",
            hint="build with CPython from Debian or python.org (zlib 1.2 or 1.3), or make image-lock",
        )
    os.replace(blob, places.blobs / sha256)
    remembered.write_text(made.model_dump_json())
    return made


def require_base(lock: Lock, definition: Definition, places: Places, progress: Progress) -> LockedLayer:
    """The locked Debian layer, as a blob in the cache: there already, or made now."""
    locked = lock.layers[0]
    return locked if _is_there(locked, places) else base(locked, lock, definition, places, progress)


def _base_key(lock: Lock, definition: Definition) -> str:
    of = [str(debian.FORMAT), definition.os.model_dump_json(), str(lock.epoch), *(deb.sha256 for deb in lock.debs)]
    return hashlib.sha256("\n".join(of).encode()).hexdigest()[:16]


def require_space(needed: int, folder: Path) -> None:
    """Raises PreflightError before the first byte where the disk is too small."""
    if (free := shutil.disk_usage(folder).free) < needed + 64 * MIB:
        raise PreflightError(
            f"{folder} has {free / 1e9:.1f} GB free, the layers need {needed / 1e9:.1f} GB",
            hint="free some space, or delete .milktea/cache/blobs: everything in it can be made again",
        )


def _write_one(content: Content, locked: LockedLayer, epoch: int, places: Places) -> str:
    path = places.blobs / locked.blob_sha256
    if content.packed:
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_bytes(blob := _pack(_tar(content, epoch)))
        found = hashlib.sha256(blob).hexdigest()
        os.replace(part, path)
    else:
        found = layers.write_file(content.entries(), epoch, path).sha256
    if found != locked.blob_sha256:
        path.unlink()
        why, hint = CHANGED.get(content.kind, ("a wheel changed after its check", "delete .milktea/cache/wheels and run `make image` again"))
        raise PreflightError(f"layer {content.name} came out as {found[:12]}, the lock says {locked.blob_sha256[:12]}: {why}", hint=hint)
    return content.name


def _image(lock: Lock, definition: Definition, found: Sequence[LockedLayer], places: Places) -> Image:
    stacked = tuple(
        Layer(x.name, x.diff_id, x.blob_sha256, x.blob_bytes, places.blobs / x.blob_sha256, x.size_bytes) for x in found
    )
    return Image(config_json(lock, list(found)), stacked, definition.tag)


def _wheel_layer(name: str, held: Sequence[Wheel], definition: Definition, places: Places) -> Content:
    paths = [packages.where(wheel, places.wheels) for wheel in held]
    if lost := [path.name for path in paths if not path.is_file()]:
        raise PreflightError(f"{lost[0]} was not fetched", hint=f"make image IMAGE={definition.name}, where there is a network")
    make = partial(_placed, paths, definition.python.version, definition.python.prune)
    return Content(name, "wheels", tuple(f"{x.name} {x.version}" for x in held), make, sum(x.size_bytes for x in held))


def _placed(paths: Sequence[Path], python: str, prune: Sequence[str]) -> list[Entry]:
    return [entry for path in paths for entry in wheels.place(path, python, prune)]


def _model_layers(lock: Lock, places: Places) -> list[Content]:
    found = []
    for bundled in lock.models:
        if bundled.bundled:
            folder, holds = model.where(bundled, places.models), (f"{bundled.name} {bundled.set_digest[7:19]}",)
            for name, files in model.layers(bundled):
                weight = sum(file.size_bytes for file in files)
                make = partial(model.entries, bundled.name, [file.path for file in files], folder)
                found.append(Content(name, "model", holds, make, weight))
    return found


def _box(definition: Definition, places: Places) -> Content:
    """docker/box/N: the commands of the container; executable by the bit that git keeps."""
    root = places.dockerfile(definition.box)
    return Content("box", "config", (definition.box,), partial(_copied, _files(root), root))


def _copied(files: Sequence[Path], root: Path, below: str = "") -> list[Entry]:
    prefix = f"{below}/" if below else ""
    return [Entry(f"{prefix}{path.relative_to(root)}", 0o755 if os.access(path, os.X_OK) else 0o644, path.read_bytes()) for path in files]


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    return sorted(path for path in source.rglob("*") if path.is_file() and not set(path.parts) & set(LEFT_OUT))


def _tar(content: Content, epoch: int) -> list[bytes]:
    """The layer's tar: a piece for each header, for each function or so of a source file, and one for the end."""
    pieces = []
    for entry in content.entries():
        data = entry.data or b""
        pieces += [layers.tar_header(entry, epoch), *_chapters(data + b"\0" * (-len(data) % layers.BLOCK))]
    return [*pieces, b"\0" * (2 * layers.BLOCK)]


def _chapters(data: bytes) -> Iterator[bytes]:
    """The text cut where two blank lines are, in pieces of CHAPTER_BYTES or more. An edit moves no cut but those near it."""
    begin = 0
    for found in BLANK_LINES.finditer(data):
        if found.end() - begin >= CHAPTER_BYTES:
            yield data[begin : found.end()]
            begin = found.end()
    if begin < len(data):
        yield data[begin:]


def _pack(pieces: Iterable[bytes]) -> bytes:
    """A gzip member for each piece: an update then carries the functions that changed, not the layer."""
    return b"".join(map(layers.packed_member, pieces))


def _gzip_file(tar: Path, places: Places) -> Path:
    blob = places.blobs / f"os.{os.getpid()}.part"
    with tar.open("rb") as source, blob.open("wb") as out, gzip.GzipFile("", "wb", 6, out, mtime=0) as packer:
        shutil.copyfileobj(source, packer, MIB)
    return blob


def _locked(content: Content, diff_id: str, sha256: str, blob_bytes: int, size: int) -> LockedLayer:
    return LockedLayer(name=content.name, kind=content.kind, diff_id=diff_id, blob_sha256=sha256, blob_bytes=blob_bytes,
                       size_bytes=size, holds=list(content.holds))


def _is_there(layer: LockedLayer, places: Places) -> bool:
    path = places.blobs / layer.blob_sha256
    return path.is_file() and path.stat().st_size == layer.blob_bytes


class _Sink:
    """Counts nothing, keeps nothing: for hashes without a file."""

    def write(self, data: bytes | memoryview) -> int:
        return len(data)
