"""Interrupts in the middle of a run: which stages they may stop, and what happens then. Where the
user does not choose, what is paid for is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from ops.box import scripts
from ops.box.connection import Box
from ops.errors import Failed, Lost, MilkteaError
from ops.run import chain, people, retrieve, wishes
from ops.run.follow import BAD_MANIFEST, pull_folder
from ops.run.kept import kept, stop_and_keep
from ops.run.rental import raise_if_preempted
from ops.run.session import Detached, Interrupted, Kept, Session

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
SAVE_S = 40.0  # for the trainer to end its step and save, scaled by the clock's pace
MIN_SAVE_S = 5.0
FETCH_S = 20.0  # of what is left of a box's life, to fetch what was saved
LOOK_S = 5  # of waiting in one command: a link that breaks costs no more
ANSWER_S = 15.0  # for the box to take a command and to answer
TRIES, AGAIN_S = 3, 3.0
DESTROYED = "stopped by you; the box is destroyed"


def stage(act: Callable[Concatenate[Session, P], R]) -> Callable[Concatenate[Session, P], R]:
    """Decorates a stage of the story that an interrupt may stop half way. Then the wish is carried
    out; where it is to go on, `act` is called again and does what is left to do."""

    @wraps(act)
    def wrapper(session: Session, /, *args: P.args, **kwargs: P.kwargs) -> R:
        box = next((a for a in args if isinstance(a, Box)), None)
        while True:
            try:
                with session.shield.lowered():
                    if session.wish and (box is not None or not session.may_have_box()):
                        raise Interrupted
                    return act(session, *args, **kwargs)
            except Interrupted:
                if box is not None:
                    box.close()  # a command may be half sent: the next one gets a new connection
                obey(session, box)

    return wrapper


def obey(session: Session, box: Box | None) -> None:
    """Carry out the wish, or what the user chooses now. Returns when the run is to go on.

    Raises Interrupted to end a run that was not launched or whose result is at home, Failed to end
    any other, Detached to leave the box, Kept once it is stopped."""
    lines = session.journal.lines
    if not session.wish:
        offered = wishes.choices(lines, session.plan, session.clock.now(), attached=False)
        chosen = session.screen.choose([(c.wish, c.text) for c in offered])
        session.wish = default_wish(session) if chosen is None else chosen or wishes.GO_ON
    session.shield.forget()  # pressed again while choosing
    if session.wish in (wishes.FETCH, wishes.KEEP) and box is None and wishes.launched(lines):
        return  # a later stage has the box, and carries the wish out
    wish, session.wish = session.wish, ""
    session.note("interrupted", chosen=wish, **_sender(session))
    wishes.forget(session.journal.folder)
    if wish == wishes.LEAVE and kept(lines) is not None:
        raise Kept
    if wishes.at_home(lines):
        if wish == wishes.GO_ON:
            return
        raise Interrupted
    if wish == wishes.LEAVE and wishes.works_alone(lines, session.plan):
        raise Detached
    if wish == wishes.GO_ON or (wish != wishes.DESTROY and wishes.coming_home(lines)):
        return
    if not wishes.launched(lines):
        raise Interrupted
    if wish == wishes.DESTROY or box is None:
        raise Failed(DESTROYED, hint="")
    if not fetch_newest(session, box):
        raise Failed(DESTROYED, hint="")
    if wish == wishes.KEEP:
        try:
            return stop_and_keep(session, box)
        except Kept:
            if session.wish == wishes.DESTROY:  # wished since
                raise Failed(DESTROYED, hint="") from None
            raise
        except MilkteaError as e:
            session.screen.waiting(f"the box is not kept but destroyed: {e}")
    raise Failed(
        f"stopped by you; {chain.saved_words(session)}",
        hint=f"`milktea resume {session.run_id}` goes on from what is at home",
    )


def _sender(session: Session) -> dict[str, str]:
    """Who wished, where it was another person than the run's own."""
    folder = session.journal.folder
    user = wishes.sender(folder)
    return {"user": user} if user not in ("", people.user_of(folder)) else {}


