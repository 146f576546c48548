"""The command line: it parses and prints; `ops.api` does the work. Each command imports `ops.api`
itself, so that `--help` and `--version` do not load the clients of vast.ai and SSH."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from ops.cli import compare, data, endpoints, history, image, serve, shelf, sweep, use, visit
from ops.cli.acting import (
    acting,
    interrupted,
    market,
    may_destroy,
    may_end,
    open_screen,
    report,
)
from ops.cli.ending import last_lines, stopped
from ops.cli.errors import errors
from ops.cli.history import Json, Run
from ops.errors import ConfigError

if TYPE_CHECKING:
    pass

BEGAN = time.time()  # process start; `explain` counts from it
app = typer.Typer(
    no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.add_typer(image.app, name="image")
app.add_typer(use.adapter_app, name="adapter")
app.add_typer(data.app, name="data")

JobArgument = Annotated[Path, typer.Argument(help="The job file")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask")]
PRACTICE = Path("jobs/practice.toml")


def _version(wanted: bool) -> None:
    """Print the versions that a bug report needs, without importing torch."""
    if not wanted:
        return
    versions = []
    for package in ("milktea", "torch"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    print(f"{versions[0]}, Python {platform.python_version()}, {versions[1]}", platform.platform())
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Of milktea, Python, torch and this system",
        ),
    ] = False,
) -> None:
    """Fine-tune a language model on a rented GPU, and leave nothing running that bills you."""


Foreground = Annotated[
    bool, typer.Option("--foreground", help="Own the run in this process, not in one of its own")
]
Detach = Annotated[bool, typer.Option("--detach", help="Do not watch; `milktea attach` does")]


@app.command("rent-and-train")
def rent_and_train(
    job: JobArgument = PRACTICE,
    as_json: Json = False,
    yes: Yes = False,
    foreground: Foreground = False,
    detach: Detach = False,
) -> None:
    """Rent, push, train, retrieve, destroy: the adapter lies in out/RUN when this ends. The run
    outlives this terminal."""
    _validate_ways(foreground, detach)
    with errors(as_json), acting(as_json) as (vast, screen):
        from ops import api

        real = api.uses_vast_ai()
        planned = api.plan(job, vast=vast, on_cpu=not real)
        screen.plan(planned.plan, planned.ranking, planned.credit_usd)
        if real and not yes and sys.stdin.isatty() and not typer.confirm("Rent it?", default=True):
            api.drop(planned)
            print("nothing was rented")
            raise typer.Exit(0)
        run = api.rent_and_train(
            planned,
            vast=vast,
            screen=screen,
            began_unix_s=BEGAN,
            foreground=foreground,
            detach=detach,
        )
        last_lines(run, screen, as_json)


@app.command()
def plan(job: JobArgument = PRACTICE, as_json: Json = False) -> None:
    """Everything up to the plan screen: checks, search, prices. Nothing is rented."""
    with errors(as_json), acting(as_json) as (vast, screen):
        from ops import api

        planned = api.plan(job, vast=vast, or_estimate=True)
        api.drop(planned)
        screen.plan(planned.plan, planned.ranking, planned.credit_usd)


@app.command()
def resume(
    run: Run,
    as_json: Json = False,
    foreground: Foreground = False,
    detach: Detach = False,
    max_usd: Annotated[
        float | None, typer.Option(min=0.001, help="Of the whole run, from now on")
    ] = None,
    max_hours: Annotated[
        float | None, typer.Option(min=0.001, help="Of the whole run, from now on")
    ] = None,
) -> None:
    """Go on with a run that no process owns any more, or watch one that goes on."""
    _validate_ways(foreground, detach)
    with errors(as_json), acting(as_json) as (vast, screen):
        from ops import api

        found = api.resume(
            run,
            vast=vast,
            screen=screen,
            foreground=foreground,
            detach=detach,
            max_usd=max_usd,
            max_hours=max_hours,
        )
        last_lines(found, screen, as_json)


@app.command()
def attach(run: Run, as_json: Json = False) -> None:
    """Watch a run from its beginning to its end; the exit code is the run's."""
    with errors(as_json), interrupted():
        from ops import api

        screen = open_screen(as_json)
        last_lines(api.attach(run, screen=screen), screen, as_json)


