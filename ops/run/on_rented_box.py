"""One rented box after another, until one carries the work through. Read `on_rented_box` first;
what it calls follows in order. Each stage looks at what is done and does the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ops.box import facts, scripts
from ops.box import push as pushing
from ops.box.connection import Box, Endpoint
from ops.box.transfer import PushFile, sha256_of
from ops.errors import (
    BoxError,
    Failed,
    Lost,
    MarketError,
    MilkteaError,
    NeverReady,
    NoOffer,
    OfferGone,
    Preempted,
    PreflightError,
    RateLimited,
    Unsuitable,
)
from ops.market.models import Instance, Offer
from ops.market.ranking import Ranking
from ops.run import blame, chain, place, wishes
from ops.run import boot as booting
from ops.run.choose import choose, search
from ops.run.interrupt import stage
from ops.run.keeper import keeper_running
from ops.run.rental import box_left_alone, endpoints, raise_if_preempted, rented
from ops.run.retry import retry_transfer
from ops.run.session import MARGIN_S, Session
from ops.wait import Patience
from trainer.wire.job import WIRE, Job

R = TypeVar("R")
boot = stage(booting.boot)
MAX_MACHINES = 5  # in a row without a checkpoint, before the run gives up
CONNECT_S = 300.0
REACH_S = 20.0  # of trying, before vast.ai is asked for the ports again
ARM_S = 45.0  # for the watchdog to report that it is armed, scaled by the clock's pace
MIN_ARM_S = 3
NOT_ANSWERED = re.compile(r"HTTP (000|403|429|5\d\d)")  # by vast.ai, or by a firewall
TUNNEL_S = 75.0  # to connect, before a stuck proxy tunnel is given one reboot


def on_rented_box(
    session: Session, seen: Ranking | None, work: Callable[[Session, Box], R], undone: str
) -> R:
    """Rent a machine, push to it, do `work` on it and destroy it; return what `work` returned. A
    machine that is at fault is replaced by another. `seen` is the market as the user has just seen
    it, `undone` what none of MAX_MACHINES did, in words.

    No box of this run exists afterwards, however it ends; only BoxLeaked and Detached leave one."""
    with box_left_alone(session):
        session.remember_place()
    for offer in offers(session, seen):
        try:
            with rented(session, offer) as instance_id:
                box = connect(session, boot(session, instance_id, offer), offer)
                with keeper_running(session, box):
                    push(session, box)
                    return work(session, box)
        except (BoxError, OfferGone, RateLimited) as e:
            remember_failure(session, offer, e)
    raise NoOffer(f"{MAX_MACHINES} machines were tried and none {undone}")


def offers(session: Session, seen: Ranking | None) -> Iterator[Offer]:
    """The offers to try: each time the one on which the run is expected to cost least. A run that
    still has a box begins with the offer of that box."""
    if session.may_have_box():
        yield session.offer()
    fruitless = 0
    while fruitless < MAX_MACHINES:
        yield next_offer(session, seen)
        seen = None
        # a machine that saved a checkpoint was progress, however it ended
        last = session.journal.last("renting", "checkpoint")
        fruitless = 0 if last and last.kind == "checkpoint" else fruitless + 1


@stage
def next_offer(session: Session, seen: Ranking | None) -> Offer:
    """The best offer that was not tried: of `seen`, or of a new search."""
    return choose(session, seen or search(session))


def remember_failure(session: Session, offer: Offer, error: MilkteaError) -> None:
    """Write to the journal why this machine did not do, so that another is chosen next:
    "bad_machine" for a fault of its own, "missed" for what is not (outbid, taken by somebody else).

    Raises when another machine would not help: a result that is at home, a conversation that had
    begun, a changed host key, or the same fatal word from machines of two owners."""
    if wishes.at_home(session.journal.lines):
        raise error
    if _talked(session):
        raise Failed(f"the box was lost in the conversation: {error}", hint="") from error
    fault = isinstance(error, NeverReady | Unsuitable | Lost)
    word = blame.fatal_word(error)
    bad = [line.data for line in session.journal.lines if line.kind == "bad_machine"]
    here = blame.owner_of(offer.machine_id, offer.host_id)
    others = blame.owners_with_word(word, bad) - {here} if word else set()
    if others:  # machines of two owners fail with one word: the image or the job is at fault
        session.note("missed", machine_id=offer.machine_id, offer_id=offer.id, why=str(error))
        what = f"{len(others) + 1} of them said {word!r}: {error}"
        raise _not_the_machine(session, error, what) from error
    session.note(
        "bad_machine" if fault else "missed",
        machine_id=offer.machine_id,
        host_id=offer.host_id,
        offer_id=offer.id,
        why=str(error),
    )
    machine = NeverReady | Unsuitable | Lost | Preempted
    if isinstance(error, BoxError) and not isinstance(error, machine):
        raise error  # a changed host key: stop
    if isinstance(error, RateLimited):
        session.clock.sleep(15)


def _talked(session: Session) -> bool:
    """Whether the conversation that this run is for had begun on the newest machine."""
    line = session.journal.last("serving", "renting")
    return not session.plan.trains and line is not None and line.kind == "serving"


def _not_the_machine(session: Session, error: MilkteaError, what: str) -> MilkteaError:
    """The error that blames the image, or the job, for what several machines reported."""
    if isinstance(error, NeverReady):
        return PreflightError(
            f"image {session.plan.image} starts on no machine: {what}",
            hint="look at image.ref in the job file: its name, its tag, whether it is public",
        )
    return Failed(
        f"the training runs on no machine: {what}",
        hint=f"`milktea logs {session.run_id}` shows its last lines; look at image.ref and the job",
    )


@stage
def connect(session: Session, instance: Instance, offer: Offer) -> Box:
    """Connect, check that the machine matches the offer and that its watchdog is armed.
    Raises NeverReady, Unsuitable, HostKeyChanged."""
    box = Box(
        endpoints(instance),
        "root",
        session.key_path,
        session.known_hosts,
        retry_s=3 * session.clock.pace,
        patience_s=max(2.0, 120 * session.clock.pace),
    )
    began = session.clock.steady()
    before = session.journal.last("connected", "renting")
    checked = before is not None and before.kind == "connected"  # by an earlier client
    _reach(session, box, instance, scripts.LEASE_S if checked else CONNECT_S)
    if unarmed := _unarmed(session, box):
        raise Unsuitable(f"the watchdog of machine {offer.machine_id} is not armed: {unarmed}")
    expected = facts.ExpectedMachine.of(offer, session.plan.needs)
    why = facts.unsuitable(
        facts.parse(retry_transfer(session, box, lambda: box.run(facts.SCRIPT)).stdout),
        # what was trained meanwhile lies on the disk
        replace(expected, disk_gib=0.0) if checked else expected,
    )
    if why:
        raise Unsuitable(f"machine {offer.machine_id} is not what was offered: {why}")
    session.note(
        "connected",
        instance_id=instance.id,
        via=box.endpoint.kind if box.endpoint else None,
        seconds=round(session.clock.steady() - began, 2),
    )
    return box


def _reach(session: Session, box: Box, instance: Instance, patience_s: float) -> None:
    """Connect, at the ports that vast.ai shows now; a stuck tunnel is given one reboot. Raises
    NeverReady after `patience_s` in which vast.ai answers and the box does not, Preempted,
    HostKeyChanged."""
    missed, tunnel_tried, pace = Patience(session.clock), False, session.clock.pace

    def show(endpoint: Endpoint, reason: str) -> None:
        session.screen.connecting(f"{endpoint}: {reason}")

    while True:
        try:
            box.connect(deadline_s=REACH_S * pace, on_try=show)
            return
        except NeverReady as e:
            missed.look(counts=raise_if_preempted(session, box))
            session.moved_t = session.clock.steady()  # this loop has its own patience
            if missed.seconds > patience_s * pace or session.left_s() < MARGIN_S:
                raise NeverReady(
                    f"the box was missed for {missed.seconds:.0f} s: {e}", hint=e.hint
                ) from e
        if missed.seconds > TUNNEL_S * pace and not tunnel_tried:
            tunnel_tried = True
            with suppress(MarketError):  # the box may become reachable all the same
                if "port forwarding failed" in session.vast.container_log(instance.id):
                    session.note("rebooted", instance_id=instance.id, why="its tunnel is stuck")
                    session.vast.reboot(instance.id)


def _unarmed(session: Session, box: Box) -> str:
    """Why the box's watchdog is not armed; "" where it is. A watchdog that gets no answer from
    vast.ai is asked again: for a lease's time while we get none either, else once."""
    since_0_1 = place.remembered(session.journal.lines) is None
    wait_s = max(MIN_ARM_S, int(ARM_S * session.clock.pace))
    ready = scripts.ready(session.run_id, wait_s, since_0_1=since_0_1)
    until_s = session.clock.steady() + scripts.LEASE_S * session.clock.pace
    again = True
    while True:
        proof = retry_transfer(session, box, lambda: box.run(ready, timeout_s=90))
        if proof.stdout.strip() == "armed":
            return ""
        said = (proof.stdout + proof.stderr).strip()[-300:]
        if not NOT_ANSWERED.search(said):
            return said
        answers = raise_if_preempted(session, box)
        if (answers and not again) or (not answers and session.clock.steady() > until_s):
            return said
        again = again and not answers  # once more where vast.ai answers us
        session.screen.waiting(f"{said}; asked again")


