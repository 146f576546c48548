"""The screen of a program or a notebook: plain lines, few of them."""

from __future__ import annotations

import time

from ops import api
from ops.api import Event, Quiet, events

PARTS = 10  # of a training, each of which is told once


class Told(Quiet):
    """Prints each stage of a run as a line, and a line for each tenth of the training. No line is
    ever written over: a notebook and a log file show the same."""

    def __init__(self) -> None:
        super().__init__()
        self._total_steps, self._part, self._held_out = 0, 0, ""

    def line(self, line: api.Line) -> None:
        if text := api.told_line(line):
            print(text, flush=True)

    def event(self, event: Event, spent_usd: float, max_usd: float, dies_at_unix_s: float) -> None:
        match event:
            case events.Started():
                self._total_steps = event.total_steps
                self._part = PARTS * event.step // max(1, event.total_steps)
                self._held_out = ""
            case events.HeldOut():
                self._held_out = f", held-out loss {event.loss:.4f}"
            case events.Step() if self._total_steps:
                part = PARTS * event.step // self._total_steps
                if part > self._part:
                    self._part = part
                    print(self._words(event, spent_usd, max_usd), flush=True)
            case _:
                pass

    def _words(self, step: events.Step, spent_usd: float, max_usd: float) -> str:
        at = time.strftime("%H:%M", time.localtime(time.time() + step.eta_s))
        now = f"{step.step} of {self._total_steps}, loss {step.loss:.4f}{self._held_out}"
        return f"{'step':<9} {now}, {spent_usd:.4f} of {max_usd:.2f} $, done about {at}"
