"""`rent-and-train` typed in terminals that go away: the run is not theirs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from machine import needs

import milktea
import rig
from ops.fakevast import FakeVast
from ops.run import journal
from ops.wait import until

ROOT = Path(__file__).parents[3]
JOB = """
name = "typed"
model = {{ base = "{model}", precision = "fp32" }}
data = {{ files = ["{data}"] }}
lora = {{ r = 4, lora_alpha = 8, target_modules = ["q_proj"] }}
limits = {{ max_usd = 1.0, max_hours = 2.0 }}
image = {{ ref = "{image}", trainer = "image", size_gib = 0.4 }}
results = {{ folder = "out" }}
"""


@pytest.fixture
def typed(own: rig.Rig, fake: FakeVast) -> str:
    """The command as a line of sh, with what it needs of the environment."""
    model = rig.tiny_model(own.folder / "stub")
    job = own.folder / "job.toml"
    job.write_text(JOB.format(model=model, data=own.data, image=rig.IMAGE))
    env = {"VAST_URL": fake.url, "VAST_API_KEY": fake.api_key, "MILKTEA_PACE": str(rig.PACE)}
    env |= {"MILKTEA_RUNS": str(own.runs), "PYTHONPATH": str(ROOT)}
    given = " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
    command = [sys.executable, "-m", "ops.cli", "rent-and-train", str(job), "--yes"]
    return f"env {given} {shlex.join(command)}"


def came(own: rig.Rig, kind: str) -> milktea.Run:
    """The one run, once its journal has a line of this kind."""

    def look() -> milktea.Run | None:
        found = [r for r in milktea.runs(own.runs) if journal.last(r.journal, kind)]
        return found[0] if found else None

    run = until(look, every_s=0.1, timeout_s=120)
    assert run is not None, f"no line {kind!r} came"
    return run


def test_killing_the_tmux_session_leaves_the_run_and_its_box(
    own: rig.Rig, fake: FakeVast, typed: str
) -> None:
    needs("tmux")
    (own.image / "pause").touch()
    tmux = ["tmux", "-S", str(own.folder / "tmux"), "-f", "/dev/null"]
    subprocess.run([*tmux, "new-session", "-d", "-s", "milktea", typed], check=True, timeout=30)
    run = came(own, "attached")
    came(own, "launched")
    subprocess.run([*tmux, "kill-server"], check=True, timeout=30)
    came(own, "detached")
    (own.image / "pause").unlink()
    assert milktea.attach(run).adapter is not None
    assert sum(r["route"] == "create" for r in fake.requests) == 1


def test_a_shell_that_ends_leaves_a_detached_run(own: rig.Rig, fake: FakeVast, typed: str) -> None:
    needs("nohup")
    words = f"nohup {typed} --detach --json >{shlex.quote(str(own.folder))}/said"
    subprocess.run(["sh", "-c", words], check=True, timeout=120, start_new_session=True)
    told = json.loads((own.folder / "said").read_text().splitlines()[-1])
    run = milktea.find_run(told["run_id"], own.runs)
    assert told["kind"] == "detached" and milktea.attach(run).adapter is not None
    assert journal.last(run.journal, "owned")["pid"] != os.getpid()


def test_a_run_in_the_foreground_ends_its_terminal_as_the_run_ends(
    own: rig.Rig, fake: FakeVast, typed: str
) -> None:
    (own.image / "fail").touch()
    done = subprocess.run(
        ["sh", "-c", f"{typed} --foreground"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 6 and "exit code 4: planted" in done.stderr
    [run] = milktea.runs(own.runs)
    assert f"milktea logs {run.id}" in done.stderr and run.owner == ""
