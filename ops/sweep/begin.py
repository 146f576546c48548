"""Run a planned sweep to its end, and leave its table, picture and JSON beside the results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ops.errors import MilkteaError
from ops.run.journal import Journal
from ops.sweep import engine
from ops.sweep.engine import Acts, Sweep, Watcher
from ops.sweep.page import best, page
from ops.sweep.plan import PlannedSweep
from ops.sweep.state import Trial, new_folder
from ops.use.compare import looks_of

PAGE, FACTS = "sweep.html", "sweep.json"


@dataclass(frozen=True)
class Swept:
    """Where a sweep stands: its trials, and the best of those whose result is at home. `page` is
    its picture and table; None where the user left before the end."""

    id: str
    trials: list[Trial]
    spent_usd: float
    max_usd: float
    best: Trial | None
    page: Path | None


def run_sweep(
    planned: PlannedSweep,
    root: Path,
    acts: Acts,
    watcher: Watcher,
    pressed: Callable[[], bool],
    *,
    halves: bool = True,
    look_s: float = engine.LOOK_S,
) -> Swept:
    """Begin or go on. `pressed` says whether Ctrl-C was pressed since it was asked last. Raises
    BoxLeaked, Fenced where another process runs this sweep."""
    first = planned.trials[0].job
    folder = planned.folder or new_folder(root, first.name, time.time())
    with Journal(folder) as held:
        begun = engine.begin(held, planned)
        watcher.line(begun, planned.trials)
        sweep = Sweep(
            held,
            planned.trials,
            acts,
            watcher,
            max_usd=planned.max_usd,
            at_once=planned.at_once,
            halves=halves,
        )
        ended = sweep.run(pressed, look_s)
        spent = sweep.spent_usd()
    out = first.results.folder / folder.name
    made = _write(out, folder.name, planned, spent) if ended else None
    return Swept(folder.name, planned.trials, spent, planned.max_usd, best(planned.trials), made)


def _write(out: Path, name: str, planned: PlannedSweep, spent_usd: float) -> Path:
    looks: dict[int, list[tuple[int, float]]] = {}
    for trial in planned.trials:
        with suppress(MilkteaError):
            told = list(trial.run.events()) if trial.run else []
            looks[trial.number] = [(look.step, look.loss) for look in looks_of(told)]
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_bytes(page(name, planned.trials, looks, spent_usd, planned.max_usd))
    facts = {"sweep": name, "spent_usd": round(spent_usd, 6), "max_usd": planned.max_usd}
    rows = [trial.as_dict() for trial in planned.trials]
    text = json.dumps({**facts, "trials": rows}, ensure_ascii=False, indent=1)
    (out / FACTS).write_text(text + "\n", "utf-8")
    return out / PAGE
