"""milktea from Python: what the command line does, as functions with typed results.

    import milktea

    planned = milktea.plan("jobs/practice.toml")      # checks, offers, prices; rents nothing
    run = milktea.rent_and_train(planned)             # rents; returns once the box is proven gone
    print(run.adapter, run.cost().spent_usd)

A job is a path of a TOML file, or a dict of the same keys (relative paths in it, and its
`results.folder` of `out`, are of the working directory). `vast` is vast.ai where VAST_API_KEY is
set, else the emulator on this machine (`open_market`); `root` is the folder of runs, `runs/` or
MILKTEA_RUNS. Errors are those of `ops.errors`: each has `money`, `hint` and `exit_code`.

Whatever acts first finishes every destroy that an earlier client began and could not prove, and
raises BoxLeaked where it still cannot.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ops.errors import Failed, JournalError, MilkteaError, PreflightError
from ops.export.folder import Kind, export
from ops.hardware.gpus import Gpu
from ops.image import carry
from ops.image import workflow as images
from ops.job import cards, config, planner
from ops.job.cards import KnownCard, KnownModel, Price
from ops.job.config import JobFile
from ops.job.plan import Plan
from ops.job.preflight import preflight
from ops.job.talk_plan import talk_plan
from ops.market.client import Vast
from ops.market.models import Instance
from ops.market.provider import Provider, provider_from
from ops.market.ranking import Ranking, rank
from ops.run import journal, place, rent_and_chat, rental, supervisor, wishes
from ops.run import prices as price_list
from ops.run import reap as reaping
from ops.run.attach import Tail, raise_if_failed, watching
from ops.run.choose import bad_machines, no_offer_error, search_offers
from ops.run.explain import Status, told_line
from ops.run.folders import project_folder, runs_folder
from ops.run.journal import Journal, Line
from ops.run.meter import dearest_silence, may_have_box, plan_of
from ops.run.reap import Reaped
from ops.run.session import Interrupted, Screen, Session
from ops.run.view import Cost, Run, find_run, runs
from ops.use import begin, words
from ops.use import compare as comparing
from ops.use import rows as data
from ops.use.compare import Comparison, Outcome
from ops.use.found import Found
from ops.use.results import (
    check_adapter,
    combine_adapters,
    evaluate,
    export_adapter,
    find_result,
    merge,
)
from ops.wait import RealClock
from trainer.data.sources import Reading
from trainer.wire import events
from trainer.wire.events import Event, Sample, Score

__all__ = [
    "Comparison",
    "Cost",
    "Event",
    "Found",
    "Gpu",
    "Instance",
    "Interrupted",
    "JobFile",
    "Kind",
    "KnownCard",
    "KnownModel",
    "Line",
    "MilkteaError",
    "Outcome",
    "Plan",
    "Planned",
    "Price",
    "Quiet",
    "Ranking",
    "Reading",
    "Reaped",
    "Run",
    "Sample",
    "Score",
    "Screen",
    "Status",
    "Vast",
    "attach",
    "begin",
    "carry",
    "check_adapter",
    "combine_adapters",
    "compare",
    "data",
    "dearest_silence",
    "destroy",
    "evaluate",
    "events",
    "export",
    "export_adapter",
    "find_result",
    "find_run",
    "finish_destroys",
    "gpus",
    "images",
    "load_job",
    "merge",
    "models",
    "open_market",
    "plan",
    "plan_chat",
    "prices",
    "reap",
    "rent_and_talk",
    "rent_and_train",
    "resume",
    "runs",
    "runs_folder",
    "schema",
    "stop",
    "told_line",
    "uses_vast_ai",
    "words",
]

Job = JobFile | Mapping[str, Any] | Path | str
schema = config.schema
# no limits on requests, and the image size that jobs/practice.toml names
EMULATOR = ("--no-rate-limits", "--image-bytes", "milktea/*=289910784")
EMULATOR_PACE = 0.1  # waiting for an emulator, as a share of waiting for vast.ai
WATCH_EVERY_S = 0.1  # between two looks at what the owner of a run tells


# -- where, and as whom ----------------------------------------------------------------------------


def uses_vast_ai(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether VAST_API_KEY is set. Without it the emulator plays vast.ai, and no money moves."""
    return provider_from(dict(environ)) is not None


