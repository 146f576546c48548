"""Show an error on the command line: what happened, the state of the money, the next command, and
the exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from ops.cli.typed import as_typed
from ops.errors import MilkteaError, disk_error
from ops.plain import json_line, plain


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Turn a MilkteaError into its message, money, hint and code on stderr (or JSON on stdout), and
    exit with its code; so an OSError of this machine's disk."""
    try:
        yield
    except MilkteaError as e:
        _fail(e, as_json)
    except typer.Abort as e:  # Ctrl-C or Ctrl-D at a question
        print("\nthe question was not answered, and nothing more was done", file=sys.stderr)
        raise typer.Exit(130) from e
    except OSError as e:
        if (said := disk_error(e)) is None:
            raise
        said.hint = "make room, or mend the rights of what is named; then the same command again"
        _fail(said, as_json)


def _fail(e: MilkteaError, as_json: bool) -> NoReturn:
    if as_json:
        row = {
            "kind": "error",
            "error": type(e).__name__,
            "what": str(e),
            "money": e.money,
            "hint": e.hint,
            "exit_code": e.exit_code,
        }
        print(json_line(row))
        raise typer.Exit(e.exit_code)
    what, hint = as_typed(plain(str(e))), as_typed(plain(e.hint))
    print(f"\n{type(e).__name__}: {what}\n  money: {plain(e.money)}", file=sys.stderr)
    if hint:
        print(f"  next:  {hint}", file=sys.stderr)
    if e.exit_code == 70 and (first := e.__cause__) is not None:
        print(f"  first: {type(first).__name__}: {plain(str(first))}", file=sys.stderr)
    # make turns every code into its own 2
    print(f"  code:  {e.exit_code} (docs/troubleshooting.md)", file=sys.stderr)
    raise typer.Exit(e.exit_code)
