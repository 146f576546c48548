"""What `milktea image ...` and the makefile call, one function a verb. None prints: each takes a
``progress`` for its lines.
"""

from __future__ import annotations

import datetime
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from ops.errors import ConfigError
from ops.image.build import context, engine
from ops.image.build.export import export
from ops.image.bundle import bundle as bundles
from ops.image.bundle import inventory, signature
from ops.image.bundle.archive import Image
from ops.image.bundle.bundle import Bundle
from ops.image.bundle.contents import PROVE, Contents, Options
from ops.image.bundle.cuda_lines import line_of, lines
from ops.image.bundle.inventory import Present
from ops.image.fetch import debian, models, wheels
from ops.image.fetch.debian import Mirrors as Mirrors  # offered to the command line
from ops.image.spec import budget, definition
from ops.image.spec import lock as locks
from ops.image.spec.definition import Definition, ModelSource
from ops.image.spec.lock import Lock
from ops.image.spec.paths import Places

Progress = Callable[[str], None]
FAT32_BYTES = 4_294_967_295
VOLUMES = {
    "fat32": FAT32_BYTES,
    "dvd": 4_700_000_000,
    "dvd-dl": 8_500_000_000,
    "bd": 25_000_000_000,
}
DOCUMENTS = (
    "jobs/*.toml",
    "docs/*.md",
)  # what a person on the server reads, where it is in the checkout


def quiet(line: str) -> None:
    """Takes a line of progress and says nothing."""


def define(name: str, places: Places = Places()) -> Definition:
    """images/NAME.toml; raises ConfigError with the file and the key, and outside of a checkout."""
    places.validate()
    return definition.read(places.definition(name))


def read_lock(name: str, places: Places = Places()) -> Lock:
    """images/NAME.lock; raises ConfigError where it is older than the definition."""
    lock = locks.read(places.lock(name))
    definition.validate_current(lock, define(name, places))
    return lock


def lock(
    name: str, places: Places = Places(), mirrors: Mirrors | None = None, progress: Progress = quiet
) -> Lock:
    """Resolve everything as it is today; write images/NAME.lock and the requirement files beside
    its Dockerfile.

    Needs a network; 1 to 3 minutes and the packages' size on the disk. Raises PreflightError where
    something cannot be had, ConfigError where the Dockerfile's version is released.
    """
    spec, mirrors = define(name, places), mirrors or Mirrors.of_this_host()
    context.validate_unreleased(spec.dockerfile, places)
    debs = debian.resolve(spec.os, mirrors)
    debian.fetch(debs, mirrors, places.debs, progress)
    found = wheels.resolve(spec.python, spec.python.requirements, places.wheels, progress)
    beside = [
        models.resolve(source, places.root, places.models, progress) for source in spec.models
    ]
    locked = Lock(
        image=spec.name,
        version=spec.version,
        wire=spec.wire,
        platform=spec.platform,
        epoch=spec.epoch,
        dockerfile=spec.dockerfile,
        definition_sha256=spec.sha256,
        python=spec.python.version,
        cuda=spec.cuda,
        debs=debs,
        wheels=context.assign_layers(found, spec),
        models=beside,
    )
    locks.write(locked, places.lock(name))
    context.write_requirements(locked, spec, places)
    return locked


def fetch(
    name: str, places: Places = Places(), mirrors: Mirrors | None = None, progress: Progress = quiet
) -> None:
    """Get everything that the lock pins onto this disk, each file by its hash. The only step that
    needs a network.
    """
    spec, found = define(name, places), read_lock(name, places)
    debian.fetch(found.debs, mirrors or Mirrors.of_this_host(), places.debs, progress)
    wheels.fetch(spec.python, found.wheels, places.wheels, progress)
    for model in found.models:
        models.fetch(model, places.root, places.models, progress)
    context.lay_out(found, places)


def build(
    name: str,
    places: Places = Places(),
    progress: Progress = quiet,
    base: str | None = None,
    host: str | None = None,
) -> str:
    """Build the image from what was fetched, without a network; returns its tag.

    ``base`` is a Debian 12 in the engine in place of the one that the Dockerfile names. Raises
    PreflightError where a file was not fetched or the engine refuses.
    """
    spec, found = define(name, places), read_lock(name, places)
    client = engine.connect(host)
    context.lay_out(found, places)
    arguments = {"PIP_NO_INDEX": "1"} | ({"BASE": base} if base else {})
    engine.build(
        client, places.root, f"docker/{spec.dockerfile}/Dockerfile", spec.tag, arguments, progress
    )
    return spec.tag


