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
from ops.image import workflow as images
from ops.job import cards, config, planner
from ops.job.cards import KnownCard, KnownModel, Price
from ops.job.config import JobFile
from ops.job.plan import Plan
from ops.job.preflight import preflight
from ops.market.client import Provider, Vast, provider_from
from ops.market.models import Instance
from ops.market.ranking import Ranking, rank
from ops.run import explain, journal, rental, supervisor, wishes
from ops.run import prices as price_list
from ops.run import reap as reaping
from ops.run.attach import Tail, raise_if_failed, watching
from ops.run.choose import bad_machines, no_offer_error, search_offers
from ops.run.explain import Status, told_line
from ops.run.journal import Journal, Line
from ops.run.meter import dearest_silence, ends_itself_at, may_have_box
from ops.run.reap import Reaped
from ops.run.session import Interrupted, Screen, Session
from ops.use import begin, words
from ops.use import found as results
from ops.use import rows as data
from ops.use.found import Found
from ops.wait import RealClock
from trainer.data.files import Reading
from trainer.wire import events
from trainer.wire.events import Event, Sample, Score

__all__ = [
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
    "check_adapter",
    "combine_adapters",
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
    "prices",
    "reap",
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
FOLLOW_EVERY_S = 1.0
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


def project_folder() -> Path:
    """Where runs and the emulator lie: the nearest folder with `runs` or `.milktea` in it, from the
    working directory upwards and below the home or the root; else the working directory."""
    here = Path.cwd()
    ends = {Path.home(), Path(here.anchor), Path(tempfile.gettempdir()).resolve()}
    for folder in (here, *here.parents):
        if folder in ends:
            break
        if (folder / "runs").is_dir() or (folder / ".milktea").is_dir():
            return folder
    return here


def runs_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of runs: MILKTEA_RUNS, or `runs` in the project's folder."""
    return Path(environ.get("MILKTEA_RUNS") or project_folder() / "runs").resolve()


# -- what a run is ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A job whose data, model and needs were checked, and what the market offers for it now."""

    plan: Plan
    ranking: Ranking  # .accepted: at least one, the cheapest finished run first
    credit_usd: float


@dataclass(frozen=True)
class Cost:
    """Dollars of one run, all its machines."""

    spent_usd: float  # by our own meter
    billed_usd: float | None  # by vast.ai; None until it can be read for every machine
    predicted_usd: float | None  # for the machine taken last
    max_usd: float  # limits.max_usd


@dataclass(frozen=True)
class Run:
    """One run's folder. Everything is read anew from what lies there; nothing here acts."""

    folder: Path

    @property
    def id(self) -> str:
        """The run id, which is also the label of its boxes."""
        return self.folder.name

    @property
    def journal(self) -> list[Line]:
        """Every line, oldest first. Raises JournalError for a damaged or newer journal."""
        return journal.read(self.folder)

    @property
    def adapter(self) -> Path | None:
        """The verified adapter.zip at home, or None."""
        pulled = journal.last(self.journal, "pulled")
        return Path(pulled["adapter"]) if pulled else None

    @property
    def sha256(self) -> str | None:
        """Of the adapter."""
        pulled = journal.last(self.journal, "pulled")
        return str(pulled["sha256"]) if pulled else None

    @property
    def ends_itself_at(self) -> float | None:
        """Unix seconds at which the box that this run has now destroys itself; None without one."""
        lines = self.journal
        return ends_itself_at(lines) if may_have_box(lines) else None

    @property
    def is_owned(self) -> bool:
        """Whether a process acts on this run."""
        return journal.is_held(self.folder)

    @property
    def owner(self) -> str:
        """`live`: owned, and a terminal watches; `detached`: owned, nobody watches; `alone`: it has
        a box that no process owns; "" without a box and an owner."""
        if self.is_owned:
            return "live" if supervisor.is_watched(self.folder) else "detached"
        return "alone" if may_have_box(self.journal) else ""

    def choices(self) -> list[wishes.Choice]:
        """What can be wished of it now, with the price; the first keeps what is paid for."""
        lines = self.journal
        return wishes.choices(lines, Plan.from_line(lines[0]), time.time(), attached=True)

    def status(self) -> Status:
        """Stage, owner, box, dollars and newest checkpoint."""
        return explain.status(self.id, self.journal, time.time(), self.owner)

    def cost(self) -> Cost:
        """Our meter, vast.ai's bill and the prediction."""
        facts = self.cost_facts()
        bills = [bill["usd"] for bill in facts["bills"]]
        known = bool(bills) and None not in bills
        billed = round(sum(bills), 6) if known else None
        return Cost(facts["spent_usd"], billed, facts["predicted_usd"], facts["max_usd"])

    def cost_facts(self) -> dict[str, Any]:
        """`cost` with each bill's items, for JSON."""
        return explain.cost_facts(self.journal, time.time())

    def cost_lines(self) -> list[str]:
        """`cost` in words."""
        return explain.cost_lines(self.journal, time.time())

    def explain(self) -> list[str]:
        """Why this offer, why it stopped, where each cent went, and how long each phase took."""
        lines = self.journal
        first = next((e.t for e in self.events() if isinstance(e, events.Step)), None)
        took = ", ".join(f"{name} {s} s" for name, s in explain.phases(lines, first))
        told = explain.explain(lines, time.time())
        return [*told, f"from the command to the first step: {took}"]

    def events(self, *, follow: bool = False) -> Iterator[Event]:
        """What the trainer said on the machine taken last, as far as it is at home.

        With `follow`, goes on as more comes, until nobody owns this run and it has no box. A line
        that no trainer wrote is passed over."""
        offset = 0
        while True:
            ended = follow and not self.owner  # read before the events: none is lost
            path = self.folder / "events.jsonl"
            if path.exists():
                with path.open("rb") as file:
                    file.seek(offset)
                    texts, used = events.whole_lines(file.read())
                offset += used
                yield from events.readable(texts)[0]
            if ended or not follow:
                return
            time.sleep(FOLLOW_EVERY_S)


def runs(root: Path | None = None) -> list[Run]:
    """Every run in `root`, sorted by id: by the job's name, then by time."""
    return [Run(folder) for folder in journal.runs(root or runs_folder())]


def find_run(name: str, root: Path | None = None) -> Run:
    """The run of this id, or whose id alone begins with it; `last` is the one that began last.
    Raises JournalError where that is not one run."""
    root = root or runs_folder()
    found = runs(root)
    if name == "last":
        chosen = sorted(found, key=_began)[-1:]
    else:
        chosen = [r for r in found if r.id == name] or [r for r in found if r.id.startswith(name)]
    if len(chosen) != 1:
        raise JournalError(
            f"{name!r} names {len(chosen)} runs under {root}", hint="`milktea status` lists them"
        )
    return chosen[0]


def _began(run: Run) -> tuple[str, ...]:
    """A run id ends in date, time and four random digits."""
    return tuple(run.id.split("-")[-3:-1])


def find_result(name: str | Path, *, base: str | None = None, root: Path | None = None) -> Found:
    """The result of a run (as `find_run` names it), or in an adapter's folder or archive; `base` is
    the base model's folder or hub id, by default what run or adapter say. Raises PreflightError
    where there is none, JournalError."""
    root = root or runs_folder()
    path = Path(name).expanduser()
    is_run = len(path.parts) == 1 and (root / path).is_dir()
    if path.exists() and not is_run:
        return results.of_path(path, root, base)
    return results.of_run(find_run(str(name), root).folder, base)


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


def resume(
    run: Run | str,
    *,
    vast: Vast | None = None,
    root: Path | None = None,
    screen: Screen | None = None,
    foreground: bool = False,
    detach: bool = False,
) -> Run:
    """Go on with a run whose owner died, that was interrupted, or whose box was taken away or left
    to itself; as `rent_and_train`. A run that has an owner is watched (`attach`). Raises
    JournalError where it is done or never began."""
    vast, root, screen = vast or open_market(), root or runs_folder(), screen or Quiet()
    _finished(vast, root, screen)
    run = run if isinstance(run, Run) else find_run(run, root)
    if run.is_owned:
        return run if detach else attach(run, screen=screen)
    with Journal(run.folder) as held:
        if not held.lines:
            raise JournalError(
                f"{run.id} has an empty journal", hint="start it anew with rent-and-train"
            )
        if (pulled := held.last("pulled")) is not None:
            raise JournalError(
                f"{run.id} is done: its adapter is {pulled['adapter']}",
                hint="`milktea reap` if its box still stands",
            )
        wishes.forget(run.folder)  # of an owner that is dead
        if foreground:
            supervisor.supervise(Session(held, Plan.from_line(held.lines[0]), vast, screen))
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
    if wish in (wishes.FETCH, wishes.DESTROY):
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
    wish: Literal["fetch", "destroy"] = "fetch",
    *,
    vast: Vast | None = None,
    root: Path | None = None,
    screen: Screen | None = None,
) -> Run:
    """End a run: `fetch` brings the newest checkpoint home first (a result that is on its way comes
    home whole), `destroy` nothing. Returns once no box of it is left; where somebody wished
    another end before, that one holds. Raises as `rent_and_train`; JournalError for a run that has
    no box and no owner."""
    run = run if isinstance(run, Run) else find_run(run, root)
    before = len(run.journal)
    if not run.is_owned:
        if not may_have_box(run.journal):
            raise JournalError(f"{run.id} has no box, and nothing acts on it", hint="")
        vast = vast or open_market()
        _finished(vast, run.folder.parent, screen)
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
            made = Plan.from_line(held.lines[0])
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


