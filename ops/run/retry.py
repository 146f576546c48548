"""Retries of transfers: over a link that broke, or while this disk is full."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ops.box import scripts
from ops.box.connection import Box
from ops.errors import Lost, NeverReady, PreflightError
from ops.run.rental import raise_if_preempted
from ops.run.session import MARGIN_S, Session
from ops.wait import Patience, until

T = TypeVar("T")
FULL_PATIENCE_S, FULL_EVERY_S = 1800.0, 10.0  # for this disk to have room for a file of the box


def retry_transfer(session: Session, box: Box, action: Callable[[], T]) -> T:
    """Repeat a transfer over broken connections and while this disk is full, and return its result.

    Raises Lost when the box does not answer for LEASE_S although vast.ai does, or when its deadline
    is near; PreflightError when this disk is full for FULL_PATIENCE_S; Preempted when the box was
    taken away."""
    full_until = session.clock.steady() + FULL_PATIENCE_S * session.clock.pace
    while True:
        try:
            with session.own_deadline():
                return action()
        except Lost as e:
            session.screen.waiting(f"the link broke ({e}); again")
            if not reconnect(session, box):
                raise
        except PreflightError as e:  # this disk is full: the file waits on the box
            if session.clock.steady() > full_until or session.left_s() < 2 * MARGIN_S:
                raise
            session.screen.waiting(f"{e}; make room: it is tried again")
            session.clock.sleep(FULL_EVERY_S)


def reconnect(session: Session, box: Box) -> bool:
    """Whether the box accepts a connection again within LEASE_S; time in which vast.ai does not
    answer either is not counted. Raises Preempted when it was taken away, HostKeyChanged."""
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
