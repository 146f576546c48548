"""`milktea image ...`: images from their locks, bundles for servers without a network. Imports are
inside the commands, as in cli.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli.errors import errors

if TYPE_CHECKING:
    from ops.image.fetch.debian import Mirrors

app = typer.Typer(
    no_args_is_help=True,
    help="Images: lock, build, push, and bundle for a server without a network",
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(help="One of images/*.toml, such as practice or train-cu130")]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _mirrors() -> Mirrors:
    from ops.image.fetch.debian import Mirrors

    return Mirrors.given(os.environ)


@app.command()
def build(
    name: Name = "practice",
    dockerfile: Annotated[
        bool,
        typer.Option("--dockerfile", help="By docker build from docker/, instead of the assembler"),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="With --dockerfile: an ordinary base image in place of our own Debian"),
    ] = None,
    load: Annotated[
        bool,
        typer.Option(
            "--load/--no-load", help="Bring it into the Docker engine, where there is one"
        ),
    ] = True,
) -> None:
    """Fetch what the lock pins, put the image together without a network, and bring it into the
    engine."""
    with errors(False):
        from ops.errors import ConfigError, PreflightError
        from ops.image import workflow as images

        if base and not dockerfile:
            raise ConfigError(
                f"--base {base} is for the Dockerfile",
                hint=f"make image IMAGE={name} WITH=dockerfile BASE={base}",
            )
        images.fetch(name, mirrors=_mirrors(), progress=_say)
        if dockerfile:
            print(
                "built by its Dockerfile: "
                f"{images.build_with_dockerfile(name, progress=_say, base=base)}"
            )
            return
        image = images.assemble(name, progress=_say)
        print(
            f"{image.tag}: {len(image.layers)} layers, "
            f"{sum(layer.blob_bytes for layer in image.layers) / 1e6:,.0f} MB, predicted "
            "digests met"
        )
        if load:
            try:
                print(f"loaded: {images.load(name, progress=_say)}")
            except PreflightError as e:
                print(
                    f"not loaded into an engine: {e}\n  next: "
                    f"{e.hint or '`make bundle` needs none'}"
                )


@app.command()
def fetch(name: Name = "practice") -> None:
    """Bring everything that the lock pins onto this disk, each file checked; nothing after it needs
    a network."""
    with errors(False):
        from ops.image import workflow as images

        images.fetch(name, mirrors=_mirrors(), progress=_say)
        print(f"everything that images/{name}.lock pins is here")


@app.command()
def context(
    name: Name,
    folder: Annotated[
        Path, typer.Argument(help="A new folder for docker build --network=none FOLDER")
    ],
) -> None:
    """Lay out the build context of the image's Dockerfile: what was fetched, and nothing else."""
    with errors(False):
        from ops.image import workflow as images

        images.fetch(name, mirrors=_mirrors(), progress=_say)
        print(images.context(name, folder))


@app.command()
def base(
    name: Name = "practice",
    registry: Annotated[
        bool,
        typer.Option(
            "--registry", help="By docker/os/1 on an ordinary base image, instead of mmdebstrap"
        ),
    ] = False,
    on: Annotated[
        str | None,
        typer.Option(
            "--on", help="With --registry: another base than the definition's registry_base"
        ),
    ] = None,
) -> None:
    """Bring the image's Debian into the engine, for its Dockerfile to stand on."""
    with errors(False):
        from ops.image import workflow as images

        images.fetch(name, mirrors=_mirrors(), progress=_say)
        print(
            images.build_registry_base(name, on, progress=_say)
            if registry
            else images.load_base(name, progress=_say)
        )


@app.command("convert-llama")
def convert_llama(
    source: Annotated[
        Path,
        typer.Argument(
            help="The folder of the original layout: params.json, consolidated.*.pth, "
            "tokenizer.model"
        ),
    ],
    target: Annotated[Path, typer.Argument(help="A new folder for safetensors")],
) -> None:
    """Turn the original LLaMA .pth layout into safetensors; no pickle is run."""
    with errors(False):
        from ops.image.convert_llama import convert

        print(*convert(source, target, _say), sep="\n")


@app.command()
def lock(name: Name = "practice") -> None:
    """Pin every package, Debian package, model file and layer by hash; write images/NAME.lock and
    its Dockerfile."""
    with errors(False):
        from ops.image import workflow as images

        found = images.lock(name, mirrors=_mirrors(), progress=_say)
        counts = (
            f"{len(found.wheels)} wheels, {len(found.debs)} Debian packages, "
            f"{len(found.models)} models, {len(found.layers)} layers"
        )
        print(f"images/{name}.lock: {counts}")


@app.command()
def predict(name: Name = "practice") -> None:
    """The digests that a build from this lock will have, before it is built."""
    with errors(False):
        from dataclasses import asdict, is_dataclass

        from ops.image import workflow as images

        identity = images.predict(name)
        print(
            json.dumps(
                asdict(identity) if is_dataclass(identity) else identity.model_dump(), indent=1
            )
        )


@app.command()
def push(
    name: Name,
    registry: Annotated[
        str, typer.Argument(help="As docker push takes it: ghcr.io/you/milktea-train:1")
    ],
) -> None:
    """Push to a registry that vast.ai's hosts pull from; log in with docker login first."""
    with errors(False):
        from ops.image import workflow as images

        print(images.push(name, registry, progress=_say))


@app.command()
def bundle(
    name: Name = "practice",
    out: Annotated[
        Path | None, typer.Option(help="The folder to carry; bundle-NAME without it")
    ] = None,
    since: Annotated[
        Path | None,
        typer.Option(
            help="The bundle that the server has, or its image.lock: only what changed is carried"
        ),
    ] = None,
    inventory: Annotated[
        Path | None, typer.Option(help="What the server's `INSTALL.sh preflight --json` wrote")
    ] = None,
    volume: Annotated[
        str, typer.Option(help="fat32, dvd, dvd-dl, bd, or bytes: no file will be larger")
    ] = "",
    key: Annotated[
        Path | None, typer.Option(help="Sign with this key (milktea image keygen)")
    ] = None,
) -> None:
    """Write a folder that a server with Docker, and nothing else, installs from."""
    with errors(False):
        from ops.image import ship

        made = ship.bundle(
            name,
            out or Path(f"bundle-{name}"),
            since=since,
            server=inventory,
            volume=volume,
            key=key,
            progress=_say,
        )
        print(made)


@app.command()
def keygen(
    path: Annotated[
        Path, typer.Argument(help="Where the key goes; keep it off the disk that is carried")
    ],
) -> None:
    """A key to sign bundles with, and the fingerprint to tell the other side by phone."""
    with errors(False):
        from ops.image import ship

        print(ship.keygen(path))


@app.command()
def fit(
    inventory: Annotated[
        Path, typer.Argument(help="What the server's `INSTALL.sh preflight --json` wrote")
    ],
) -> None:
    """Which images the server of this inventory runs as they are."""
    with errors(False):
        from ops.image import ship

        print(*ship.fitting(inventory), sep="\n")


@app.command()
def weigh(name: Name = "practice") -> None:
    """Every byte of the image, by layer and reason."""
    with errors(False):
        from ops.image import workflow as images
        from ops.image.spec import budget

        _, whole = images.assembled(name)
        for layer, size, packed, why in budget.attribution(whole):
            print(f"{size:>13,} {packed:>13,}  {layer}  {why}")
