"""One rented machine: rent once, prove what an unclear answer left behind, boot, and destroy until
it is proven absent.

Before a create stands its intent in the journal; before a DELETE stands nothing: no disk, no line,
no diagnostic. Whatever instant the client dies at, the journal and the label on vast.ai's list
together say what exists.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict

from ops.box import scripts
from ops.box.connection import Box, Endpoint, load
from ops.errors import (
    BoxLeaked,
    Fenced,
    MarketError,
    MilkteaError,
    NeverReady,
    NoAnswer,
    OfferGone,
    Preempted,
    RateLimited,
    Refused,
    Unsuitable,
)
from ops.job import tokens
from ops.market import cost
from ops.market.client import Vast
from ops.market.models import Instance, Offer
from ops.run import blame
from ops.run.session import Detached, Session, boot_timeout_s
from ops.wait import until

READS = 3  # without it, in a row, prove absence
# between reads after an unclear create: a new contract may take seconds to be listed
SETTLE_S = 5.0
PROOF_S = 2.0  # between reads after a destroy
DESTROY_PATIENCE_S = 600.0
UNSEEN_PATIENCE_S = 300.0  # a new contract may be invisible for so long
LOG_S = 5.0  # waited for a container's log after the proof
SICK_PATIENCE_S = 120.0  # of offline or unknown before the box is given up


@contextmanager
def rented(session: Session, offer: Offer) -> Iterator[int]:
    """The instance id of the machine behind `offer`, or the one that this run already has. On the
    way out, however, it is destroyed and proven gone; only `Detached` leaves it, guarded by its own
    watchdog, and `Fenced`, since another client has it. A destroy without its proof raises
    BoxLeaked from the first error. Raises NoAnswer where vast.ai does not say whether there is one:
    then nothing is rented and nothing destroyed."""
    try:
        adopted = adopt(session)
    except (RateLimited, NoAnswer) as e:  # it may train: no answer is no reason to destroy it
        raise NoAnswer(
            f"vast.ai does not say whether the box of {session.run_id} still stands: {e}",
            hint=f"`milktea resume {session.run_id}` asks again; until then the box is left alone",
        ) from e
    try:
        yield adopted or rent(session, offer)
    except (Detached, Fenced):
        raise
    except BaseException as first:
        try:
            give_back(session, why=type(first).__name__, log=isinstance(first, MilkteaError))
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
    vast.ai would refuse any offer, PreflightError where a token that the job names is not here."""
    allowed_s = session.allowed_s(offer)
    tokens.validate(session.plan.env, session.plan.image_login)
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
        return _settle(session, e)
    session.created = instance_id  # known from here on, whatever the disk does
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
    session.note("absent", reads=READS, provisional=isinstance(error, NoAnswer))
    if isinstance(error, NoAnswer | OfferGone):
        raise OfferGone(str(error)) from error
    raise error


def boot(session: Session, instance_id: int, offer: Offer) -> Instance:
    """Wait until it runs and lets us at its ports. Raises NeverReady (fatal status, deadline),
    Preempted, Unsuitable."""
    with suppress(MarketError):  # onstart brings the key too: no reason to destroy a box
        session.vast.attach_key(instance_id, session.make_key())
    timeout_s = boot_timeout_s(session.predicted(offer))
    began = session.clock.steady()
    load()
    sick_since: list[float] = []
    seen = False

    def look() -> Instance | None:
        nonlocal seen
        now = session.vast.instance(instance_id)
        waited = session.clock.steady() - began
        if now is None and seen:  # it ended itself, while this machine slept
            raise_if_preempted(session, None)
        seen = seen or now is not None
        if now is None:
            if waited > UNSEEN_PATIENCE_S * session.clock.pace:
                raise NeverReady(
                    f"instance {instance_id} is not to be seen {waited:.0f} s after it was rented"
                )
            return None
        session.screen.booting(now, waited)
        _raise_if_fatal(session, now)
        if now.status in ("offline", "unknown"):
            sick_since.append(session.clock.steady())
            if session.clock.steady() - sick_since[0] > SICK_PATIENCE_S * session.clock.pace:
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
    session.note("booted", instance_id=running.id, seconds=round(session.clock.steady() - began, 2))
    return running


def _raise_if_fatal(session: Session, now: Instance) -> None:
    if now.outbid:
        raise Preempted(f"instance {now.id} was outbid, or the credit ran out")
    if now.status == "exited" or blame.start_word(now.status_msg):
        raise NeverReady(
            f"machine {now.machine_id} cannot start: {now.status} {now.status_msg.strip()[:200]}"
        )


def endpoints(instance: Instance) -> list[Endpoint]:
    """The ways to its sshd, as the record has them now."""
    found = [Endpoint(instance.ssh_host, instance.ssh_port, "proxy")] if instance.ssh_port else []
    if instance.direct_port:
        found.insert(0, Endpoint(instance.direct_host, instance.direct_port, "direct"))
    return found


def raise_if_preempted(session: Session, box: Box | None) -> bool:
    """Ask vast.ai, when the box does not answer, and take the ports that it tells now. Whether
    vast.ai answered. Raises Preempted when it was stopped or is gone; silence raises nothing."""
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


