"""`milktea image ...`: build images from their locks, and bundles for servers without a network.
`ops.api` is imported inside the commands, as in app.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli.errors import errors
from ops.errors import ConfigError
from ops.plain import number_of

if TYPE_CHECKING:
    from ops.api import images

app = typer.Typer(
    no_args_is_help=True,
    help="Images: lock, build, push, and bundle for a server without a network",
    rich_markup_mode=None,
)

model_app = typer.Typer(
    no_args_is_help=True, help="Base models without an image", rich_markup_mode=None
)
app.add_typer(model_app, name="model")

Name = Annotated[str, typer.Argument(help="One of images/*.toml, such as practice or train-cu130")]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _mirrors() -> images.Mirrors:
    from ops.api import images

    return images.Mirrors.given(os.environ)


@app.command()
def build(
    name: Name = "practice",
    base: Annotated[
        str | None,
        typer.Option(
            help="A Debian 12 in the engine, instead of the one that the Dockerfile names"
        ),
    ] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch/--no-fetch", help="Get what is missing first; needs a network")
    ] = True,
) -> None:
    """Fetch what the lock pins, then docker build without a network."""
    with errors(False):
        from ops.api import images

        if fetch:
            images.fetch(name, mirrors=_mirrors(), progress=_say)
        print(f"built: {images.build(name, progress=_say, base=base)}")


@app.command()
def fetch(name: Name = "practice") -> None:
    """Bring everything that the lock pins onto this disk, each file by its hash; nothing after it
    needs a network."""
    with errors(False):
        from ops.api import images

        images.fetch(name, mirrors=_mirrors(), progress=_say)
        print(f"everything that images/{name}.lock pins is here")


@app.command()
def base(name: Name = "practice") -> None:
    """Make a Debian base of the locked packages by mmdebstrap, for a machine that reaches no
    registry."""
    with errors(False):
        from ops.api import images

        tag = images.make_base(name, progress=_say)
        print(f"{tag}\n  next: make image IMAGE={name} BASE={tag}")


@app.command()
def lock(name: Name = "practice") -> None:
    """Pin every Debian package, wheel and model file by hash; write images/NAME.lock and the
    requirement files."""
    with errors(False):
        from ops.api import images

        found = images.lock(name, mirrors=_mirrors(), progress=_say)
        counts = (
            f"{len(found.wheels)} wheels, {len(found.debs)} Debian packages, "
            f"{number_of(len(found.models), 'model')}"
        )
        print(f"images/{name}.lock: {counts}")


@app.command()
def push(
    name: Name,
    registry: Annotated[
        str, typer.Argument(help="As docker push takes it: ghcr.io/you/milktea-train:2")
    ],
) -> None:
    """Push to a registry that vast.ai's hosts pull from; log in with docker login first."""
    with errors(False):
        from ops.api import images

        print(images.push(name, registry, progress=_say))


@app.command()
def bundle(
    name: Name = "practice",
    out: Annotated[
        Path | None, typer.Option(help="The folder to carry; a new one of its own name without it")
    ] = None,
    since: Annotated[
        Path | None,
        typer.Option(
            help="The bundle that the server has, or its image.lock: only what changed is carried"
        ),
    ] = None,
    inventory: Annotated[
        Path | None, typer.Option(help="What the server's `INSTALL.sh preflight --facts` wrote")
    ] = None,
    volume: Annotated[
        str, typer.Option(help="fat32, dvd, dvd-dl, bd, or bytes: no file will be larger")
    ] = "",
    key: Annotated[
        Path | None, typer.Option(help="Sign with this key; a key of yours, made once, without it")
    ] = None,
    signed: Annotated[bool, typer.Option("--sign/--no-sign", help="Sign it")] = True,
    proved: Annotated[
        bool,
        typer.Option("--prove/--no-prove", help="Let the image prove itself first, once an image"),
    ] = True,
    image: Annotated[
        str | None,
        typer.Option(help="An image made FROM the built one, by a Dockerfile or docker commit"),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format", help="folder, or oci: one archive for registries, skopeo, ctr, k3s"
        ),
    ] = "folder",
) -> None:
    """Write a folder that a server with Docker, and nothing else, installs from."""
    with errors(False):
        from ops.api import carry

        if form not in ("folder", "oci"):
            raise ConfigError(
                f"--format {form} is neither folder nor oci",
                hint="leave it out for a folder to install from",
            )
        made = carry.bundle(
            name,
            out,
            since=since,
            server=inventory,
            volume=volume,
            key=key,
            signed=signed,
            image=image,
            whole=form == "oci",
            proved=proved,
            progress=_say,
        )
        print(made if isinstance(made, Path) else made.summary)


@app.command()
def keygen(
    path: Annotated[
        Path, typer.Argument(help="Where the key goes; keep it off the disk that is carried")
    ],
) -> None:
    """A key to sign bundles with, and the fingerprint to tell the other side by telephone."""
    with errors(False):
        from ops.api import carry

        print(carry.keygen(path))


@app.command()
def compatible(
    inventory: Annotated[
        Path, typer.Argument(help="What the server's `INSTALL.sh preflight --facts` wrote")
    ],
) -> None:
    """Which images the server of these facts runs as they are."""
    with errors(False):
        from ops.api import carry

        print(*carry.compatible(inventory), sep="\n")


@app.command()
def size(name: Name = "practice") -> None:
    """Every byte of the image that was bundled last, by layer and reason."""
    with errors(False):
        from ops.api import images

        for layer, bytes_there, packed, why in images.sizes(name):
            print(f"{bytes_there:>13,} {packed:>13,}  {layer}  {why}")


@app.command()
def release(name: Name) -> None:
    """Mark the image's Dockerfile version as released: its files are never written again."""
    with errors(False):
        from ops.api import images

        folder = images.release(name)
        print(f"{folder} is released; the next change gets a new version")


@model_app.command("add")
def add_model(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Of safetensors; ChatGLM2 or 3, or the original LLaMA layout, are converted"
        ),
    ],
    name: Annotated[
        str, typer.Option(help="What jobs call it, as company/Model-7B; the folder's name without")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="The folder to carry; a new one without")] = None,
    volume: Annotated[str, typer.Option(help="As of milktea image bundle")] = "",
    key: Annotated[Path | None, typer.Option(help="As of milktea image bundle")] = None,
    signed: Annotated[bool, typer.Option("--sign/--no-sign", help="Sign it")] = True,
) -> None:
    """Write a base model as a bundle of its own, for a server that has an image."""
    with errors(False):
        from ops.api import carry

        made = carry.bundle_model(
            folder, name, out, volume=volume, key=key, signed=signed, progress=_say
        )
        print(made.summary)
