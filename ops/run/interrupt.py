"""Interrupts in the middle of a run: which stages they may stop, and what happens then. Where the
user does not choose, what is paid for is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from ops.box import scripts
from ops.box.connection import Box
from ops.errors import Failed, MilkteaError
from ops.run import chain, retrieve, wishes
from ops.run.follow import BAD_MANIFEST, pull_folder
from ops.run.kept import kept, stop_and_keep
from ops.run.session import Detached, Interrupted, Kept, Session

P = ParamSpec("P")
R = TypeVar("R")


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

    Raises Interrupted to end a run that was not launched, Failed to end one that was, Detached to
    leave the box, Kept once it is stopped."""
    lines = session.journal.lines
    if not session.wish:
        offered = wishes.choices(lines, session.plan, session.clock.now(), attached=False)
        chosen = session.screen.choose([(c.wish, c.text) for c in offered])
        session.wish = default_wish(session) if chosen is None else chosen or wishes.GO_ON
    session.shield.forget()  # pressed again while choosing
    if session.wish in (wishes.FETCH, wishes.KEEP) and box is None and wishes.launched(lines):
        return  # a later stage has the box, and carries the wish out
    wish, session.wish = session.wish, ""
    session.note("interrupted", chosen=wish)
    wishes.forget(session.journal.folder)
    if wish == wishes.LEAVE and kept(lines) is not None:
        raise Kept
    if wish == wishes.LEAVE and wishes.works_alone(lines, session.plan):
        raise Detached
    if wish == wishes.GO_ON or (wish != wishes.DESTROY and wishes.coming_home(lines)):
        return
    if not wishes.launched(lines):
        raise Interrupted
    if wish == wishes.DESTROY or box is None:
        raise Failed("stopped by you; the box is destroyed", hint="")
    fetch_newest(session, box)
    if wish == wishes.KEEP:
        try:
            return stop_and_keep(session, box)
        except MilkteaError as e:
            session.screen.waiting(f"the box is not kept but destroyed: {e}")
    raise Failed(
        f"stopped by you; {chain.saved_words(session)}",
        hint=f"`milktea resume {session.run_id}` goes on from what is at home",
    )


def default_wish(session: Session) -> str:
    """The wish when this process has to end and nobody can be asked: leave a box that trains on
    alone; otherwise fetch the checkpoint and destroy."""
    alone = wishes.works_alone(session.journal.lines, session.plan)
    return wishes.LEAVE if alone else wishes.FETCH


def fetch_newest(session: Session, box: Box) -> None:
    """Ask the trainer to save, and pull the newest complete checkpoint. A failure only shows a
    message."""
    try:
        session.screen.waiting("the trainer saves a checkpoint")
        box.run(scripts.stop_training(session.run_id))
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
    except (MilkteaError, OSError, *BAD_MANIFEST) as e:
        session.screen.waiting(f"the newest checkpoint could not be fetched: {e}")
