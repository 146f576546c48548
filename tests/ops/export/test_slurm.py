"""The exported batch file under a real Slurm: two slurmd of Debian's on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import slurm
from machine import NOT_HERE, needs

import milktea

ROOT = Path(__file__).parents[3]
# the nodes' names have no address here, where the batch file lets the processes meet
SCONTROL = """#!/bin/sh
[ "$1 $2" = "show hostnames" ] && { echo 127.0.0.1; exit 0; }
exec @SCONTROL@ "$@"
"""
TRAIN = "import sys\nfrom trainer.launch import main\nsys.exit(main(sys.argv[1:]))\n"


def asked(env: dict[str, str], *words: str) -> str:
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def state(env: dict[str, str], number: str) -> str:
    told = asked(env, "scontrol", "show", "job", number)
    return told.split("JobState=")[1].split()[0]


def wait_for(folder: Path, env: dict[str, str], number: str, word: str) -> None:
    """Until the run's events have this word. Raises AssertionError where the job ends before."""
    deadline = time.monotonic() + 400
    path = folder / "events.jsonl"
    while not (path.is_file() and word in path.read_text()):
        log = (folder / "log.txt").read_text()[-2000:] if (folder / "log.txt").is_file() else ""
        assert state(env, number) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), log
        assert time.monotonic() < deadline, log
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_whose_time_is_up_saves_is_queued_again_and_goes_on_on_both_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(*slurm.TOOLS)
    if os.getuid():
        pytest.skip(f"root, which slurmd wants: {NOT_HERE}")
    job = milktea.Job.from_toml(ROOT / "jobs/practice.toml")
    job = job.with_(training={"num_train_epochs": 1, "save_every_s": 600})
    (tmp_path / "bin").mkdir()
    real = str(shutil.which("scontrol"))
    texts = {"milktea-train": f"#!{sys.executable}\n{TRAIN}"}
    texts["scontrol"] = SCONTROL.replace("@SCONTROL@", real)
    for name, text in texts.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    more = {"MILKTEA_CONTAINER": "none", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for name, value in (more | {"PYTHONPATH": str(ROOT)}).items():
        monkeypatch.setenv(name, value)
    with slurm.slurm(tmp_path / "slurm") as env:
        for name in env.keys() - os.environ.keys():
            monkeypatch.setenv(name, env[name])
        queued = job.submit(tmp_path / "out", nodes=2, queue="gpu")
        folder, number = queued.folder, queued.number
        try:
            assert queued.state in ("PENDING", "CONFIGURING", "RUNNING")
            wait_for(folder, env, number, '"event": "step"')
            asked(env, "scancel", "--batch", "--signal=USR1", number)  # as --signal=B:USR1@120 does
            wait_until(lambda: state(env, number) == "PENDING" and not has_steps(number), 240)
            [kept] = list((folder / "checkpoints").iterdir())
            asked(env, "scontrol", "update", f"JobId={number}", "StartTime=now")
            wait_for(folder, env, number, '"event": "finished"')
            wait_until(lambda: queued.state == "COMPLETED", 120)
        finally:
            queued.cancel()
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    started = [row for row in rows if row["event"] == "started"]
    assert [row["processes"] for row in started] == [2, 2]
    assert started[1]["step"] == int(kept.name) > 0
    assert queued.adapter == folder / "result/adapter.zip"


def has_steps(number: str) -> bool:
    """Whether a node still ends what it ran of this job; Slurm itself waits two minutes for it."""
    told = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return f"slurmstepd: [{number}." in told.stdout


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)
