"""What `milktea image ...` and the makefile call, one function a verb. None prints: each takes a ``progress`` that hears lines."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from ops.errors import ConfigError
from ops.image import assemble as assembly
from ops.image.build import dockerfile, engine
from ops.image.build.container_config import config_json
from ops.image.bundle.archive import Image, Layer
from ops.image.fetch import debian
from ops.image.fetch import models as model
from ops.image.fetch import wheels as packages
from ops.image.fetch.debian import Mirrors
from ops.image.spec import budget, definition
from ops.image.spec import lock as locks
from ops.image.spec.definition import Definition
from ops.image.spec.lock import Identity, Lock
from ops.image.spec.paths import Places

Progress = Callable[[str], None]
TOOLS = ("pip",)  # what the Dockerfile installs the wheels with; in no image


def quiet(line: str) -> None:
    """Hears progress and says nothing."""


def define(name: str, places: Places = Places()) -> Definition:
    """images/NAME.toml; raises ConfigError with the file and the key."""
    return definition.read(places.definition(name))


def read_lock(name: str, places: Places = Places()) -> Lock:
    """images/NAME.lock, refused where it is older than the definition."""
    found = locks.read(places.lock(name))
    definition.require_current(found, define(name, places))
    return found


def lock(name: str, places: Places = Places(), mirrors: Mirrors | None = None, progress: Progress = quiet) -> Lock:
    """Resolve everything as it is today, compute every identity, write images/NAME.lock and the Dockerfile made from it.

    Needs a network; 1 to 3 minutes and the image's size on the disk. Raises PreflightError where something cannot be had.
    """
    spec, mirrors = define(name, places), mirrors or Mirrors.of_this_host()
    debs = debian.resolve(spec.os, mirrors)
    debian.fetch(debs, mirrors, places.debs, progress)
    wheels = packages.resolve(spec.python, spec.python.requirements, places.wheels, progress)
    tools = packages.resolve(spec.python, TOOLS, places.wheels, progress)
    models = [model.resolve(source, places.root, places.models, progress) for source in spec.models]
    found = Lock(
        image=spec.name, version=spec.version, wire=spec.wire, platform=spec.platform, epoch=spec.epoch, dockerfile=spec.dockerfile,
        definition_sha256=spec.sha256, python=spec.python.version, cuda=spec.cuda, debs=debs, models=models,
        wheels=assembly.group(wheels, spec), tools=[tool.model_copy(update={"layer": "tools"}) for tool in tools],
    )  # fmt: skip
    base = assembly.base(None, found, spec, places, progress)
    above = assembly.identify_all(assembly.contents(found, spec, places), spec.epoch, progress)
    found = found.model_copy(update={"layers": [base, *above]})
    locks.write(found, places.lock(name))
    dockerfile.write(found, spec, places)
    return found


def fetch(name: str, places: Places = Places(), mirrors: Mirrors | None = None, progress: Progress = quiet) -> None:
    """Get everything that the lock pins onto this disk, each file checked. The only step that needs a network."""
    spec, found = define(name, places), read_lock(name, places)
    debian.fetch(found.debs, mirrors or Mirrors.of_this_host(), places.debs, progress)
    packages.fetch(spec.python, [*found.wheels, *found.tools], places.wheels, progress)
    for base in found.models:
        model.fetch(base, places.root, places.models, progress)


def predict(name: str, places: Places = Places()) -> Identity:
    """The digests of the image that :func:`assemble` would make from this lock and this checkout; milliseconds, no wheel needed."""
    return assembly.predict(read_lock(name, places), define(name, places), places)


def assemble(name: str, places: Places = Places(), progress: Progress = quiet) -> Image:
    """The image from its lock: no engine, no root, no network. Writes config.json and image.lock under .milktea/images/NAME.

    Raises PreflightError where a file was not fetched, ConfigError where a layer is over its budget. Safe to repeat: what is
    there is kept.
    """
    spec, found = define(name, places), read_lock(name, places)
    trainer = assembly.trainer_content(spec, places)
    whole = assembly.complete(found, spec, places, trainer)
    budget.require(whole, definition.read_budget(places.budget(name)), places.budget(name))
    image = assembly.write(whole, spec, places, trainer, progress)
    folder = places.image(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(image.config_json_bytes)
    locks.write(whole, folder / "image.lock")
    return image


def assembled(name: str, places: Places = Places()) -> tuple[Image, Lock]:
    """The image that was assembled last, with its whole lock; raises ConfigError where there is none."""
    folder = places.image(name)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"image {name} has not been assembled here", hint=f"make image IMAGE={name}")
    whole = locks.read(folder / "image.lock")
    stacked = tuple(
        Layer(x.name, x.diff_id, x.blob_sha256, x.blob_bytes, places.blobs / x.blob_sha256, x.size_bytes) for x in whole.layers
    )
    tag = whole.identity.tag if whole.identity else f"milktea/{name}:{whole.version}"
    return Image((folder / "config.json").read_bytes(), stacked, tag), whole


def write_dockerfile(name: str, places: Places = Places()) -> Path:
    """Render docker/NAME/VERSION/ from the lock again, without locking again; returns the Dockerfile."""
    found = read_lock(name, places)
    dockerfile.write(found, define(name, places), places)
    return places.dockerfile(found.dockerfile) / "Dockerfile"


def context(name: str, folder: Path, places: Places = Places()) -> Path:
    """The build context of the image's Dockerfile: everything fetched, nothing else. Returns the Dockerfile in it."""
    return dockerfile.context(read_lock(name, places), define(name, places), places, folder)


