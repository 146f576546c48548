"""The boards: TensorBoard always, Weights & Biases when the job asks for it and it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import events_of, manifest_of

from trainer import launch

Make = Callable[..., Path]
ROOT = Path(launch.__file__).parent.parent
# What Weights & Biases' package is called with, written down. The real one brings 100 MB; where it
# is installed, the last test uses it.
RECORDER = """
import json, os
def put(*what):
    with open(os.environ["RECORD"], "a") as file: file.write(json.dumps(what) + "\\n")
class Run:
    def log(self, values, step): put("log", step, sorted(values))
    def finish(self): put("finish")
def init(**settings):
    put("init", {k: settings[k] for k in ("project", "name", "mode")}, sorted(settings["config"]))
    return Run()
"""


def train(job: Path, path: str = "", **environment: str) -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    surroundings = (
        kept | {"PYTHONPATH": f"{path}:{ROOT}".lstrip(":"), "OMP_NUM_THREADS": "1"} | environment
    )
    done = subprocess.run(
        [sys.executable, "-m", "trainer.launch", str(job)],
        capture_output=True,
        text=True,
        timeout=150,
        env=surroundings,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        pytest.param({}, "offline", marks=pytest.mark.slow),
        pytest.param({"WANDB_API_KEY": "k"}, "online", marks=pytest.mark.slow),
        pytest.param(
            {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline", marks=pytest.mark.slow
        ),
    ],
)
def test_weights_and_biases_gets_every_told_step_and_no_data(
    run_folder: Make, tmp_path: Path, environment: dict[str, str], mode: str
) -> None:
    (tmp_path / "wandb.py").write_text(RECORDER)
    job = run_folder(training={"max_steps": 3, "report_to": ["wandb"]})
    train(job, str(tmp_path), RECORD=str(tmp_path / "record"), **environment)
    calls = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
    assert (
        calls[0][:2] == ["init", {"project": "milktea", "name": "test-run", "mode": mode}]
        and "data" not in calls[0][2]
    )
    assert [c[1] for c in calls if c[0] == "log"] == [
        e["step"] for e in events_of(job) if e["event"] == "step"
    ]
    assert calls[-1] == ["finish"]


@pytest.mark.slow
def test_where_it_is_not_installed_the_run_says_so_and_goes_on(
    run_folder: Make, tmp_path: Path
) -> None:
    (tmp_path / "wandb.py").write_text("raise ImportError('no wandb here')\n")
    job = run_folder(training={"max_steps": 3, "report_to": ["wandb"]})
    train(job, str(tmp_path))
    assert any("pip install wandb" in e.get("message", "") for e in events_of(job))
    assert manifest_of(job)["steps"] == 3 and list((job.parent / "tensorboard").glob("events*"))


@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed (pip install wandb)"
)
def test_the_real_one_writes_an_offline_run(run_folder: Make) -> None:
    job = run_folder(training={"max_steps": 3, "report_to": ["wandb"]})
    train(job, WANDB_MODE="offline")
    assert list((job.parent / "wandb").glob("offline-run-*/*.wandb"))