@app.command()
def stop(
    run: Run,
    as_json: Json = False,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Bring the newest checkpoint home, then destroy")
    ] = False,
    keep_disk: Annotated[
        bool,
        typer.Option(
            "--keep-disk", help="The same, but stop the box and keep its disk, at a price a day"
        ),
    ] = False,
    destroy: Annotated[bool, typer.Option("--destroy", help="Destroy now")] = False,
    yes: Yes = False,
) -> None:
    """End a run. Without an option the choices are shown with their price. Of another person's run
    it asks first whether it is meant."""
    with errors(as_json), interrupted():
        from ops import api

        ends = {"fetch": fetch, "keep": keep_disk, "destroy": destroy}
        asked = [end for end, wanted in ends.items() if wanted]
        if len(asked) > 1:
            raise ConfigError("one of --fetch, --keep-disk and --destroy, not more", hint="")
        screen, found = open_screen(as_json), api.find_run(run)
        theirs = may_end(found, yes)
        wish: str | None = asked[0] if asked else None
        if not asked:
            wish = screen.choose([(c.wish, c.text) for c in found.choices()])
        if wish is None:
            raise ConfigError(
                "nobody can be asked here which end", hint=f"milktea stop {found.id} --fetch"
            )
        if wish not in ends:
            print("nothing was stopped", file=sys.stderr)
            return
        end = cast(Literal["fetch", "keep", "destroy"], wish)
        found = api.stop(found, end, screen=screen, theirs=theirs)
        stopped(found, screen, as_json)


@app.command()
def reap(
    as_json: Json = False,
    foreign: Annotated[
        bool,
        typer.Option(
            "--foreign", help="Also of other people, or without a folder here, once confirmed"
        ),
    ] = False,
    yes: Yes = False,
) -> None:
    """Destroy every box that no live client looks after, and prove it."""
    with errors(as_json):
        from ops import api

        vast, screen = market(), open_screen(as_json)
        vast.tell = screen.waiting
        reaped = api.reap(vast=vast, screen=screen)
        if foreign and reaped.foreign and may_destroy(reaped.foreign, yes):
            more = api.reap(foreign=True, vast=vast, screen=screen)
            more.destroyed[:0] = reaped.destroyed
            reaped = more
        report(reaped, as_json, say_nothing_found=True)


@app.command()
def destroy(run: Run, as_json: Json = False, yes: Yes = False) -> None:
    """Destroy the box of one run now, and prove it. Of another person's run it asks first."""
    with errors(as_json), acting(as_json) as (vast, screen):
        from ops import api

        found = api.find_run(run)
        had = api.destroy(found, vast=vast, screen=screen, theirs=may_end(found, yes))
        if as_json:
            print(json.dumps({"kind": "destroyed" if had else "nothing", "run_id": found.id}))
        else:
            did = "destroyed, absent in three spaced reads" if had else "has no box; nothing to do"
            print(f"{found.id}: {did}")


for command in (history.status, history.logs, history.cost, history.explain):
    app.command()(command)
app.command()(compare.compare)
app.command()(sweep.sweep)
app.command()(data.init)
data.app.command()(endpoints.translate)
data.app.command()(endpoints.instruct)
app.command()(shelf.models)
app.command()(shelf.gpus)
app.command()(use.chat)
app.command()(use.evaluate)
app.command()(use.merge)
app.command()(serve.serve)
app.command()(visit.ssh)
app.command("exec", context_settings=visit.AS_TYPED)(visit.execute)
app.command()(visit.forward)
app.command()(visit.tensorboard)
app.command()(visit.web)


@app.command()
def export(
    kind: Annotated[str, typer.Argument(help="slurm, kubeflow, skypilot or dstack")],
    job: JobArgument = PRACTICE,
    nodes: Annotated[int, typer.Option(help="Machines; GPUs of each are offer.num_gpus")] = 1,
    queue: Annotated[
        str | None, typer.Option(help="Slurm's partition, or Kueue's local queue")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write in; exports/ without it")
    ] = None,
) -> None:
    """The same image and job.json for a scheduler that you have already: an sbatch file, a Kubeflow
    TrainJob, or a task of SkyPilot or dstack."""
    with errors(False):
        from ops import api

        known = ("slurm", "kubeflow", "skypilot", "dstack")
        if kind not in known:
            raise ConfigError(
                f"{kind!r} is none of {', '.join(known)}", hint="milktea export slurm JOB"
            )
        files = api.export(cast(api.Kind, kind), job, out or Path("exports"), nodes, queue)
        print(*files, sep="\n")
        print("\n" + files[0].read_text("utf-8"), end="")  # what to do next


@app.command()
def schema() -> None:
    """The JSON Schema of a job file, for editors."""
    from ops import api

    print(json.dumps(api.schema(), indent=1))


# -- what the commands share -----------------------------------------------------------------------


def _validate_ways(foreground: bool, detach: bool) -> None:
    if foreground and detach:
        with errors(False):
            raise ConfigError("--foreground or --detach, not both", hint="")


def _tell_first_sentences(group: typer.Typer) -> None:
    """The list of commands has the first sentence of each whole, where Typer would cut it."""
    for command in group.registered_commands:
        told = " ".join((command.callback.__doc__ or "").split()) if command.callback else ""
        command.short_help = told.split(". ")[0].removesuffix(".")
    for below in group.registered_groups:
        if below.typer_instance is not None:
            below.short_help = str(below.typer_instance.info.help)
            _tell_first_sentences(below.typer_instance)


_tell_first_sentences(app)


def main() -> None:
    """The command that was typed. From its start on an interrupt raises KeyboardInterrupt; one that
    was ignored before, in the background of a script, stays so."""
    command = typer.main.get_command(app)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command()
