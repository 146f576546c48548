"""Serves a result on the run's own box through one port of this machine's loopback, until its
deadline or until the user leaves. The box's watchdog and keeper stay armed; the box is destroyed
when this client falls silent."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ops.box import serving
from ops.box.connection import Box
from ops.box.forward import Forward
from ops.box.scripts import run_folder
from ops.errors import BoxError, Failed
from ops.job import tokens
from ops.job.talk_plan import CONTEXT, RESULT, WIDTH
from ops.run import wishes
from ops.run.retry import retry_transfer
from ops.run.session import MARGIN_S, Interrupted, Session
from ops.wait import until

LOOK_S, METER_S = 1.0, 10.0  # between checks of the clock; between checks of the server
TELL_S = 5.0  # between two messages while the server loads
UP_S = 2400.0  # limit for loading, including a download of the base from the hub
VOTES = ("feedback.jsonl", "feedback.pairs.jsonl", "feedback.labels.jsonl")
VOTES_BYTES = 8 << 20  # limit of one file
KEPT_PRECISIONS = ("nf4", "int8", "fp8")  # a base trained in one of these is served in it too


@dataclass(frozen=True)
class Served:
    """A server on the box, reachable at `page`, an address that includes the token, until `ends_at`
    in unix seconds."""

    page: str
    ends_at: float


def arguments(session: Session) -> list[str]:
    """Arguments of trainer.serve.server on the box: the base, the result's name and its file."""
    job = session.plan.wire_job
    model = job["model"]
    precision = model.get("precision", "bf16")
    words = [f"--precision={precision}"] if precision in KEPT_PRECISIONS else []
    words += [f"--width={WIDTH}", f"--context={CONTEXT}", "--feedback=talk", "--port=0"]
    return ["--base", base_of(session), *words, f"{job['run_id']}={RESULT}"]


def base_of(session: Session) -> str:
    """The base model as the box addresses it: a folder, or a hub id with its revision."""
    model = session.plan.wire_job["model"]
    return model.get("path") or "@".join(filter(None, (model["base"], model.get("revision"))))


@contextmanager
def served(session: Session, box: Box) -> Iterator[Served]:
    """Start the server, wait until it listens, and forward a port to it while the block runs.
    Raises Failed with the server's last output where it ends, BoxError where the box fails."""
    token = secrets.token_urlsafe(32)
    start = serving.serve(session.run_id, session.plan.trainer, arguments(session))
    given = f"{token}\n".encode() + tokens.at_launch(session.plan.env)
    answer = retry_transfer(session, box, lambda: box.run(start, input=given))
    if answer.exit_code != 0:
        raise Failed(f"the server could not be started: {answer.stderr[-300:]}")
    port = _port(session, box)
    now = session.clock.now()
    ends_at = min(now + session.plan.talk_s, session.dies_at() - MARGIN_S)
    last = max(0.0, ends_at - now + MARGIN_S)
    retry_transfer(session, box, lambda: box.run(serving.end_in(last)))
    session.note("serving", ends_at=round(ends_at, 3))
    with Forward(box, port) as forward:
        yield Served(f"http://127.0.0.1:{forward.port}/#{token}", ends_at)


def _port(session: Session, box: Box) -> int:
    """The server's port on the box's loopback, once it listens."""
    began = told = session.clock.steady()

    def look() -> int | None:
        nonlocal told
        state, said = _look(session, box)
        if state == "ended":
            raise Failed(f"the server ended: {said[-600:]}", hint="the result is as it was")
        now = session.clock.steady()
        if now - told > TELL_S:
            told = now
            session.screen.waiting(f"the server loads the model ({now - began:.0f} s)")
        try:
            return serving.port_of(said) if state == "up" else None
        except ValueError as e:
            raise Failed(f"the server's address makes no sense: {said[:80]!r}", hint="") from e

    with session.shield.lowered(), session.own_deadline():
        left_s = min(UP_S, max(1.0, session.left_s() - MARGIN_S))
        port = until(look, every_s=LOOK_S, timeout_s=left_s, clock=session.clock)
    if port is None:
        raise Failed(f"the server was not up within {left_s / 60:.0f} minutes")
    return port


