"""Where a sweep stands, as its journal tells it. The journal lies in runs/sweeps/SWEEP/."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ops.errors import JournalError
from ops.job.job_file import JobFile
from ops.run import journal
from ops.run.journal import Line
from ops.run.view import Run

FOLDER = "sweeps"  # in the folder of runs
WAITING, LIVE = "waiting", "live"
# how a trial ends: its result is at home; it was ended at a rung; its run failed; it was ended by
# the user; the purse had too little for it
DONE, STOPPED, FAILED, ENDED, SKIPPED = "done", "stopped early", "failed", "ended", "skipped"


@dataclass
class Trial:
    """One run of a sweep. `cap_usd` is its limits.max_usd, reserved while it is live; `rungs` its
    held-out losses by share of the steps."""

    number: int  # from 1
    job: JobFile
    settings: dict[str, Any]
    enough_usd: float = 0.0  # with which it is begun
    predicted_usd: float = 0.0
    state: str = WAITING
    run: Run | None = None
    cap_usd: float = 0.0
    spent_usd: float = 0.0  # once it ended
    rungs: dict[float, float] = field(default_factory=dict)
    held_out: float | None = None  # nats per target token, once it ended
    stopping: str = ""  # why it is being ended
    why: str = ""  # how it ended, in words
    resumed: int = 0

    @property
    def words(self) -> str:
        """The settings in which it differs."""
        told = ", ".join(f"{k.split('.')[-1]}={_plain(v)}" for k, v in self.settings.items())
        return told or self.job.name

    def as_dict(self) -> dict[str, Any]:
        return {
            "trial": self.number,
            "settings": self.settings,
            "state": self.state,
            "run_id": self.run.id if self.run else None,
            "held_out": self.held_out,
            "spent_usd": round(self.spent_usd, 6),
            "cap_usd": self.cap_usd,
            "rungs": {str(k): v for k, v in self.rungs.items()},
            "adapter": str(adapter) if (adapter := self.adapter) else None,
            "why": self.why,
        }

    @property
    def adapter(self) -> Path | None:
        return self.run.adapter if self.run is not None and self.state == DONE else None


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def digest(trials: Sequence[Trial]) -> str:
    """Of everything that its jobs say: the same jobs, in the same order, are the same sweep."""
    told = [[part.model_dump(mode="json") for part in t.job.parts] for t in trials]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def unfinished(root: Path, wanted: str) -> Path | None:
    """The folder of the newest sweep of this digest that has not ended."""
    for path in sorted((root / FOLDER).glob(f"*/{journal.FILE}"), reverse=True):
        try:
            lines = journal.read(path.parent)
        except JournalError:
            continue
        if lines and lines[0].get("digest") == wanted and lines[-1].kind != "over":
            return path.parent
    return None


def new_folder(root: Path, name: str, now: float) -> Path:
    """`now` is in unix seconds."""
    at = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    return root / FOLDER / f"{name}-{at}-{secrets.token_hex(2)}"


def recall(lines: Sequence[Line], trials: Sequence[Trial], root: Path) -> None:
    """Set each trial to where the journal left it."""
    by_number = {trial.number: trial for trial in trials}
    for told in lines[0]["trials"] if lines else []:
        trial = by_number[int(told["trial"])]
        trial.enough_usd, trial.predicted_usd = told["enough_usd"], told["predicted_usd"]
    for line in lines:
        if "trial" in line:
            _recall_line(by_number[int(line["trial"])], line, root)


def _recall_line(trial: Trial, line: Line, root: Path) -> None:
    match line.kind:
        case "began":
            trial.state, trial.run = LIVE, Run(root / line["run_id"])
            trial.cap_usd, trial.resumed = float(line["cap_usd"]), 0
        case "unbegun":
            trial.state, trial.run = WAITING, None
        case "rung":
            trial.rungs[float(line["share"])] = float(line["loss"])
        case "stopping":
            trial.stopping = str(line["why"])
        case "resumed":
            trial.resumed += 1
        case "ended":
            trial.state, trial.why = str(line["state"]), str(line["why"])
            trial.spent_usd, trial.held_out = float(line["spent_usd"]), line["held_out"]


def told(trials: Sequence[Trial]) -> list[Mapping[str, Any]]:
    """The trials as the journal's first line has them."""
    return [
        {
            "trial": t.number,
            "name": t.job.name,
            "settings": t.settings,
            "enough_usd": t.enough_usd,
            "predicted_usd": t.predicted_usd,
        }
        for t in trials
    ]
