"""`milktea compare`: runs side by side, a column for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ops.cli.errors import errors
from ops.cli.history import Json
from ops.errors import ConfigError
from ops.plain import json_line, plain

if TYPE_CHECKING:
    from ops import api

WIDEST = 40  # characters of a cell
# the field of an outcome, its name in the table, how its number is shown
ROWS = (
    ("stage", "stands at", ""),
    ("steps", "steps", ""),
    ("loss_first", "first loss", ".4f"),
    ("loss_last", "last loss", ".4f"),
    ("held_out_before", "held-out loss before", ".4f"),
    ("held_out", "held-out loss", ".4f"),
    ("accuracy", "held-out accuracy", ".1%"),
    ("exact_match", "held-out exact match", ".1%"),
    ("tokens_per_second", "tokens a second", ",.0f"),
    ("gpu", "GPU", ""),
    ("hours", "hours", ".2f"),
    ("spent_usd", "spent $", ".4f"),
    ("billed_usd", "billed $", ".4f"),
)


def compare(
    runs: Annotated[list[str], typer.Argument(help="Run ids, or beginnings of them")],
    as_json: Json = False,
) -> None:
    """Runs side by side: the settings that differ, where the curves ended, held-out rows, scores,
    hours, speed and cost."""
    with errors(as_json):
        from ops import api

        if len(runs) < 2:
            raise ConfigError("one run alone is compared with nothing", hint="milktea compare A B")
        found = api.compare(runs)
        if as_json:
            print(json_line(found.as_dict()))
        else:
            print(*table(found), sep="\n")


def table(found: api.Comparison) -> list[str]:
    """The lines of a table: a column for each run, only rows of which something is known."""
    told = [outcome.as_dict() for outcome in found.outcomes]
    rows = [("", [outcome.run_id for outcome in found.outcomes])]
    rows += [(name, [_value(v) for v in values]) for name, values in found.differ.items()]
    for field, name, form in ROWS:
        cells = [_value(one[field], form) for one in told]
        if any(cell != "-" for cell in cells):
            rows.append((name, cells))
    for name in dict.fromkeys(name for o in found.outcomes for name in o.scores):
        rows.append((name, [o.scores.get(name, "-") for o in found.outcomes]))
    return columns([[name, *cells] for name, cells in rows])


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, with each column as wide as its widest cell; a Chinese letter is two wide."""
    from rich.cells import cell_len, set_cell_size

    cells = [[_clip(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(set_cell_size(c, w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _value(value: Any, form: str = "") -> str:
    if value is None or value == "":
        return "-"
    return format(value, form) if form and not isinstance(value, str) else str(value)


def _clip(text: str) -> str:
    text = plain(text).replace("\n", " ")
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"
