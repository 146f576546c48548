"""The story: rent, push, train, retrieve, destroy. `rent_and_train` is the main job, read aloud;
what it calls is below it in order.

`resume` is the same function on a run that has a journal already: each stage looks at what is done
and does the rest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ops.box import facts, scripts, transfer
from ops.box.connection import Box, Endpoint
from ops.box.transfer import PushFile, sha256_of
from ops.errors import (
    AdapterError,
    BoxError,
    Failed,
    Lost,
    MilkteaError,
    NeverReady,
    NoOffer,
    OfferGone,
    OverBudget,
    Preempted,
    PreflightError,
    RateLimited,
    Stalled,
    Unsuitable,
)
from ops.job import tokens
from ops.market.models import Instance, Offer
from ops.market.ranking import Ranking
from ops.run import blame, place, rental, retrieve
from ops.run.choose import choose, search
from ops.run.follow import EVENTS, NoFirstStep, follow, newest_checkpoint
from ops.run.interrupt import fetch_newest, stage
from ops.run.keeper import kept
from ops.run.rental import endpoints, raise_if_preempted, rented
from ops.run.result import ADAPTER
from ops.run.session import MARGIN_S, Session, metered
from ops.wait import Patience, until
from trainer.wire.job import WIRE, Job

T = TypeVar("T")
boot = stage(rental.boot)
MACHINES = 5  # tried for one run before giving up
CONNECT_S = 300.0
ARM_S = 45.0  # for the watchdog to prove itself, scaled by the clock's pace
ARM_LEAST_S = 3
TUNNEL_S = 75.0  # after which a stuck proxy tunnel is cured by one reboot
FULL_PATIENCE_S, FULL_EVERY_S = 1800.0, 10.0  # while this disk has no room for what comes home
FETCHES = 3  # of a result that does not verify


@dataclass(frozen=True)
class Outcome:
    adapter_zip: Path
    sha256: str
    spent_usd: float


@metered
def rent_and_train(session: Session, seen: Ranking | None = None) -> Outcome:
    """The main job; `seen` is the market as the user has just seen it. Returns once a verified
    adapter is at home and no box of this run exists; raises otherwise, with the same guarantee
    about the box, or BoxLeaked, or Detached."""
    session.remember_place()
    for offer in offers(session, seen):
        try:
            with rented(session, offer) as instance_id:
                box = connect(session, boot(session, instance_id, offer), offer)
                with kept(session, box):
                    push(session, box)
                    launch(session, box)
                    watch(session, box)
                    return pull(session, box)
        except (BoxError, OfferGone, RateLimited) as e:
            remember_bad(session, offer, e)
    raise NoOffer(f"{MACHINES} machines were tried and none carried the run through")


def offers(session: Session, seen: Ranking | None) -> Iterator[Offer]:
    """The offers to try, the cheapest finished run first, searched anew after each; first the one
    that this run still has."""
    if session.may_have_box():
        yield session.offer()
    fruitless = 0
    while fruitless < MACHINES:
        yield taken(session, seen)
        seen = None
        # a machine that saved a checkpoint carried the run on, however it ended
        last = session.journal.last("renting", "checkpoint")
        fruitless = 0 if last and last.kind == "checkpoint" else fruitless + 1


@stage
def taken(session: Session, seen: Ranking | None) -> Offer:
    """The best offer that was not tried, of the market as it was seen or is now."""
    return choose(session, seen or search(session))


def remember_bad(session: Session, offer: Offer, error: MilkteaError) -> None:
    """Another machine is taken next. A machine that failed by itself is remembered; being outbid or
    late is not its fault."""
    fault = isinstance(error, NeverReady | Unsuitable | Lost)
    word = blame.word(error)
    bad = [line.data for line in session.journal.lines if line.kind == "bad_machine"]
    others = blame.machines_that_said(word, bad) - {offer.machine_id} if word else set()
    if others:  # two machines, one word: it is the image's, or the job's
        session.note("missed", machine_id=offer.machine_id, offer_id=offer.id, why=str(error))
        said = f"{len(others) + 1} of them said {word!r}: {error}"
        raise _not_the_machines(session, error, said) from error
    session.note(
        "bad_machine" if fault else "missed",
        machine_id=offer.machine_id,
        offer_id=offer.id,
        why=str(error),
    )
    machine = NeverReady | Unsuitable | Lost | Preempted
    if isinstance(error, BoxError) and not isinstance(error, machine):
        raise error  # a changed host key: stop, whatever else there is to rent
    if isinstance(error, RateLimited):
        session.clock.sleep(15)


def _not_the_machines(session: Session, error: MilkteaError, said: str) -> MilkteaError:
    if isinstance(error, NeverReady):
        return PreflightError(
            f"image {session.plan.image} starts on no machine: {said}",
            hint="look at image.ref in the job file: its name, its tag, whether it is public",
        )
    return Failed(
        f"the training runs on no machine: {said}",
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

    def told(endpoint: Endpoint, reason: str) -> None:
        session.screen.connecting(f"{endpoint}: {reason}")

    try:
        box.connect(deadline_s=TUNNEL_S * session.clock.pace, on_try=told)
    except NeverReady:
        raise_if_preempted(session, box)
        if "port forwarding failed" in session.vast.container_log(instance.id):
            session.note("rebooted", instance_id=instance.id, why="its tunnel is stuck")
            session.vast.reboot(instance.id)
        box.connect(deadline_s=(CONNECT_S - TUNNEL_S) * session.clock.pace, on_try=told)
    since_0_1 = place.remembered(session.journal.lines) is None
    wait_s = max(ARM_LEAST_S, int(ARM_S * session.clock.pace))
    proof = box.run(scripts.ready(session.run_id, wait_s, since_0_1=since_0_1), timeout_s=90)
    if proof.stdout.strip() != "armed":
        said = (proof.stdout + proof.stderr).strip()[-300:]
        raise Unsuitable(f"the watchdog of machine {offer.machine_id} is not armed: {said}")
    why = facts.unsuitable(
        facts.parse(box.run(facts.SCRIPT).stdout), facts.Expected.of(offer, session.plan.needs)
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


@stage
def push(session: Session, box: Box) -> None:
    """Job, data, model, our trainer, and the newest checkpoint of an earlier box. What is there
    whole already is not sent again, and nothing once the training was launched there: by then a
    newer milktea may have other files of the same names."""
    last = session.journal.last("launched", "renting")
    if last is not None and last.kind == "launched":
        return
    folder = scripts.run_folder(session.run_id)
    job = session.journal.folder / "job.json"
    job.write_text(_job_text(session.plan.wire_job), "utf-8")
    files = [PushFile(p.local, f"{folder}/{p.remote}", p.sha256) for p in session.plan.pushes]
    files.append(_push_file(job, f"{folder}/job.json"))
    if checkpoint := newest_checkpoint(session):
        files += [
            _push_file(p, f"{folder}/checkpoints/{checkpoint.name}/{p.relative_to(checkpoint)}")
            for p in sorted(checkpoint.rglob("*"))
            if p.is_file()
        ]
    began = session.clock.steady()
    persist(
        session,
        box,
        lambda: transfer.push(box, files, lambda done, total: session.moving("push", done, total)),
    )
    sent = sum(f.local.stat().st_size for f in files)
    session.note(
        "pushed", files=len(files), bytes_in=sent, seconds=round(session.clock.steady() - began, 2)
    )


def _job_text(wire_job: dict[str, Any]) -> str:
    """job.json; as it was planned, where milktea 0.1 planned it."""
    if wire_job["wire"] != WIRE:
        return json.dumps(wire_job, ensure_ascii=False, indent=1)
    return Job.model_validate(wire_job).text()


def _push_file(local: Path, remote: str) -> PushFile:
    return PushFile(local, remote, sha256_of(local))


def persist(session: Session, box: Box, action: Callable[[], T]) -> T:
    """A transfer again and again over broken links, until the box stays away for a lease's time
    although vast.ai answers, or its deadline is near, and for FULL_PATIENCE_S while this disk is
    full. Raises Lost, PreflightError then, Preempted when it was taken away."""
    full_until = session.clock.steady() + FULL_PATIENCE_S * session.clock.pace
    while True:
        try:
            return action()
        except Lost as e:
            session.screen.waiting(f"the link broke ({e}); again")
            if not reconnected(session, box):
                raise
        except PreflightError as e:  # this disk is full: what is paid for waits there
            if session.clock.steady() > full_until or session.left_s() < 2 * MARGIN_S:
                raise
            session.screen.waiting(f"{e}; make room: it is tried again")
            session.clock.sleep(FULL_EVERY_S)


def reconnected(session: Session, box: Box) -> bool:
    """Whether the box lets us in again within a lease's time in which vast.ai answers. Raises
    Preempted when it was taken away, HostKeyChanged."""
    silent = Patience(session.clock)

    def connected() -> bool | None:
        online = raise_if_preempted(session, box)
        session.moved_t = session.clock.steady()  # this loop has its own patience
        if session.left_s() < MARGIN_S:
            return False
        try:
            box.connect(deadline_s=60 * session.clock.pace)
            return True
        except NeverReady:
            silent.look(counts=online)
            return False if silent.seconds > scripts.LEASE_S * session.clock.pace else None

    return bool(until(connected, every_s=3, clock=session.clock))


@stage
def launch(session: Session, box: Box) -> None:
    """Start the training. Idempotent. The events of an earlier machine are put aside: offsets
    begin again."""
    before = session.journal.last("launched", "renting")
    events = session.journal.folder / "events.jsonl"
    if before and before.kind == "renting" and events.exists():
        events.rename(events.with_name(f"events.{len(session.journal.lines)}.jsonl"))
    _start(session, box)


def _start(session: Session, box: Box, more: tuple[tuple[str, str], ...] = ()) -> None:
    start = scripts.launch(session.run_id, session.plan.trainer)
    settings = "".join(f"{name}={value}\n" for name, value in more).encode()
    answer = box.run(start, input=tokens.at_launch(session.plan.env) + settings)
    if answer.exit_code != 0:
        raise Lost(f"the training could not be started: {answer.stderr[-300:]}")
    session.note("launched", state=answer.stdout.strip().splitlines()[-1], settings=dict(more))


@stage
def watch(session: Session, box: Box) -> None:
    """Follow to the end; a limit or a failure fetches the newest checkpoint before it is raised.
    Where several consumer cards hang before their first step, it is tried once without their
    reaching each other."""
    while True:
        try:
            return follow(session, box)
        except NoFirstStep:
            offer, launched = session.offer(), session.journal.last("launched")
            tried = launched is not None and bool(launched.get("settings"))
            if tried or not blame.may_lack_peers(offer.gpu_name, offer.num_gpus):
                raise
            session.screen.waiting(
                f"{offer.num_gpus} x {offer.gpu_name} hang before the first step: once more with "
                f"{'='.join(blame.PEERS)}"
            )
            box.run(scripts.kill_training(session.run_id))
            _start(session, box, (blame.PEERS,))
        except (OverBudget, Stalled, Failed, Unsuitable):
            fetch_newest(session, box)
            raise


@stage
def pull(session: Session, box: Box) -> Outcome:
    """Bring the result home, prove it whole and sane, and only then allow the box to go. A bad copy
    is fetched again."""
    staging = session.journal.folder / "result"
    staging.mkdir(exist_ok=True)
    for attempt in range(1, FETCHES + 1):
        try:
            looked = persist(session, box, lambda: retrieve.fetch(session, box, staging))
            break
        except AdapterError as e:
            session.note("bad_result", attempt=attempt, why=str(e))
            shutil.rmtree(staging)
            staging.mkdir()
            if attempt == FETCHES:
                raise
    out = retrieve.lay_out(session, staging, looked, session.journal.folder / EVENTS)
    found = looked.verified
    session.note(
        "pulled",
        sha256=found.sha256,
        bytes_out=found.size_bytes,
        tensors=found.tensors,
        adapter=str(out / ADAPTER),
    )
    return Outcome(out / ADAPTER, found.sha256, session.spent_usd())
