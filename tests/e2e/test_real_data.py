"""Real Alpaca rows in Chinese through the whole job on the practice model, on one and on two
processes. The data is not ours to commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data/alpaca_zh_demo.json"

JOB = """
name = "real"
[model]
base = "{root}/trainer/practice/practice_model"
precision = "fp32"
[data]
files = ["{data}"]
max_length = 1024
over_length = "drop"
[training]
batch_size = 16
max_steps = 12
learning_rate = 5e-3
[offer]
num_gpus = {gpus}
[limits]
max_usd = 1
max_hours = 1
[image]
ref = "milktea/practice:3"
trainer = "image"
size_gib = 0.4
[results]
folder = "out"
"""


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="the shared sample data is not here")
@pytest.mark.parametrize("gpus", [1, 2])
def test_alpaca_in_chinese_trains_with_a_falling_loss(tmp_path: Path, gpus: int) -> None:
    (tmp_path / "job.toml").write_text(JOB.format(root=ROOT, data=DATA, gpus=gpus))
    env = {k: v for k, v in os.environ.items() if not k.startswith("VAST_")} | {
        "MILKTEA_RUNS": str(tmp_path / "runs")
    }
    command = [sys.executable, "-m", "ops.cli", "rent-and-train", str(tmp_path / "job.toml")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    events = [
        json.loads(line)
        for line in next((tmp_path / "runs").glob("*/events.jsonl")).read_text().splitlines()
    ]
    started = next(e for e in events if e["event"] == "started")
    losses = [e["loss"] for e in events if e["event"] == "step"]
    assert started["processes"] == gpus
    assert losses[-1] < losses[0] - 0.5, losses
    assert len(list((tmp_path / "out").glob("*/adapter.zip"))) == 1
