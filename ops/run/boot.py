"""Wait until a rented instance runs, and look whether it is what was offered."""

from __future__ import annotations

import time
from contextlib import suppress

from ops.box.connection import load
from ops.errors import (
    MarketError,
    NeverReady,
    NoAnswer,
    Preempted,
    RateLimited,
    Unsuitable,
)
from ops.market import cost
from ops.market.models import Instance, Offer
from ops.run import blame
from ops.run.kept import start_again
from ops.run.meter import boot_timeout_s
from ops.run.rental import raise_if_preempted
from ops.run.session import MARGIN_S, Session
from ops.wait import Patience, until

UNSEEN_PATIENCE_S = 300.0  # a new instance may be invisible for so long
RESTART_S = 120.0  # for which a box that was started again may be shown stopped
HALTED = ("", "stopped", "exited")  # how it is shown then
OFFLINE_PATIENCE_S = 120.0  # of offline or unknown before the box is given up


def boot(session: Session, instance_id: int, offer: Offer) -> Instance:
    """Wait until the instance runs and has an SSH port, and return its record. Time in which
    vast.ai does not answer is not counted. Raises NeverReady (fatal status, deadline), Preempted,
    Unsuitable when it is not what was offered."""
    again = start_again(session, instance_id)
    with suppress(MarketError):  # the onstart script brings the key too
        session.vast.attach_key(instance_id, session.make_key())
    timeout_s = boot_timeout_s(session.predicted(offer))
    began = session.clock.steady()
    load()
    offline_since: list[float] = []
    seen, unseen, booting = False, Patience(session.clock), Patience(session.clock)

    def look() -> Instance | None:
        nonlocal seen
        waited = session.clock.steady() - began
        try:
            now = session.vast.instance(instance_id)
        except (NoAnswer, RateLimited) as e:  # of vast.ai: the box may boot, or train, all the same
            session.screen.waiting(f"{e}; asked again")
            unseen.look(counts=False)
            booting.look(counts=False)
            if session.left_s() < MARGIN_S:
                raise NeverReady(f"vast.ai does not show instance {instance_id}: {e}") from e
            return None
        booting.look()
        if now is None and seen:  # it destroyed itself, or the host took it away
            raise_if_preempted(session, None)
        seen = seen or now is not None
        if now is None:
            unseen.look()
            if unseen.seconds > UNSEEN_PATIENCE_S * session.clock.pace:
                raise NeverReady(
                    f"instance {instance_id} is not to be seen {waited:.0f} s after it was rented"
                )
            return None
        session.screen.booting(now, waited)
        if again and waited < RESTART_S * session.clock.pace and now.status in HALTED:
            return None  # it was told to start a moment ago
        _raise_if_fatal(now)
        if now.status in ("offline", "unknown"):
            offline_since.append(session.clock.steady())
            if session.clock.steady() - offline_since[0] > OFFLINE_PATIENCE_S * session.clock.pace:
                raise NeverReady(f"machine {now.machine_id} is {now.status}")
            return None
        offline_since.clear()
        if now.status == "running" and (now.direct_port or now.ssh_port):
            return now
        if booting.seconds > timeout_s:
            raise NeverReady(f"machine {offer.machine_id} did not boot within {timeout_s:.0f} s")
        return None

    running = until(look, every_s=2.0, clock=session.clock)
    assert running is not None, "looked at for as long as nothing is raised"
    _validate_first_boot(session, running, offer)
    session.note("booted", instance_id=running.id, seconds=round(session.clock.steady() - began, 2))
    return running


def _validate_first_boot(session: Session, running: Instance, offer: Offer) -> None:
    """Raises Unsuitable where the instance is not what was offered. At a later boot it was looked
    at; a price that rose since moves the keeper's deadline."""
    before = session.journal.last("booted", "renting")
    if before is not None and before.kind == "booted":
        return
    if why := difference(running, offer, session.plan.needs.disk_gib, session.bid(offer)):
        raise Unsuitable(f"instance {running.id} is not what was offered: {why}")
    if running.end_unix_s is None:
        return
    left_s, needs_s = (
        running.end_unix_s - session.clock.now(),
        3600 * session.predicted(offer).hours,
    )
    if left_s < needs_s:
        raise Unsuitable(
            f"the contract of instance {running.id} ends in {max(0.0, left_s) / 60:.0f} minutes, "
            f"and the run is to take {needs_s / 60:.0f}"
        )
    if running.end_unix_s < session.dies_at():
        at = time.strftime("%a %H:%M", time.localtime(running.end_unix_s))
        session.screen.waiting(f"vast.ai stops the box at {at}: its contract ends then")


def _raise_if_fatal(now: Instance) -> None:
    if now.outbid:
        raise Preempted(f"instance {now.id} was outbid, or the credit ran out")
    if now.status == "exited" or blame.start_word(now.status_msg):
        raise NeverReady(
            f"machine {now.machine_id} cannot start: {now.status} {now.status_msg.strip()[:200]}"
        )


def difference(
    instance: Instance, offer: Offer, disk_gib: float, bid_usd_per_hour: float | None
) -> str:
    """How the created instance differs from the offer that was taken; "" when it does not."""
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