def open_market(environ: Mapping[str, str] = os.environ) -> Vast:
    """vast.ai for the key in VAST_API_KEY (at VAST_URL, if set); without a key the emulator of
    MILKTEA_EMULATOR (`.milktea/fakevast`), started when it does not run. MILKTEA_PACE scales all
    waiting. Raises RuntimeError where the emulator does not start."""
    provider = provider_from(dict(environ))
    if provider is not None:
        return Vast(provider, RealClock(float(environ.get("MILKTEA_PACE") or 1)))
    from ops.fakevast.embedded import ensure  # asyncssh and aiohttp, which a key does without

    folder = Path(environ.get("MILKTEA_EMULATOR") or project_folder() / ".milktea" / "fakevast")
    server = ensure(folder, options=EMULATOR)
    return Vast(Provider(server.url, server.api_key), RealClock(EMULATOR_PACE))


# -- what a run is ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A job whose data, model and needs were checked, and what the market offers for it now."""

    plan: Plan
    ranking: Ranking  # .accepted: at least one, the cheapest finished run first
    credit_usd: float


# -- what one does with it -------------------------------------------------------------------------


class Quiet:
    """A `Screen` that tells nobody. Subclass it and override what you want to hear; `event` hears
    every word of the trainer."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.score: Score | None = None

    def line(self, line: Line) -> None:
        """A journal line was written."""

    def plan(self, plan: Plan, ranking: Ranking, credit_usd: float) -> None:
        """The plan is made."""

    def booting(self, instance: Instance, waited_s: float) -> None:
        """The machine starts."""

    def connecting(self, message: str) -> None:
        """A way in is tried."""

    def moving(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Bytes go up (`what` is push) or come home (pull)."""

    def event(self, event: Event, spent_usd: float, max_usd: float, dies_at_unix_s: float) -> None:
        """The trainer said something."""

    def waiting(self, message: str) -> None:
        """Something has to be waited for."""

    def talking(self, page: str, ends_at_unix_s: float) -> None:
        """People can talk to the result at `page`, which holds the token; told again and again."""

    def destroying(self, why: str) -> None:
        """The box is about to be destroyed."""

    def meter(self, spent_usd: float, max_usd: float) -> None:
        """What the run has cost so far, about once a second."""

    def choose(self, choices: Sequence[tuple[str, str]]) -> str | None:
        """After Ctrl-C: the key of one of `choices`, "" to go on; here nobody is asked."""
        return None


def load_job(job: Job) -> JobFile:
    """The job, checked. Raises ConfigError listing every mistake with its path."""
    if isinstance(job, JobFile):
        return job
    if isinstance(job, Mapping):
        results = {"folder": "out"} | dict(job.get("results", {}))
        return config.parse({**job, "results": results}, Path("job"))
    return config.load(Path(job))


models = cards.models


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
    """Everything that can fail for free, then the market ranked for this job. Rents nothing and
    leaves nothing on the disk.

    `on_cpu` refuses what this computer's CPU could not train within limits.max_hours, which is
    where the emulator's boxes compute. `or_estimate` tells tokens from characters where a model
    that the catalogue knows cannot be had (no network): nothing is rented by such a plan. Raises
    ConfigError, PreflightError, NoOffer, MarketError."""
    vast, root = vast or open_market(), root or runs_folder()
    _finished(vast, root)
    parsed, now = load_job(job), time.time()
    asked = {"on_cpu": on_cpu, "or_estimate": or_estimate}
    made = preflight(lambda: planner.new_plan(parsed, root, now, **asked), vast, root)
    (root / made.run_id).rmdir()  # nothing is begun
    offers = search_offers(vast, made.needs)
    ranking = rank(offers, made.needs, made.workload, bad_machines(root, time.time()))
    if not ranking.accepted:
        raise no_offer_error(ranking, 0, made.needs)
    return Planned(made, ranking, vast.credit_usd())


