"""Before money: the job, checked; models, cards and prices; the plan with its market."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ops.api.market import open_market
from ops.api.reaping import finished
from ops.hardware.gpus import Gpu
from ops.job import cards, config, planner
from ops.job.cards import KnownCard, Price
from ops.job.job_file import JobFile
from ops.job.label import RUN_ID
from ops.job.plan import Plan
from ops.job.preflight import preflight
from ops.market.client import Vast
from ops.market.ranking import Ranking, rank
from ops.run import prices as price_list
from ops.run.choose import bad_machines, no_offer_error, search_offers
from ops.run.folders import runs_folder
from ops.run.journal import FILE as JOURNAL


@runtime_checkable
class Declared(Protocol):
    """A job that was declared in Python (ops/declare/job.py)."""

    @property
    def file(self) -> JobFile: ...


Job = JobFile | Declared | Mapping[str, Any] | Path | str
KEPT_S = 86_400.0  # that a plan may be begun in, where it left files
schema = config.schema
models = cards.models


@dataclass(frozen=True)
class Planned:
    """A job whose data, model and needs were checked, and what the market offers for it now."""

    plan: Plan
    ranking: Ranking  # .accepted: at least one, the cheapest finished run first
    credit_usd: float

    def __str__(self) -> str:
        """The four best offers with their dollars and hours, and what the plan notes."""
        p = self.plan
        lines = [f"{p.run_id}: {p.image}, at most {p.max_usd:.2f} $ and {p.max_s / 3600:.1f} h"]
        for one in self.ranking.accepted[:4]:
            card = f"{one.offer.num_gpus} x {one.offer.gpu_name}"
            lines.append(f"  {card:<20} {one.cost.usd:8.4f} $ {one.cost.hours:6.2f} h  {one.why}")
        return "\n".join([*lines, *(f"  {note}" for note in p.notes)])


def load_job(job: Job) -> JobFile:
    """The job, checked. Raises ConfigError listing every mistake with its path."""
    if isinstance(job, JobFile):
        return job
    if isinstance(job, Declared):
        return job.file
    if isinstance(job, Mapping):
        return config.parse(with_results(job), Path("job"))
    return config.load(Path(job))


def with_results(job: Mapping[str, Any]) -> dict[str, Any]:
    """A job as a dict, whose results go to `out` in the working directory."""
    return {**job, "results": {"folder": "out"} | dict(job.get("results", {}))}


def prices(vast: Vast | None = None) -> dict[Gpu, Price]:
    """What each known card costs now, as one GPU on demand. Raises MarketError."""
    return price_list.now(vast or open_market())


def gpus(
    words: Sequence[str] = (),
    *,
    job: Job | None = None,
    prices: Mapping[Gpu, Price] | None = None,
) -> list[KnownCard]:
    """The known cards in whose name each of `words` stands, with `prices` where given and, of a
    job, whether each holds it. Raises ConfigError, and PreflightError where the job has a mistake
    or no card holds it."""
    needs, names = None, []
    if job is not None:
        parsed = load_job(job)
        names = parsed.offer.gpu_name
        free = parsed.offer.model_copy(update={"gpu_name": []})  # each card is judged by itself
        parsed = parsed.model_copy(update={"offer": free})
        with tempfile.TemporaryDirectory() as folder:
            needs = planner.new_plan(parsed, Path(folder), time.time(), or_estimate=True).needs
    return cards.cards(words, dict(prices or {}), needs, names)


def plan(
    job: Job,
    *,
    vast: Vast | None = None,
    root: Path | None = None,
    on_cpu: bool = False,
    or_estimate: bool = False,
) -> Planned:
    """Everything that can fail for free, then the market ranked for this job. Rents nothing. Tables
    and archives lie in the run's folder as they will travel; `drop` removes them, or the first plan
    a day later. Nothing else is left on the disk.

    `on_cpu` refuses what this computer's CPU could not train within limits.max_hours, which is
    where the emulator's boxes compute. `or_estimate` tells tokens from characters where a model
    that the catalogue knows cannot be had (no network): nothing is rented by such a plan. Raises
    ConfigError, PreflightError, NoOffer, MarketError."""
    vast, root = vast or open_market(), root or runs_folder()
    finished(vast, root)
    parsed, now = load_job(job), time.time()
    _sweep(root, now)
    asked = {"on_cpu": on_cpu, "or_estimate": or_estimate}
    made = preflight(lambda: planner.new_plan(parsed, root, now, **asked), vast, root)
    try:
        offers = search_offers(vast, made.needs)
        ranking = rank(offers, made.needs, made.workload, bad_machines(root, time.time()))
        if not ranking.accepted:
            raise no_offer_error(ranking, 0, made.needs)
        planned = Planned(made, ranking, vast.credit_usd())
    except BaseException:
        _remove_unbegun(root / made.run_id)
        raise
    if not any((root / made.run_id).iterdir()):
        (root / made.run_id).rmdir()
    return planned


def drop(planned: Planned, root: Path | None = None) -> None:
    """Removes what a plan left in `root` that will not be begun."""
    _remove_unbegun((root or runs_folder()) / planned.plan.run_id)


def _sweep(root: Path, now: float) -> None:
    """Drops the plans that nobody began within KEPT_S."""
    for folder in root.iterdir() if root.is_dir() else ():
        with suppress(OSError):  # another process was first, or it is another's
            if RUN_ID.fullmatch(folder.name) and folder.stat().st_mtime < now - KEPT_S:
                _remove_unbegun(folder)


def _remove_unbegun(folder: Path) -> None:
    """Removes the folder of a run that has no journal."""
    if not (folder / JOURNAL).exists():
        shutil.rmtree(folder, ignore_errors=True)
