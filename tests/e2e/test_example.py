"""jobs/example.py, the job in Python that a user copies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import milktea
import rig
from ops.fakevast import FakeVast
from ops.market.provider import Provider
from ops.wait import RealClock

ROOT = Path(__file__).parents[2]


def test_its_jobs_are_planned_on_the_emulator(tmp_path: Path) -> None:
    spec = spec_from_file_location("example", ROOT / "jobs/example.py")
    assert spec is not None and spec.loader is not None
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    with FakeVast(tmp_path / "fakevast") as fake:
        vast = milktea.Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))
        plans = [
            milktea.plan(example.job(r), vast=vast, root=tmp_path / "runs") for r in example.RANKS
        ]
    ranks = [planned.plan.wire_job["lora"]["r"] for planned in plans]
    assert ranks == list(example.RANKS) and len(set(ranks)) == len(ranks)
    assert all(0 < p.ranking.accepted[0].cost.usd < p.plan.max_usd for p in plans)


@pytest.mark.slow
def test_it_trains_the_cheapest_and_says_what_it_learned(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("VAST_")}
    env |= {
        "MILKTEA_RUNS": str(tmp_path / "runs"),
        "MILKTEA_EMULATOR": str(tmp_path / "emulator"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs/example.py")],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    os.kill(json.loads((tmp_path / "emulator/server.json").read_text())["pid"], signal.SIGTERM)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" $ on ") == 2
    score = re.search(r"exact match ([\d.]+)% -> ([\d.]+)%", done.stdout)
    assert score and float(score[2]) > float(score[1]) + 50, done.stdout
    assert len(list((tmp_path / "out").glob("*/adapter.zip"))) == 1
