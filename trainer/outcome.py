"""How the box side of a run ends: exit codes, the file that carries them, and the word that tells why.

Pure Python: the launcher, which imports no torch, and the training processes agree here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.events import Failed, Writer

DONE, BROKEN, REFUSED, STOPPED, TERMINATED = 0, 1, 3, 4, 143
EXIT_VARIABLE = "MILKTEA_EXIT_FILE"  # names EXIT_FILE's stand-in: each machine has its own
EXIT_FILE = ".trainer_exit"  # the trainer's own exit code; a launcher of several loses it
SHOWN = 40  # samples on a terminal


class Unexpected(RuntimeError):
    """An error that no stage foresaw, as a sentence. Its traceback is in log.txt. `hint` is what
    to do, `samples` is empty."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.samples: Sequence[str] = ()
        self.hint = hint


def refuse(run: Path, error: Exception) -> int:
    """Tells why the run ended, on stderr and in events.jsonl; returns the exit code of a refusal.

    `error.hint` (what to do) and `error.samples` (file:line) are told where it has them."""
    hint, samples = getattr(error, "hint", ""), list(getattr(error, "samples", []))
    writer = Writer(run / "events.jsonl")
    writer.write(Failed, reason=str(error), samples=samples, hint=hint)
    writer.close()
    more = len(samples) - SHOWN
    shown = samples[:SHOWN] + ([f"... and {more} more, all in events.jsonl"] if more > 0 else [])
    lines = filter(None, [f"stopped: {error}", *shown, hint])
    print(*lines, sep="\n", file=sys.stderr, flush=True)
    return REFUSED