def rent_and_train(
    job: Job | Planned,
    *,
    vast: Vast | None = None,
    root: Path | None = None,
    screen: Screen | None = None,
    began_unix_s: float | None = None,
    foreground: bool = False,
    detach: bool = False,
) -> Run:
    """The main job: rent, push, train, pull, verify, destroy and prove.

    The run is owned by a process of its own, which outlives this one; this call watches it
    (`attach`), or returns at once with `detach`. With `foreground` this process owns it: SIGINT
    asks `screen` what to do, SIGTERM and SIGHUP leave a box that trains to itself
    (limits.when_silent) and destroy one that does not.

    Returns with `run.adapter` at home and no box left; `run.adapter` is None where the run, or its
    box, was left to itself. Raises any MilkteaError, with the same guarantee about the box, or
    BoxLeaked; Interrupted where the run was ended before its training, or where Ctrl-C was pressed
    and nobody could be asked. `began_unix_s` is when the user asked, for the record."""
    emulated = vast is None and not uses_vast_ai()
    vast, root, screen = vast or open_market(), root or runs_folder(), screen or Quiet()
    began = began_unix_s or time.time()
    if not isinstance(job, Planned):
        job = plan(job, vast=vast, root=root, on_cpu=emulated)
        screen.plan(job.plan, job.ranking, job.credit_usd)
    if job.plan.estimated:
        raise PreflightError(
            "this plan's tokens are an estimate: its rows were not checked with the tokenizer",
            hint="`milktea plan JOB` where the model's tokenizer can be had",
        )
    with Journal(root / job.plan.run_id) as held:
        line = held.append("planned", began=round(began, 3), **job.plan.to_line())
        if foreground:
            screen.line(line)
            supervisor.supervise(Session(held, job.plan, vast, screen), job.ranking)
            return Run(held.folder)
    supervisor.start(held.folder, vast, job.ranking)
    run = Run(held.folder)
    return run if detach else attach(run, screen=screen)


def compare(named: Sequence[Run | str], *, root: Path | None = None) -> Comparison:
    """Runs side by side: the settings in which they differ, and what each came to. Reads only;
    raises JournalError for what is no run."""
    return comparing.compare([r if isinstance(r, Run) else find_run(r, root) for r in named])


def resume(
    run: Run | str,
    *,
    vast: Vast | None = None,
    root: Path | None = None,
    screen: Screen | None = None,
    foreground: bool = False,
    detach: bool = False,
    max_usd: float | None = None,
    max_hours: float | None = None,
) -> Run:
    """Go on with a run whose owner died, that was interrupted, or whose box was taken away or left
    to itself; as `rent_and_train`. A run that has an owner is watched (`attach`). `max_usd` and
    `max_hours` are of the whole run and take the place of the job's; a box that it has keeps the
    deadline that it was given. Raises JournalError where it is done or never began, PreflightError
    for limits of a run that has an owner."""
    vast, root, screen = vast or open_market(), root or runs_folder(), screen or Quiet()
    _finished(vast, root, screen)
    run = run if isinstance(run, Run) else find_run(run, root)
    if run.is_owned:
        if max_usd is not None or max_hours is not None:
            raise PreflightError(
                f"{run.id} is owned by a process, which keeps the limits that it began with",
                money="nothing was changed",
                hint=f"`milktea attach {run.id}` watches it",
            )
        return run if detach else attach(run, screen=screen)
    place.validate_same(run.id, place.remembered(run.journal), vast)
    with Journal(run.folder) as held:
        if not held.lines:
            raise JournalError(
                f"{run.id} has an empty journal", hint="start it anew with rent-and-train"
            )
        if not Plan.from_line(held.lines[0]).trains:
            raise JournalError(
                f"{run.id} was rented to talk, and nobody talks any more",
                hint=f"`milktea destroy {run.id}` if its box still stands",
            )
        if (pulled := held.last("pulled")) is not None:
            raise JournalError(
                f"{run.id} is done: its adapter is {pulled['adapter']}",
                hint="`milktea reap` if its box still stands",
            )
        wishes.forget(run.folder)  # of an owner that is dead
        if max_usd is not None or max_hours is not None:
            made = plan_of(held.lines)
            max_s = made.max_s if max_hours is None else 3600 * max_hours
            held.append("limits", max_usd=max_usd or made.max_usd, max_s=max_s)
        if foreground:
            supervisor.supervise(Session(held, plan_of(held.lines), vast, screen))
            return run
    supervisor.start(run.folder, vast)
    return run if detach else attach(run, screen=screen)