def until_absent(
    vast: Vast,
    label: str,
    *,
    known: int | None = None,
    begun: Callable[[], object] = lambda: None,
    tell: Callable[[str], object] = lambda trouble: None,
) -> list[float]:
    """Destroy instance `known` and everything with `label`, again and again, until READS spaced
    reads in a row list none; their unix seconds.

    `begun` is called once the first DELETE is sent, `tell` with each trouble; what they raise is
    passed over. Raises BoxLeaked without that proof after DESTROY_PATIENCE_S, or at once where
    vast.ai says that the key is none (auth_error). Nothing else ends it."""
    pending = [] if known is None else [known]
    trouble, first = "", True

    def absent() -> list[float] | None:
        nonlocal pending, trouble, first
        trouble = ""
        for instance_id in pending:
            trouble = _destroyed(vast, instance_id, label, known) or trouble
        if first:
            first = False
            _guarded(begun)
        try:
            pending, reads = _labelled(vast, label)
        except Exception as e:  # a list that cannot be read proves nothing, whatever it holds
            _raise_leaked_if_final(e, label, known)
            trouble = trouble or _said(e)
        else:
            if not pending:
                return reads
            trouble = trouble or "still listed"
        _guarded(tell, trouble)
        return None

    found = until(absent, every_s=PROOF_S, timeout_s=DESTROY_PATIENCE_S, clock=vast.clock)
    if found is None:
        raise _leaked(label, known, trouble)
    return found


def _destroyed(vast: Vast, instance_id: int, label: str, known: int | None) -> str:
    """One DELETE; what went wrong, or "". Raises BoxLeaked where the key is none."""
    try:
        vast.destroy(instance_id)
    except Exception as e:  # it is sent again, whatever came back
        _raise_leaked_if_final(e, label, known)
        return _said(e)
    return ""


def _labelled(vast: Vast, label: str) -> tuple[list[int], list[float]]:
    """As `listed`, by nothing but id and label: an odd row of somebody else's stops nothing."""
    reads: list[float] = []
    while True:
        found = [number for number, theirs in vast.labels() if theirs == label]
        reads.append(round(vast.clock.now(), 2))
        if found or len(reads) == READS:
            return found, reads
        vast.clock.sleep(PROOF_S)


def _raise_leaked_if_final(e: Exception, label: str, known: int | None) -> None:
    if isinstance(e, Refused) and e.code == "auth_error":
        raise _leaked(label, known, str(e)) from e


def _said(e: Exception) -> str:
    return str(e) if isinstance(e, MilkteaError) else f"{type(e).__name__}: {e}"


def _guarded(act: Callable[..., object], *args: object) -> None:
    """On the way out nothing but the proof counts: a full disk, a closed screen, odd text."""
    with suppress(Exception):
        act(*args)


def _leaked(label: str, instance_id: int | None, trouble: str) -> BoxLeaked:
    which = "" if instance_id is None else f" (instance {instance_id})"
    return BoxLeaked(f"the box of {label}{which} is not proven destroyed: {trouble}")


def give_back(session: Session, why: str, *, log: bool = False) -> None:
    """Destroy everything with this run's label until it is proven absent. Safe to call twice.

    With `log`, the container's log is asked for while the DELETE is on its way. Raises BoxLeaked
    without the proof, Elsewhere where the run was rented at another place, Fenced where another
    client has it."""
    if not session.may_have_box():
        return
    if session.journal.taken_over():
        raise Fenced(f"{session.run_id}: another client has taken this run over; this one stops")
    session.validate_place()
    with session.shield:
        _give_back(session, why, log)


def _give_back(session: Session, why: str, log: bool) -> None:
    known = session.instance_id() or session.created
    witness = _Witness(session, known) if log and known is not None else None

    def begun() -> None:
        _guarded(session.screen.destroying, why)
        _guarded(lambda: session.note("destroying", why=why))

    def tell(trouble: str) -> None:
        patience = f"tried again for {DESTROY_PATIENCE_S / 60:.0f} minutes"
        session.screen.waiting(f"not destroyed yet: {trouble}; {patience}")

    try:
        reads = until_absent(session.vast, session.run_id, known=known, begun=begun, tell=tell)
    except BoxLeaked as leak:
        said = str(leak)
        ends = _ends_by_itself(session)
        _guarded(lambda: session.note("leaked", instance_id=known, trouble=said))
        leak.money = f"it may be billing; {ends}"
        with suppress(Exception):
            leak.money = f"it may be billing {session.usd_per_hour():.3f} $/h; {ends}"
        raise
    session.created = None
    try:
        session.note("destroyed", reads=reads, instance_id=known)
    except Exception as e:
        said = f"destroyed, absent in {READS} spaced reads; the journal takes no line: {_said(e)}"
        _guarded(session.screen.waiting, said)
    if witness:
        _guarded(witness.keep)
    _guarded(_bill, session, known)


def _ends_by_itself(session: Session) -> str:
    """What a box does that is not proven destroyed."""
    launched = session.journal.last("launched", "renting")
    alone = launched is not None and launched.kind == "launched"
    if alone and session.plan.when_silent == "finish":
        at = time.strftime("%a %H:%M", time.localtime(session.dies_at()))
        return f"its own watchdog ends it at {at}"
    return f"its own watchdog ends it within {scripts.LEASE_S // 60} minutes of silence"


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


class _Witness:
    """The container's log dies with the box; when something went wrong it is the only witness. It
    is asked for by a thread with its own client: the DELETE waits for nothing of it."""

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
        """Write what came, once the box is proven gone."""
        self._thread.join(LOG_S)
        if self._text:
            self._path.write_text(self._text, "utf-8", errors="backslashreplace")
