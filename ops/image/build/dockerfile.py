"""The readable way to the same image: a Dockerfile over the fetched files, where pip itself installs the wheels.

Rendered from the lock into docker/NAME/VERSION/, committed, and not edited once its version is released. It needs no new
syntax, so every builder from engine 20.10 on takes it, with BuildKit or without, and no network.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

from ops.errors import ConfigError
from ops.image import assemble, wheels
from ops.image.build.container_config import ENTRYPOINT, HEALTH, environment, labels
from ops.image.fetch import debian
from ops.image.fetch import models as model
from ops.image.fetch import wheels as packages
from ops.image.spec.definition import Definition
from ops.image.spec.lock import Lock
from ops.image.spec.paths import Places

BASE = "os/1"
HEAD = """\
# {name}, version {version}: {what}.
# Made from images/{name}.toml and images/{name}.lock by `make image-lock`; a released version is never edited.
# Build:  make image IMAGE={name} WITH=dockerfile
# or, by hand:  milktea image context {name} CONTEXT && docker build --network=none CONTEXT
# BASE is our own Debian, made from the locked packages (`milktea image base {name}` loads it into the engine), or the one
# that docker/os/1/Dockerfile builds on an ordinary base from a registry.
ARG BASE=milktea/os-{name}:{version}

# -- the wheels, each layer's in a folder of its own; none of this stage is in the image
FROM ${{BASE}} AS wheels
COPY install.sh prune.txt /work/
COPY groups/ /work/groups/
COPY wheels/ /work/wheels/
RUN ["sh", "/work/install.sh", "{python}", "{epoch}"]

# -- the image: what changes least comes first
FROM ${{BASE}}
"""

INSTALL = """\
#!/bin/sh
# Fills /layers/NAME with what pip installs for each group of wheels: offline, every hash checked, nothing compiled.
# sh install.sh PYTHON EPOCH
set -eu
umask 022
python=$1 epoch=$2

venv=/layers/venv/opt/venv
mkdir -p "$venv/bin" "$venv/lib/python$python/site-packages"
ln -s "/usr/bin/python$python" "$venv/bin/python"
ln -s python "$venv/bin/python3"
ln -s python "$venv/bin/python$python"
ln -s lib "$venv/lib64"
printf 'home = /usr/bin\\ninclude-system-site-packages = false\\nversion = %s\\nexecutable = /usr/bin/python%s\\n' \\
  "$python" "$python" >"$venv/pyvenv.cfg"
mkdir -p /opt
cp -a /layers/venv/opt/venv /opt/venv

