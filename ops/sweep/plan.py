"""What a sweep will do: its jobs checked, each with its prediction, or where an unfinished one of
the same jobs stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ops.errors import ConfigError, MilkteaError
from ops.job import config
from ops.job.config import with_max_usd
from ops.job.job_file import JobFile
from ops.job.plan import Plan
from ops.market.ranking import Ranking
from ops.run import journal
from ops.sweep import grid
from ops.sweep.state import LIVE, WAITING, Trial, digest, recall, unfinished
from ops.use.compare import differences, flattened

START_H = 0.1  # hours of a machine that a run may need beyond its prediction
MARGIN = 1.5  # of the prediction, with which a run is begun


class Priced(Protocol):
    """A plan with the market ranked for it."""

    @property
    def plan(self) -> Plan: ...
    @property
    def ranking(self) -> Ranking: ...


@dataclass(frozen=True)
class PlannedSweep:
    """`folder` is that of an unfinished sweep of the same jobs, which goes on; else None. `notes`
    are of the first job's plan."""

    trials: list[Trial]
    max_usd: float
    at_once: int
    digest: str
    folder: Path | None
    notes: list[str]

    @property
    def predicted_usd(self) -> float:
        """Of all runs that have not ended, if none is ended early."""
        return sum(t.predicted_usd for t in self.trials if t.state in (WAITING, LIVE))


def variations(job: Mapping[str, Any] | Path, sets: Mapping[str, Sequence[Any]]) -> list[JobFile]:
    """The job (a file, or the dict of its keys) with every combination of these values of its
    settings (dotted keys). Raises ConfigError."""
    path = job if isinstance(job, Path) else Path("job")
    raw = config.read(job) if isinstance(job, Path) else dict(job)
    found = grid.combinations(sets)
    return [config.parse(grid.varied(raw, s, n), path) for n, s in enumerate(found, 1)]


def plan_sweep(
    jobs: Sequence[JobFile],
    max_usd: float,
    at_once: int,
    root: Path,
    plan: Callable[[JobFile], Priced],
) -> PlannedSweep:
    """Plan every job, or recall the unfinished sweep of these jobs under `root`. Raises
    ConfigError, and what `plan` raises, with the run that it is of."""
    if not jobs or not max_usd > 0 or at_once < 1:
        raise ConfigError("a sweep has at least one job, one run at once, and a purse above 0 $")
    differ = differences([_settings(job) for job in jobs])
    trials = [
        Trial(n + 1, job, {name: values[n] for name, values in differ.items()})
        for n, job in enumerate(jobs)
    ]
    wanted = digest(trials)
    notes: list[str] = []
    if (folder := unfinished(root, wanted)) is not None:
        recall(journal.read(folder), trials, root)
        return PlannedSweep(trials, max_usd, at_once, wanted, folder, notes)
    for trial in trials:
        try:
            made = plan(with_max_usd(trial.job, min(max_usd, trial.job.limits.max_usd)))
        except MilkteaError as e:
            e.args = (f"run {trial.number} ({trial.words}): {e}",)
            raise
        cost, notes = made.ranking.accepted[0].cost, notes or made.plan.notes
        trial.predicted_usd = cost.expected_usd
        trial.enough_usd = MARGIN * cost.expected_usd + START_H * cost.usd_per_hour
    return PlannedSweep(trials, max_usd, at_once, wanted, None, notes)


def _settings(job: JobFile) -> dict[str, Any]:
    """All settings of a job by dotted name, without its own name."""
    flat = flattened(job.model_dump(mode="json"))
    return {name: value for name, value in flat.items() if name != "name"}