def attach(run: Run | str, *, root: Path | None = None, screen: Screen | None = None) -> Run:
    """Watch a run that another process owns, from its beginning to its end; acts on nothing.

    Ctrl-C lets `screen` choose: to leave, after which this returns, or an end of the run. Returns
    and raises as `rent_and_train`, for a run that has ended as well; JournalError where its owner
    was killed."""
    run, screen = run if isinstance(run, Run) else find_run(run, root), screen or Quiet()
    with watching(run.folder), _ctrl_c() as pressed:
        tail = Tail(run.folder, screen)
        while True:
            over = not run.is_owned  # looked at first: what it told last is told below
            tail.show_new()
            if over:
                break
            if pressed.is_set():
                pressed.clear()
                if _chosen(run, screen) == wishes.LEAVE:
                    return run
            time.sleep(WATCH_EVERY_S)
    raise_if_failed(run.folder)
    return run


def _chosen(run: Run, screen: Screen) -> str:
    """What the user wishes of a run that another process owns; its owner is told. Raises
    Interrupted where nobody can be asked."""
    wish = screen.choose([(c.wish, c.text) for c in run.choices()])
    if wish is None:
        raise Interrupted(
            f"the run goes on without this terminal: `milktea attach {run.id}` watches it, "
            f"`milktea stop {run.id}` ends it"
        )
    if wish in (wishes.FETCH, wishes.KEEP, wishes.DESTROY):
        holds = wishes.send(run.folder, wish)
        screen.waiting(f"the run's owner is told: {holds}")
    return wish


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Set by SIGINT; nothing is cut in half by it. In another thread than the main one, where no
    signal arrives, nothing changes."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def stop(
    run: Run | str,
    wish: Literal["fetch", "keep", "destroy"] = "fetch",
    *,
    vast: Vast | None = None,
    root: Path | None = None,
    screen: Screen | None = None,
) -> Run:
    """End a run: `fetch` brings the newest checkpoint home first (a result that is on its way comes
    home whole), `destroy` nothing. Returns once no box of it is left. `keep` does as `fetch`, and
    then stops the box: its disk stays for a price a day (`run.kept`), and `resume` starts it.

    Where somebody wished another end before, that one holds. Raises as `rent_and_train`;
    JournalError for a run that has no box and no owner, PreflightError where `keep` is not worth
    it, or the box is stopped already."""
    run = run if isinstance(run, Run) else find_run(run, root)
    before = len(run.journal)
    if run.kept and wish == "destroy" and not run.is_owned:
        destroy(run, vast=vast, root=root, screen=screen)
        return run
    _validate_end(run, wish)
    if not run.is_owned:
        if not may_have_box(run.journal):
            raise JournalError(f"{run.id} has no box, and nothing acts on it", hint="")
        vast = vast or open_market()
        _finished(vast, run.folder.parent, screen)
        place.validate_same(run.id, place.remembered(run.journal), vast)
        wishes.forget(run.folder)  # of an owner that is dead
        wishes.send(run.folder, wish)
        supervisor.start(run.folder, vast)
    else:
        wishes.send(run.folder, wish)
    try:
        return attach(run, screen=screen)
    except (Failed, Interrupted):
        if any(line.kind == "interrupted" for line in run.journal[before:]):
            return run  # as it was wished
        raise


def _validate_end(run: Run, wish: str) -> None:
    """Raises PreflightError for an end that this run cannot have now; nothing is changed then."""
    if run.kept and not run.is_owned:
        raise PreflightError(
            f"the box of {run.id} is {run.kept}",
            money="nothing was changed",
            hint=f"`milktea resume {run.id}` starts it, `milktea stop {run.id} --destroy` ends it",
        )
    if wish == wishes.KEEP and wishes.KEEP not in [c.wish for c in run.choices()]:
        raise PreflightError(
            f"the box of {run.id} is not worth keeping: {wishes.why_not_kept(run.journal)}",
            money="nothing was changed",
            hint=f"`milktea stop {run.id} --fetch` brings the newest checkpoint home",
        )


def destroy(
    run: Run | str,
    *,
    vast: Vast | None = None,
    root: Path | None = None,
    screen: Screen | None = None,
) -> bool:
    """Destroy the box of one run now, and prove it absent; a run that has an owner is ended by it.
    Returns whether it may have had one. Raises BoxLeaked without that proof."""
    vast, root = vast or open_market(), root or runs_folder()
    _finished(vast, root, screen)
    run = run if isinstance(run, Run) else find_run(run, root)
    if run.is_owned:
        had = may_have_box(run.journal)
        stop(run, "destroy", vast=vast, screen=screen)
        return had
    with Journal(run.folder) as held:
        had = may_have_box(held.lines)
        if had:
            made = plan_of(held.lines)
            rental.destroy(Session(held, made, vast, screen or Quiet()), why="asked for")
        return had