@stage
def push(session: Session, box: Box) -> None:
    """Push the job, data, model, our trainer, and from an earlier box the results of its stages and
    the newest checkpoint. Files that are complete on the box are not sent again.

    Once the training was launched on this box nothing is pushed: a newer milktea may have other
    files of the same names."""
    last = session.journal.last("launched", "renting")
    if last is not None and last.kind == "launched":
        return
    folder = scripts.run_folder(session.run_id)
    job = session.journal.folder / "job.json"
    job.write_text(_job_text(session.plan.wire_job), "utf-8")
    files = [PushFile(p.local, f"{folder}/{p.remote}", p.sha256) for p in session.plan.pushes]
    files.append(_push_file(job, f"{folder}/job.json"))
    kept = chain.results_to_push(session)
    if checkpoint := chain.newest_checkpoint(session):
        kept += [p for p in sorted(checkpoint.rglob("*")) if p.is_file()]
    home = session.journal.folder
    files += [_push_file(p, f"{folder}/{p.relative_to(home).as_posix()}") for p in kept]
    began = session.clock.steady()
    retry_transfer(
        session,
        box,
        lambda: pushing.push(box, files, lambda done, total: session.moving("push", done, total)),
    )
    sent = sum(f.local.stat().st_size for f in files)
    session.note(
        "pushed", files=len(files), bytes_in=sent, seconds=round(session.clock.steady() - began, 2)
    )


def _job_text(wire_job: dict[str, Any]) -> str:
    """The text of job.json; a job that milktea 0.1 planned is left as it is."""
    if wire_job["wire"] != WIRE:
        return json.dumps(wire_job, ensure_ascii=False, indent=1)
    return Job.model_validate(wire_job).text()


def _push_file(local: Path, remote: str) -> PushFile:
    return PushFile(local, remote, sha256_of(local))