def _look(session: Session, box: Box) -> tuple[str, str]:
    answer = retry_transfer(session, box, lambda: box.run(serving.look(session.run_id)))
    try:
        return serving.parse_look(answer.stdout)
    except ValueError as e:
        raise Failed(f"the server's box makes no sense: {e}", hint="") from e


def hold(session: Session, box: Box, told: Served, votes: Path) -> None:
    """Keep the box until `told.ends_at` or until the user ends it. Meanwhile update the page's cost
    meter and the screen, and append rows of votes to the folder `votes`. Raises Failed where the
    server ends, Lost or Preempted where the box is gone."""
    rows = _Votes(session, box, votes)
    try:
        with session.shield.lowered(), session.own_deadline():
            while (left_s := told.ends_at - session.clock.now()) > 0:
                session.screen.talking(told.page, told.ends_at)
                _tell_meter(session, box, left_s)
                state, said = _look(session, box)
                if state == "ended":
                    raise Failed(f"the server ended: {said[-600:]}", hint="the result is as it was")
                rows.fetch()
                _wait(session, min(METER_S, left_s))
    except Interrupted:
        _leave(session, box)
    session.shield.forget()
    rows.fetch()


def _leave(session: Session, box: Box) -> None:
    """Note that the user leaves or this process must end; the paid result is at home."""
    box.close()  # a command may be sent in part
    session.note("interrupted", chosen=session.wish or wishes.DESTROY)
    session.wish = ""
    wishes.forget(session.journal.folder)


def _wait(session: Session, seconds: float) -> None:
    """Wait in unscaled seconds, since people are chatting."""
    until_s = session.clock.steady() + seconds
    while session.clock.steady() < until_s:
        session.clock.sleep(LOOK_S)


def _tell_meter(session: Session, box: Box, left_s: float) -> None:
    told = {
        "usd": session.spent_usd(),
        "usd_per_hour": session.usd_per_hour(),
        "max_usd": session.plan.max_usd,
        "ends_in_s": left_s,
    }
    tell = serving.tell_meter(session.run_id)
    retry_transfer(session, box, lambda: box.run(tell, input=json.dumps(told)))


class _Votes:
    """Fetches the rows of people's votes line by line. A line that is not a JSON object, and what
    exceeds VOTES_BYTES, is not fetched."""

    def __init__(self, session: Session, box: Box, folder: Path) -> None:
        self._folder, self._box = folder, box
        self._remote = f"{run_folder(session.run_id)}/talk"
        self._taken = dict.fromkeys(VOTES, 0)

    def fetch(self) -> None:
        """Append new rows to the files of the same names here; a failure is retried by the next
        call."""
        with suppress(BoxError, OSError):
            for name, taken in self._taken.items():
                if taken < VOTES_BYTES:
                    self._taken[name] += self._fetch(name, taken)

    def _fetch(self, name: str, taken: int) -> int:
        new = self._box.read_from(f"{self._remote}/{name}", taken)
        whole = new[: new.rfind(b"\n") + 1]
        rows = [line for line in whole.splitlines() if _is_row(line)]
        if rows:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / name).open("ab") as file:
                file.write(b"\n".join(rows) + b"\n")
        return len(whole)


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def then_chat(session: Session, box: Box, votes: Path) -> None:
    """Once the result is at home, serve it on the run's own box for results.then_chat_minutes. A
    failure is shown and does not affect the result."""
    if not session.plan.talk_s:
        return
    try:
        with served(session, box) as told:
            hold(session, box, told, votes)
    except Interrupted:
        _leave(session, box)
    except (BoxError, Failed) as e:
        session.screen.waiting(f"no conversation any more: {e}")
