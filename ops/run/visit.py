"""Visits to the box of a run, over the run's key and its pinned host key: a shell, a command, a
forwarded port.

A visitor owns nothing. It writes no line into the journal, pins no key, and renews no lease: a box
that its owner left ends at the moment at which it would have ended without the visit.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ops.box.connection import Box
from ops.box.forward import Forward
from ops.box.interact import interact, pipe
from ops.box.scripts import run_folder
from ops.errors import BoxError, JournalError, Lost, NeverReady, Preempted, PreflightError
from ops.market.client import Vast
from ops.run import people, place
from ops.run.journal import last
from ops.run.meter import may_have_box
from ops.run.rental import endpoints
from ops.run.view import Run

LOOK_S = 1.0  # between two looks at whether a forwarded box still stands
_SHELL = '"$(command -v bash || echo sh)" -l'


def shell(run: Run, vast: Vast) -> int:
    """A login shell in the run's folder on its box, in this terminal; its exit code. Raises as
    `visited`."""
    with visited(run, vast) as box:
        return interact(box, f"{_in_folder(run)}\n{_SHELL}\nexit $?")


def execute(run: Run, vast: Vast, words: Sequence[str]) -> int:
    """Run a command in the run's folder on its box and return its exit code; 128 + n where signal n
    ended it. It has a terminal where this process has one at both ends, else this process's own
    stdin, stdout and stderr. Raises as `visited`."""
    script = f"{_in_folder(run)}\n{shlex.join(words)}\nexit $?"
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with visited(run, vast) as box:
        return (interact if terminal else pipe)(box, script)


@contextmanager
def forwarded(run: Run, vast: Vast, port: int, local: int = 0) -> Iterator[Forward]:
    """A port of this machine's loopback that leads to `port` of the box's own, while the block
    runs: `local`, or a free one for 0. Raises as `visited`, and PreflightError where `local` cannot
    be had."""
    with visited(run, vast) as box:
        try:
            forward = Forward(box, port, local)
        except OSError as e:
            why = f"port {local} of this machine cannot be had: {e.strerror}"
            raise PreflightError(why, money="nothing was changed", hint="--port 0") from e
        with forward:
            yield forward


def wait_for_end(run: Run, look: Callable[[], None] = lambda: None) -> None:
    """Return once the run has another box than now, or none; `look` is called once a second."""
    before = _instance_id(run)
    while _instance_id(run) == before:
        look()
        time.sleep(LOOK_S)


def listens(run: Run, vast: Vast, port: int) -> bool:
    """Whether something listens at this port of the box's loopback. Raises as `visited`."""
    with visited(run, vast) as box:
        try:
            box.channel_to(port).close()
        except Lost:
            raise
        except BoxError:
            return False
        return True


@contextmanager
def visited(run: Run, vast: Vast) -> Iterator[Box]:
    """The run's box, connected. Raises JournalError for a run without one, or whose box is stopped;
    NotYours for another person's; NeverReady before its owner has pinned its key; Elsewhere where
    it was rented at another place; Preempted where vast.ai does not list it; HostKeyChanged,
    Lost."""
    with _box_of(run, vast) as box:
        try:
            box.reconnect()
            yield box
        except Lost as e:
            e.hint = f"`milktea status {run.id}` says whether its box still stands"
            raise


def _box_of(run: Run, vast: Vast) -> Box:
    instance_id = _instance_id(run)
    if instance_id is None:
        raise JournalError(
            f"{run.id} has no box: {run.status().stage}",
            money="nothing was changed",
            hint=f"`milktea logs {run.id}` shows what came home of it",
        )
    people.validate_mine(
        run.folder, hint=f"its key is theirs alone; `milktea logs {run.id}` needs none"
    )
    if run.kept and not run.is_owned:
        raise JournalError(
            f"the box of {run.id} is {run.kept}",
            money="nothing was changed",
            hint=f"`milktea resume {run.id}` starts it",
        )
    known_hosts = run.folder / f"known_hosts.{instance_id}"
    place.validate_same(run.id, place.remembered(run.journal), vast)
    instance = vast.instance(instance_id)
    if instance is None:
        raise Preempted(
            f"vast.ai does not list instance {instance_id} of {run.id}",
            money="it is not billed while it does not exist",
            hint=f"`milktea resume {run.id}` proves it and goes on elsewhere",
        )
    if not known_hosts.is_file() or not (ways := endpoints(instance)):
        raise NeverReady(
            f"the box of {run.id} starts: its owner has not connected to it yet",
            hint=f"`milktea attach {run.id}` shows when it does",
        )
    return Box(ways, "root", run.folder / "id_ed25519", known_hosts)


def _instance_id(run: Run) -> int | None:
    """The id of the instance that the run has now."""
    lines = run.journal
    rented = last(lines, "rented", "destroyed", "absent")
    if rented is None or rented.kind != "rented" or not may_have_box(lines):
        return None
    return int(rented["instance_id"])


def _in_folder(run: Run) -> str:
    return f"cd {run_folder(run.id)} 2>/dev/null || cd"
