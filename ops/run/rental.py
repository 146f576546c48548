"""One rented machine: rent once, prove what an unclear answer left behind, boot, and destroy until
it is proven absent.

The order of journal line and call is the protocol (DESIGN section 5): whatever instant the client
dies at, the journal and the label on vast.ai's list together say what exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from ops.box import scripts
from ops.box.connection import load
from ops.errors import (
    BoxLeaked,
    MarketError,
    MilkteaError,
    NeverReady,
    NoAnswer,
    OfferGone,
    Preempted,
    Refused,
    Unsuitable,
)
from ops.market import cost
from ops.market.client import Vast
from ops.market.models import Instance, Offer
from ops.run.session import Detached, Session, boot_timeout_s
from ops.wait import until

READS = 3  # without it, in a row, prove absence
# between reads after an unclear create: a new contract may take seconds to be listed
SETTLE_S = 5.0
PROOF_S = 2.0  # between reads after a destroy
DESTROY_PATIENCE_S = 600.0
UNSEEN_PATIENCE_S = 60.0  # a new contract may be invisible for so long
SICK_PATIENCE_S = 120.0  # of offline or unknown before the box is given up

# Words in status_msg that no waiting heals (vast-api.md section 5, numbers 5 to 7).
FATAL_WORDS = (
    "manifest unknown",
    "manifest for",
    "unauthorized",
    "no space left on device",
    "toomanyrequests",
    "pull access denied",
    "oci runtime create failed",
    "unsatisfied condition",
    "failed to start containers",
    "invalid reference format",
)


@contextmanager
def rented(session: Session, offer: Offer) -> Iterator[int]:
    """The instance id of the machine behind `offer`, or the one that this run already has. On the
    way out, however, it is destroyed and proven gone; only `Detached` leaves it, guarded by its own
    watchdog. A failing destroy raises BoxLeaked from the first error."""
    try:
        yield adopt(session) or rent(session, offer)
    except Detached:
        raise
    except BaseException as first:
        try:
            _keep_diagnostics(session, first)
            give_back(session, why=type(first).__name__)
        except BoxLeaked as leak:
            raise leak from first
        raise
    give_back(session, why="done")


def adopt(session: Session) -> int | None:
    """The instance that an earlier client of this run rented, if it is still listed."""
    if session.journal.last("renting") is None or not session.may_have_box():
        return None
    found, _ = listed(session.vast, session.run_id)
    if not found:
        give_back(session, why="not listed any more")
        return None
    line = session.journal.last("rented", "renting")
    if line is None or line.kind != "rented":
        session.note("rented", instance_id=found[0].id, adopted=True)
    return found[0].id


def rent(session: Session, offer: Offer) -> int:
    """Create once. Raises OfferGone when it is proven that nothing was created, Refused when
    vast.ai would refuse any offer."""
    allowed_s = session.allowed_s(offer)
    with session.shield:
        return _rent(session, offer, allowed_s)


def _rent(session: Session, offer: Offer, allowed_s: float) -> int:
    session.note(
        "renting",
        offer=asdict(offer),
        label=session.run_id,
        bid_usd_per_hour=session.bid(offer),
        disk_gib=session.plan.needs.disk_gib,
        max_s=round(allowed_s),
    )
    try:
        instance_id = session.vast.create(
            offer.id,
            image=session.plan.image,
            disk_gib=session.plan.needs.disk_gib,
            label=session.run_id,
            env=scripts.environment(session.vast.provider.url, allowed_s),
            onstart=scripts.onstart(session.make_key()),
            bid_usd_per_hour=session.bid(offer),
        )
    except MarketError as e:
        return _settle(session, e)
    session.note("rented", instance_id=instance_id)
    return instance_id


def _settle(session: Session, error: MarketError) -> int:
    """After anything but a clean yes: three spaced reads by label. The id of what exists and is of
    use, else OfferGone or `error`."""
    session.note("unclear", error=str(error), instance_id=error.instance_id)
    found, _ = listed(session.vast, session.run_id, every_s=SETTLE_S)
    if found:
        session.note("rented", instance_id=found[0].id, adopted=True)
        if len(found) == 1 and found[0].intended_status != "stopped":
            return found[0].id
        give_back(session, why="created but not running")
    session.note("absent", reads=READS)
    if isinstance(error, NoAnswer | OfferGone):
        raise OfferGone(str(error)) from error
    raise error


def boot(session: Session, instance_id: int, offer: Offer) -> Instance:
    """Wait until it runs and lets us at its ports. Raises NeverReady (fatal status, deadline),
    Preempted, Unsuitable."""
    session.vast.attach_key(instance_id, session.make_key())
    timeout_s = boot_timeout_s(session.predicted(offer))
    began = session.clock.now()
    load()
    sick_since: list[float] = []

    def look() -> Instance | None:
        now = session.vast.instance(instance_id)
        waited = session.clock.now() - began
        if now is None:
            if waited > UNSEEN_PATIENCE_S:
                raise NeverReady(
                    f"instance {instance_id} is not to be seen {waited:.0f} s after it was rented"
                )
            return None
        session.screen.booting(now, waited)
        _refuse_fatal(session, now)
        if now.status in ("offline", "unknown"):
            sick_since.append(session.clock.now())
            if session.clock.now() - sick_since[0] > SICK_PATIENCE_S * session.clock.pace:
                raise NeverReady(f"machine {now.machine_id} is {now.status}")
            return None
        sick_since.clear()
        return now if now.status == "running" and (now.direct_port or now.ssh_port) else None

    running = until(
        look, every_s=2.0, timeout_s=timeout_s / session.clock.pace, clock=session.clock
    )
    if running is None:
        raise NeverReady(f"machine {offer.machine_id} did not boot within {timeout_s:.0f} s")
    why = differs(running, offer, session.plan.needs.disk_gib, session.bid(offer))
    if why:
        raise Unsuitable(f"instance {running.id} is not what was offered: {why}")
    session.note("booted", instance_id=running.id, seconds=round(session.clock.now() - began, 2))
    return running


def _refuse_fatal(session: Session, now: Instance) -> None:
    if now.outbid:
        raise Preempted(f"instance {now.id} was outbid, or the credit ran out")
    message = now.status_msg.lower()
    word = next((w for w in FATAL_WORDS if w in message), None)
    if now.status == "exited" or word:
        raise NeverReady(
            f"machine {now.machine_id} cannot start: {now.status} {now.status_msg.strip()[:200]}"
        )


def refuse_preempted(session: Session) -> None:
    """Ask vast.ai, when the box does not answer. Raises Preempted when it was stopped or is gone;
    silence raises nothing."""
    instance_id = session.instance_id()
    try:
        now = session.vast.instance(instance_id) if instance_id is not None else None
    except MarketError:
        return
    if now is None or now.outbid or now.status in ("exited", "stopped"):
        state = f"{now.status} {now.status_msg.strip()[:100]}" if now else "not there any more"
        session.note("preempted", instance_id=instance_id, state=state)
        raise Preempted(f"instance {instance_id} is {state}")


def differs(
    instance: Instance, offer: Offer, disk_gib: float, bid_usd_per_hour: float | None
) -> str:
    """How the created instance deviates from the offer that was taken; "" when it does not."""
    price = (
        offer.usd_per_hour if bid_usd_per_hour is None else bid_usd_per_hour
    ) + cost.disk_usd_per_hour(offer, disk_gib)
    checks = [
        (
            "machine_id",
            instance.machine_id,
            offer.machine_id,
            instance.machine_id == offer.machine_id,
        ),
        ("gpu_name", instance.gpu_name, offer.gpu_name, instance.gpu_name == offer.gpu_name),
        ("num_gpus", instance.num_gpus, offer.num_gpus, instance.num_gpus == offer.num_gpus),
        ("disk GiB", instance.disk_gib, disk_gib, instance.disk_gib >= disk_gib - 0.5),
        (
            "$/h",
            round(instance.usd_per_hour, 4),
            round(price, 4),
            instance.usd_per_hour <= price * 1.02 + 1e-4,
        ),
    ]
    return "; ".join(
        f"{name} is {got}, offered {wanted}" for name, got, wanted, ok in checks if not ok
    )


def listed(
    vast: Vast, label: str, *, every_s: float = PROOF_S
) -> tuple[list[Instance], list[float]]:
    """(what has `label`, the unix seconds of each read), by the first read that shows any; nothing
    after READS reads, `every_s` apart. Raises MarketError when a read fails: the reads before it
    prove nothing."""
    reads: list[float] = []
    while True:
        found = vast.instances(label=label)
        reads.append(round(vast.clock.now(), 2))
        if found or len(reads) == READS:
            return found, reads
        vast.clock.sleep(every_s)


def until_absent(vast: Vast, label: str, *, known: int | None = None) -> list[float]:
    """Destroy instance `known` and everything with `label`, again and again, until READS spaced
    reads in a row list none; their unix seconds. Raises BoxLeaked without that proof after
    DESTROY_PATIENCE_S, or at once where vast.ai refuses."""
    pending = [] if known is None else [known]
    trouble = ""

    def absent() -> list[float] | None:
        nonlocal pending, trouble
        try:
            for instance_id in pending:
                vast.destroy(instance_id)
            found, reads = listed(vast, label)
        except MilkteaError as e:
            if isinstance(e, Refused):
                raise _leaked(label, known, str(e)) from e
            trouble = str(e)
            return None
        pending, trouble = [i.id for i in found], "still listed"
        return None if found else reads

    reads = until(absent, every_s=PROOF_S, timeout_s=DESTROY_PATIENCE_S, clock=vast.clock)
    if reads is None:
        raise _leaked(label, known, trouble)
    return reads


def _leaked(label: str, instance_id: int | None, trouble: str) -> BoxLeaked:
    which = "" if instance_id is None else f" (instance {instance_id})"
    return BoxLeaked(f"the box of {label}{which} is not proven destroyed: {trouble}")


def give_back(session: Session, why: str) -> None:
    """Destroy everything with this run's label until it is proven absent. Safe to call twice.
    Raises BoxLeaked without that proof."""
    if not session.may_have_box():
        return
    with session.shield:
        _give_back(session, why)


def _give_back(session: Session, why: str) -> None:
    session.screen.destroying(why)
    session.note("destroying", why=why)
    known = session.instance_id()
    try:
        reads = until_absent(session.vast, session.run_id, known=known)
    except BoxLeaked as leak:
        session.note("leaked", instance_id=known, trouble=str(leak))
        ends = f"its own watchdog ends it within {scripts.LEASE_S // 60} minutes of silence"
        leak.money = f"it may be billing {session.usd_per_hour():.3f} $/h; {ends}"
        raise
    session.note("destroyed", reads=reads, instance_id=known)
    _bill(session, known)


def _bill(session: Session, instance_id: int | None) -> None:
    """Keep what vast.ai says it cost beside what we said. It may lag: nothing depends on it."""
    if instance_id is None:
        return
    try:
        charges = session.vast.charges(instance_id, session.journal.lines[0].t)
    except MilkteaError as e:
        session.note("bill", instance_id=instance_id, error=str(e))
        return
    session.note(
        "bill",
        instance_id=instance_id,
        items=[asdict(c) for c in charges],
        usd=round(sum(c.usd for c in charges), 6),
    )


def _keep_diagnostics(session: Session, first: BaseException) -> None:
    """The container's log dies with the box; when something went wrong it is the only witness. Best
    effort."""
    instance_id = session.instance_id()
    if instance_id is None or not isinstance(first, MilkteaError):
        return
    try:
        text = session.vast.container_log(instance_id)
    except (MilkteaError, OSError):
        return
    if text:
        (session.journal.folder / "container.log").write_text(text, "utf-8")