def default_wish(session: Session) -> str:
    """The wish when this process has to end and nobody can be asked: leave a box that trains on
    alone; otherwise fetch the checkpoint, where the result is not at home, and destroy."""
    if wishes.at_home(session.journal.lines):
        return wishes.FETCH
    alone = wishes.works_alone(session.journal.lines, session.plan)
    return wishes.LEAVE if alone else wishes.FETCH


def fetch_newest(session: Session, box: Box) -> bool:
    """Ask the trainer to save, and pull the newest complete checkpoint. A failure only shows a
    message. An interrupt changes nothing unless the user wishes to destroy the box now: then this
    ends at once and returns False."""
    while True:
        try:
            with session.shield.lowered():
                _save_and_fetch(session, box)
            return True
        except Interrupted:
            box.close()
            if _destroy_now(session):
                return False


def _destroy_now(session: Session) -> bool:
    """Whether the wish that has interrupted a fetch, or the user's answer now, is to destroy."""
    if not session.wish:
        spent = f"about {session.spent_usd():.3f} $ in all"
        offered = [
            (wishes.GO_ON, f"go on: the checkpoint comes home, then the box is destroyed: {spent}"),
            (wishes.DESTROY, f"destroy now, without it: {spent}"),
        ]
        session.wish = session.screen.choose(offered) or wishes.GO_ON
    session.shield.forget()  # pressed again while choosing
    wish, session.wish = session.wish, ""
    sender = _sender(session)
    wishes.forget(session.journal.folder)
    if wish == wishes.DESTROY:
        session.note("interrupted", chosen=wish, **sender)
    return wish == wishes.DESTROY


def _save_and_fetch(session: Session, box: Box) -> None:
    try:
        session.screen.waiting("the trainer saves a checkpoint")
        _save(session, box)
        _again(session, box, lambda: _fetch(session, box))
    except (MilkteaError, OSError, *BAD_MANIFEST) as e:
        session.screen.waiting(f"the newest checkpoint could not be fetched: {e}")


def _save(session: Session, box: Box) -> None:
    """Return once the trainer has ended, or after SAVE_S; sooner where the box ends itself soon."""
    pace = session.clock.pace
    left_s = max(0.0, session.left_s() - FETCH_S * pace)
    save_s = min(max(SAVE_S * pace, MIN_SAVE_S), left_s)
    ends_at = session.clock.steady() + save_s
    wait_s = max(1, min(LOOK_S, int(save_s)))
    stop = scripts.stop_training(session.run_id, wait_s)
    for _ in range(max(1, round(save_s / wait_s))):
        told = _again(session, box, lambda: box.run(stop, timeout_s=wait_s + ANSWER_S))
        if told.stdout.strip() == "ended" or session.clock.steady() >= ends_at:
            return


def _again(session: Session, box: Box, act: Callable[[], T]) -> T:
    """What `act` returns, tried TRIES times over a link that breaks. Raises Lost, Preempted."""
    for left in reversed(range(TRIES)):
        try:
            return act()
        except Lost as e:
            if not left:
                raise
            session.screen.waiting(f"the link broke ({e}); again")
            session.clock.sleep(AGAIN_S)
            raise_if_preempted(session, box)
    raise AssertionError("the last try returns or raises")


def _fetch(session: Session, box: Box) -> None:
    folder = scripts.run_folder(session.run_id)
    chain.try_to_bring_home(session, box)
    listed = box.run(
        f"cd {folder} && ls -d checkpoints/*/manifest.json stages/*/checkpoints/*/manifest.json"
        " 2>/dev/null"
    ).stdout.split()
    paths = [n.removesuffix("/manifest.json") for n in listed]
    paths = [p for p in paths if chain.home_of(session, p) is not None]
    newest = max(paths, key=chain.order_of, default=None)
    local = chain.home_of(session, newest) if newest else None
    have = chain.newest_checkpoint(session)
    here = have and have.relative_to(session.journal.folder).as_posix()
    if newest and local and (not here or chain.order_of(newest) > chain.order_of(here)):
        max_bytes = retrieve.checkpoint_bytes(session.plan.workload)
        moved = pull_folder(box, f"{folder}/{newest}", local, None, max_bytes=max_bytes)
        session.note("checkpoint", step=int(local.name), folder=str(local), bytes_out=moved)
