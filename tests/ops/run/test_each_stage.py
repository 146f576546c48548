"""Each stage from the launch on, and each way in which nobody looks after it for half an hour: the
adapter comes home from the same box, or by another one where silence is to end it.

Ten minutes of the box are three seconds here (`shorten_the_lease`), half an hour is nine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from owners import Forked, came, creates, in_a_terminal, planned, shorten_the_lease, told

import milktea
import rig
from ops.box import pull as pulling
from ops.errors import JournalError
from ops.fakevast import FakeVast
from ops.market.client import Vast
from ops.market.provider import Provider
from ops.run import sandbox
from ops.run.reap import reap
from ops.wait import RealClock

pytestmark = pytest.mark.slow
HALF_AN_HOUR_S = 9.0
STAGES = ("load", "train", "save", "pull", "verify", "destroy")


class Stage:
    """Makes a run stand in one of its stages until `go`; `reached` says that it stands there."""

    def __init__(self, name: str, own: rig.Rig, patched: pytest.MonkeyPatch) -> None:
        self._held, self.reached = own.folder / "held", own.folder / "reached"
        self._held.touch()
        self._trainers = {"load": own.image / "hang", "train": own.image / "pause"}.get(name)
        if self._trainers:
            self._trainers.touch()
            return
        if name in ("save", "pull"):
            word = {"save": "/checkpoints/", "pull": "/result/"}[name]
            self._hold(patched, pulling, "pull", lambda box, remote, *rest: word in remote)
        elif name == "verify":
            self._hold(patched, sandbox, "verify", lambda *told: True)
        else:
            self._hold(patched, Vast, "destroy", lambda *told: True)

    def _hold(
        self, patched: pytest.MonkeyPatch, owner: Any, name: str, here: Callable[..., bool]
    ) -> None:
        real = getattr(owner, name)

        def held(*args: Any, **more: Any) -> Any:
            while here(*args) and self._held.exists():
                self.reached.touch()
                time.sleep(0.05)
            return real(*args, **more)

        patched.setattr(owner, name, held)

    def came(self, run: milktea.Run) -> None:
        if self._trainers:
            told(run, "launched" if self._trainers.name == "hang" else "event")
        else:
            came(self.reached.exists)

    def go(self) -> None:
        self._held.unlink()
        if self._trainers:
            self._trainers.unlink()


@pytest.fixture
def vast(fake: FakeVast) -> Vast:
    return Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))


def standing(
    name: str, own: rig.Rig, vast: Vast, when_silent: str = "finish"
) -> tuple[milktea.Run, Forked, Stage]:
    """A run that stands in this stage, and its owner."""
    with pytest.MonkeyPatch.context() as patched:
        shorten_the_lease(patched)
        run = planned(own, when_silent=when_silent)
        stage = Stage(name, own, patched)
        owner = Forked(run, vast)
        stage.came(run)
    return run, owner, stage


@pytest.mark.parametrize("name", STAGES)
def test_an_owner_and_a_terminal_that_stand_still_for_half_an_hour_go_on_with_the_same_box(
    own: rig.Rig, fake: FakeVast, vast: Vast, name: str
) -> None:
    run, owner, stage = standing(name, own, vast)
    pid, master = in_a_terminal(fake, own, "attach", run.id)
    told(run, "attached")
    for number in (pid, owner.pid):
        os.kill(number, signal.SIGSTOP)
    time.sleep(HALF_AN_HOUR_S)
    stage.go()
    for number in (pid, owner.pid):
        os.kill(number, signal.SIGCONT)
    assert owner.ended() == 0 and run.adapter is not None and creates(fake) == 1
    os.close(master)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("name", STAGES)
def test_a_terminal_that_is_closed_changes_nothing_of_its_run(
    own: rig.Rig, fake: FakeVast, vast: Vast, name: str
) -> None:
    run, owner, stage = standing(name, own, vast)
    pid, master = in_a_terminal(fake, own, "attach", run.id)
    told(run, "attached")
    os.close(master)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGHUP
    told(run, "detached")
    time.sleep(HALF_AN_HOUR_S)
    stage.go()
    assert owner.ended() == 0 and run.adapter is not None and creates(fake) == 1


@pytest.mark.parametrize("name", STAGES)
def test_half_an_hour_after_its_owner_was_killed_a_run_goes_on_with_the_same_box(
    own: rig.Rig, fake: FakeVast, vast: Vast, name: str
) -> None:
    run, owner, stage = standing(name, own, vast)
    owner.kill()
    time.sleep(HALF_AN_HOUR_S)
    stage.go()
    [box] = fake.instances()
    if name == "destroy":  # the adapter is at home, and the box works on alone until it is reaped
        with pytest.raises(JournalError, match="is done: its adapter is"):
            milktea.resume(run, vast=vast, root=own.runs)
        assert reap(own.runs, vast, rig.Silent()).destroyed == [run.id]
    else:
        assert milktea.resume(run, vast=vast, root=own.runs).adapter is not None
    assert run.adapter is not None and creates(fake) == 1
    assert told(run, "destroyed")["instance_id"] == box["id"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("name", ("load", "train", "save", "pull"))
def test_where_silence_ends_a_box_the_run_goes_on_with_another_from_what_is_home(
    own: rig.Rig, fake: FakeVast, vast: Vast, name: str, how: signal.Signals
) -> None:
    run, owner, stage = standing(name, own, vast, "destroy")
    owner.kill(how)
    came(lambda: not fake.instances(), within_s=30)
    stage.go()
    if how == signal.SIGSTOP:
        owner.kill(signal.SIGCONT)
        assert owner.ended() == 0
    else:
        milktea.resume(run, vast=vast, root=own.runs)
    assert run.adapter is not None
    rents = [line.kind for line in run.journal].count("rented")
    if how == signal.SIGKILL:  # who resumes rents for ten minutes of silence, as a user does
        assert rents == 2
    assert rents >= 2, "a third, where this computer is too busy for the owner's leases of 3 s"
    if name == "pull":  # the checkpoint was at home
        pushed = [line["files"] for line in run.journal if line.kind == "pushed"]
        assert pushed[1] > pushed[0]
