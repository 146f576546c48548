"""A run is owned by a process of its own: terminals come, wish and go; it dies, and another goes on
with the same box."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from machine import NOT_HERE, needs
from owners import (
    Forked,
    Heard,
    came,
    creates,
    in_a_terminal,
    paused,
    planned,
    shorten_the_lease,
    stop_in_time,
    terminal_environment,
    told,
)

import milktea
import rig
from ops.box import pull as pulling
from ops.box import push as pushing
from ops.errors import Failed, JournalError
from ops.fakevast import FakeVast
from ops.job.plan import Plan
from ops.market.provider import Provider
from ops.run import journal, supervisor, wishes
from ops.run.attach import _File
from ops.run.journal import Journal, Line
from ops.wait import RealClock

ROOT = Path(__file__).parents[3]


@pytest.fixture
def vast(fake: FakeVast) -> milktea.Vast:
    return milktea.Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))


# -- to its end ------------------------------------------------------------------------------------


def test_a_detached_run_comes_home_and_whoever_attaches_sees_all_of_it(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast
) -> None:
    run = planned(own)
    supervisor.start(run.folder, vast)
    screen = Heard()
    assert milktea.attach(run, screen=screen).adapter is not None
    kinds = [line.kind for line in run.journal]
    assert screen.kinds == kinds and not run.is_owned and run.owner == ""
    assert {"owned", "attached", "pulled", "destroyed"} <= set(kinds)
    assert [type(e).__name__ for e in screen.events] == [type(e).__name__ for e in run.events()]
    again = Heard()
    milktea.attach(run, screen=again)
    assert again.kinds == screen.kinds, "a run that has ended tells the same"


def test_an_error_of_the_run_reaches_whoever_watches_with_its_class_money_and_hint(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast
) -> None:
    (own.image / "fail").touch()
    run = planned(own)
    supervisor.start(run.folder, vast)
    with pytest.raises(Failed, match="exit code 4: planted") as failed:
        milktea.attach(run)
    assert failed.value.exit_code == 6 and "spent 0." in failed.value.money
    assert "milktea logs" in failed.value.hint


def test_a_run_has_one_owner_and_its_files_are_nobody_elses_to_read(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast
) -> None:
    (own.image / "pause").touch()
    run = planned(own)
    supervisor.start(run.folder, vast)
    with pytest.raises(JournalError, match="another milktea"):
        supervisor.start(run.folder, vast)
    told(run, "launched")
    assert wishes.send(run.folder, "fetch") == "fetch"
    names = (supervisor.LOG, supervisor.PROGRESS)
    assert [n for n in names if (run.folder / n).stat().st_mode & 0o077] == []
    with pytest.raises(Failed):
        milktea.attach(run)


# -- wishes ----------------------------------------------------------------------------------------


def test_of_two_wishes_the_first_one_holds_and_the_second_is_told_so(tmp_path: Path) -> None:
    assert wishes.send(tmp_path, "fetch") == "fetch"
    assert wishes.send(tmp_path, "destroy") == "fetch" == wishes.read(tmp_path)
    assert (tmp_path / wishes.FILE).stat().st_mode & 0o077 == 0
    assert [p.name for p in tmp_path.iterdir()] == [wishes.FILE]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"wish":"format"}', '{"wish":3}', "\xff" * 9000])
def test_a_wish_that_cannot_be_understood_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / wishes.FILE).write_text(text)
    assert wishes.read(tmp_path) is None


@pytest.mark.parametrize(("wish", "saved"), [("fetch", True), ("destroy", False)])
def test_stop_ends_a_training_run_as_it_was_wished(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast, wish: Any, saved: bool
) -> None:
    stop_in_time(own)
    run = planned(own)
    supervisor.start(run.folder, vast)
    told(run, "event")
    assert milktea.stop(run, wish, vast=vast) == run
    assert told(run, "interrupted")["chosen"] == wish
    assert (journal.last(run.journal, "checkpoint") is not None) is saved
    assert journal.last(run.journal, "destroyed") is not None and run.adapter is None
    assert wishes.read(run.folder) is None, "it is fulfilled"


def test_stop_before_the_training_leaves_nothing_and_resume_goes_on(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned(own)
    monkeypatch.setattr(pushing, "push", lambda *a, **k: time.sleep(60))
    owner = Forked(run, vast)
    told(run, "connected")
    milktea.stop(run, "fetch", vast=vast)
    assert owner.ended() == 130 and fake.instances() == []
    monkeypatch.undo()
    assert milktea.resume(run, vast=vast, root=own.runs).adapter is not None


def test_a_result_on_its_way_home_comes_home_although_somebody_wishes_a_checkpoint(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned(own)
    real, slow = pulling.pull, own.folder / "slow"
    slow.touch()

    def pull(box: Any, remote: str, *rest: Any, **more: Any) -> Any:
        while slow.exists() and "/result/" in remote:
            time.sleep(0.05)
        return real(box, remote, *rest, **more)

    monkeypatch.setattr(pulling, "pull", pull)
    owner = Forked(run, vast)
    told(run, "ended")
    wishes.send(run.folder, "fetch")
    told(run, "interrupted")
    slow.unlink()
    assert milktea.attach(run).adapter is not None
    assert owner.ended() == 0 and creates(fake) == 1


def test_a_told_file_that_begins_anew_is_read_from_its_beginning(tmp_path: Path) -> None:
    told, path = _File(tmp_path / "told"), tmp_path / "told"
    assert told.new_lines() == []
    path.write_text('{"a":1}\n{"b":2}\n{"c"')
    assert told.new_lines() == ['{"a":1}', '{"b":2}']
    path.write_text('{"d":4}\n')
    assert told.new_lines() == ['{"d":4}'] and told.new_lines() == []


# -- terminals -------------------------------------------------------------------------------------


def read_until(master: int, text: str) -> str:
    said = ""
    while text not in said:
        said += os.read(master, 4096).decode("utf-8", "replace")
    return said


def test_closing_the_terminal_detaches_and_the_journal_says_so(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast
) -> None:
    run = paused(own, vast)
    pid, master = in_a_terminal(fake, own, "attach", run.id)
    told(run, "attached")
    assert run.owner == "live"
    os.close(master)  # the kernel sends SIGHUP
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGHUP
    told(run, "detached")
    assert run.owner == "detached" and journal.last(run.journal, "interrupted") is None
    (own.image / "pause").unlink()
    assert milktea.attach(run).adapter is not None
    assert creates(fake) == 1


CGROUP = Path("/sys/fs/cgroup/pids/milktea-tried")  # of cgroup v1; v2 has one hierarchy
if Path("/sys/fs/cgroup/cgroup.controllers").exists():
    CGROUP = Path("/sys/fs/cgroup/milktea-tried")
SESSIONS = {  # how each is begun with ./resume.sh and ended, and whether its end is the owner's
    "tmux": ("tmux -S ./socket new-session -d ./resume.sh", "tmux -S ./socket kill-server", False),
    "nohup": ("nohup ./resume.sh >/dev/null 2>&1 & echo $! >pid", "kill -9 $(cat pid)", False),
    "systemd-run": (
        "systemd-run --user --collect --unit milktea-tried $PWD/resume.sh",
        "systemctl --user stop milktea-tried",
        True,
    ),
    # a container's processes end with its first one
    "unshare": (
        "unshare --pid --fork --mount-proc --kill-child ./resume.sh >/dev/null 2>&1 & echo $! >pid",
        "kill -9 $(cat pid)",
        True,
    ),
    # what a service manager does when a unit ends: it kills all that the unit's cgroup holds
    "cgroup": (
        f"mkdir {CGROUP} && sh -c 'echo $$ >{CGROUP}/cgroup.procs; exec ./resume.sh' "
        ">/dev/null 2>&1 &",
        f"kill -9 $(cat {CGROUP}/cgroup.procs); until rmdir {CGROUP}; do sleep 0.1; done",
        True,
    ),
}


def can_begin(tool: str) -> bool:
    """Whether this machine and its user may begin such a session."""
    match tool:
        case "systemd-run":
            return Path("/run/systemd/system").exists()
        case "cgroup":
            return os.access(CGROUP.parent, os.W_OK) and (CGROUP.parent / "cgroup.procs").exists()
        case "unshare":
            words = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
            return subprocess.run(words, capture_output=True).returncode == 0
        case _:
            return True


@pytest.mark.slow
@pytest.mark.parametrize("tool", SESSIONS)
def test_a_run_outlives_the_session_that_it_was_started_in(
    own: rig.Rig, fake: FakeVast, tool: str
) -> None:
    """But for one that ends all that was started in it: the box trains on, and the adapter comes
    home by `resume`."""
    if tool != "cgroup":
        needs(tool)
    if not can_begin(tool):
        pytest.skip(f"a session of {tool}: {NOT_HERE}")
    begin, end, ends_the_owner = SESSIONS[tool]
    (own.image / "pause").touch()
    run = planned(own)
    names = ("VAST_URL", "VAST_API_KEY", "MILKTEA_PACE", "MILKTEA_RUNS", "PYTHONPATH")
    env = terminal_environment(fake, own)
    given = "".join(f"export {name}={shlex.quote(env[name])}\n" for name in names)
    script = own.folder / "resume.sh"
    script.write_text(f"#!/bin/sh\n{given}exec {sys.executable} -m ops.cli resume {run.id}\n")
    script.chmod(0o700)
    subprocess.run(begin, shell=True, check=True, cwd=own.folder, timeout=60)
    try:
        told(run, "launched", within_s=90)
    finally:
        subprocess.run(end, shell=True, check=True, cwd=own.folder, timeout=60)
    if ends_the_owner:
        came(lambda: not run.is_owned)
    else:
        assert run.is_owned
    (own.image / "pause").unlink()
    vast = milktea.Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))
    done = milktea.attach(run) if run.is_owned else milktea.resume(run, vast=vast, root=own.runs)
    assert done.adapter is not None and creates(fake) == 1


def test_ctrl_c_offers_priced_choices_and_pressed_again_it_takes_the_kind_one(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast
) -> None:
    run = paused(own, vast)
    pid, master = in_a_terminal(fake, own, "attach", run.id)
    told(run, "attached")
    os.write(master, b"\x03")
    said = read_until(master, "choose 1 or 2 or 3 [1]")
    for words in ("leave; the run goes on", "fetch the checkpoint", "destroy now", "$ in all"):
        assert words in said
    os.write(master, b"\x03")
    assert f"milktea attach {run.id}" in read_until(master, "ends it")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(master)
    assert run.is_owned and journal.last(run.journal, "interrupted") is None
    (own.image / "pause").unlink()
    assert milktea.attach(run).adapter is not None


def test_ctrl_c_where_nobody_can_be_asked_leaves_the_run_to_its_owner(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast
) -> None:
    run = paused(own, vast)

    class Pressing(Heard):
        def line(self, line: Line) -> None:
            super().line(line)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(milktea.Interrupted, match="the run goes on without this terminal"):
        milktea.attach(run, screen=Pressing())
    with pytest.raises(Failed, match="stopped by you"):
        milktea.attach(run, screen=Pressing("destroy"))
    assert journal.last(run.journal, "destroyed") is not None


def test_json_is_one_object_a_line_and_done_comes_last(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast
) -> None:
    run = planned(own)
    supervisor.start(run.folder, vast)
    env = os.environ | {"MILKTEA_RUNS": str(own.runs)}
    for words in (("attach", run.id, "--json"), ("logs", "-f", run.id, "--json")):
        done = subprocess.run(
            [sys.executable, "-m", "ops.cli", *words],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        rows = [json.loads(text) for text in done.stdout.splitlines()]
        assert done.returncode == 0 and len(rows) > 3
        assert rows[-1]["kind"] == "done" and rows[-1]["sha256"] == run.sha256


def test_stop_and_status_as_they_are_typed(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast
) -> None:
    run = paused(own, vast)
    env = {k: v for k, v in os.environ.items() if not k.startswith("VAST")}
    env |= {"MILKTEA_RUNS": str(own.runs)}

    def milktea_says(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "ops.cli", *words]
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, input="", timeout=60
        )
        return done.returncode, done.stdout + done.stderr

    code, said = milktea_says("status")
    assert code == 0 and re.search(rf"{run.id}  detached \d+ (s|min)  training  box ", said)
    code, said = milktea_says("stop", run.id)
    assert code == 2 and f"milktea stop {run.id} --fetch" in said, "nobody can be asked"
    code, said = milktea_says("stop", run.id, "--destroy", "--json")
    assert code == 0 and json.loads(said.splitlines()[-1])["kind"] == "stopped"
    code, said = milktea_says("stop", run.id, "--fetch")
    assert code == 8 and "has no box" in said


# -- an owner that sleeps or dies ------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_the_lease(monkeypatch)


def held_in(stage: str, own: rig.Rig, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the run stand in this stage, where it is killed; the journal's line that says so."""

    def stands(*args: Any, **more: Any) -> None:
        time.sleep(100)

    match stage:
        case "push":
            monkeypatch.setattr(pushing, "push", stands)
            return "connected"
        case "train":
            (own.image / "pause").touch()
            return "launched"
        case _:
            real = pulling.pull

            def pull(box: Any, remote: str, *rest: Any, **more: Any) -> Any:
                return (stands if "/result/" in remote else real)(box, remote, *rest, **more)

            monkeypatch.setattr(pulling, "pull", pull)
            return "ended"


