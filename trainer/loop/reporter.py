"""What a run tells while it goes: events.jsonl and the boards. Only rank 0 tells; the others are
silent."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.data.words import number_of
from trainer.loop import report
from trainer.loop.held_out import Look
from trainer.wire import events
from trainer.wire.job import Job

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")
NOTES = "data_report.txt"


@dataclass(frozen=True)
class Ended:
    """A training that reached its end. `adapter_sha256` is that of its archive, known on rank 0
    alone."""

    steps: int
    final_loss: float
    adapter_sha256: str = ""


class Reporter:
    """Every method does nothing where the process is not the `first`. Of a stage of several, `run`
    is its own folder, `home` that of the whole run, and `place` its fields of Started."""

    def __init__(
        self,
        job: Job,
        run: Path,
        first: bool,
        home: Path | None = None,
        place: Mapping[str, Any] | None = None,
    ) -> None:
        self._run, self._log, self._boards = run, None, None
        self._home, self._place = home or run, dict(place or {})
        if first:
            events.end_cut_line(self._home / "events.jsonl")
            self._log = events.EventWriter(self._home / "events.jsonl")
            self._boards = report.Boards(job, run)

    def event(self, kind: type[events.Event], **fields: Any) -> None:
        """A line of events.jsonl."""
        if self._log is not None:
            self._log.write(kind, **fields)

    def started(self, notes: Sequence[str], **facts: Any) -> None:
        """The Started event with `facts`, then what people should know before: `notes` on the data,
        also in data_report.txt, and a board that is missing."""
        if self._boards is None:
            return
        self.event(events.Started, versions=versions(), **self._place, **facts)
        if notes:
            (self._run / NOTES).write_text("\n".join(notes) + "\n", encoding="utf-8")
            told = (
                f"{number_of(len(notes), 'row', 'was', 'were')} changed or left out: "
                f"{notes[0]} ... ({NOTES} has all)"
            )
            self.event(events.Warned, message=told)
        if self._boards.warning:
            self.event(events.Warned, message=self._boards.warning)

    def step(self, step: int, values: dict[str, float], eta_s: float) -> None:
        """A step's numbers by name: Step's fields, and a stage's own."""
        self.event(events.Step, step=step, eta_s=eta_s, **values)
        if self._boards is not None:
            self._boards.step(step, values)

    def looked(self, step: int, look: Look) -> None:
        """What the held-out rows gave after step `step`."""
        self.event(events.HeldOut, step=step, **look._asdict())
        if self._boards is not None:
            values = {"held_out_loss": look.loss, "held_out_accuracy": look.accuracy}
            self._boards.step(step, values)

    def checkpoint(self, step: int, folder: Path, digest: str) -> None:
        """A checkpoint is on disk; `digest` is the sha256 of its manifest."""
        path = folder.relative_to(self._home).as_posix()
        self.event(events.Checkpoint, step=step, path=path, manifest_sha256=digest)

    def finished(self, ended: Ended, began: float) -> None:
        """The run is done; its seconds count from `began` (unix time)."""
        self.event(
            events.Finished,
            seconds=round(time.time() - began, 1),
            steps=ended.steps,
            final_loss=ended.final_loss,
            adapter_sha256=ended.adapter_sha256,
        )

    def close(self) -> None:
        for told in (self._log, self._boards):
            if told is not None:
                told.close()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that compute, by name."""
    return {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES}
