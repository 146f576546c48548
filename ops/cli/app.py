"""The command line: the only module that reads the environment, and with screen.py the only one
that prints.

Imports are inside the commands: `--help` answers at once, and only what a command needs is loaded.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ops.cli import history, image
from ops.cli.errors import errors
from ops.cli.history import Json, Run, folder_of, runs

if TYPE_CHECKING:
    from ops.job.plan import Plan
    from ops.market.client import Vast
    from ops.market.ranking import Ranking
    from ops.run.session import Session

BEGAN = time.time()  # as near to the user's Enter as Python can say
app = typer.Typer(
    no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.add_typer(image.app, name="image")

JobArgument = Annotated[Path, typer.Argument(help="The job file")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask")]
PRACTICE = Path("jobs/practice.toml")
# 0.27 GiB, as jobs/practice.toml says
EMULATOR = ("--no-rate-limits", "--image-bytes", "milktea/*=289910784")


@app.command("rent-and-train")
def rent_and_train(job: JobArgument = PRACTICE, as_json: Json = False, yes: Yes = False) -> None:
    """Rent, push, train, retrieve, destroy: the adapter lies in out/RUN when this ends."""
    with errors(as_json), _acting(as_json) as (vast, screen):
        from functools import partial

        from ops.job.preflight import preflight
        from ops.run.journal import Journal
        from ops.run.rent_and_train import rent_and_train as story
        from ops.run.session import Session

        plan = preflight(lambda: _planned(job, on_cpu=not _is_real()), vast, runs())
        with Journal(runs() / plan.run_id) as journal:
            _first_line(journal, plan, screen)
            session = Session(journal, plan, vast, screen)
            ranking = _show_plan(session)
            if (
                not yes
                and _is_real()
                and sys.stdin.isatty()
                and not typer.confirm("Rent it?", default=True)
            ):
                raise typer.Exit(0)
            _act(session, partial(story, seen=ranking), as_json)


@app.command()
def plan(job: JobArgument = PRACTICE, as_json: Json = False) -> None:
    """Everything up to the plan screen: checks, search, prices. Nothing is rented."""
    with errors(as_json), _acting(as_json) as (vast, screen):
        from ops.job.preflight import preflight
        from ops.market.ranking import rank
        from ops.run.choose import bad_machines, found_offers, none_left

        done = preflight(lambda: _planned(job), vast, runs())
        (runs() / done.run_id).rmdir()  # nothing is begun
        ranking = rank(
            found_offers(vast, done.needs),
            done.needs,
            done.workload,
            bad_machines(runs(), time.time()),
        )
        if not ranking.accepted:
            raise none_left(ranking, 0)
        screen.plan(done, ranking, vast.credit_usd())


@app.command()
def resume(run: Run, as_json: Json = False) -> None:
    """Go on with a run whose client died, that was interrupted, or whose box was taken away."""
    with errors(as_json), _acting(as_json) as (vast, screen):
        from ops.errors import JournalError
        from ops.job.plan import Plan
        from ops.run.journal import Journal
        from ops.run.rent_and_train import rent_and_train as story
        from ops.run.session import Session

        with Journal(folder_of(run)) as journal:
            if not journal.lines:
                raise JournalError(
                    f"{journal.run_id} has an empty journal",
                    hint="start it anew with rent-and-train",
                )
            if (pulled := journal.last("pulled")) is not None:
                raise JournalError(
                    f"{journal.run_id} is done: its adapter is {pulled['adapter']}",
                    hint="`milktea reap` if its box still stands",
                )
            session = Session(journal, Plan.from_line(journal.lines[0]), vast, screen)
            _act(session, story, as_json)


@app.command()
def reap(
    as_json: Json = False,
    foreign: Annotated[
        bool, typer.Option("--foreign", help="Also runs that have no folder here")
    ] = False,
) -> None:
    """Destroy every box that no live client looks after, and prove it."""
    with errors(as_json), _vast() as vast:
        from ops.run.reap import reap as sweep

        _report(
            sweep(runs(), vast, _screen(as_json), foreign=foreign), as_json, say_nothing_found=True
        )


@app.command()
def destroy(run: Run, as_json: Json = False) -> None:
    """Destroy the box of one run now, and prove it."""
    with errors(as_json), _acting(as_json) as (vast, screen):
        from ops.job.plan import Plan
        from ops.run.journal import Journal
        from ops.run.rental import give_back
        from ops.run.session import Session, may_have_box

        with Journal(folder_of(run)) as journal:
            had = may_have_box(journal.lines)
            give_back(
                Session(journal, Plan.from_line(journal.lines[0]), vast, screen), why="asked for"
            )
            if as_json:
                print(
                    json.dumps(
                        {"kind": "destroyed" if had else "nothing", "run_id": journal.run_id}
                    )
                )
            else:
                print(
                    f"{journal.run_id}: "
                    + (
                        "destroyed, absent in three spaced reads"
                        if had
                        else "has no box; nothing to do"
                    )
                )


for told in (history.status, history.logs, history.cost, history.explain):
    app.command()(told)


@app.command()
def export(
    kind: Annotated[str, typer.Argument(help="slurm or kubeflow")],
    job: JobArgument = PRACTICE,
    nodes: Annotated[int, typer.Option(help="Machines; GPUs of each are offer.num_gpus")] = 1,
    queue: Annotated[
        str | None, typer.Option(help="Slurm's partition, or Kueue's local queue")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write in; exports/ without it")
    ] = None,
) -> None:
    """The same image and job.json for a scheduler that you have already: an sbatch file, or a
    Kubeflow TrainJob."""
    with errors(False):
        from ops.errors import ConfigError
        from ops.export.folder import Kind
        from ops.export.folder import export as write

        if kind not in ("slurm", "kubeflow"):
            raise ConfigError(
                f"{kind!r} is neither slurm nor kubeflow", hint="milktea export slurm JOB"
            )
        files = write(cast(Kind, kind), job, out or Path("exports"), nodes, queue)
        print(*files, sep="\n")


@app.command()
def schema() -> None:
    """The JSON Schema of a job file, for editors."""
    from ops.job.config import schema as exported

    print(json.dumps(exported(), indent=1))


# -- what the commands share -----------------------------------------------------------------------


def _planned(job: Path, *, on_cpu: bool = False) -> Plan:
    from ops.job.config import load
    from ops.job.planner import new_plan

    return new_plan(load(job), runs(), time.time(), on_cpu=on_cpu)


def _is_real() -> bool:
    return bool(os.environ.get("VAST_API_KEY", "").strip())


@contextmanager
def _vast() -> Iterator[Vast]:
    """vast.ai when VAST_API_KEY is set; else the emulator on this machine, started when it is not
    running."""
    from ops.market.client import Provider, Vast, provider_from
    from ops.wait import RealClock

    provider, pace = provider_from(os.environ), float(os.environ.get("MILKTEA_PACE") or 1.0)
    if provider is None:
        from ops.fakevast.embedded import ensure

        server = ensure(
            Path(os.environ.get("MILKTEA_EMULATOR", ".milktea/fakevast")), options=EMULATOR
        )
        provider = Provider(server.url, server.api_key)
        pace = 0.1
        print(
            "VAST_API_KEY is not set: the emulator plays vast.ai on this machine; no money moves.",
            file=sys.stderr,
        )
    yield Vast(provider, RealClock(pace))


@contextmanager
def _acting(as_json: bool) -> Iterator[tuple[Vast, Any]]:
    """For a command that acts: vast.ai and the screen, once every destroy that an earlier command
    could not finish is finished."""
    from ops.run.reap import finish_destroys

    with _vast() as vast:
        screen = _screen(as_json)
        _report(finish_destroys(runs(), vast, screen), as_json)
        yield vast, screen


def _screen(as_json: bool) -> Any:
    from ops.cli.screen import JsonLines, Terminal

    if as_json:
        return JsonLines()
    from rich.console import Console

    return Terminal(Console())


def _first_line(journal: Any, plan: Plan, screen: Any) -> None:
    screen.line(journal.append("planned", began=round(BEGAN, 3), **plan.to_line()))


def _show_plan(session: Session) -> Ranking:
    from ops.run.choose import none_left, search

    ranking = search(session)
    if not ranking.accepted:
        raise none_left(ranking, 0)
    session.screen.plan(session.plan, ranking, session.vast.credit_usd())
    return ranking


def _act(session: Session, story: Any, as_json: bool) -> None:
    """Run the story with signals turned into Interrupted, and say how it ended."""
    from ops.errors import MilkteaError
    from ops.run.session import Detached, Interrupted

    def interrupted(number: int, frame: Any) -> None:
        if session.shield.up:
            print("\na moment: the box is not left halfway", file=sys.stderr)
        session.shield.interrupt()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    try:
        outcome = story(session)
    except Detached:
        if as_json:
            print(
                json.dumps(
                    {"kind": "detached", "run_id": session.run_id, "dies_at": session.dies_at()}
                )
            )
        else:
            print(
                f"detached; `milktea resume {session.run_id}` goes on; the box ends itself "
                "at its deadline"
            )
        return
    except Interrupted:
        session.note("failed", what="interrupted", exit_code=130)
        print(
            f"interrupted; the box is destroyed and proven absent; {session.money()}",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    except MilkteaError as e:
        session.note("failed", what=f"{type(e).__name__}: {e}", exit_code=e.exit_code)
        raise
    _last_lines(session, outcome, as_json)


def _last_lines(session: Session, outcome: Any, as_json: bool) -> None:
    bill = session.journal.last("bill")
    billed = f"{bill['usd']:.4f} $" if bill and "usd" in bill.data else "not to be had yet"
    facts = {
        "run_id": session.run_id,
        "adapter": str(outcome.adapter_zip),
        "sha256": outcome.sha256,
        "spent_usd": round(session.spent_usd(), 5),
        "bill_usd": bill.get("usd") if bill else None,
    }
    if as_json:
        print(json.dumps({"kind": "done", **facts}))
        return
    screen = session.screen
    for sample in screen.samples:
        print(
            f"  {' / '.join(sample.prompt.split(chr(10)))}\n    before: {sample.before}\n    "
            f"after:  {sample.after}"
        )
    if (score := screen.score) is not None:
        print(
            f"held-out exact match: {score.exact_match_before:.1%} before, "
            f"{score.exact_match_after:.1%} after ({score.rows} rows)"
        )
    line = session.journal.last("rented", "destroyed")
    predicted = session.journal.last("offers")
    said = f", predicted {predicted['predicted']['usd']:.4f} $" if predicted else ""
    gone = (
        f"box {line.get('instance_id')} destroyed, verified absent x{len(line.get('reads', []))}"
        if line
        else ""
    )
    print(
        f"{gone}; cost {facts['spent_usd']:.4f} $ (vast.ai's bill {billed}{said}); adapter "
        f"{_short(outcome.adapter_zip)} sha256 {outcome.sha256}"
    )


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _report(reaped: Any, as_json: bool, *, say_nothing_found: bool = False) -> None:
    found = bool(reaped.destroyed or reaped.left or reaped.leaked)
    if as_json and (found or say_nothing_found):
        print(
            json.dumps(
                {
                    "kind": "reaped",
                    "destroyed": reaped.destroyed,
                    "left": reaped.left,
                    "leaked": [str(e) for e in reaped.leaked],
                }
            )
        )
    if not as_json:
        for run_id in reaped.destroyed:
            print(f"{run_id}: destroyed, absent in three spaced reads")
        for line in reaped.left:
            print(f"left alone: {line}")
        if say_nothing_found and not found:
            print("no box of ours exists")
    if reaped.leaked:
        raise reaped.leaked[0]


def main() -> None:
    app()


if __name__ == "__main__":
    main()
