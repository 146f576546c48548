"""The commands that go to a run's box, TensorBoard over its numbers, and the page of all runs."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli.acting import market
from ops.cli.errors import errors
from ops.cli.history import Run

if TYPE_CHECKING:
    from ops import api

# what follows RUN is the box's command, with its own options
AS_TYPED = {"ignore_unknown_options": True, "allow_interspersed_args": False}
Port = Annotated[int, typer.Argument(min=1, max=65535, help="A port of the box's own loopback")]


def ssh(run: Run) -> None:
    """A shell on the box of a run, in the run's folder; exits as the shell does."""
    with errors(False):
        from ops import api

        code = api.visit.shell(api.find_run(run), market())
    raise typer.Exit(code)


def execute(
    run: Run, command: Annotated[list[str], typer.Argument(metavar="CMD...", help="The command")]
) -> None:
    """Run a command on the box of a run, in the run's folder; exits as the command does. Pipes go
    both ways."""
    with errors(False):
        from ops import api

        try:
            code = api.visit.execute(api.find_run(run), market(), command)
        except BrokenPipeError:  # whoever read our output has gone
            sys.stderr.close()
            code = 141
    raise typer.Exit(code)


def forward(
    run: Run,
    port: Port,
    local: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Here; a free one without it")
    ] = 0,
) -> None:
    """Reach a port of a run's box at a port of this machine's loopback, until Ctrl-C or until the
    box is gone."""
    with errors(False):
        from ops import api

        found, vast = api.find_run(run), market()
        if not api.visit.listens(found, vast, port):
            print(f"nothing listens at port {port} of the box yet", file=sys.stderr)
        with api.visit.forwarded(found, vast, port, local) as opened:
            print(f"127.0.0.1:{opened.port} is port {port} of the box; Ctrl-C ends it", flush=True)
            with suppress(KeyboardInterrupt):
                api.visit.wait_for_end(found)
                print("the box is gone", file=sys.stderr)


def tensorboard(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run ids, or `last`")],
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="6006, or a free one, without it")
    ] = None,
) -> None:
    """TensorBoard over what these runs have told so far, on this machine, until Ctrl-C. It needs no
    box; a run that goes on is followed."""
    with errors(False):
        from ops import api

        found = [api.find_run(run) for run in runs]
        with api.board.served(found, port) as (address, board):
            print(f"{address}   Ctrl-C ends it", flush=True)
            with suppress(KeyboardInterrupt):
                _follow(board)


def web(
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="8015, or a free one, without it")
    ] = None,
    browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open it in this desktop's browser")
    ] = False,
) -> None:
    """A page of all runs on this machine's loopback, live: curves, money, logs, answers, and what
    may be done with its price. Ctrl-C ends the page, and no run."""
    with errors(False):
        from ops import api

        def told(address: str) -> None:
            print(f"{address}   Ctrl-C ends the page, and no run", flush=True)
            if browser:
                import webbrowser

                webbrowser.open(address)

        api.web(told, port=port)


def _follow(board: api.board.Board) -> None:
    from ops import api

    while True:
        time.sleep(api.board.EVERY_S)
        board.write_new()
