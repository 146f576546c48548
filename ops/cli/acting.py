"""What commands that act share: the market, the screen, and what is finished first. `ops.api` is
imported inside, as in app.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from ops.errors import ConfigError
from ops.plain import plain

if TYPE_CHECKING:
    from ops import api
    from ops.cli.screen import JsonLines, Terminal


def market() -> api.Vast:
    from ops import api

    if not api.uses_vast_ai():
        print(
            "VAST_API_KEY is not set: the emulator plays vast.ai on this machine; no money moves.",
            file=sys.stderr,
        )
    return api.open_market()


@contextmanager
def acting(as_json: bool) -> Iterator[tuple[api.Vast, Terminal | JsonLines]]:
    """For a command that acts: give the block the client of vast.ai and the screen, after finishing
    every destroy that an earlier command could not finish. An interrupt exits with 130."""
    from ops import api

    vast, screen = market(), open_screen(as_json)
    vast.tell = screen.waiting
    report(api.finish_destroys(vast=vast, screen=screen), as_json)
    with interrupted():
        yield vast, screen


@contextmanager
def interrupted() -> Iterator[None]:
    """Turn Interrupted into a message and exit code 130."""
    from ops import api

    try:
        yield
    except api.Interrupted as e:
        print(f"interrupted; {e}", file=sys.stderr)
        raise typer.Exit(130) from None


def open_screen(as_json: bool) -> Terminal | JsonLines:
    from rich.console import Console

    from ops.cli.screen import JsonLines, Terminal

    return JsonLines() if as_json else Terminal(Console())


def report(reaped: api.Reaped, as_json: bool, *, say_nothing_found: bool = False) -> None:
    found = bool(reaped.destroyed or reaped.left or reaped.leaked)
    if as_json and (found or reaped.removed or say_nothing_found):
        row = {"destroyed": reaped.destroyed, "left": reaped.left, "removed": reaped.removed}
        row |= {"leaked": [str(e) for e in reaped.leaked]}
        print(json.dumps({"kind": "reaped", **row}))
    if not as_json:
        for run_id in reaped.destroyed:
            print(f"{run_id}: destroyed, absent in three spaced reads")
        for line in reaped.left:
            print(plain(f"left alone: {line}"))
        print(*map(plain, reaped.removed), sep="\n", end="\n" if reaped.removed else "")
        if say_nothing_found and not found:
            print("no box of ours exists")
    if reaped.leaked:
        raise reaped.leaked[0]


def may_destroy(labels: list[str], yes: bool) -> bool:
    """Whether boxes that another folder, or another tool, may look after are to be destroyed.
    Raises ConfigError where nobody can be asked."""
    if yes:
        return True
    print(*map(plain, labels), sep="\n", file=sys.stderr)
    if not sys.stdin.isatty():
        raise ConfigError(
            f"nobody can be asked here whether these {len(labels)} are yours",
            hint="milktea reap --foreign --yes",
        )
    return typer.confirm(f"Destroy these {len(labels)}, begun elsewhere?", default=False)


def may_end(run: api.Run, yes: bool) -> bool:
    """Whether a run of another person is meant: asked, where nobody said --yes and somebody can be
    asked. For a run of one's own nothing is asked. False is refused by what ends it."""
    if run.is_mine or yes or not sys.stdin.isatty():
        return yes
    if typer.confirm(f"{run.id} is a run of {plain(run.user)}. End it?", default=False):
        return True
    print("nothing was changed", file=sys.stderr)
    raise typer.Exit(0)
