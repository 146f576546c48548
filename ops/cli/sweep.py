"""`milktea sweep`: many variations of a job under one purse."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli.acting import acting
from ops.cli.compare import columns
from ops.cli.errors import errors
from ops.cli.history import Json
from ops.errors import ConfigError, Failed
from ops.plain import json_line, number_of, plain

if TYPE_CHECKING:
    from ops import api
    from ops.cli.screen import JsonLines, Terminal


def sweep(
    job: Annotated[Path, typer.Argument(help="The job file")],
    sets: Annotated[
        list[str],
        typer.Option("--set", help="KEY=VALUE,VALUE; of several every combination is a run"),
    ],
    max_usd: Annotated[float, typer.Option(min=0.001, help="Of all runs together")],
    at_once: Annotated[int, typer.Option(min=1, help="Runs at the same time")] = 2,
    early_stop: Annotated[
        bool,
        typer.Option(help="End the worse half by held-out loss at a quarter and at half its steps"),
    ] = True,
    plan: Annotated[bool, typer.Option("--plan", help="Show the plan and rent nothing")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
    as_json: Json = False,
) -> None:
    """Try every combination of settings, each a run of its own, and tell which is best. Killed, the
    same command goes on."""
    with errors(as_json), acting(as_json) as (vast, screen):
        from ops import api

        parsed = [api.parse_set(word) for word in sets]
        values = dict(parsed)
        if len(values) < len(parsed):
            raise ConfigError("--set names a key twice", hint="--set KEY=VALUE,VALUE,VALUE")
        real = api.uses_vast_ai()
        planned = api.plan_map(
            api.variations(job, values),
            max_usd=max_usd,
            at_once=at_once,
            vast=vast,
            on_cpu=not real and not plan,
            or_estimate=plan,
        )
        _show_plan(planned, as_json)
        if plan:
            return
        if real and not yes and sys.stdin.isatty() and not typer.confirm("Rent them?", True):
            print("nothing was rented")
            return
        watcher = _Watcher(screen, as_json)
        swept = api.map(planned, early_stop=early_stop, vast=vast, watcher=watcher)
        _show_end(swept, as_json)


def _show_plan(planned: api.PlannedSweep, as_json: bool) -> None:
    predicted = planned.predicted_usd
    if as_json:
        rows = [t.as_dict() | {"predicted_usd": t.predicted_usd} for t in planned.trials]
        facts = {"predicted_usd": predicted, "max_usd": planned.max_usd}
        print(json_line({"kind": "plan", **facts, "at_once": planned.at_once, "trials": rows}))
        return
    table = [["run", "differs in", "predicted $", "stands"]]
    table += [[str(t.number), t.words, f"{t.predicted_usd:.4f}", t.state] for t in planned.trials]
    print(*columns(table), sep="\n")
    for note in planned.notes:
        print(plain(f"  {note}"))
    if planned.folder is not None:
        print(f"{planned.folder.name} goes on: what ended stays as it is")
    print(
        f"{number_of(len(planned.trials), 'run')}, {planned.at_once} at a time: "
        f"{predicted:.4f} $ predicted if "
        f"none ends early, at most {planned.max_usd:.2f} $ together"
    )
    if predicted > planned.max_usd:
        print("the purse is too small for all of them: the last ones may not begin")


class _Watcher:
    """Prints each line of the sweep's journal, as words or as JSON."""

    def __init__(self, screen: Terminal | JsonLines, as_json: bool) -> None:
        self._screen, self._json = screen, as_json

    def line(self, line: api.Line, trials: Sequence[api.Trial]) -> None:
        if self._json:
            print(json_line({"t": line.t, "kind": line.kind, **line.data}), flush=True)
        elif "trial" in line:
            trial = next(t for t in trials if t.number == line["trial"])
            if text := _words(line):
                print(plain(f"run {trial.number} ({trial.words}): {text}"), flush=True)

    def meter(self, trials: Sequence[api.Trial], spent_usd: float, max_usd: float) -> None:
        """Nothing: each line tells the money that it moves."""

    def choose(self, choices: Sequence[tuple[str, str]]) -> str | None:
        return self._screen.choose(choices)


def _words(line: api.Line) -> str:
    match line.kind:
        case "began":
            return f"begins as {line['run_id']}, at most {line['cap_usd']:.4f} $"
        case "rung":
            return f"held-out loss {line['loss']:.4f} after {line['share']:.0%} of its steps"
        case "stopping":
            return f"is ended, {line['why']}"
        case "resumed":
            return "its owner died; it is taken up again"
        case "ended":
            loss = line["held_out"]
            told = "" if loss is None else f", held-out loss {loss:.4f}"
            why = f": {line['why']}" if line["why"] else ""
            return f"{line['state']}{why}{told}, {line['spent_usd']:.4f} $"
        case _:
            return ""


def _show_end(swept: api.Swept, as_json: bool) -> None:
    """The table; exit code 130 where the user ended it. Raises Failed where no run came home."""
    from ops import api

    left = swept.page is None
    best = swept.best
    if as_json:
        facts = {"spent_usd": round(swept.spent_usd, 6), "page": str(swept.page or "") or None}
        told = {"best": best.as_dict() if best else None, "left": left}
        trials = [t.as_dict() for t in swept.trials]
        print(json_line({"kind": "swept", "id": swept.id, **facts, **told, "trials": trials}))
    else:
        print("", *columns(api.sweep_rows(swept.trials)), sep="\n")
        print(f"spent     {swept.spent_usd:.4f} $ of {swept.max_usd:.2f} $")
        if left:
            print("its runs go on by themselves; the same command goes on with the sweep")
        if best is not None and best.adapter is not None:
            print(f"adapter   {os.path.relpath(best.adapter)}")
        if swept.page is not None:
            print(f"picture   {os.path.relpath(swept.page)}")
    if left:
        return
    if any(t.state == "ended" for t in swept.trials):
        raise typer.Exit(130)
    if not any(t.state == "done" for t in swept.trials):
        raise Failed(
            "no run of the sweep came home",
            money=f"spent {swept.spent_usd:.4f} $ of {swept.max_usd:.2f} $; no box is left",
            hint="`milktea explain RUN` tells why a run failed",
        )
