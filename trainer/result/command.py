"""What the commands over a result share: an answer as text or as one line of JSON, a refusal in
words with exit code 3, progress on stderr. No torch."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError

from trainer.data.mistakes import grouped

DONE, REFUSED, INTERRUPTED = 0, 3, 130
EVERY_S = 10.0  # between two lines of progress where stderr is no terminal


def parser_of(module: str, about: str) -> argparse.ArgumentParser:
    """A parser with --json, whose other arguments the caller adds."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("--json", action="store_true", help="the answer as one line of JSON")
    return parser


def answer(
    work: Callable[[], dict[str, Any]],
    text: Callable[[dict[str, Any]], str],
    as_json: bool,
    refusals: tuple[type[Exception], ...] = (),
) -> int:
    """Do `work`, print what it returns, and return the exit code. ValueError, OSError, files
    that are cut off and `refusals` are refusals."""
    quiet()
    caught: tuple[type[Exception], ...] = (
        ValueError,
        OSError,
        zipfile.BadZipFile,
        SafetensorError,
        *refusals,
    )
    try:
        told = work()
    except caught as error:
        _refuse(error, as_json)
        return REFUSED
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(told, ensure_ascii=False) if as_json else text(told))
    return DONE


def _refuse(error: Exception, as_json: bool) -> None:
    samples = grouped(getattr(error, "samples", ()))
    why = "\n".join([str(error), *samples, *getattr(error, "__notes__", ())])
    hint = getattr(error, "hint", "")
    if as_json:
        print(json.dumps({"refused": why, "hint": hint}, ensure_ascii=False))
        return
    print(f"refused: {why}", *([f"do this: {hint}"] if hint else []), sep="\n", file=sys.stderr)


def quiet() -> None:
    """Turns off the progress bars and the warnings of libraries."""
    if "torch" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        warnings.filterwarnings("ignore", module="(peft|transformers|torch)")


class StatusLine:
    """One line on stderr that is written over; where that is no terminal, one every EVERY_S."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.shown = time.monotonic()

    def __call__(self, line: str) -> None:
        now = time.monotonic()
        if self.live:
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
        elif now - self.shown >= EVERY_S:
            self.shown = now
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clears the line."""
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