pip=$(echo /work/wheels/pip-*.whl)/pip # Python runs it from inside its wheel
for group in /work/groups/*.txt; do
  name=$(basename "$group" .txt)
  /opt/venv/bin/python -B "$pip" install --quiet --disable-pip-version-check --root-user-action=ignore \\
    --no-warn-script-location --no-index --find-links /work/wheels --no-deps --no-compile --require-hashes --ignore-installed \\
    --root "/layers/$name" --prefix /opt/venv -r "$group"
  site=/layers/$name/opt/venv/lib/python$python/site-packages
  while read -r pattern; do
    find "$site" -path "$site/$pattern" ! -type d -delete
    find "/layers/$name/opt/venv" -path "/layers/$name/opt/venv/$pattern" ! -path "$site/*" ! -type d -delete
  done </work/prune.txt
  find "/layers/$name" -mindepth 1 -type d -empty -delete
done
find /layers -exec touch --no-dereference --date="@$epoch" {} +
"""


def write(lock: Lock, definition: Definition, places: Places) -> None:
    """The Dockerfile and its script, into docker/NAME/VERSION/."""
    folder = places.dockerfile(lock.dockerfile)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Dockerfile").write_text(render(lock, definition))
    (folder / "install.sh").write_text(INSTALL)


def render(lock: Lock, definition: Definition) -> str:
    """The Dockerfile's text, of the lock alone."""
    what = f"CUDA {lock.cuda.toolkit}, driver {lock.cuda.min_driver} or newer" if lock.cuda else "for the CPU, no GPU needed"
    text = HEAD.format(name=lock.image, version=lock.version, what=what, python=lock.python, epoch=lock.epoch)
    for layer in lock.layers[1:]:
        text += _copy(layer.name, layer.kind)
    text += f"COPY site/ /{wheels.site_packages(lock.python)}/\n\n"
    text += _block("ENV", environment(lock).items())
    text += _block("LABEL", labels(lock).items())
    text += "EXPOSE 22\n"  # no WORKDIR: BuildKit makes an empty layer of it, the legacy builder none
    text += f'HEALTHCHECK --interval=60s --timeout=10s --retries=3 CMD ["{HEALTH}"]\n'
    return text + "ENTRYPOINT [" + ", ".join(f'"{part}"' for part in ENTRYPOINT) + "]\n"


def context(lock: Lock, definition: Definition, places: Places, folder: Path) -> Path:
    """Lay out the build context in the new folder ``folder``; returns the Dockerfile in it. Raises where a file is missing."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty", hint="name a new folder")
    source = places.dockerfile(lock.dockerfile)
    for name in ("groups", "wheels", "site"):
        (folder / name).mkdir(parents=True)
    for name in ("Dockerfile", "install.sh"):
        shutil.copyfile(source / name, folder / name)
    (folder / "prune.txt").write_text("".join(f"{pattern}\n" for pattern in definition.python.prune))
    for wheel in lock.wheels:
        with (folder / "groups" / f"{wheel.layer}.txt").open("a") as group:
            group.write(packages.pin(wheel) + "\n")
    for wheel in [*lock.wheels, *lock.tools]:
        _link(packages.where(wheel, places.wheels), folder / "wheels" / wheel.file)
    for path in assemble.sources(places):
        _copied(path, folder / "site" / path.relative_to(places.root))
    box = places.dockerfile(definition.box)
    for path in sorted(path for path in box.rglob("*") if path.is_file()):
        _copied(path, folder / "box" / path.relative_to(box))  # whatever the checkout's umask was
    for bundled in lock.models:
        for layer, files in model.layers(bundled) if bundled.bundled else ():
            for file in files:
                _copied(model.where(bundled, places.models) / file.path, folder / layer / "models" / bundled.name / file.path)
    _stamp(folder, lock.epoch)
    return folder / "Dockerfile"


def _copy(name: str, kind: str) -> str:
    return f"COPY {name}/ /\n" if kind in ("config", "model") else f"COPY --from=wheels /layers/{name}/ /\n"


def _block(word: str, items: Iterable[tuple[str, str]]) -> str:
    lines = [f"{key}={value if value.replace('/', '').isalnum() else shlex.quote(value)}" for key, value in items]
    return f"{word} " + " \\\n    ".join(lines) + "\n"


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _copied(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def _stamp(folder: Path, epoch: int) -> None:
    """One time for all, so that the same context gives the same layers; the linked wheels keep theirs, no layer holds them."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            path.chmod(0o755)
        if path.parent.name != "wheels":
            os.utime(path, (epoch, epoch), follow_symlinks=False)


def base_context(lock: Lock, definition: Definition, places: Places, folder: Path) -> None:
    """The build context of docker/os/1: the locked Debian packages, for a base from a registry."""
    source = places.dockerfile(BASE)
    (folder / "debs").mkdir(parents=True)
    for name in ("Dockerfile", "install-debs.sh"):
        shutil.copyfile(source / name, folder / name)
    rules = [f"path-exclude={path}" for path in definition.os.exclude] + [f"path-include={path}" for path in definition.os.keep]
    (folder / "dpkg.cfg").write_text("".join(f"{rule}\n" for rule in rules))
    for deb in lock.debs:
        _link(debian.where(deb, places.debs), folder / "debs" / f"{deb.name}_{deb.architecture}.deb")
    _stamp(folder, lock.epoch)
