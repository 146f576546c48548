"""Rents a box to chat with a result: rent, push, serve, destroy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ops.box import serving
from ops.box.connection import Box
from ops.box.interact import interact
from ops.errors import Failed
from ops.job import tokens
from ops.job.talk_plan import RESULT
from ops.market.ranking import Ranking
from ops.run.on_rented_box import on_rented_box
from ops.run.rental import destroy
from ops.run.retry import retry_transfer
from ops.run.session import Interrupted, Session, metered
from ops.run.talk import base_of, hold, served

Use = Callable[[Session, Box], None]


@metered
def rent_and_chat(session: Session, use: Use, seen: Ranking | None = None) -> None:
    """Rent a machine, push the result, let `use` chat with it, and destroy the machine. A machine
    that fails before the conversation begins is replaced by another. However this ends, no box of
    the run exists, or BoxLeaked is raised."""

    def talk(session: Session, box: Box) -> None:
        use(session, box)
        session.note("talked")

    on_rented_box(session, seen, talk, "served the result")


def in_browser(votes: Path) -> Use:
    """Chat in a browser. `Screen.talking` gets the page's address; rows of votes are saved in the
    folder `votes`."""

    def use(session: Session, box: Box) -> None:
        with served(session, box) as told:
            hold(session, box, told, votes)

    return use


def in_terminal(options: Sequence[str]) -> Use:
    """Chat in this terminal; `options` are those of trainer/serve/chat.py."""

    def use(session: Session, box: Box) -> None:
        run_id, given = session.run_id, tokens.at_launch(session.plan.env)
        ends_at = min(session.clock.now() + session.plan.talk_s, session.dies_at())
        ends = serving.end_in(ends_at - session.clock.now())
        retry_transfer(session, box, lambda: box.run(serving.keep_environment(run_id), input=given))
        retry_transfer(session, box, lambda: box.run(ends))
        session.note("serving", ends_at=round(ends_at, 3))
        words = [RESULT, "--base", base_of(session), *options]
        script = serving.terminal(run_id, session.plan.trainer, words)
        with session.shield.lowered(), session.own_deadline():
            if code := interact(box, script):
                raise Failed(f"the conversation ended with exit code {code}", hint="")

    return use


def end_conversation(session: Session) -> None:
    """Destroy the box of a conversation whose owner process is gone; it is not resumed. Raises
    Interrupted."""
    destroy(session, why="nobody talks any more")
    raise Interrupted("the conversation is over")
