"""The commands that only tell: from the journals and what was brought home, without a network."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli.errors import errors
from ops.errors import JournalError
from ops.plain import json_line, plain

if TYPE_CHECKING:
    from ops import api

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs")]
Run = Annotated[
    str, typer.Argument(help="A run id, or an unambiguous beginning of one; `last` is the newest")
]


def status(
    run: Annotated[str | None, typer.Argument(help="One run; without it, all")] = None,
    as_json: Json = False,
) -> None:
    """Where every run stands, from the journals alone."""
    with errors(as_json):
        rows = [found.status() for found in _readable(run)]
        if as_json:
            for row in rows:
                print(json.dumps(row.as_dict()))
            return
        for row in rows:
            box = f"box {row.box}" if row.box else "no box"
            step = f"  checkpoint {row.step}" if row.step else ""
            print(
                f"{row.run_id}  {row.stage}  {box}  {row.spent_usd:.4f} of {row.max_usd:.2f} "
                f"${step}" + (f"  {row.adapter}" if row.adapter else "")
            )
        if not rows:
            print("no runs yet: `make rent-and-train` makes the first")


def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as new lines come")] = False,
    as_json: Json = False,
) -> None:
    """What the trainer said, as far as it is at home; acts on nothing."""
    with errors(as_json):
        from ops import api

        found = api.find_run(run)
        for event in found.events(follow=follow):
            if as_json:
                print(json_line(event.model_dump()), flush=True)
                continue
            facts = event.model_dump(exclude={"t", "event"})
            words = (
                f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()
            )
            print(plain("  ".join([event.event, *words])), flush=True)
        for name in ("log.txt", "container.log"):
            if (found.folder / name).exists() and not as_json:
                print(f"--- {name}\n" + plain((found.folder / name).read_text("utf-8", "replace")))


def cost(
    run: Annotated[str | None, typer.Argument(help="One run; without it, all")] = None,
    as_json: Json = False,
) -> None:
    """Our meter, vast.ai's bill and the prediction, from the journals alone."""
    with errors(as_json):
        for found in _readable(run):
            if as_json:
                print(json.dumps({"run_id": found.id, **found.cost_facts()}))
            else:
                print(found.id, *found.cost_lines(), sep="\n  ")


def explain(run: Run, as_json: Json = False) -> None:
    """Why this offer, why it stopped, where each cent went."""
    with errors(as_json):
        from ops import api

        found = api.find_run(run)
        if not as_json:
            print(*map(plain, found.explain()), sep="\n")
            return
        for line in found.journal:
            row = {"t": line.t, "kind": line.kind, **line.data}
            print(json_line(row))


def _readable(name: str | None) -> Iterator[api.Run]:
    """The named run, or all; of those whose journal cannot be read, stderr says why."""
    from ops import api

    for run in [api.find_run(name)] if name else api.runs():
        try:
            if run.journal:
                yield run
        except JournalError as e:
            print(f"{run.id}: {e}\n  {e.hint}", file=sys.stderr)
