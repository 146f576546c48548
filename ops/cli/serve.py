"""`milktea serve`: results behind OpenAI's interface, and a page to talk in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ops.cli.errors import errors
from ops.cli.history import Json
from ops.cli.use import Base


def serve(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Run ids or `last`; adapters' folders, zips"),
    ],
    base: Base = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at; another than loopback needs --token-file")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="8014, or a free one where it is taken, without it")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="A file with a token of yours; a new one without it")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="A host name by which browsers reach this computer")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="A PEM file with certificate and key: https")
    ] = None,
    width: Annotated[int, typer.Option(min=1, help="Answers decoded side by side")] = 16,
    context: Annotated[int, typer.Option(min=16, help="Tokens of prompt and answer")] = 4096,
    device: Annotated[str, typer.Option(help="auto, cuda, mps or cpu")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp8, int8 or nf4")] = "auto",
    as_json: Json = False,
) -> None:
    """Talk to results in the browser, or by any OpenAI client, on this computer: prints one address
    with its token. `base` is served beside them. Ctrl-C ends it."""
    with errors(as_json):
        from ops import api

        options = [f"--host={host}", f"--width={width}", f"--context={context}"]
        options += [f"--device={device}", f"--precision={precision}"]
        options += [f"--port={port}"] if port is not None else []
        options += [f"--token-file={token_file}"] if token_file else []
        options += [f"--certificate={certificate}"] if certificate else []
        options += [f"--name={one}" for one in name or []]
        results = [api.find_result(run, base=base) for run in runs]
        if code := api.words.show(api.words.serve(results, options), as_json):
            raise typer.Exit(code)
