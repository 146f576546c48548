"""One rented machine: rent it once, find what an unclear answer created, and destroy it until it is
proven absent.

The journal has the intent before a create is sent. Nothing is waited for before a DELETE is sent:
neither the disk, nor a journal line, nor a diagnostic. So, whenever the client dies, the journal
and the labels in vast.ai's list together say what exists.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict

from ops.box import scripts
from ops.box.connection import Box, Endpoint
from ops.errors import (
    BoxLeaked,
    Fenced,
    MarketError,
    MilkteaError,
    NoAnswer,
    OfferGone,
    Preempted,
    RateLimited,
)
from ops.job import tokens
from ops.market.models import Instance, Offer
from ops.run.absence import (
    DESTROY_PATIENCE_S,
    PROOF_S,
    READS,
    ignore_errors,
    instances_of_run,
    message_of,
    until_absent,
)
from ops.run.kept import kept, words
from ops.run.session import Detached, Session

# between reads after an unclear create: a new instance may take seconds to be listed
UNCLEAR_S = 5.0
LOG_S = 5.0  # to wait for a container's log after the proof


@contextmanager
def rented(session: Session, offer: Offer) -> Iterator[int]:
    """Rent the machine of `offer`, or take the one that this run already has, and give its instance
    id to the block. However the block ends, the machine is destroyed and proven absent. Two errors
    leave it: `Detached` (its own watchdog guards it) and `Fenced` (another client has it).

    Raises BoxLeaked, from the block's error, for a destroy without proof. Raises NoAnswer where
    vast.ai does not say whether the run has a machine: then nothing is rented or destroyed."""
    with box_left_alone(session):
        existing = existing_instance(session)
    try:
        yield existing or rent(session, offer)
    except (Detached, Fenced):
        raise
    except BaseException as first:
        try:
            destroy(session, why=type(first).__name__, log=isinstance(first, MilkteaError))
        except BoxLeaked as leak:
            raise leak from first
        raise
    destroy(session, why="done")


@contextmanager
def box_left_alone(session: Session) -> Iterator[None]:
    """Within it, no answer of vast.ai is a reason to ask again later: the box of the run, where it
    may have one, may be training. Raises NoAnswer that says so."""
    try:
        yield
    except (RateLimited, NoAnswer) as e:
        if not session.may_have_box():
            raise
        raise NoAnswer(
            f"vast.ai does not say whether the box of {session.run_id} still stands: {e}",
            hint=f"`milktea resume {session.run_id}` asks again; until then the box is left alone",
        ) from e


def existing_instance(session: Session) -> int | None:
    """The id of the instance that an earlier client of this run rented; None when it has none, or
    when it is not listed any more."""
    if not session.may_have_box():
        return None
    found = instances_of_run(session.vast, session.run_id)
    if not found:
        destroy(session, why="not listed any more")
        return None
    if session.instance_id() is None:
        session.note("rented", instance_id=found[0].id, adopted=True)
    return found[0].id


def rent(session: Session, offer: Offer) -> int:
    """Create an instance, once, and return its id. Raises OfferGone when it is proven that nothing
    was created, Refused when vast.ai would refuse any offer, OverBudget when too little is left
    for another machine, PreflightError where a token that the job names is not set, Preempted
    where the result is at home: its box is gone, and no other is needed."""
    if session.journal.last("pulled") is not None:
        raise Preempted("its box is gone")
    allowed_s = session.allowed_s(offer)
    tokens.validate(session.plan.env, session.plan.image_login)
    with session.shield:
        return _rent(session, offer, allowed_s)


def _rent(session: Session, offer: Offer, allowed_s: float) -> int:
    session.note(
        "renting",
        offer=asdict(offer),
        label=session.plan.label,
        bid_usd_per_hour=session.bid(offer),
        disk_gib=session.plan.needs.disk_gib,
        max_s=round(allowed_s),
    )
    try:
        instance_id = session.vast.create(
            offer.id,
            image=session.plan.image,
            disk_gib=session.plan.needs.disk_gib,
            label=session.plan.label,
            env=scripts.environment(
                session.vast.provider.url,
                allowed_s,
                session.plan.when_silent,
                session.plan.hold_s,
            ),
            onstart=scripts.onstart(session.make_key()),
            bid_usd_per_hour=session.bid(offer),
            login=tokens.registry_login(session.plan.image, session.plan.image_login),
        )
    except MarketError as e:
        return _resolve_unclear_create(session, e)
    session.created = instance_id  # first: the journal's line may meet a full disk
    session.note("rented", instance_id=instance_id)
    return instance_id


def _resolve_unclear_create(session: Session, error: MarketError) -> int:
    """The id of the instance that a create without a clear answer made, by three spaced reads of
    the label. Raises OfferGone or `error` when none exists or it does not run."""
    session.note("unclear", error=str(error), instance_id=error.instance_id)
    found = instances_of_run(session.vast, session.run_id, every_s=UNCLEAR_S)
    if found:
        session.note("rented", instance_id=found[0].id, adopted=True)
        if len(found) == 1 and found[0].intended_status != "stopped":
            return found[0].id
        destroy(session, why="created but not running")
    session.note("absent", reads=READS, provisional=isinstance(error, NoAnswer))
    if isinstance(error, NoAnswer | OfferGone):
        raise OfferGone(str(error)) from error
    raise error


def endpoints(instance: Instance) -> list[Endpoint]:
    """Where its sshd answers, by its record: the direct port first, then vast.ai's proxy."""
    found = [Endpoint(instance.ssh_host, instance.ssh_port, "proxy")] if instance.ssh_port else []
    if instance.direct_port:
        found.insert(0, Endpoint(instance.direct_host, instance.direct_port, "direct"))
    return found


