"""One acting client on one run: its journal, its provider, its clock and its screen; and what the
journal says of the money."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from ops.box.connection import Box
from ops.box.scripts import LEASE_S, WATCH_S
from ops.errors import MilkteaError, OverBudget
from ops.job.plan import Plan
from ops.market import cost
from ops.market.client import Vast
from ops.market.cost import Cost
from ops.market.models import Instance, Offer
from ops.market.ranking import Priced, Ranking, bid_of
from ops.run import place
from ops.run.journal import Journal, Line, last
from trainer.wire.events import Event, Sample, Score

P = ParamSpec("P")
R = TypeVar("R")
APPEARS_S = 600.0  # after an unclear create, in which its box may still come to be listed
MARGIN_S = 60.0  # before the box's own deadline, in which the laptop fetches what there is


class Detached(BaseException):
    """The box is left to itself: it goes on, and ends by itself."""


class Interrupted(BaseException):
    """The user pressed Ctrl-C, or this process was asked to end."""


class Shield:
    """Keeps an interrupt out of everything but the stages that may be cut in half, and within
    those out of what must not be: a journal line, a create under way, a destroy being proven.

    `interrupt` is the signal handler's half: it raises Interrupted at once inside `lowered`, and
    else when the next one begins, or when the outermost `with shield` inside one ends."""

    def __init__(self) -> None:
        self._depth = 1
        self._pending = False

    def interrupt(self) -> None:
        if self._depth:
            self._pending = True
        else:
            raise Interrupted

    def forget(self) -> None:
        """What was pressed meanwhile is answered."""
        self._pending = False

    @contextmanager
    def lowered(self) -> Iterator[None]:
        """Within it, an interrupt raises Interrupted."""
        depth = self._depth
        try:
            self._depth = 0
            if self._pending:
                self._pending = False
                raise Interrupted
            yield
        finally:
            self._depth = depth

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, kind: object, *rest: object) -> None:
        self._depth -= 1
        if self._pending and not self._depth:
            self._pending = False
            if kind is None:
                raise Interrupted


class Screen(Protocol):
    """Where a run is told to people. Every method returns at once and never raises."""

    samples: list[Sample]  # the trainer's answers before and after
    score: Score | None  # on the held-out rows

    def line(self, line: Line) -> None: ...
    def plan(self, plan: Plan, ranking: Ranking, credit_usd: float) -> None: ...
    def booting(self, instance: Instance, waited_s: float) -> None: ...
    def connecting(self, message: str) -> None: ...
    def moving(self, what: str, done_bytes: int, total_bytes: int) -> None: ...
    def event(
        self, event: Event, spent_usd: float, max_usd: float, dies_at_unix_s: float
    ) -> None: ...
    def waiting(self, message: str) -> None: ...
    def destroying(self, why: str) -> None: ...
    def meter(self, spent_usd: float, max_usd: float) -> None:
        """What the run has cost so far, about once a second; from any thread."""

    def choose(self, choices: Sequence[tuple[str, str]]) -> str | None:
        """The user's choice after Ctrl-C, by its key; the first keeps what is paid for. "" where
        nothing was chosen in time, None where nobody can be asked."""


class Session:
    def __init__(self, journal: Journal, plan: Plan, vast: Vast, screen: Screen) -> None:
        self.journal, self.plan, self.vast, self.clock, self.screen = (
            journal,
            plan,
            vast,
            vast.clock,
            screen,
        )
        self.shield = Shield()
        self.wish = ""  # of ops.run.wishes, to be obeyed where the story stands
        self.created: int | None = None  # rented by this client, in the journal or not
        self._at_its_place = False
        self.moved_t = self.clock.steady()  # when anything of this run last moved
        self._deadline: tuple[int, float] | None = None  # the line that set it, steady seconds
        self.key_path = journal.folder / "id_ed25519"  # of this run alone

    @property
    def run_id(self) -> str:
        return self.plan.run_id

    def validate_place(self) -> None:
        """Once for a client. Raises Elsewhere where the run was rented at another place,
        MarketError where vast.ai does not say whose account this is."""
        if not self._at_its_place:
            place.validate_same(self.run_id, place.remembered(self.journal.lines), self.vast)
            self._at_its_place = True

    def remember_place(self) -> None:
        """Before the first create: where this run is rented. A run of milktea 0.1 that rented
        already has no such line and gets none."""
        if self.journal.last(place.KIND, "renting") is None:
            this = place.here(self.vast)
            self.note(place.KIND, url=this.url, account=this.account)
        self.validate_place()

    def make_key(self) -> str:
        """Write the run's key unless it is there, and return its public line."""
        return Box.make_key(self.key_path)

    @property
    def known_hosts(self) -> Path:
        """One per machine: another machine may show another key, the same one may not."""
        return self.journal.folder / f"known_hosts.{self.instance_id()}"

    def note(self, kind: str, **data: Any) -> Line:
        """One journal line, told on the screen. Raises OSError where the disk takes none, but for
        the record of how a run failed: its error is what must reach the user."""
        with self.shield:
            try:
                line = self.journal.append(kind, **data)
            except OSError:
                if kind != "failed":
                    raise
                return Line(len(self.journal.lines), self.clock.now(), kind, data)
            self.moved_t = self.clock.steady()
            self.screen.line(line)
        return line

    def moving(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Bytes moved, as the screen and the keeper see them."""
        self.moved_t = self.clock.steady()
        self.screen.moving(what, done_bytes, total_bytes)

    # -- what the journal says ---------------------------------------------------------------------

    def may_have_box(self) -> bool:
        return may_have_box(self.journal.lines)

    def instance_id(self) -> int | None:
        line = self.journal.last("rented", "destroyed", "absent")
        return line["instance_id"] if line and line.kind == "rented" else None

    def offer(self) -> Offer:
        """The offer taken last."""
        line = self.journal.last("renting")
        assert line is not None, "nothing was rented yet"
        return Offer(**line["offer"])

    def bid(self, offer: Offer) -> float | None:
        """$/h to bid, None on demand."""
        return bid_of(offer, self.plan.needs)

    def predicted(self, offer: Offer) -> Cost:
        return cost.predict(offer, self.plan.workload, self.bid(offer))

    def usd_per_hour(self) -> float:
        return burn_usd_per_hour(self.plan, self.offer(), self.bid(self.offer()))

    def spent_usd(self) -> float:
        """All machines of this run so far, by our own meter (vast.ai's bill comes later)."""
        return spent_usd(self.journal.lines, self.clock.now())

    def money(self) -> str:
        spent = f"spent {self.spent_usd():.4f} $ of {self.plan.max_usd:.2f} $"
        if may_appear(self.journal.lines, self.clock.now()) and not self.may_have_box():
            spent += (
                "; a create was answered unclearly, and its box may appear for "
                f"{APPEARS_S / 60:.0f} minutes yet: the next command looks for it"
            )
        return spent

    def allowed_s(self, offer: Offer) -> float:
        """Seconds a new machine may live, by money and by hours; the box's watchdog gets this
        number. Raises OverBudget when it is not worth starting."""
        age_s = self.clock.now() - self.journal.lines[0].t
        predicted, bid = self.predicted(offer), self.bid(offer)
        left_s = life_s(self.plan, offer, bid, predicted, self.spent_usd(), age_s)
        if left_s < 2 * MARGIN_S:
            raise OverBudget(
                f"{max(left_s, 0):.0f} s are left by limits.max_usd and limits.max_hours: "
                "too few for another machine",
                hint="raise limits.max_usd or limits.max_hours in the job file and run it again",
            )
        return left_s

    def left_s(self) -> float:
        """Seconds until the box ends itself, by a clock that no date moves."""
        line = runs_since(self.journal.lines)
        assert line is not None, "nothing was rented yet"
        if self._deadline is None or self._deadline[0] != line.n:
            left_s = self.dies_at() - self.clock.now()
            self._deadline = (line.n, self.clock.steady() + left_s)
        return self._deadline[1] - self.clock.steady()

    def shorten(self, share: float) -> None:
        """The same dollars last only for `share` of the time that is left."""
        left_s = self.left_s()
        assert self._deadline is not None
        self._deadline = (self._deadline[0], self.clock.steady() + max(0.0, left_s) * share)

    def dies_at(self) -> float:
        """Unix seconds at which the box ends itself, for people and for the journal."""
        ends_at = ends_itself_at(self.journal.lines)
        assert ends_at is not None, "nothing was rented yet"
        return ends_at


def metered(act: Callable[Concatenate[Session, P], R]) -> Callable[Concatenate[Session, P], R]:
    """`act`; an error that leaves it says what the run has spent, unless its raise knew more of the
    money."""

    @wraps(act)
    def wrapper(session: Session, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return act(session, *args, **kwargs)
        except MilkteaError as e:
            with suppress(ArithmeticError, KeyError, TypeError):  # never hides the first error
                e.fill_in_money(session.money())
            raise

    return wrapper


def burn_usd_per_hour(plan: Plan, offer: Offer, bid: float | None) -> float:
    """GPUs and disk of a machine that runs."""
    return (bid or offer.usd_per_hour) + cost.disk_usd_per_hour(offer, plan.needs.disk_gib)


def life_s(
    plan: Plan, offer: Offer, bid: float | None, predicted: Cost, spent_usd: float, age_s: float
) -> float:
    """Seconds that a machine rented now may live, in a run of that age which has spent so much."""
    boot_h = boot_timeout_s(predicted) / 3600
    before_it_runs = (
        predicted.inet_down_usd
        + predicted.inet_up_usd
        + cost.disk_usd_per_hour(offer, plan.needs.disk_gib) * boot_h
    )
    left_usd = plan.max_usd - spent_usd - before_it_runs
    paid_s = left_usd / burn_usd_per_hour(plan, offer, bid) * 3600
    return min(paid_s, plan.max_s - age_s) - WATCH_S


@dataclass(frozen=True)
class Silence:
    """What it costs at most when no client is heard after the launch, and how many seconds after
    the rent the result is lost then."""

    usd: float
    lost_after_s: float


def dearest_silence(plan: Plan, priced: Priced) -> Silence:
    """Of a run that begins now on this offer."""
    bid, c = bid_of(priced.offer, plan.needs), priced.cost
    burn = burn_usd_per_hour(plan, priced.offer, bid)
    before_s = c.boot_s + c.pull_s
    if plan.when_silent == "destroy":
        return Silence(burn * (LEASE_S + WATCH_S) / 3600, before_s + LEASE_S)
    lives_s = life_s(plan, priced.offer, bid, c, 0.0, 0.0)
    ended_s = c.transfer_s + c.start_s + c.train_s
    lost_s = lives_s if plan.hold_s is None else min(lives_s, ended_s + plan.hold_s)
    most = burn * (lives_s + WATCH_S) / 3600 + c.inet_down_usd + c.inet_up_usd
    return Silence(min(plan.max_usd, most), before_s + lost_s)


def boot_timeout_s(predicted: Cost) -> float:
    """Patience for a boot: ten minutes, and three times what the image should take."""
    return 600.0 + 3.0 * predicted.pull_s


def may_have_box(lines: list[Line]) -> bool:
    """Whether something with this run's label may exist: rented or asked for, and not proven absent
    since."""
    line = last(lines, "renting", "rented", "absent", "destroyed")
    return line is not None and line.kind in ("renting", "rented")


def runs_since(lines: list[Line]) -> Line | None:
    """The line from which the newest machine's life is counted: its first boot, or its rent."""
    rent = last(lines, "renting")
    if rent is None:
        return None
    return next((line for line in lines[rent.n :] if line.kind == "booted"), rent)


def ends_itself_at(lines: list[Line]) -> float | None:
    """Unix seconds at which the newest machine destroys itself at the latest; None before the first
    rent."""
    since, rent = runs_since(lines), last(lines, "renting")
    return None if since is None or rent is None else since.t + float(rent["max_s"])


def may_appear(lines: list[Line], now: float) -> bool:
    """Whether a create without a clear answer is so fresh that its box may still come to be
    listed: absence is provisional."""
    return any(
        line.kind == "absent" and line.get("provisional") and now - line.t < APPEARS_S
        for line in reversed(lines)
    )


def spent_usd(lines: list[Line], now: float) -> float:
    """Dollars of every machine in the journal up to `now`: GPU from running, disk from rent, bytes
    both ways."""
    total = 0.0
    offer: Offer | None = None
    rented_t = running_t = 0.0
    gb_in = gb_out = 0.0
    bid: float | None = None
    disk = 0.0

    def close(until: float) -> float:
        if offer is None or not rented_t:
            return 0.0
        paid = offer if bid is None else replace(offer, usd_per_hour=bid)
        running_s = max(0.0, until - running_t) if running_t else 0.0
        return cost.burn_usd(paid, running_s, max(0.0, until - rented_t), gb_in, gb_out, disk)

    for line in lines:
        if line.kind == "renting":
            offer, bid, disk = Offer(**line["offer"]), line["bid_usd_per_hour"], line["disk_gib"]
            rented_t = running_t = gb_out = 0.0
            gb_in = lines[0].get("workload", {}).get("image_bytes", 0.0) / 1e9  # pulled on our bill
        elif line.kind == "rented" and not rented_t:
            rented_t = line.t
        elif line.kind == "booted":
            running_t = running_t or line.t
        elif line.kind in ("pushed", "pulled", "checkpoint"):
            gb_in += line.get("bytes_in", 0) / 1e9
            gb_out += line.get("bytes_out", 0) / 1e9
        elif line.kind in ("destroyed", "absent"):
            total += close(line.t)
            offer, rented_t = None, 0.0
    return total + close(now)