STAGES = pytest.mark.parametrize("stage", ["train", "pull"])


@pytest.mark.parametrize(
    ("how", "stage"),
    [
        pytest.param(signal.SIGKILL, "train", id="SIGKILL-train"),
        pytest.param(signal.SIGKILL, "pull", id="SIGKILL-pull", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, "train", id="SIGSTOP-train", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, "pull", id="SIGSTOP-pull", marks=pytest.mark.slow),
    ],
)
def test_with_finish_the_same_box_brings_the_adapter_home_after_any_silence(
    own: rig.Rig,
    fake: FakeVast,
    vast: milktea.Vast,
    monkeypatch: pytest.MonkeyPatch,
    impatient: None,
    stage: str,
    how: signal.Signals,
) -> None:
    run = planned(own)
    with monkeypatch.context() as patched:
        mark = held_in(stage, own, patched)
        owner = Forked(run, vast)
        told(run, mark)
    owner.kill(how)
    rented = creates(fake)
    time.sleep(6)  # twice the lease: an absence has no event to wait for
    [box] = fake.instances()
    (own.image / "pause").unlink(missing_ok=True)
    if how == signal.SIGSTOP and stage == "train":
        owner.kill(signal.SIGCONT)
        assert milktea.attach(run).adapter is not None and owner.ended() == 0
    else:
        if how == signal.SIGSTOP:
            owner.kill()
        assert run.owner == "alone"
        with pytest.raises(JournalError, match="was killed") as killed:
            milktea.attach(run)
        assert f"milktea resume {run.id}" in killed.value.hint and "at " in killed.value.money
        assert milktea.resume(run, vast=vast, root=own.runs).adapter is not None
    assert creates(fake) == rented and told(run, "destroyed")["instance_id"] == box["id"]