# -- what one does with a result -------------------------------------------------------------------


def merge(
    result: Found | str | Path,
    *,
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
    to: Path | None = None,
    data: Path | None = None,
) -> dict[str, Any]:
    """Merge an adapter into its base, in the new folder `to` (merged-DTYPE beside the adapter).
    Returns the folder's name and its certificate, which is of the rows of `data` (the job's
    held-out ones) and of general texts. Raises PreflightError where it is refused."""
    return words.tell(words.merge(_result(result), dtype, to, data))


def evaluate(
    result: Found | str | Path,
    *,
    data: Path | None = None,
    against: Found | str | Path | None = None,
    rows: int = 200,
    new_tokens: int = 256,
    to: Path | None = None,
) -> dict[str, Any]:
    """Scores of a result and of its base (or of the result `against`) on the first `rows` rows of
    `data` (the job's held-out ones): "scores" by side and name, each with its value and 95 %
    interval, "difference", "examples"; also written to `to` (evaluation.json beside the adapter).
    Raises PreflightError where it is refused."""
    other = None if against is None else _result(against)
    return words.tell(words.evaluate(_result(result), data, other, rows, new_tokens, to))


def check_adapter(result: Found | str | Path) -> list[dict[str, Any]]:
    """For each engine its name, whether it loads the adapter, why (not), and the command. Raises
    PreflightError for what is no adapter."""
    verdicts: list[dict[str, Any]] = words.tell(words.check(_result(result)))["loads_in"]
    return verdicts


