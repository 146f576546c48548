"""How the box side of a run ends: exit codes, the file that carries them, and the event that says
why.

Pure Python: the launcher, which imports no torch, and the training processes agree here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.wire.events import EventWriter, Failure, parse, whole_lines

DONE, BROKEN, REFUSED, STOPPED, TERMINATED = 0, 1, 3, 4, 143
EXIT_VARIABLE = "MILKTEA_EXIT_FILE"  # names EXIT_FILE's stand-in: each machine has its own
EXIT_FILE = ".trainer_exit"  # the trainer's own exit code; a launcher of several loses it
SHOWN = 40  # samples on a terminal
TAIL = 1 << 16  # bytes of events.jsonl in which a reason is looked for


class Unexpected(RuntimeError):
    """An error that no stage foresaw, as a sentence. Its traceback is in log.txt. `hint` is what
    to do, `samples` is empty."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.samples: Sequence[str] = ()
        self.hint = hint

    @classmethod
    def of(cls, error: Exception) -> Unexpected:
        """What it was, on one line of at most 400 characters."""
        text = " ".join(str(error).split())[:400]
        hint = (
            "report the traceback in log.txt; `milktea resume RUN` goes on from the last checkpoint"
        )
        return cls(f"{type(error).__name__}: {text}" if text else type(error).__name__, hint)


def is_reported(run: Path, since: float) -> bool:
    """Whether a process of this start (after `since`, unix time) has told why it ended. Of several
    processes the first to fail has the reason; the others only lose it."""
    path = run / "events.jsonl"
    lines = whole_lines(path.read_bytes()[-TAIL:])[0][-SHOWN:] if path.is_file() else []
    for line in lines:
        try:
            event = parse(line)
        except ValueError:  # cut at the tail's beginning
            continue
        if isinstance(event, Failure) and event.t >= since:
            return True
    return False


def report_refusal(run: Path, error: Exception) -> int:
    """Tells why the run ended, on stderr and in events.jsonl; returns the exit code of a refusal.

    `error.hint` (what to do) and `error.samples` (file:line) are told where it has them."""
    hint, samples = getattr(error, "hint", ""), list(getattr(error, "samples", []))
    writer = EventWriter(run / "events.jsonl")
    writer.write(Failure, reason=str(error), samples=samples, hint=hint)
    writer.close()
    more = len(samples) - SHOWN
    shown = samples[:SHOWN] + ([f"... and {more} more, all in events.jsonl"] if more > 0 else [])
    lines = filter(None, [f"stopped: {error}", *shown, hint])
    print(*lines, sep="\n", file=sys.stderr, flush=True)
    return REFUSED
