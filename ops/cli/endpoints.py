"""`milktea data translate` and `instruct`: rows through an endpoint that may cost money. `ops.api`
is imported inside, as in app.py."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli.data import Column, DropBad, Force, Format, reading_of, tell_written
from ops.cli.errors import errors
from ops.cli.history import Json
from ops.errors import ConfigError
from ops.plain import json_line, number_of, plain

if TYPE_CHECKING:
    from ops import api

TOLD_EVERY_S = 10.0  # where nobody sees a line that changes

Url = Annotated[str, typer.Option("--endpoint", help="https://HOST/v1, `milktea serve` too")]
Model = Annotated[str, typer.Option("--model", help="As the endpoint calls it")]
MaxUsd = Annotated[
    float | None, typer.Option(min=0, help="No call is sent that could cost more than this in all")
]
PriceIn = Annotated[
    float | None, typer.Option(help="Dollars for a million tokens in; loopback needs none")
]
PriceOut = Annotated[float | None, typer.Option(help="Dollars for a million tokens out")]
KeyEnv = Annotated[
    str | None, typer.Option(help="The environment variable that holds the endpoint's key")
]
Extra = Annotated[
    str | None, typer.Option(help="More fields of a request, as JSON: '{\"seed\": 1}'")
]
LimitField = Annotated[
    str, typer.Option(help="How the endpoint calls the limit; or max_completion_tokens")
]
Plan = Annotated[bool, typer.Option("--plan", help="Price it; send and write nothing")]
AtOnce = Annotated[int, typer.Option(min=1, max=64, help="Calls on their way at a time")]
Partial = Annotated[
    bool, typer.Option("--partial", help="Write what there is, where the work ends early")
]


def translate(
    files: Annotated[Path, typer.Argument(metavar="FILE", help="A file, a folder or a pattern")],
    to: Annotated[str, typer.Option(help="zh, en, ja, fr, ...")],
    endpoint: Url,
    model: Model,
    out: Annotated[Path | None, typer.Argument(help="Beside FILE without it")] = None,
    max_usd: MaxUsd = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    plan: Plan = False,
    key_env: KeyEnv = None,
    rows_per_call: Annotated[int, typer.Option(min=1, help="At most")] = 20,
    chars_per_call: Annotated[int, typer.Option(min=1, help="Of all texts, at most")] = 8_000,
    at_once: AtOnce = 4,
    about_language: Annotated[
        str, typer.Option(help="Rows about rhyme, spelling, translating: drop, keep or translate")
    ] = "drop",
    prompt: Annotated[
        str, typer.Option(help="Your words with {text}, for a model that takes one text a call")
    ] = "",
    extra: Extra = None,
    limit_field: LimitField = "max_tokens",
    partial: Partial = False,
    force: Force = False,
    form: Format = "auto",
    column: Column = None,
    drop_bad: DropBad = False,
    as_json: Json = False,
) -> None:
    """Write the rows in another language. Code, links, numbers and placeholders stay as they are.
    The same command again goes on where it stopped, and pays for nothing twice."""
    with errors(as_json):
        from ops import api

        there = api.endpoint_of(endpoint, model, price_in, price_out, key_env, extra, limit_field)
        how = api.translating.how(
            to, rows_per_call, chars_per_call, at_once, about_language, prompt
        )
        reading = reading_of(form, column, drop_bad)
        if plan:
            _priced(vars(api.translating.price([files], there, how, reading)), as_json)
            return
        with _progress("texts", as_json) as tell:
            written = api.translating.translate(
                [files],
                out,
                there,
                how,
                max_usd=capped(there, max_usd),
                reading=reading,
                force=force,
                partial=partial,
                tell=tell,
            )
        tell_written(written, as_json)


def instruct(
    files: Annotated[Path, typer.Argument(metavar="SEEDS", help="A file, a folder or a pattern")],
    endpoint: Url,
    model: Model,
    out: Annotated[Path | None, typer.Argument(help="Beside SEEDS without it")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="New rows, in the seeds' manner")] = None,
    answers: Annotated[
        bool, typer.Option("--answers", help="Answers for rows that have none, instead")
    ] = False,
    topics: Annotated[Path | None, typer.Option(help="A file, a topic a line")] = None,
    max_usd: MaxUsd = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    plan: Plan = False,
    key_env: KeyEnv = None,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Of one answer, at most")] = 1024,
    at_once: AtOnce = 4,
    seed: Annotated[int, typer.Option(help="Of which seeds serve as examples")] = 42,
    extra: Extra = None,
    limit_field: LimitField = "max_tokens",
    partial: Partial = False,
    force: Force = False,
    form: Format = "auto",
    column: Column = None,
    drop_bad: DropBad = False,
    as_json: Json = False,
) -> None:
    """Write new rows that repeat no seed, or answers for rows that have none. The same command
    again goes on where it stopped, and pays for nothing twice."""
    with errors(as_json):
        from ops import api

        there = api.endpoint_of(endpoint, model, price_in, price_out, key_env, extra, limit_field)
        wanted = api.instructing.asked(rows, answers, topics, seed, answer_tokens, at_once)
        reading = reading_of(form, column, drop_bad)
        if plan:
            _priced(vars(api.instructing.price([files], there, wanted, reading)), as_json)
            return
        with _progress("rows", as_json) as tell:
            written = api.instructing.instruct(
                [files],
                out,
                there,
                wanted,
                max_usd=capped(there, max_usd),
                reading=reading,
                force=force,
                partial=partial,
                tell=tell,
            )
        tell_written(written, as_json)


def capped(endpoint: api.Endpoint, max_usd: float | None) -> float | None:
    """What may be spent. Raises ConfigError where it costs something and nobody said how much."""
    if max_usd is None and (endpoint.usd_in or endpoint.usd_out):
        raise ConfigError("--max-usd is not given", hint="--max-usd 3; --plan tells the price")
    return max_usd


def _priced(told: dict[str, float], as_json: bool) -> None:
    if as_json:
        print(json_line({"kind": "priced", **told}))
        return
    for name, value in told.items():
        if name.endswith("usd"):
            continue
        print(f"{name.replace('_', ' '):<12}{value:>12,}")
    print(f"{'expected':<12}{'$' + format(told['usd'], ',.4f'):>12}")
    worst = "where every answer is as long as it may be"
    print(f"{'at most':<12}{'$' + format(told['worst_usd'], ',.4f'):>12}  {worst}")
    print("nothing was sent")


@contextmanager
def _progress(what: str, as_json: bool) -> Iterator[api.Tell]:
    """Tells on stderr how far the calls are: a line that changes on a terminal, else one now and
    then."""
    seen, shown = sys.stderr.isatty() and not as_json, [0.0]

    def tell(done: int, total: int, spent: api.Spent) -> None:
        now = time.monotonic()
        if now - shown[0] < (0.5 if seen else TOLD_EVERY_S):
            return
        shown[0] = now
        line = f"{done:,} of {number_of(total, 'call')} of {what}, ${spent.usd:.4f} at most"
        print(plain(line), end="\r" if seen else "\n", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        if seen:
            print(file=sys.stderr)
