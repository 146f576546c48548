"""What a client needs to act on one run: its journal, plan, client of vast.ai, clock and screen;
and the run's money and deadlines, computed from the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from ops.box.connection import Box
from ops.errors import MilkteaError, OverBudget, disk_error
from ops.job.plan import Plan
from ops.market import cost
from ops.market.client import Vast
from ops.market.cost import CostEstimate
from ops.market.models import Instance, Offer
from ops.market.ranking import Ranking, bid_of
from ops.run import place
from ops.run.journal import Journal, Line
from ops.run.meter import (
    APPEARS_S,
    age_s,
    burn_usd_per_hour,
    ends_itself_at,
    life_s,
    may_appear,
    may_have_box,
    price_of,
    runs_since,
    spent_usd,
)
from trainer.wire.events import Event, Sample, Score

P = ParamSpec("P")
R = TypeVar("R")
MORE = "`milktea resume RUN --max-usd N` or `--max-hours N` goes on with a higher limit"
MARGIN_S = 60.0  # before the box's own deadline, to fetch the newest checkpoint


class Detached(BaseException):
    """This client leaves the box: it trains on, and its own watchdog ends it."""


class Kept(Detached):
    """The box is stopped, its disk is kept."""


class Interrupted(BaseException):
    """The user pressed Ctrl-C, or this process was asked to end."""


class Shield:
    """Defers interrupts. Only code inside `with shield.lowered()` may be interrupted; inside that,
    `with shield` protects again what must not stop half way: a journal line, a create, a destroy.

    The signal handler calls `interrupt`. It raises Interrupted at once where that is allowed, and
    otherwise as soon as it is: when the next `lowered` begins, or the outermost `with shield` in
    one ends."""

    def __init__(self) -> None:
        self._depth = 1
        self._pending = False

    def interrupt(self) -> None:
        if self._depth:
            self._pending = True
        else:
            raise Interrupted

    def forget(self) -> None:
        """Drop a deferred interrupt."""
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
    """Shows a run to people. Every method returns at once and never raises."""

    samples: list[Sample]  # the model's answers before and after the training
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
    def talking(self, page: str, ends_at_unix_s: float) -> None:
        """People can talk to the result at `page`, which holds the token; told again and again."""

    def destroying(self, why: str) -> None: ...
    def meter(self, spent_usd: float, max_usd: float) -> None:
        """What the run has cost so far, about once a second; from any thread."""

    def choose(self, choices: Sequence[tuple[str, str]]) -> str | None:
        """Ask the user after Ctrl-C. `choices` are (key, text); the first keeps what is paid for.
        Returns the chosen key, "" where nothing was chosen in time, None where there is no
        terminal."""


class Session:
    """One client's work on one run. It holds no connection to the box."""

    def __init__(self, journal: Journal, plan: Plan, vast: Vast, screen: Screen) -> None:
        self.journal, self.plan, self.vast, self.clock, self.screen = (
            journal,
            plan,
            vast,
            vast.clock,
            screen,
        )
        self.shield = Shield()
        self.wish = ""  # one of ops.run.wishes, for the next stage that may be interrupted
        self.created: int | None = None  # instance id, known before the journal has it
        self._place_validated = False
        self.moved_t = self.clock.steady()  # when this run last made progress, by clock.steady
        self._deadline: tuple[int, float] | None = None  # (the line that set it, steady seconds)
        self.has_own_deadline = False  # what is done now ends by itself; the keeper waits for it
        self.key_path = journal.folder / "id_ed25519"  # each run has its own key

    @property
    def run_id(self) -> str:
        return self.plan.run_id

    def validate_place(self) -> None:
        """Compare where the run was rented with where this client is, once. Raises Elsewhere where
        they differ, MarketError where vast.ai does not say whose account this is."""
        if not self._place_validated:
            place.validate_same(self.run_id, place.remembered(self.journal.lines), self.vast)
            self._place_validated = True

    def remember_place(self) -> None:
        """Write where this run is rented into the journal, before the first create. A run of
        milktea 0.1 that rented already has no such line and gets none."""
        if self.journal.last(place.KIND, "renting") is None:
            this = place.here(self.vast)
            self.note(place.KIND, url=this.url, account=this.account)
        self.validate_place()

    def make_key(self) -> str:
        """Make the run's SSH key unless it exists, and return its public line."""
        return Box.make_key(self.key_path)

    @property
    def known_hosts(self) -> Path:
        """One file for each instance: another machine has another host key, the same one may not
        change it."""
        return self.journal.folder / f"known_hosts.{self.instance_id()}"

    def note(self, kind: str, **data: Any) -> Line:
        """Append a line to the journal and show it. Raises OSError where the disk takes none;
        except for a "failed" line, because then the error it records must reach the user."""
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
        """Show a transfer and count it as progress."""
        self.moved_t = self.clock.steady()
        self.screen.moving(what, done_bytes, total_bytes)

    @contextmanager
    def own_deadline(self) -> Iterator[None]:
        """Within it no silence is a stall: every part of what is done has a deadline of its own."""
        before = self.has_own_deadline
        self.has_own_deadline = True
        try:
            yield
        finally:
            self.moved_t, self.has_own_deadline = self.clock.steady(), before

    # -- what the journal says ---------------------------------------------------------------------

    def may_have_box(self) -> bool:
        return may_have_box(self.journal.lines)

    def instance_id(self) -> int | None:
        line = self.journal.last("rented", "destroyed", "absent")
        return line["instance_id"] if line and line.kind == "rented" else None

    def offer(self) -> Offer:
        """The offer that was rented last."""
        line = self.journal.last("renting")
        assert line is not None, "nothing was rented yet"
        return Offer(**line["offer"])

    def bid(self, offer: Offer) -> float | None:
        """$/h to bid for it; None on demand."""
        return bid_of(offer, self.plan.needs)

    def predicted(self, offer: Offer) -> CostEstimate:
        return cost.predict(offer, self.plan.workload, self.bid(offer))

    def usd_per_hour(self) -> float:
        """What the machine costs now, GPUs and disk."""
        if (risen := price_of(self.journal.lines)) is not None:
            return float(risen["usd_per_hour"])
        return burn_usd_per_hour(self.plan, self.offer(), self.bid(self.offer()))

    def spent_usd(self) -> float:
        """Dollars of all machines of this run so far, by our own meter (vast.ai's bill is
        later)."""
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
        """Seconds that a new machine may live by max_usd and max_hours; the box's watchdog gets
        this number. Raises OverBudget when they are too few to start."""
        predicted, bid = self.predicted(offer), self.bid(offer)
        left_s = life_s(self.plan, offer, bid, predicted, self.spent_usd(), self.age_s())
        if left_s < 2 * MARGIN_S:
            raise OverBudget(
                f"{max(left_s, 0):.0f} s are left by limits.max_usd and limits.max_hours: "
                "too few for another machine",
                hint=MORE.replace("RUN", self.run_id),
            )
        return left_s

    def age_s(self) -> float:
        """Seconds of this run that count for limits.max_hours."""
        return age_s(self.journal.lines, self.clock.now())

    def left_s(self) -> float:
        """Seconds until the box destroys itself, by clock.steady."""
        line = self.journal.last("price", "starting", "renting")
        line = runs_since(self.journal.lines) if line and line.kind == "renting" else line
        assert line is not None, "nothing was rented yet"
        if self._deadline is None or self._deadline[0] != line.n:
            left_s = self.dies_at() - self.clock.now()
            self._deadline = (line.n, self.clock.steady() + left_s)
        return self._deadline[1] - self.clock.steady()

    def shorten(self, share: float) -> None:
        """Multiply the time that is left by `share`: the price rose."""
        left_s = self.left_s()
        assert self._deadline is not None
        self._deadline = (self._deadline[0], self.clock.steady() + max(0.0, left_s) * share)

    def reprice(self, usd_per_hour: float, unread_s: float) -> None:
        """The machine costs so much from some moment of the last `unread_s` on, by the journal
        too: the same dollars end sooner. From any thread."""
        before = self.usd_per_hour()
        unpaid_s = unread_s * (usd_per_hour - before) / usd_per_hour
        left_s = max(0.0, self.left_s() * before / usd_per_hour - unpaid_s)
        self.shorten(left_s / max(1.0, self.left_s()))  # whatever the disk does with the line
        ends_at = round(self.clock.now() + left_s, 3)
        self.journal.append("price", usd_per_hour=usd_per_hour, ends_at=ends_at)

    def unread_s(self) -> float:
        """Seconds for which nobody acted on this run before its present owner."""
        owned = self.journal.last("owned")
        lines = self.journal.lines
        return lines[owned.n].t - lines[owned.n - 1].t if owned and owned.n else 0.0

    def dies_at(self) -> float:
        """Unix seconds at which the box destroys itself, to show and to record."""
        ends_at = ends_itself_at(self.journal.lines)
        assert ends_at is not None, "nothing was rented yet"
        return ends_at


def metered(act: Callable[Concatenate[Session, P], R]) -> Callable[Concatenate[Session, P], R]:
    """Decorates `act`: a MilkteaError that leaves it says what the run has spent, unless its raise
    said more of the money. An OSError of this machine's disk leaves it as a DiskError."""

    @wraps(act)
    def wrapper(session: Session, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return act(session, *args, **kwargs)
        except (MilkteaError, OSError) as e:
            said = disk_error(e) if isinstance(e, OSError) else e
            if said is None:
                raise
            with suppress(ArithmeticError, KeyError, TypeError):  # never hides the first error
                said.fill_in_money(session.money())
            if said is e:
                raise
            raise said from e

    return wrapper
