"""The owner of a run, in this process: its signals, what it hears, what it tells, and its exit
codes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rig
from ops import detached
from ops.errors import JournalError, OverBudget
from ops.fakevast import FakeVast
from ops.market.client import Provider, Vast
from ops.market.ranking import Ranking
from ops.run import journal, supervisor, wishes
from ops.run.journal import Journal
from ops.run.session import Interrupted, Session
from ops.run.supervisor import FileScreen, error_facts, is_watched, supervise
from ops.wait import RealClock, until


@pytest.fixture
def session(own: rig.Rig) -> Iterator[Session]:
    """A client of a run that has rented nothing; nobody answers at its address."""
    plan = own.plan()
    with Journal(own.runs / plan.run_id) as held:
        yield rig.client(plan, held, "http://127.0.0.1:9", "key")


def vast_of(fake: FakeVast) -> Vast:
    return Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))


def planned(own: rig.Rig, **more: Any) -> Path:
    """The folder of a run that is planned, and that nobody owns."""
    plan = own.plan(**more)
    with Journal(own.runs / plan.run_id) as held:
        held.append("planned", **plan.to_line())
        return held.folder


# -- signals ---------------------------------------------------------------------------------------

ENDS = [signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", [*ENDS, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_waits_until_it_may_interrupt_and_only_some_of_them_wish(
    session: Session, number: signal.Signals
) -> None:
    before = {n: signal.getsignal(n) for n in (*ENDS, signal.SIGINT, signal.SIGUSR1)}
    with supervisor._signals(session):
        os.kill(os.getpid(), number)
        time.sleep(0)
        assert session.wish == (wishes.FETCH if number in ENDS else "")
        with pytest.raises(Interrupted), session.shield.lowered():
            pass
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_signal_does_not_take_the_place_of_a_wish(session: Session) -> None:
    session.wish = wishes.DESTROY
    with supervisor._signals(session):
        os.kill(os.getpid(), signal.SIGTERM)
    assert session.wish == wishes.DESTROY


def test_in_another_thread_than_the_first_no_signal_is_handled(session: Session) -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def other() -> None:
        with supervisor._signals(session):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [before]


# -- what it hears ---------------------------------------------------------------------------------


def test_a_wish_interrupts_the_story_once(session: Session) -> None:
    listener = supervisor._Listener(session, threading.main_thread().ident)
    folder = session.journal.folder
    with supervisor._signals(session):
        listener.look()
        assert session.wish == ""
        wishes.send(folder, wishes.FETCH)
        for _ in range(2):
            listener.look()
            time.sleep(0)
        assert session.wish == wishes.FETCH
        with pytest.raises(Interrupted), session.shield.lowered():
            pass
        session.wish = ""
        listener.look()
        with session.shield.lowered():
            assert session.wish == "", "the same wish is not heard twice"
        wishes.forget(folder)
        listener.look()
        wishes.send(folder, wishes.DESTROY)
        listener.look()
        time.sleep(0)
        assert session.wish == wishes.DESTROY, "the next one is"
        session.shield.forget()


def test_a_story_outside_the_first_thread_is_not_interrupted(session: Session) -> None:
    wishes.send(session.journal.folder, wishes.FETCH)
    supervisor._Listener(session, None).look()
    assert session.wish == ""


def test_terminals_that_come_and_go_are_in_the_journal(session: Session) -> None:
    listener, folder = supervisor._Listener(session, None), session.journal.folder
    listener.look()
    assert not is_watched(folder)
    with open(folder / supervisor.WATCHED, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        listener.look()
        listener.look()
        assert is_watched(folder)
    listener.look()
    kinds = [line.kind for line in session.journal.lines]
    assert kinds == ["planned", "attached", "detached"]


def test_wishes_are_looked_for_while_the_story_runs(session: Session) -> None:
    with supervisor._signals(session), supervisor._listening(session):
        wishes.send(session.journal.folder, wishes.FETCH)
        assert until(lambda: session.wish or None, every_s=0.02, timeout_s=60) == wishes.FETCH
        session.shield.forget()
    assert not any(thread.name == "wishes" for thread in threading.enumerate())


# -- how it ends -----------------------------------------------------------------------------------


def test_an_error_is_kept_with_what_a_terminal_needs_to_raise_it_again() -> None:
    error = OverBudget("too dear", hint="raise it")
    error.money = "spent 1 $"
    assert error_facts(error) == {
        "what": "OverBudget: too dear",
        "error": "OverBudget",
        "exit_code": error.exit_code,
        "money": "spent 1 $",
        "hint": "raise it",
        "said": "too dear",
    }
    assert error_facts(ValueError("ours")) == {
        "what": "ValueError: ours",
        "error": "ValueError",
        "exit_code": 1,
    }


def test_a_run_that_comes_home_has_exit_code_0_and_one_that_cannot_its_errors(
    own: rig.Rig, fake: FakeVast
) -> None:
    begun: list[bool] = []
    folder = planned(own)
    assert supervisor.own(folder, vast_of(fake), lambda: begun.append(journal.is_held(folder))) == 0
    assert begun == [True]
    assert journal.read(folder)[1].kind == "owned"
    poor = planned(own, max_usd=0.0001)
    code = supervisor.own(poor, vast_of(fake))
    last = journal.read(poor)[-1]
    assert last.kind == "failed" and last["exit_code"] == code > 1


class Interrupting(rig.Silent):
    """Presses Ctrl-C when a line of this kind is written, and chooses `choice`."""

    def __init__(self, kind: str, choice: str) -> None:
        super().__init__(choice)
        self.kind = kind

    def line(self, line: Any) -> None:
        super().line(line)
        if line.kind == self.kind:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_that_is_ended_before_its_training_leaves_nothing_and_says_so(
    own: rig.Rig, fake: FakeVast
) -> None:
    with Journal(planned(own)) as held:
        plan = rig.client(own.plan(), held, fake.url, fake.api_key).plan
        screen = Interrupting("booted", wishes.DESTROY)
        session = rig.client(plan, held, fake.url, fake.api_key, screen=screen)
        with pytest.raises(Interrupted, match="no box of this run is left; spent 0"):
            supervise(session)
        line = held.last("failed")
        assert line is not None and line["exit_code"] == 130 and line["error"] == "Interrupted"
    assert fake.instances() == []


def test_a_conversation_is_held_by_its_owner_and_ended_by_the_next_one(session: Session) -> None:
    session.plan = replace(session.plan, trains=False)
    held: list[Session] = []
    supervise(session, talk=held.append)
    assert held == [session]
    with pytest.raises(Interrupted, match="no box of this run is left"):
        supervise(session)


def test_an_interrupted_owner_ends_with_130(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = planned(own)
    wishes.send(folder, wishes.DESTROY)
    monkeypatch.setattr(supervisor, "LISTEN_S", 0.001)
    assert supervisor.own(folder, vast_of(fake)) == 130


def test_the_process_says_that_it_is_ready_and_takes_its_pace_from_its_environment(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = planned(own, max_usd=0.0001)
    seen: list[Vast] = []

    def owning(owned: Path, vast: Vast, begun: Callable[[], None]) -> int:
        assert owned == folder
        seen.append(vast)
        begun()
        return 7

    monkeypatch.setattr(supervisor, "own", owning)
    monkeypatch.setenv("VAST_URL", fake.url)
    monkeypatch.setenv("VAST_API_KEY", fake.api_key)
    for pace, wanted in (("0.25", 0.25), ("", 1.0)):
        ready, fd = os.pipe()
        monkeypatch.setenv("MILKTEA_PACE", pace)
        monkeypatch.setattr(sys, "argv", ["supervisor", str(folder), str(fd)])
        assert supervisor.main() == 7
        with open(ready, "rb") as pipe:
            assert pipe.read() == b"ready"
        assert seen[-1].clock.pace == wanted and seen[-1].provider.url == fake.url


def test_an_owner_that_does_not_come_up_shows_the_end_of_what_it_said(
    own: rig.Rig, fake: FakeVast
) -> None:
    folder = planned(own)
    (folder / journal.FILE).write_text("no line\n" + (folder / journal.FILE).read_text())
    (folder / supervisor.LOG).write_text("x" * 3000)
    with pytest.raises(JournalError, match="did not come up: ") as caught:
        supervisor.start(folder, vast_of(fake))
    said = str(caught.value).split("did not come up: ", 1)[1]
    assert said == (folder / supervisor.LOG).read_text()[-1000:].strip() and "x" in said
    assert "--foreground" in caught.value.hint
    assert detached.started[-1].wait(60) != 0


def test_an_owner_that_is_started_is_a_session_of_its_own_that_has_seen_the_market(
    own: rig.Rig, fake: FakeVast
) -> None:
    folder = planned(own, max_usd=0.0001)
    number = supervisor.start(folder, vast_of(fake), Ranking([], [], []))
    assert os.getsid(number) == number
    assert stat.S_IMODE((folder / supervisor.LOG).stat().st_mode) == 0o600
    code = detached.started[-1].wait(60)
    line = journal.read(folder)[-1]
    assert line.kind == "failed" and line["exit_code"] == code > 1
    assert line["error"] == "NoOffer", "that market was empty"
    assert not (folder / supervisor.MARKET).exists(), "read once"


# -- the market that the user saw ------------------------------------------------------------------


@pytest.mark.parametrize(("age_s", "fresh"), [(299.0, True), (300.0, False), (300.5, False)])
def test_the_ranking_that_was_shown_is_good_for_five_minutes_and_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age_s: float, fresh: bool
) -> None:
    path = tmp_path / supervisor.MARKET
    path.write_bytes(supervisor._market.dump_json(Ranking([], [], [])))
    os.utime(path, (1000.0, 1000.0))
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(time=lambda: 1000.0 + age_s))
    assert (supervisor._saved_ranking(tmp_path) is not None) is fresh
    assert not path.exists() and supervisor._saved_ranking(tmp_path) is None


# -- what it tells ---------------------------------------------------------------------------------


def test_a_line_is_told_four_times_a_second_and_the_same_one_every_five_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=lambda: 1000.12345 + now[0])
    monkeypatch.setattr(supervisor, "time", clock)
    with FileScreen(tmp_path) as screen:
        for at, message in (
            (0.0, "a"),
            (0.2, "b"),  # too soon
            (0.25, "b"),
            (5.0, "b"),  # the same
            (5.25, "b"),
            (5.3, "c"),  # too soon
            (5.5, "\ud800"),
        ):
            now[0] = at
            screen.waiting(message)
        screen.moving("push", 1, 2)
    screen.waiting("after the end")
    path = tmp_path / supervisor.PROGRESS
    rows = [json.loads(line) for line in path.read_text("ascii").splitlines()]
    assert [(r["t"], r.get("message")) for r in rows] == [
        (1000.123, "a"),
        (1000.373, "b"),
        (1005.373, "b"),
        (1005.623, "\ud800"),
        (1005.623, None),
    ]
    assert rows[-1] == {"t": 1005.623, "kind": "moving", "what": "push", "done": 1, "total": 2}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_folder_that_takes_no_file_only_tells_less(tmp_path: Path) -> None:
    with FileScreen(tmp_path / "not there") as screen:
        screen.waiting("x")
        assert screen.choose([("go on", "")]) is None