def export_adapter(
    result: Found | str | Path,
    target: Literal["vllm", "sglang", "llama.cpp", "ollama", "hf"],
    *,
    name: str = "tuned",
    gguf_type: Literal["f16", "q8_0"] = "f16",
    merged: bool = False,
    repo: str = "",
    public: bool = False,
    to: Path | None = None,
) -> dict[str, Any]:
    """The result as another program takes it, in the new folder `to` (for-TARGET beside the
    adapter): "folder", "commands" to type, "notes". `repo` uploads to the hub by the token in
    HF_TOKEN. Raises PreflightError where it is refused."""
    options = [f"--name={name}", f"--type={gguf_type}", f"--repo={repo}"]
    options += [f"--{word}" for word, on in (("merged", merged), ("public", public)) if on]
    return words.tell(words.export(_result(result), target, to, options))


def combine_adapters(
    weights: Mapping[str | Path, float], to: Path, *, rank: int | None = None
) -> dict[str, Any]:
    """The weighted sum of adapters (as `find_result` names them) of one base, in the new archive
    (.zip) or folder `to`; cut to `rank` where it is given. Returns "rank", "modules", "lost" (of
    each module, as a share) and "notes". Raises PreflightError where it is refused."""
    parts = [(find_result(named), weight) for named, weight in weights.items()]
    return words.tell(words.combine(parts, to, rank))


def _result(named: Found | str | Path) -> Found:
    return named if isinstance(named, Found) else find_result(named)
