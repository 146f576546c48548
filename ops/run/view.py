"""A run as its folder tells it: everything is read anew from what lies there, and nothing acts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.errors import JournalError, MilkteaError
from ops.run import explain, journal, people, supervisor, wishes
from ops.run.explain import Status
from ops.run.folders import runs_folder
from ops.run.journal import Line
from ops.run.kept import kept, words
from ops.run.meter import ends_itself_at, may_have_box, plan_of
from trainer.wire import events
from trainer.wire.events import Event
from trainer.wire.job import Job

FOLLOW_EVERY_S = 1.0


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
        """The run id, with which the label of its boxes begins."""
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
    def merged(self) -> tuple[Path | None, str]:
        """(the folder of the merged model that its box made, why there is none); (None, "") where
        none was asked for."""
        line = journal.last(self.journal, "merged")
        if line is None:
            return None, ""
        return (Path(line["folder"]), "") if line.get("folder") else (None, line["why_not"])

    @property
    def answers(self) -> bool:
        """Whether its result is a model to talk to: not one that scores, of the stage rm."""
        try:
            job = Job.model_validate_json((self.folder / "job.json").read_bytes())
        except (OSError, ValueError):  # none was sent yet, or one of milktea 0.1
            return False
        return job.stage != "rm"

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
    def kept(self) -> str:
        """The price and the date of its box, where that is stopped; "" without such a box."""
        line = kept(self.journal)
        return "" if line is None else words(line)

    @property
    def user(self) -> str:
        """Who rented it: a name as the label of its boxes has it."""
        return people.user_of(self.folder)

    @property
    def is_mine(self) -> bool:
        """Whether who asks is its `user`: MILKTEA_USER, or the login name."""
        return people.is_mine(self.folder)

    @property
    def is_owned(self) -> bool:
        """Whether a process acts on this run."""
        return journal.is_held(self.folder)

    @property
    def owner(self) -> str:
        """`live`: owned, and a terminal watches; `detached`: owned, nobody watches; `alone`: it has
        a box that no process owns; `kept`: that box is stopped; "" without a box and an owner."""
        if self.is_owned:
            return "live" if supervisor.is_watched(self.folder) else "detached"
        if self.kept:
            return "kept"
        return "alone" if may_have_box(self.journal) else ""

    def choices(self) -> list[wishes.Choice]:
        """What can be wished of it now, with the price; the first keeps what is paid for."""
        lines = self.journal
        return wishes.choices(lines, plan_of(lines), time.time(), attached=True)

    def status(self) -> Status:
        """Stage, owner, box, dollars and newest checkpoint."""
        return explain.status(self.id, self.journal, time.time(), self.owner, self.user)

    def cost(self) -> Cost:
        """Our meter, vast.ai's bill and the prediction."""
        facts = self.cost_facts()
        billed = explain.billed_usd(self.journal)
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
    """The run of this id, or whose id alone begins with it; `last` is the one that began last,
    among those of who asks where there is any. Raises JournalError where that is not one run."""
    root = root or runs_folder()
    found = runs(root)
    if name == "last":
        chosen = sorted(found, key=_mine_and_began)[-1:]
    else:
        chosen = [r for r in found if r.id == name] or [r for r in found if r.id.startswith(name)]
    if len(chosen) != 1:
        raise JournalError(
            f"{name!r} names {len(chosen)} runs under {root}", hint="`milktea status` lists them"
        )
    return chosen[0]


def find_trained(root: Path) -> Run:
    """The run that began last and trains: one that was rented to talk has no result of its own. A
    run of who asks comes before all others. Raises JournalError without one."""
    for run in sorted(runs(root), key=_mine_and_began, reverse=True):
        with suppress(MilkteaError):
            if (lines := run.journal) and lines[0].get("trains", True):
                return run
    raise JournalError(f"there is no run under {root}", hint="`milktea rent-and-train JOB`")


def _mine_and_began(run: Run) -> tuple[bool, list[str]]:
    """A run id ends in date, time and four random digits."""
    return run.is_mine, run.id.split("-")[-3:-1]