def raise_if_preempted(session: Session, box: Box | None) -> bool:
    """Ask vast.ai about a box that does not answer, and give `box` the ports of its record. Returns
    whether vast.ai answered. Raises Preempted when the instance was stopped or is gone."""
    instance_id = session.instance_id()
    try:
        now = _shown(session, instance_id) if instance_id is not None else None
    except MarketError as e:
        return not isinstance(e, NoAnswer)
    if now is None or now.outbid or now.status in ("exited", "stopped"):
        state = f"{now.status} {now.status_msg.strip()[:100]}" if now else "not there any more"
        session.note("preempted", instance_id=instance_id, state=state)
        raise Preempted(f"instance {instance_id} is {state}")
    if box is not None:
        box.endpoints = endpoints(now) or box.endpoints
    return True


def _shown(session: Session, instance_id: int) -> Instance | None:
    """The instance's record; None after READS spaced reads without it."""
    for n in range(READS):
        if n:
            session.clock.sleep(PROOF_S)
        if (now := session.vast.instance(instance_id)) is not None:
            return now
    return None


def destroy(session: Session, why: str, *, log: bool = False) -> None:
    """Destroy everything with this run's label until it is proven absent. Safe to call twice.

    With `log`, the container's log is fetched meanwhile. Raises BoxLeaked without the proof,
    Elsewhere where the run was rented at another place, Fenced where another client has it."""
    if not session.may_have_box():
        return
    if session.journal.taken_over():
        raise Fenced(f"{session.run_id}: another client has taken this run over; this one stops")
    session.validate_place()
    with session.shield:
        _destroy(session, why, log)


def _destroy(session: Session, why: str, log: bool) -> None:
    known = session.instance_id() or session.created
    container_log = _ContainerLog(session, known) if log and known is not None else None

    def begun() -> None:
        ignore_errors(session.screen.destroying, why)
        ignore_errors(lambda: session.note("destroying", why=why))

    def tell(trouble: str) -> None:
        patience = f"tried again for {DESTROY_PATIENCE_S / 60:.0f} minutes"
        session.screen.waiting(f"not destroyed yet: {trouble}; {patience}")

    try:
        reads = until_absent(session.vast, session.run_id, known=known, begun=begun, tell=tell)
    except BoxLeaked as leak:
        message = str(leak)
        ends = _ends_by_itself(session)
        ignore_errors(lambda: session.note("leaked", instance_id=known, trouble=message))
        leak.money = f"it may be billing; {ends}"
        with suppress(Exception):
            leak.money = f"it may be billing {session.usd_per_hour():.3f} $/h; {ends}"
        raise
    session.created = None
    try:
        session.note("destroyed", reads=reads, instance_id=known)
    except Exception as e:
        message = (
            f"destroyed, absent in {READS} spaced reads; the journal takes no line: {message_of(e)}"
        )
        ignore_errors(session.screen.waiting, message)
    if container_log:
        ignore_errors(container_log.keep)
    ignore_errors(_bill, session, known)


def _ends_by_itself(session: Session) -> str:
    """When a box that is not proven destroyed ends by its own watchdog, in words."""
    if (line := kept(session.journal.lines)) is not None:
        return f"it is {words(line)}"
    launched = session.journal.last("launched", "renting")
    alone = launched is not None and launched.kind == "launched"
    if alone and session.plan.when_silent == "finish":
        at = time.strftime("%a %H:%M", time.localtime(session.dies_at()))
        return f"its own watchdog ends it at {at}"
    return f"its own watchdog ends it within {scripts.LEASE_S // 60} minutes of silence"


def _bill(session: Session, instance_id: int | None) -> None:
    """Write vast.ai's charges for the instance into the journal. They may be hours late: nothing
    depends on them."""
    if instance_id is None:
        return
    try:
        charges = session.vast.charges(instance_id, session.journal.lines[0].t)
    except MilkteaError as e:
        session.note("bill", instance_id=instance_id, error=str(e))
        return
    if not charges:
        session.note("bill", instance_id=instance_id, error="vast.ai has charged nothing yet")
        return
    session.note(
        "bill",
        instance_id=instance_id,
        items=[asdict(c) for c in charges],
        usd=round(sum(c.usd for c in charges), 6),
    )


class _ContainerLog:
    """The container's log, which is deleted with the box and may be the only record of what went
    wrong. A thread with its own client fetches it, so that the DELETE does not wait."""

    def __init__(self, session: Session, instance_id: int) -> None:
        self._path = session.journal.folder / "container.log"
        self._text = ""
        vast = session.vast.twin()

        def ask() -> None:
            with suppress(Exception):
                self._text = vast.container_log(instance_id)

        self._thread = threading.Thread(target=ask, name="container-log", daemon=True)
        self._thread.start()

    def keep(self) -> None:
        """Write what has arrived, once the box is proven absent."""
        self._thread.join(LOG_S)
        if self._text:
            self._path.write_text(self._text, "utf-8", errors="backslashreplace")