def load(name: str, places: Places = Places(), progress: Progress = quiet, host: str | None = None) -> str:
    """Bring the assembled image into the engine; returns its ID there. Raises PreflightError where there is no engine."""
    image, _ = assembled(name, places)
    return engine.load(engine.connect(host), image, progress)


def load_base(name: str, places: Places = Places(), progress: Progress = quiet, host: str | None = None) -> str:
    """Bring the image's Debian layer into the engine as an image of its own, for its Dockerfile to stand on; returns the tag.

    Makes the layer of the fetched packages where it is not there; the rest of the image need not be."""
    client, spec, found = engine.connect(host), define(name, places), read_lock(name, places)
    made = assembly.require_base(found, spec, places, progress)
    layer = Layer(made.name, made.diff_id, made.blob_sha256, made.blob_bytes, places.blobs / made.blob_sha256, made.size_bytes)
    base = Image(config_json(found, [made]), (layer,), f"milktea/os-{name}:{found.version}")
    engine.load(client, base, progress)
    return base.tag


def build_registry_base(
    name: str, registry_base: str | None = None, places: Places = Places(), progress: Progress = quiet, buildkit: bool = False,
    host: str | None = None,
) -> str:
    """The image's Debian on an ordinary base, by docker/os/1: for those who have a registry and no mmdebstrap. Returns the tag."""
    client, spec, found = engine.connect(host), define(name, places), read_lock(name, places)
    tag = f"milktea/os-{name}:{found.version}-registry"
    with tempfile.TemporaryDirectory(prefix="milktea-context-", dir=places.cache) as folder:
        dockerfile.base_context(found, spec, places, Path(folder))
        engine.build(client, Path(folder), tag, {"REGISTRY_BASE": registry_base or spec.os.registry_base}, buildkit, progress)
    return tag


def build_with_dockerfile(
    name: str, places: Places = Places(), progress: Progress = quiet, base: str | None = None, buildkit: bool = False, host: str | None = None
) -> str:
    """The same image by pip in the engine instead of by splicing; returns its tag. ``base``: another Debian with the packages in it."""
    client = engine.connect(host)
    spec = define(name, places)
    arguments = {"BASE": base or load_base(name, places, progress, host)}
    with tempfile.TemporaryDirectory(prefix="milktea-context-", dir=places.cache) as folder:
        dockerfile.context(read_lock(name, places), spec, places, Path(folder))
        engine.build(client, Path(folder), f"{spec.tag}-dockerfile", arguments, buildkit, progress)
    return f"{spec.tag}-dockerfile"


def push(name: str, target: str, places: Places = Places(), progress: Progress = quiet, host: str | None = None) -> str:
    """Push the image to a registry that vast.ai's hosts can pull from; returns its digest."""
    load(name, places, progress, host)
    return engine.push(engine.connect(host), define(name, places).tag, target, progress)
