"""Many runs under one purse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.api.market import open_market, uses_vast_ai
from ops.api.planning import Job, Planned, load_job, plan, with_results
from ops.api.running import ctrl_c, destroy, rent_and_train, resume
from ops.errors import ConfigError
from ops.job.job_file import JobFile
from ops.market.client import Vast
from ops.run.folders import runs_folder
from ops.run.journal import Line
from ops.run.view import Run
from ops.sweep import plan as sweep_plan
from ops.sweep.begin import Swept, run_sweep
from ops.sweep.engine import Watcher
from ops.sweep.plan import PlannedSweep
from ops.sweep.state import Trial


def variations(
    job: Mapping[str, Any] | Path | str, sets: Mapping[str, Sequence[Any]]
) -> list[JobFile]:
    """The job with every combination of these values of its settings, by dotted key:
    `{"lora.r": [8, 16]}`. Raises ConfigError."""
    if isinstance(job, Mapping):
        return sweep_plan.variations(with_results(job), sets)
    return sweep_plan.variations(Path(job), sets)


def plan_map(
    jobs: Sequence[Job],
    *,
    max_usd: float,
    at_once: int = 2,
    vast: Vast | None = None,
    root: Path | None = None,
    on_cpu: bool = False,
    or_estimate: bool = False,
) -> PlannedSweep:
    """Every job checked and priced, under one purse of `max_usd`; or where an unfinished sweep of
    the same jobs stands. Rents nothing, leaves nothing. `on_cpu` and `or_estimate` as in `plan`,
    and raises as that."""
    vast, root = vast or open_market(), root or runs_folder()

    def planned(job: JobFile) -> Planned:
        return plan(job, vast=vast, root=root, on_cpu=on_cpu, or_estimate=or_estimate)

    parsed = [load_job(job) for job in jobs]
    return sweep_plan.plan_sweep(parsed, max_usd, at_once, root, planned)


def map(
    jobs: Sequence[Job] | PlannedSweep,
    *,
    max_usd: float | None = None,
    at_once: int = 2,
    early_stop: bool = True,
    vast: Vast | None = None,
    root: Path | None = None,
    watcher: Watcher | None = None,
) -> Swept:
    """Train every job, at most `at_once` at a time, for at most `max_usd` together; with
    `early_stop` the worse half by held-out loss ends at a quarter and at half of its steps.

    A run that fails does not end it. Killed, it leaves runs that end by themselves within their
    caps, and the same call goes on. Ctrl-C lets `watcher` choose; without one all runs are ended.
    Returns once no run is live, or once the user left. Raises as `plan`; BoxLeaked."""
    emulated = vast is None and not uses_vast_ai()
    vast, root = vast or open_market(), root or runs_folder()
    if not isinstance(jobs, PlannedSweep):
        if max_usd is None:
            raise ConfigError(
                "max_usd is not given: a sweep has a purse", hint="map(jobs, max_usd=6)"
            )
        jobs = plan_map(
            jobs, max_usd=max_usd, at_once=at_once, vast=vast, root=root, on_cpu=emulated
        )
    acts = _Acts(vast, root, emulated)
    with ctrl_c() as event:

        def pressed() -> bool:
            was = event.is_set()
            event.clear()
            return was

        look_s = max(0.05, vast.clock.pace)
        told = watcher or QuietSweep()
        return run_sweep(jobs, root, acts, told, pressed, halves=early_stop, look_s=look_s)


@dataclass(frozen=True)
class _Acts:
    """What a sweep does with a run: what one would do by hand."""

    vast: Vast
    root: Path
    on_cpu: bool

    def plan(self, job: JobFile) -> Planned:
        return plan(job, vast=self.vast, root=self.root, on_cpu=self.on_cpu)

    def begin(self, planned: Planned) -> Run:
        return rent_and_train(planned, vast=self.vast, root=self.root, detach=True)

    def resume(self, run: Run) -> None:
        resume(run, vast=self.vast, root=self.root, detach=True)

    def destroy(self, run: Run) -> None:
        destroy(run, vast=self.vast, root=self.root)


class QuietSweep:
    """A `Watcher` of a sweep that tells nobody. Subclass it and override what you want to hear."""

    def line(self, line: Line, trials: Sequence[Trial]) -> None:
        """A line was written to the sweep's journal."""

    def meter(self, trials: Sequence[Trial], spent_usd: float, max_usd: float) -> None:
        """After each look at the runs."""

    def choose(self, choices: Sequence[tuple[str, str]]) -> str | None:
        """After Ctrl-C: the key of one of `choices`; here nobody is asked."""
        return None