@STAGES
def test_with_destroy_the_box_is_gone_and_resume_goes_on_elsewhere(
    own: rig.Rig,
    fake: FakeVast,
    vast: milktea.Vast,
    monkeypatch: pytest.MonkeyPatch,
    impatient: None,
    stage: str,
) -> None:
    run = planned(own, when_silent="destroy")
    with monkeypatch.context() as patched:
        mark = held_in(stage, own, patched)
        owner = Forked(run, vast)
        told(run, mark)
    owner.kill()
    came(lambda: not fake.instances(), within_s=60)
    (own.image / "pause").unlink(missing_ok=True)
    assert milktea.resume(run, vast=vast, root=own.runs).adapter is not None
    assert [line.kind for line in run.journal].count("rented") == 2


@pytest.mark.parametrize("when_silent", ["finish", pytest.param("destroy", marks=pytest.mark.slow)])
def test_before_the_launch_a_dead_owners_box_is_gone_by_itself(
    own: rig.Rig,
    fake: FakeVast,
    vast: milktea.Vast,
    monkeypatch: pytest.MonkeyPatch,
    impatient: None,
    when_silent: str,
) -> None:
    run = planned(own, when_silent=when_silent)
    with monkeypatch.context() as patched:
        mark = held_in("push", own, patched)
        owner = Forked(run, vast)
        told(run, mark)
    owner.kill()
    came(lambda: not fake.instances(), within_s=60)
    assert milktea.resume(run, vast=vast, root=own.runs).adapter is not None


