"""`milktea image bundle ...`: from the name of an image to the folder that is carried. Nothing here prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ops.errors import ConfigError
from ops.image.bundle import bundle as bundles
from ops.image.bundle import inventory
from ops.image.bundle import manifest as papers
from ops.image.bundle import signature as sign
from ops.image.bundle.bundle import Bundle
from ops.image.bundle.contents import Cargo, Options
from ops.image.bundle.inventory import Present
from ops.image.driver import NATIVE, Line
from ops.image.fetch import models
from ops.image.fetch.wheels import sha256_file
from ops.image.spec import definition, lock
from ops.image.spec.lock import Cuda, Lock
from ops.image.spec.paths import Places
from ops.image.workflow import assembled, quiet

FAT32_BYTES = 4_294_967_295
SIZES = {"fat32": FAT32_BYTES, "dvd": 4_700_000_000, "dvd-dl": 8_500_000_000, "bd": 25_000_000_000}


def bundle(
    name: str,
    out: Path,
    *,
    since: Path | None = None,
    server: Path | None = None,
    volume: str = "",
    parity_members: int = 8,
    key: Path | None = None,
    places: Places = Places(),
    progress: Callable[[str], None] = quiet,
) -> Bundle:
    """Write the bundle of the image that was assembled last into `out`.

    `since` is the bundle that the server has, or the image.lock of it, `server` the JSON of its preflight; either makes an update.
    `volume` is a number of bytes, or one of SIZES; `key` signs. Raises ConfigError, PreflightError.
    """
    image, whole = assembled(name, places)
    base, base_models, kept = _base(image.diff_ids, since, server, places)
    folders = {m.name: models.where(m, places.models) for m in whole.models if not m.bundled}
    options = Options(volume_bytes(volume), parity_members, base, base_models, kept, key)
    cargo = Cargo(whole, image, folders, line_of(whole.image, whole.cuda), tuple(lines(places)))
    for digest, data in papers.kept(cargo).by_hash().items():
        places.kept.mkdir(parents=True, exist_ok=True)
        (places.kept / digest).write_bytes(data)
    return bundles.write_bundle(cargo, out, options, progress)


def keygen(path: Path) -> str:
    """A key to sign bundles with; returns its fingerprint, which whoever installs must hear by another way than the disk."""
    return sign.make_key(path)


def fitting(server: Path, places: Places = Places()) -> list[str]:
    """The images of this project that the server of this preflight JSON runs as they are."""
    return inventory.read(server).lines_that_fit(lines(places))


def lines(places: Places = Places()) -> list[Line]:
    """Every CUDA line that images/*.toml define."""
    found = [definition.read(path) for path in sorted(places.definition("x").parent.glob("*.toml"))]
    return [line_of(d.name, d.cuda) for d in found if d.cuda]


def line_of(name: str, cuda: Cuda | None) -> Line:
    """Architectures are as in the definition: ``8.0``, ``sm_80``, ``9.0a``; ``12.0+PTX`` and ``compute_120`` are for newer GPUs too."""
    if cuda is None:
        return Line(name, None)
    toolkit = ".".join(cuda.toolkit.split(".")[:2])
    if toolkit not in NATIVE:
        raise ConfigError(f"images/{name}.toml: cuda.toolkit {cuda.toolkit} is unknown", hint="add its driver to NATIVE in ops/image/driver.py")
    arches, ptx = [], []
    for text in cuda.architectures:
        number = _dotted(text.removeprefix("sm_").removeprefix("compute_").removesuffix("+PTX"))
        if not text.startswith("compute_"):
            arches.append(number)
        if text.startswith("compute_") or text.endswith("+PTX"):
            ptx.append(number)
    return Line(name, toolkit, tuple(arches), tuple(ptx))


def volume_bytes(text: str) -> int:
    """0 for "", bytes for a number, else one of SIZES."""
    if not text or text in SIZES:
        return SIZES.get(text, 0)
    if not text.isdigit() or int(text) < 1_000_000:
        raise ConfigError(f"volume size {text!r} is neither a number of bytes from 1,000,000 on nor one of {', '.join(SIZES)}")
    return int(text)


def _base(
    diff_ids: list[str], since: Path | None, server: Path | None, places: Places
) -> tuple[Present | None, frozenset[str], dict[str, Path | None]]:
    """The image, the models and the small files that the server has."""
    if since and server:
        raise ConfigError("SINCE and INVENTORY exclude each other: the inventory says what the server has", hint="give one of them")
    if since:
        at = _lock_of(since, places)
        old: Lock = lock.read(at)
        if not old.layers or old.identity is None:
            raise ConfigError(f"{since} is not the whole lock of a built image", hint="take the image.lock of the bundle that was carried")
        kept = _here({*(old.kept or {}).values()}, places) | ({sha256_file(at): at} if old.kept else {})
        return Present(ref=old.identity.tag, layers=[x.diff_id for x in old.layers]), frozenset(m.set_digest for m in old.models), kept
    if server:
        found = inventory.read(server)
        return found.base_for(diff_ids), frozenset(found.models), _here(set(found.kept), places)
    return None, frozenset(), {}


def _lock_of(since: Path, places: Places) -> Path:
    """The lock that `since` is, or that the bundle `since` has; an update has none, but the machine that made it kept it."""
    if not since.is_dir() or (since / "image.lock").is_file():
        return since / "image.lock" if since.is_dir() else since
    try:
        digest = json.loads((since / "MANIFEST.json").read_text())["kept"]["image.lock"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{since} is not a bundle", hint="name the folder of a bundle, or its image.lock") from error
    if not (places.kept / digest).is_file():
        raise ConfigError(f"{since} is an update that was made on another machine", hint="make the bundle from INVENTORY=server.json")
    return places.kept / digest


def _here(digests: set[str], places: Places) -> dict[str, Path | None]:
    """Each with the file of this machine that has the same content, papers and layers alike."""
    return {x: next((at for at in (places.kept / x, places.blobs / x) if at.is_file()), None) for x in sorted(digests)}


def _dotted(text: str) -> str:
    """``80`` and ``8.0`` are one; ``90a`` is ``9.0a``."""
    if "." in text:
        return text
    letter = text[-1] if text[-1].isalpha() else ""
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    return f"{digits[:-1]}.{digits[-1]}{letter}"
