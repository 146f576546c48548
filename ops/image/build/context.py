"""What ``docker build`` finds beside the Dockerfile: the requirement files that the lock writes,
the fetched files.

The build context is the checkout. docker/NAME/VERSION/debian holds packages.txt (by hand) and, once
fetched, the .deb files; docker/NAME/VERSION/wheels/LAYER holds requirements.txt (from the lock,
committed) and, once fetched, the wheels.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from pathlib import Path

from ops.errors import ConfigError, PreflightError
from ops.image.fetch import debian, wheels
from ops.image.spec.definition import Definition
from ops.image.spec.lock import Lock, Wheel
from ops.image.spec.paths import Places, link
from trainer.wire.digest import sha256_of

FETCHED = (".deb", ".whl", ".gz")


def assign_layers(found: Iterable[Wheel], definition: Definition) -> list[Wheel]:
    """The wheels with the names of their layers; raises ConfigError for one that no pattern of
    [layers] fits.
    """
    return [
        wheel.model_copy(update={"layer": _layer_of(wheel.name, definition)}) for wheel in found
    ]


def write_requirements(lock: Lock, definition: Definition, places: Places) -> None:
    """Write wheels/LAYER/requirements.txt for every layer; refuses where the Dockerfile's version
    is released.
    """
    folder = places.dockerfile(lock.dockerfile)
    validate_unreleased(lock.dockerfile, places)
    for layer in definition.layers:
        pins = [
            wheels.pin(wheel)
            for wheel in sorted(lock.wheels, key=lambda wheel: wheel.name)
            if wheel.layer == layer
        ]
        path = folder / "wheels" / layer / "requirements.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "# Written by `make image-lock`. Not edited by hand.\n"
            + "".join(f"{pin}\n" for pin in pins)
        )


def validate_unreleased(dockerfile: str, places: Places) -> None:
    """Raises ConfigError where docker/released names a file of this folder."""
    if places.released.is_file() and f"  {dockerfile}/" in places.released.read_text():
        name, _, version = dockerfile.rpartition("/")
        raise ConfigError(
            f"docker/{dockerfile} is released: it is never written again",
            hint=f"copy it to docker/{name}/{int(version) + 1} and name that in images/{name}.toml",
        )


def release(dockerfile: str, places: Places) -> None:
    """Add the files of docker/DOCKERFILE that git keeps to docker/released."""
    validate_unreleased(dockerfile, places)
    folder = places.dockerfile(dockerfile)
    files = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in FETCHED
    ]
    with places.released.open("a") as out:
        out.writelines(
            f"{sha256_of(path)}  {path.relative_to(places.root / 'docker')}\n" for path in files
        )


def lay_out(lock: Lock, places: Places) -> None:
    """Put the fetched packages and wheels beside the Dockerfile, as hard links; what the lock does
    not name is removed.
    """
    folder = places.dockerfile(lock.dockerfile)
    wanted = {
        folder / "debian" / Path(deb.file).name: debian.where(deb, places.debs) for deb in lock.debs
    }
    wanted |= {
        folder / "wheels" / x.layer / x.file: wheels.where(x, places.wheels) for x in lock.wheels
    }
    for path in folder.glob("*/**/*"):
        if path.suffix not in FETCHED:
            continue
        source = wanted.get(path)
        if source is None or not source.is_file() or not path.samefile(source):
            path.unlink()
    for path, source in wanted.items():
        if not source.is_file():
            raise PreflightError(
                f"{path.name} was not fetched", hint=f"milktea image fetch {lock.image}"
            )
        if not path.exists():
            link(source, path)


def _layer_of(name: str, definition: Definition) -> str:
    for layer, patterns in definition.layers.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return layer
    raise ConfigError(
        f"no layer takes the wheel {name}",
        hint=f'add python = ["*"] to [layers] in images/{definition.name}.toml',
    )
