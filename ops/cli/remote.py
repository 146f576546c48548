"""`milktea chat RUN --remote`: the result on a box that is rented for the conversation."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from ops.cli.acting import acting

if TYPE_CHECKING:
    from ops import api


def talk_remotely(
    found: api.Found,
    minutes: float,
    max_usd: float,
    yes: bool,
    as_json: bool,
    terminal: Sequence[str] | None,
) -> None:
    """Show the price, ask, rent, talk, destroy. `terminal`: options of a conversation in this
    terminal; the page in the browser without them."""
    from ops import api

    with acting(as_json) as (vast, screen):
        planned = api.plan_chat(found, minutes=minutes, max_usd=max_usd, vast=vast)
        screen.plan(planned.plan, planned.ranking, planned.credit_usd)
        asks = api.uses_vast_ai() and not yes and sys.stdin.isatty()
        if asks and not typer.confirm("Rent it?", default=True):
            print("nothing was rented")
            raise typer.Exit(0)
        run = api.rent_and_talk(planned, vast=vast, screen=screen, terminal=terminal)
        cost = run.cost()
        if as_json:
            row = {"kind": "done", "run_id": run.id, "spent_usd": round(cost.spent_usd, 5)}
            print(json.dumps(row))
        else:
            print(f"cost      {cost.spent_usd:.4f} $ of {cost.max_usd:.2f} $; no box is left")