@pytest.mark.parametrize(("when_silent", "left"), [("finish", 1), ("destroy", 0)])
def test_a_machine_that_shuts_down_leaves_a_box_that_works_alone_and_no_other(
    own: rig.Rig, fake: FakeVast, vast: milktea.Vast, when_silent: str, left: int
) -> None:
    (own.image / "pause").touch()
    run = planned(own, when_silent=when_silent)
    owner = Forked(run, vast)
    told(run, "event")
    owner.kill(signal.SIGTERM)
    assert owner.ended() == (0 if left else 6)
    assert len(fake.instances()) == left
    (own.image / "pause").unlink()
    assert milktea.resume(run, vast=vast, root=own.runs).adapter is not None
    assert creates(fake) == 2 - left


class Sleeping(RealClock):
    """A laptop that sleeps for half an hour when it is told to."""

    slept_s = 0.0

    def steady(self) -> float:
        return super().steady() + self.slept_s

    def now(self) -> float:
        return super().now() + self.slept_s


def test_half_an_hours_sleep_in_the_training_is_no_stall_of_it(
    own: rig.Rig, fake: FakeVast
) -> None:
    clock, plan = Sleeping(rig.PACE), own.plan(stall_s=900.0)
    folder = own.runs / plan.run_id

    class Dozing(rig.Silent):
        def event(self, event: Any, *rest: Any) -> None:
            clock.slept_s = 1800.0

    with Journal(folder) as held:
        session = rig.client(plan, held, fake.url, fake.api_key, screen=Dozing(), clock=clock)
        supervisor.supervise(session)
        assert Plan.from_line(held.lines[0]).stall_s == 900.0
    assert milktea.Run(folder).adapter is not None and creates(fake) == 1