def make_base(
    name: str, places: Places = Places(), progress: Progress = quiet, host: str | None = None
) -> str:
    """Make a Debian base of the locked packages by mmdebstrap, for a machine that reaches no
    registry; returns its tag.
    """
    debian.validate_mmdebstrap()
    spec, found, client = define(name, places), read_lock(name, places), engine.connect(host)
    tag = f"milktea/debian:{spec.os.suite}"
    with tempfile.TemporaryDirectory(dir=places.cache, prefix="base-") as folder:
        progress(f"making Debian {spec.os.suite} from {len(found.debs)} packages (about 30 s)")
        tar = Path(folder) / "base.tar"
        debian.make_base(spec.os, found.debs, places.debs, spec.epoch, tar)
        return engine.import_base(client, tar, tag)


def take(
    name: str,
    places: Places = Places(),
    progress: Progress = quiet,
    image: str | None = None,
    host: str | None = None,
) -> tuple[Image, Lock]:
    """Take the built image (or ``image``, one made FROM it) out of the engine as it is carried;
    writes its lock under .milktea/images/NAME.

    Raises ConfigError where a layer is over its budget, PreflightError where the image is not in
    the engine.
    """
    spec, found = define(name, places), read_lock(name, places)
    tag = spec.tag
    if image is not None:
        found = found.model_copy(update={"image": name_of(image)})
        tag = f"milktea/{found.image}:{found.version}"
    taken, whole = export(
        engine.save(engine.connect(host), image or spec.tag), tag, found, places, progress
    )
    if image is None:
        budget.require(whole, definition.read_budget(places.budget(name)), places.budget(name))
    path = places.built(whole.image)
    path.parent.mkdir(parents=True, exist_ok=True)
    locks.write(whole, path)
    return taken, whole


def prove(
    name: str,
    places: Places = Places(),
    progress: Progress = quiet,
    image: str | None = None,
    host: str | None = None,
) -> None:
    """Let the built image (or ``image``) prove itself on the CPU: its own self-test, once an image.

    Minutes the first time. Raises PreflightError with what failed.
    """
    tag = image or define(name, places).tag
    client = engine.connect(host)
    identity = engine.image_id(client, tag)
    done = places.cache / "proved" / identity.removeprefix("sha256:")
    if done.is_file():
        return
    progress(f"{tag} proves itself: real steps in fp32 and bf16 (a few minutes, once an image)")
    said = engine.prove(client, tag, places.lock(name), PROVE)
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(said)


def sizes(name: str, places: Places = Places()) -> list[tuple[str, int, int, str]]:
    """(layer, bytes uncompressed, bytes that travel, what they are) of the image taken last; raises
    ConfigError where there is none."""
    path = places.built(name)
    if not path.is_file():
        raise ConfigError(
            f"image {name} has not been bundled here", hint=f"make bundle IMAGE={name}"
        )
    return budget.attribution(locks.read(path))


def release(name: str, places: Places = Places()) -> str:
    """Mark the Dockerfile's version as released, and return its folder: its files are never written
    again."""
    dockerfile = define(name, places).dockerfile
    context.release(dockerfile, places)
    return f"docker/{dockerfile}"


def push(
    name: str,
    target: str,
    places: Places = Places(),
    progress: Progress = quiet,
    host: str | None = None,
) -> str:
    """Push the built image to a registry that vast.ai's hosts can pull from; returns its digest."""
    tag = define(name, places).tag
    return engine.push(engine.connect(host), tag, target, progress)


def bundle(
    name: str,
    out: Path | None = None,
    *,
    since: Path | None = None,
    server: Path | None = None,
    volume: str = "",
    key: Path | None = None,
    signed: bool = True,
    image: str | None = None,
    whole: bool = False,
    proved: bool = True,
    places: Places = Places(),
    progress: Progress = quiet,
) -> Bundle | Path:
    """Write the built image, or ``image`` made FROM it, as a folder to carry; ``whole`` writes one
    OCI archive instead.

    ``out`` is a new folder of its own name where it is None. ``since`` is the bundle that the
    server has, or its image.lock, ``server`` the facts of its preflight; either makes an update.
    ``volume`` is a number of bytes, or one of VOLUMES. ``key`` signs; without it a key of this
    user, made once. Raises ConfigError, PreflightError.
    """
    if proved:
        prove(name, places, progress, image)
    built, lock = take(name, places, progress, image)
    release = _release()
    contents = Contents(
        lock,
        built,
        {model.name: models.where(model, places.models) for model in lock.models},
        line_of(name, lock.cuda),
        tuple(lines(places)),
        documents=_documents(places),
    )
    if whole:
        return bundles.write_oci(contents, out or Path(f"{lock.image}-{release}.oci.tar"))
    base, base_models = _base(built, since, server)
    if signed:
        key = key or _own_key(progress)
    options = Options(release, volume_bytes(volume), base, base_models, key if signed else None)
    kind = "update" if base else "bundle"
    return bundles.write_bundle(
        contents, out or Path(f"{kind}-{lock.image}-{release}"), options, progress
    )


