"""A run whose box merges its result, on the emulator, with the real trainer and the real merge."""

from __future__ import annotations

import json
import subprocess
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import rig
from ops.fakevast import FakeVast
from ops.job import config
from ops.job.planner import new_plan
from ops.use import found, words

ROOT = Path(__file__).parents[2]
PRACTICE = ROOT / "jobs/practice.toml"
pytestmark = pytest.mark.slow


def test_the_box_merges_what_stock_peft_computes_and_milktea_merge_makes_the_same_files(
    tmp_path: Path,
) -> None:
    raw = tomllib.loads(PRACTICE.read_text("utf-8"))
    raw["training"] = raw.get("training", {}) | {"max_steps": 8}
    raw["results"] = {"folder": str(tmp_path / "out"), "merged": True}
    raw["env"] = ["OMP_NUM_THREADS"]  # on a busy machine threads wait long for each other
    own = rig.Rig(tmp_path)
    plan = new_plan(config.parse(raw, PRACTICE), own.runs, time.time())
    assert any("merged model, about" in note for note in plan.notes)
    with FakeVast(tmp_path / "fakevast") as fake:
        outcome, lines, _ = rig.whole_run(own, fake, plan=plan)
        assert outcome.sha256, outcome
        assert fake.instances() == [], "a box survived the test"
    [line] = [line for line in lines if line.kind == "merged"]
    assert line.get("why_not") is None, line["why_not"]
    home = outcome.adapter_zip.parent / "merged-bf16"
    assert Path(line["folder"]) == home
    told = json.loads((home / "certificate.json").read_text())
    assert told["numbers"]["share_of_effect"] <= 0.01

    with zipfile.ZipFile(outcome.adapter_zip) as archive:
        archive.extractall(tmp_path / "adapter")
    here = found.of_run(own.runs / plan.run_id)
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(here.base, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)(ids).logits
    assert (adapted - merged).abs().max() < 0.05 * adapted.abs().max()

    again = words.merge(here, to=tmp_path / "again").command
    subprocess.run(again, cwd=ROOT, env=words.environment(), check=True, capture_output=True)
    for name in told["files_sha256"]:
        assert (home / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
