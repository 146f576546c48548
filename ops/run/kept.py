"""A box that is stopped and kept: its GPUs cost nothing, its disk stays for a price a day until a
date, and `milktea resume` starts it again.

The date is the one at which the disk has cost as much as a start on another machine would, or
earlier where the purse or the contract says so. A stopped box has no watchdog: the first command
that acts after the date destroys it. The journal has the intent ("stopping", "starting") before
each call, and "kept" once vast.ai shows the box stopped.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace

from ops.box import scripts
from ops.box.connection import Box
from ops.errors import MarketError, NoAnswer, OverBudget, Preempted, Refused
from ops.job.plan import Plan
from ops.market import cost
from ops.market.models import Instance, Offer
from ops.run.journal import Line, last
from ops.run.meter import box_age_s, burn_usd_per_hour, halted, life_s, spent_usd
from ops.run.session import MARGIN_S, MORE, Kept, Session
from ops.wait import until

MIN_KEPT_S = 3600.0  # for less a disk is not worth keeping
STOP_PATIENCE_S = 300.0  # until vast.ai shows the box stopped
ASK_S = 3.0  # between two calls that stop it


@dataclass(frozen=True)
class Terms:
    """What a kept disk costs, and until when (unix seconds) it is kept; `saved_usd` is what a start
    on another machine would cost."""

    usd_per_hour: float
    until: float
    saved_usd: float

    @property
    def usd_per_day(self) -> float:
        return 24 * self.usd_per_hour

    def worth(self, now: float) -> bool:
        """Whether keeping is cheaper than a start elsewhere for at least MIN_KEPT_S."""
        return self.until - now >= MIN_KEPT_S

    def words(self) -> str:
        return f"{self.usd_per_day:.3f} $ a day, until {date(self.until)}"


def date(t: float) -> str:
    """Unix seconds as a date of this machine."""
    return time.strftime("%a %d %b %H:%M", time.localtime(t))


def terms(lines: list[Line], plan: Plan, now: float) -> Terms:
    """The terms on which the box of this journal could be kept from `now` on."""
    rent = last(lines, "renting")
    assert rent is not None, "a box without its intent"
    offer, bid = Offer(**rent["offer"]), rent["bid_usd_per_hour"]
    burn = burn_usd_per_hour(plan, offer, bid)
    predicted = cost.predict(offer, plan.workload, bid)
    moved_s = sum(t.seconds for t in cost.transfers(offer, plan.workload) if t.way != "home")
    saved_usd = predicted.inet_down_usd + burn * moved_s / 3600
    rate = cost.disk_usd_per_hour(offer, float(rent["disk_gib"]))
    spent = spent_usd(lines, now)
    rest_usd = max(predicted.usd - spent, burn * MARGIN_S / 900)  # to go on with
    left_usd = plan.max_usd - spent - rest_usd
    keeps_s = 3600 * min(saved_usd, max(0.0, left_usd)) / max(rate, 1e-9)
    ends_at = rent.t + offer.duration_s if offer.duration_s > 0 else float("inf")
    return Terms(rate, min(now + keeps_s, ends_at), saved_usd)


def kept(lines: list[Line]) -> Line | None:
    """The line with the terms of a box that is stopped now; None without one."""
    line = halted(lines)
    return line if line is not None and line.kind == "kept" else None


def due(lines: list[Line], now: float) -> bool:
    """Whether a stop was begun and is not proven yet, or a kept box is past its date."""
    line = halted(lines)
    if line is None or line.kind == "starting":
        return False
    return line.kind == "stopping" or now >= float(line["until"])


def words(line: Line) -> str:
    """The terms in a "kept" line, and how they end."""
    usd_per_day, at = 24 * float(line["usd_per_hour"]), date(float(line["until"]))
    return (
        f"stopped, its disk kept for {usd_per_day:.3f} $ a day until {at}: the first milktea "
        "command that acts after that destroys it"
    )


# -- acting ----------------------------------------------------------------------------------------


def stop_and_keep(session: Session, box: Box) -> None:
    """Stop the box and raise Kept once vast.ai shows it stopped.

    Returns without having stopped it where its training has just ended well. Raises MilkteaError
    where it is not worth keeping, or is not shown stopped: then it has to be destroyed."""
    agreed = terms(session.journal.lines, session.plan, session.clock.now())
    if not agreed.worth(session.clock.now()):
        raise OverBudget(f"the box is not worth keeping ({agreed.words()})")
    told = box.run(scripts.halt(session.run_id))
    if told.stdout.strip() == "ended":
        return
    if told.exit_code != 0:
        raise Refused(f"the box's disk takes no word of the stop: {told.stderr.strip()[-200:]}")
    with session.shield:
        session.note(
            "stopping",
            instance_id=session.instance_id(),
            usd_per_hour=round(agreed.usd_per_hour, 6),
            until=round(agreed.until),
        )
        finish_stop(session)
    raise Kept


def finish_stop(session: Session) -> Line:
    """Stop the box whose stop the journal has begun, again and again until vast.ai shows it
    stopped, and write that down. Raises NoAnswer without that proof, Elsewhere."""
    begun = halted(session.journal.lines)
    assert begun is not None and begun.kind == "stopping", "a stop that nobody began"
    instance_id = int(begun["instance_id"])
    session.validate_place()
    trouble = "it still runs"

    def stopped() -> Instance | None:
        nonlocal trouble
        try:
            session.vast.set_running(instance_id, False)
            now = session.vast.instance(instance_id)
        except MarketError as e:
            trouble = str(e)
            session.screen.waiting(f"not stopped yet: {e}; tried again")
            return None
        return now if now is not None and now.cur_state == "stopped" else None

    shown = until(stopped, every_s=ASK_S, timeout_s=STOP_PATIENCE_S, clock=session.clock)
    if shown is None:
        raise NoAnswer(f"instance {instance_id} is not shown stopped: {trouble}")
    charged = cost.disk_usd_per_hour(shown, shown.disk_gib)  # stopped, it may be dearer
    rate = max(charged, float(begun["usd_per_hour"]))
    now = session.clock.now()
    ends_at = float("inf") if shown.end_unix_s is None else shown.end_unix_s
    until_t = now + max(0.0, float(begun["until"]) - now) * float(begun["usd_per_hour"]) / rate
    return session.note(
        "kept",
        instance_id=instance_id,
        usd_per_hour=round(rate, 6),
        until=round(min(until_t, float(begun["until"]), ends_at)),
    )


def kept_on(session: Session) -> Line | None:
    """The line of a kept box that is to be left alone; a stop that was begun is finished first.
    None for one that is to be destroyed: past its date, not to be stopped, or destroyed in part."""
    line = session.journal.last("destroying", "leaked", "stopping", "kept", "starting", "renting")
    if line is not None and line.kind == "stopping":
        with suppress(NoAnswer):
            line = finish_stop(session)
    if line is not None and line.kind == "kept" and session.clock.now() < float(line["until"]):
        return line
    return None


def start_again(session: Session, instance_id: int) -> bool:
    """Start the box where it was stopped; whether it was. Raises Preempted where somebody else has
    its GPUs, OverBudget where too little is left, Refused, NoAnswer."""
    if halted(session.journal.lines) is None:
        return False
    plan, offer, now = session.plan, session.offer(), session.clock.now()
    # the image and the data are there
    here = replace(session.predicted(offer), inet_down_usd=0.0, pull_s=0.0)
    left_s = life_s(plan, offer, session.bid(offer), here, session.spent_usd(), session.age_s())
    rent = session.journal.last("renting")
    assert rent is not None, "a box without its intent"
    left_s = min(left_s, float(rent["max_s"]) - box_age_s(session.journal.lines, now))
    if left_s < 2 * MARGIN_S:
        raise OverBudget(
            f"{max(left_s, 0):.0f} s are left by limits.max_usd and limits.max_hours: too few to "
            "start the kept box",
            hint=MORE.replace("RUN", session.run_id),
        )
    with session.shield:
        session.note("starting", instance_id=instance_id, ends_at=round(now + left_s, 3))
        try:
            session.vast.set_running(instance_id, True)
        except Refused as e:
            if e.code != "resources_unavailable":
                raise
            raise Preempted(f"somebody else has the GPUs of the kept box: {e}") from e
    return True
