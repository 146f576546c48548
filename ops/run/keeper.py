"""The keeper of one box: two threads beside the story that renew the box's lease and enforce
limits.max_usd, max_hours and stall_minutes, whatever the story is doing.

It has its own SSH connection and its own HTTP client, and waits for nobody. When a limit is reached
it destroys the box through REST, then ends the story's connection, so that the story's next command
raises that limit's error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ops.box import scripts
from ops.box.connection import Box
from ops.errors import BoxLeaked, JournalError, Lost, MilkteaError, OverBudget, Stalled
from ops.run.absence import until_absent
from ops.run.meter import box_age_s
from ops.run.session import MORE, Session
from ops.wait import ASLEEP_S

LOOK_S = 1.0  # between two looks at the limits; no call is made for them
RENEW_S = 60.0  # between two renewals of the lease
PRICE_S = 45.0  # between two readings of price and credit
ANSWER_S = 20.0  # for one renewal
STALL_GRACE_S = 90.0  # after limits.stall_minutes, for the story to end by itself
CREDIT_S = 1800.0  # warn when the credit lasts less than this


@contextmanager
def keeper_running(session: Session, box: Box) -> Iterator[None]:
    """Run a keeper while the block runs."""
    keeper = Keeper(session, box)
    keeper.start()
    try:
        yield
    finally:
        keeper.stop()


class Keeper:
    """Two threads: one looks at the limits and makes no call before one is reached; the other
    renews the lease and reads the price."""

    def __init__(self, session: Session, box: Box) -> None:
        self._session, self._story = session, box
        self._box = box.twin()
        self._vast = session.vast.twin()
        self._instance_id = session.instance_id()
        self._stopped = threading.Event()
        self._credit_usd = float("inf")
        self._usd_per_hour = session.usd_per_hour()
        self._threads = [
            threading.Thread(target=self._every, args=(LOOK_S, self._look), daemon=True),
            threading.Thread(target=self._every, args=(RENEW_S, self._renew), daemon=True),
        ]
        self._looked = self._now()
        self._priced = self._looked - session.unread_s()
        self._asked: set[int] = set()  # price increases that were shown
        self._max_age: int | None = None  # that the box's watchdog is to be told
        begun = session.journal.last("starting", "renting")
        if begun is not None and begun.kind == "starting":
            self._max_age = self._age_at_end()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop both threads after what they are doing."""
        self._stopped.set()
        self._box.end(Lost("the keeper has ended"))

    def _every(self, seconds: float, act: Callable[[], None]) -> None:
        while not self._stopped.wait(seconds):
            with suppress(Exception):  # the next round tries again
                act()

    def _now(self) -> float:
        return self._session.clock.steady()

    # -- limits ------------------------------------------------------------------------------------

    def _look(self) -> None:
        asleep_s = self._now() - self._looked
        self._looked += asleep_s
        if asleep_s > ASLEEP_S:  # this machine slept: do not count that as a stall
            self._session.moved_t += asleep_s
        reached = self._reached_limit()
        if reached is not None:
            self._end(reached)

    def _reached_limit(self) -> MilkteaError | None:
        session = self._session
        if session.left_s() <= 0:
            return OverBudget(
                f"limits.max_usd = {session.plan.max_usd} or limits.max_hours is reached",
                hint=MORE.replace("RUN", session.run_id),
            )
        still_s = self._now() - session.moved_t
        patience_s = session.plan.stall_s + STALL_GRACE_S
        if still_s > patience_s and not session.has_own_deadline:
            return Stalled(
                f"nothing moved for {still_s / 60:.0f} minutes (limits.stall_minutes)",
                hint=f"`milktea logs {session.run_id}` shows what the trainer did last",
            )
        return None

    def _end(self, why: MilkteaError) -> None:
        """Destroy through REST until absence is proven; the story's connection ends with the first
        DELETE."""

        def tell(trouble: str) -> None:
            self._session.screen.waiting(f"not destroyed yet: {trouble}")

        self._story.condemn(why)
        try:
            until_absent(
                self._vast,
                self._session.run_id,
                known=self._instance_id,
                begun=lambda: self._story.end(why),
                tell=tell,
            )
        except BoxLeaked as leak:  # the story destroys it once more, or raises BoxLeaked
            tell(str(leak))
        finally:
            self._story.end(why)
            self._stopped.set()

    # -- lease and price ---------------------------------------------------------------------------

    def _renew(self) -> None:
        self._box.endpoints = self._story.endpoints
        more = "" if self._max_age is None else f"; {scripts.end_at(self._max_age)}"
        with suppress(MilkteaError):
            self._box.run(scripts.RENEW + more, timeout_s=ANSWER_S)
            self._max_age = None
        if self._now() - self._priced >= PRICE_S:
            self._read_price()

    def _read_price(self) -> None:
        """Move the deadline for a price that rose, here and on the box, and warn of a price that
        is to rise and of credit that ends soon."""
        if self._instance_id is None:
            return
        session, asked_at = self._session, self._now()
        instance = self._vast.instance(self._instance_id)
        if instance is not None and instance.usd_per_hour > self._usd_per_hour * 1.02 + 1e-4:
            before, self._usd_per_hour = self._usd_per_hour, instance.usd_per_hour
            with suppress(JournalError, OSError):
                session.reprice(instance.usd_per_hour, self._now() - self._priced)
            self._max_age = self._age_at_end()
            session.screen.waiting(
                f"the price rose from {before:.3f} to {instance.usd_per_hour:.3f} $/h: "
                f"the box lives {session.left_s() / 60:.0f} minutes more"
            )
        self._priced = asked_at
        self._warn_of_increases(self._instance_id)
        self._warn_of_credit()

    def _age_at_end(self) -> int:
        """The age of the box at its deadline, as its watchdog counts it."""
        session = self._session
        ends_at = session.clock.now() + session.left_s()
        return int(box_age_s(session.journal.lines, ends_at))

    def _warn_of_increases(self, instance_id: int) -> None:
        """A price that the host asks and that is not charged yet. It is not accepted."""
        for number, usd_per_hour in self._vast.price_increases(instance_id):
            if number not in self._asked:
                self._asked.add(number)
                self._session.screen.waiting(
                    f"the host asks {usd_per_hour:.3f} $/h for the GPUs from now on; milktea does "
                    "not accept it, and keeps max_usd where vast.ai charges it all the same"
                )

    def _warn_of_credit(self) -> None:
        credit = self._vast.credit_usd()
        if credit < self._usd_per_hour * CREDIT_S / 3600 and credit < self._credit_usd:
            self._session.screen.waiting(
                f"{credit:.2f} $ of credit are left: vast.ai stops the box when they are spent"
            )
        self._credit_usd = credit