def reap(
    *,
    foreign: bool = False,
    vast: Vast | None = None,
    root: Path | None = None,
    screen: Screen | None = None,
) -> Reaped:
    """Destroy every box of the runs in `root` that no live client looks after, and prove it; with
    `foreign`, also those labelled like a run of ours that has no folder there. What could not be
    proven absent is in `leaked`; nothing is raised for it."""
    vast, root = vast or open_market(), root or runs_folder()
    return reaping.reap(root, vast, screen or Quiet(), foreign=foreign)


def finish_destroys(
    *, vast: Vast | None = None, root: Path | None = None, screen: Screen | None = None
) -> Reaped:
    """Finish every destroy that an earlier client began and could not prove; what still could not
    be proven is in `leaked`."""
    vast, root = vast or open_market(), root or runs_folder()
    return reaping.finish_destroys(root, vast, screen or Quiet())


def _finished(vast: Vast, root: Path, screen: Screen | None = None) -> None:
    """`finish_destroys`; raises BoxLeaked for what is left."""
    reaped = finish_destroys(vast=vast, root=root, screen=screen)
    if reaped.leaked:
        raise reaped.leaked[0]


# -- talk to a result on a rented box --------------------------------------------------------------


def plan_chat(
    result: Found | str | Path,
    *,
    minutes: float = 60,
    max_usd: float = 1.0,
    vast: Vast | None = None,
    root: Path | None = None,
) -> Planned:
    """A box to talk to the result of a run on, for `minutes` once it is loaded and for at most
    `max_usd`, and what the market offers for it now. Rents nothing. Raises PreflightError for what
    is no run's archive, NoOffer, MarketError."""
    vast, root = vast or open_market(), root or runs_folder()
    _finished(vast, root)
    found = result if isinstance(result, Found) else find_result(result, root=root)
    if not (root / found.name / journal.FILE).is_file() or not found.adapter.is_file():
        raise PreflightError(
            f"{found.name} is not the archive of a run here: image and base are not known",
            hint="talk to it on this machine: `milktea chat` without --remote",
        )
    run = Plan.from_line(journal.read(root / found.name)[0])
    made = talk_plan(run, found.adapter, time.time(), minutes, max_usd)
    offers = search_offers(vast, made.needs)
    ranking = rank(offers, made.needs, made.workload, bad_machines(root, time.time()))
    if not ranking.accepted:
        raise no_offer_error(ranking, 0, made.needs)
    return Planned(made, ranking, vast.credit_usd())


def rent_and_talk(
    planned: Planned,
    *,
    vast: Vast | None = None,
    root: Path | None = None,
    screen: Screen | None = None,
    terminal: Sequence[str] | None = None,
) -> Run:
    """Rent the box of `plan_chat`, serve the result there and keep it until its end, SIGINT, or
    `stop`: `screen.talking` hears the page's address, at a port of this machine's loopback. With
    `terminal` (options of trainer/serve/chat.py) the conversation is in this terminal instead.

    This process owns the run, and its end is the box's: by its own hand, or by the box's watchdog
    within ten minutes. Rows of votes come home beside the result. Raises as `rent_and_train`."""
    vast, root, screen = vast or open_market(), root or runs_folder(), screen or Quiet()
    made = planned.plan
    if made.trains:
        raise PreflightError("this plan trains", hint="plan_chat() makes one that talks")
    votes = Path(made.out) / str(made.wire_job["run_id"])
    use = rent_and_chat.in_browser(votes)
    if terminal is not None:
        use = rent_and_chat.in_terminal(terminal)
    with Journal(root / made.run_id) as held:
        screen.line(held.append("planned", began=round(time.time(), 3), **made.to_line()))
        session = Session(held, made, vast, screen)
        supervisor.supervise(
            session, talk=lambda s: rent_and_chat.rent_and_chat(s, use, planned.ranking)
        )
        return Run(held.folder)