def bundle_model(
    folder: Path,
    name: str = "",
    out: Path | None = None,
    *,
    volume: str = "",
    key: Path | None = None,
    signed: bool = True,
    places: Places = Places(),
    progress: Progress = quiet,
) -> Bundle:
    """Write the base model in ``folder`` as a bundle of its own, for a server that has an image.

    ``name`` is what jobs call it; the folder's name without. ChatGLM2 and 3 and the original LLaMA
    layout are converted. Raises ConfigError, PreflightError.
    """
    name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")
    if not definition.is_model_name(name):
        raise ConfigError(
            f"{name!r} is no name of a model", hint="--name company/Model-7B, of A-Z a-z 0-9 . _ -"
        )
    source = ModelSource(name=name, source=f"folder:{folder.resolve()}")
    model = models.resolve(source, places.root, places.models, progress)
    short = f"models-{re.sub(r'[^a-z0-9.-]', '-', name.lower())}"
    release = _release()
    contents = bundles.of_models(short, [model], {name: models.where(model, places.models)})
    key = (key or _own_key(progress)) if signed else None
    options = Options(release, volume_bytes(volume), key=key)
    return bundles.write_bundle(contents, out or Path(f"{short}-{release}"), options, progress)


def keygen(path: Path) -> str:
    """A key to sign bundles with; returns its fingerprint, which whoever installs must get by
    another way than the disk.
    """
    return signature.make_key(path)


def compatible(server: Path, places: Places = Places()) -> list[str]:
    """The images of this project that the server of these facts runs as they are."""
    places.validate()
    return inventory.read(server).compatible_lines(lines(places))


def volume_bytes(text: str) -> int:
    """0 for "", bytes for a number, else one of VOLUMES; raises ConfigError."""
    if not text or text in VOLUMES:
        return VOLUMES.get(text, 0)
    if not text.isdigit() or int(text) < 1_000_000:
        raise ConfigError(
            f"volume size {text!r} is neither a number of bytes from 1,000,000 on nor one of"
            f" {', '.join(VOLUMES)}"
        )
    return int(text)


def name_of(image: str) -> str:
    """The name of a bundle of another image: the last part of its repository."""
    name = re.sub(
        r"[^a-z0-9.-]", "-", image.rpartition("/")[2].partition("@")[0].partition(":")[0].lower()
    ).strip("-.")
    if not name:
        raise ConfigError(f"{image!r} names no image", hint="docker images lists them")
    return name


def own_key() -> Path:
    """Where this user's signing key is."""
    return (
        Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        / "milktea"
        / "release-key"
    )


def _release() -> int:
    """Now, in UTC: later bundles have larger numbers."""
    return int(datetime.datetime.now(datetime.UTC).strftime("%Y%m%d%H%M%S"))


def _own_key(progress: Progress) -> Path:
    path = own_key()
    if not path.is_file():
        signature.make_key(path)
        progress(f"made a signing key: {path}")
    public = path.with_name(path.name + ".pub")
    progress(
        f"signing with {path}; tell the other side by telephone: {signature.fingerprint(public)}"
    )
    return path


def _documents(places: Places) -> dict[str, Path]:
    return {path.name: path for pattern in DOCUMENTS for path in sorted(places.root.glob(pattern))}


def _base(
    built: Image, since: Path | None, server: Path | None
) -> tuple[Present | None, frozenset[str]]:
    """The image and the models that the server has. A layer of the same files and other gzip bytes
    counts as changed.
    """
    if since and server:
        raise ConfigError(
            "SINCE and INVENTORY exclude each other: the inventory says what the server has",
            hint="give one of them",
        )
    if server:
        found = inventory.read(server)
        return found.base_for(built.diff_ids), found.models
    if not since:
        return None, frozenset()
    old = locks.read(since / "image.lock" if since.is_dir() else since)
    if not old.layers or old.identity is None:
        raise ConfigError(
            f"{since} is not the lock of a built image",
            hint="take the image.lock of the bundle that was carried",
        )
    blobs = {layer.diff_id: layer.blob_sha256 for layer in built.layers}
    same = [x.diff_id for x in old.layers if blobs.get(x.diff_id, x.blob_sha256) == x.blob_sha256]
    ref = f"{old.identity.tag.rpartition(':')[0]}:{old.identity.config_digest[7:19]}"
    return Present(ref, same), frozenset(model.set_digest for model in old.models)
