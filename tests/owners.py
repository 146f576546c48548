"""Runs that a process of their own owns, and what tests wait for of them."""

from __future__ import annotations

import os
import pty
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import milktea
import rig
from ops.box import scripts
from ops.fakevast import FakeVast
from ops.run import journal, supervisor
from ops.run.journal import Journal, Line
from ops.wait import until

ROOT = Path(__file__).parents[1]


def planned(own: rig.Rig, **more: Any) -> milktea.Run:
    """A run whose plan is made, and that nobody owns yet."""
    plan = own.plan(**more)
    with Journal(own.runs / plan.run_id) as held:
        held.append("planned", **plan.to_line())
        return milktea.Run(held.folder)


def came(what: Callable[[], Any], within_s: float = 30) -> Any:
    found = until(lambda: what() or None, every_s=0.05, timeout_s=within_s)
    assert found, "it never came"
    return found


def told(run: milktea.Run, kind: str, within_s: float = 30) -> Line:
    """The newest line of this kind, once it is there."""
    return came(lambda: journal.last(run.journal, kind), within_s)  # type: ignore[no-any-return]


def creates(fake: FakeVast) -> int:
    return sum(r["route"] == "create" for r in fake.requests)


class Forked:
    """A supervisor in a fork of the test: what the test has patched holds in it."""

    def __init__(self, run: milktea.Run, vast: milktea.Vast) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                os.setsid()
                code = supervisor.own(run.folder, vast)
            finally:
                os._exit(code)
        came(lambda: run.is_owned)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, number)
        if number == signal.SIGKILL:
            os.waitpid(self.pid, 0)

    def ended(self) -> int:
        """Its exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Heard(milktea.Quiet):
    def __init__(self, choice: str | None = None) -> None:
        super().__init__()
        self.kinds: list[str] = []
        self.events: list[Any] = []
        self.offered: list[tuple[str, str]] = []
        self._choice = choice

    def line(self, line: Line) -> None:
        self.kinds.append(line.kind)

    def event(self, event: Any, *rest: Any) -> None:
        self.events.append(event)

    def choose(self, choices: Any) -> str | None:
        self.offered = list(choices)
        return self._choice


def stop_in_time(own: rig.Rig) -> None:
    """The stub's training stands after its first step, and saves where it is asked to end."""
    (own.image / "pause").touch()
    trainer = own.image / "bin/milktea-train"
    save = "mkdir checkpoints; cp -r @F/checkpoint checkpoints/1".replace("@F", str(own.image))
    text = trainer.read_text().replace("set -e\n", f"set -e\ntrap '{save}; exit 143' TERM\n", 1)
    trainer.write_text(text)


def paused(own: rig.Rig, vast: milktea.Vast) -> milktea.Run:
    """A run with an owner of its own, whose training was launched and waits for `pause` to go."""
    (own.image / "pause").touch()
    run = planned(own)
    supervisor.start(run.folder, vast)
    told(run, "launched")
    return run


def terminal_environment(fake: FakeVast, own: rig.Rig) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("VAST")}
    env |= {"VAST_URL": fake.url, "VAST_API_KEY": fake.api_key, "MILKTEA_PACE": str(rig.PACE)}
    return env | {"MILKTEA_RUNS": str(own.runs), "PYTHONPATH": str(ROOT)}


def in_a_terminal(fake: FakeVast, own: rig.Rig, *words: str) -> tuple[int, int]:
    """(process, its terminal's other end) of a command."""
    pid, master = pty.fork()
    if pid == 0:
        env = terminal_environment(fake, own)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may be under nohup
        os.execve(sys.executable, [sys.executable, "-m", "ops.cli", *words], env)
    return pid, master


def shorten_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes that miss their client after three seconds in place of ten minutes."""
    real = scripts.environment

    def environment(*args: Any) -> dict[str, str]:
        return real(*args) | {"MILKTEA_LEASE_S": "3", "MILKTEA_WATCH_S": "1"}

    monkeypatch.setattr(scripts, "environment", environment)
    monkeypatch.setattr("ops.run.keeper.RENEW_S", 0.3)
