"""From a definition to a proven image: what `milktea image ...` and the makefile call, one function
a verb; bundles are made in carry.py. None prints: each takes a ``progress`` for its lines.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from ops.errors import ConfigError
from ops.image.build import context, engine
from ops.image.build.export import export
from ops.image.bundle.archive import Image
from ops.image.bundle.contents import PROVE
from ops.image.fetch import debian, models, wheels
from ops.image.fetch.debian import Mirrors as Mirrors  # offered to the command line
from ops.image.spec import budget, definition
from ops.image.spec import lock as locks
from ops.image.spec.definition import Definition
from ops.image.spec.lock import Lock
from ops.image.spec.paths import Places

Progress = Callable[[str], None]


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
) -> str:
    """Build the image from what was fetched, without a network; returns its tag.

    ``base`` is a Debian 12 in the engine in place of the one that the Dockerfile names. Raises
    PreflightError where a file was not fetched or the engine refuses.
    """
    spec, found = define(name, places), read_lock(name, places)
    client = engine.connect()
    context.lay_out(found, places)
    arguments = {"PIP_NO_INDEX": "1"} | ({"BASE": base} if base else {})
    engine.build(
        client, places.root, f"docker/{spec.dockerfile}/Dockerfile", spec.tag, arguments, progress
    )
    return spec.tag


def make_base(name: str, places: Places = Places(), progress: Progress = quiet) -> str:
    """Make a Debian base of the locked packages by mmdebstrap, for a machine that reaches no
    registry; returns its tag.
    """
    spec, found, client = define(name, places), read_lock(name, places), engine.connect()
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
        engine.save(engine.connect(), image or spec.tag), tag, found, places, progress
    )
    if image is None:
        budget.require(whole, definition.read_budget(places.budget(name)), places.budget(name))
    path = places.built(whole.image)
    path.parent.mkdir(parents=True, exist_ok=True)
    locks.write(whole, path)
    return taken, whole


def name_of(image: str) -> str:
    """The name of a bundle of another image: the last part of its repository."""
    name = re.sub(
        r"[^a-z0-9.-]", "-", image.rpartition("/")[2].partition("@")[0].partition(":")[0].lower()
    ).strip("-.")
    if not name:
        raise ConfigError(f"{image!r} names no image", hint="docker images lists them")
    return name


def prove(
    name: str,
    places: Places = Places(),
    progress: Progress = quiet,
    image: str | None = None,
) -> None:
    """Let the built image (or ``image``) prove itself on the CPU: its own self-test, once an image.

    Minutes the first time. Raises PreflightError with what failed.
    """
    tag = image or define(name, places).tag
    client = engine.connect()
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
    places.validate()
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
) -> str:
    """Push the built image to a registry that vast.ai's hosts can pull from; returns its digest."""
    tag = define(name, places).tag
    return engine.push(engine.connect(), tag, target, progress)
