"""Full fine-tuning in parts over two processes on the CPU: the numbers, the checkpoints and the result of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load
from tiny import events_of, manifest_of, rows

from trainer.train import run_job

Make = Callable[..., Path]
FULL = {"method": "full", "learning_rate": 1e-3, "num_train_epochs": 2}


def start(job: Path, processes: int = 2) -> subprocess.Popen[bytes]:
    """`milktea-train job.json` on that many processes, as a box runs it."""
    changed = json.loads(job.read_text()) | {"processes": processes}
    job.write_text(json.dumps(changed))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "trainer.launch", str(job)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def train(job: Path, processes: int = 2) -> list[float]:
    done = start(job, processes)
    _, said = done.communicate(timeout=150)
    assert done.returncode == 0, said.decode()[-3000:]
    return [loss for _, loss in manifest_of(job)["curve"]]


def trained(job: Path) -> dict:
    with zipfile.ZipFile(job.parent / "result" / "adapter.zip") as archive:
        return load(archive.read("model.safetensors"))


def test_two_processes_with_half_the_model_each_train_as_one_does(run_folder: Make) -> None:
    alone, shared = run_folder(training=FULL), run_folder(held_out=rows(2), training=FULL)
    assert run_job(alone) == 0
    one, two = [loss for _, loss in manifest_of(alone)["curve"]], train(shared)
    assert len(one) == 8 and one[-1] < one[0] - 0.3
    assert two == pytest.approx(one, abs=1e-5)
    expected, found = trained(alone), trained(shared)
    assert set(found) == set(expected)
    assert all((found[n] - expected[n]).abs().max() < 1e-4 for n in expected)
    assert next(e for e in events_of(shared) if e["event"] == "score")["rows"] == 2
