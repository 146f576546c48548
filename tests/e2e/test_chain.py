"""Runs that start from earlier runs, from the job file to the verified archive: an adapter is
continued, stacked on, preferred, judged by a reward model of its own chain."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ops.job import config
from ops.job.planner import make_plan
from ops.run.expected import ExpectedResult
from ops.run.result import verify
from trainer.launch import prepare_inputs, read_job
from trainer.train import run_job
from trainer.wire.job import Job

EXAMPLE = Path(__file__).parents[2] / "jobs/practice.toml"
PAIRS = {"files": ["practice/pairs.jsonl"]}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """run("NAME", **keys of the practice job) trains two steps; the manifest of what was brought
    home and verified."""

    def go(name: str, **changes: Any) -> dict[str, Any]:
        raw = tomllib.loads(EXAMPLE.read_text("utf-8"))
        raw |= {"results": {"folder": str(tmp_path / "out")}}
        raw["image"]["trainer"] = "image"
        raw["data"].pop("held_out", None)
        for key, value in changes.items():
            raw[key] = raw.get(key, {}) | value if isinstance(value, dict) else value
        raw["training"] |= {"max_steps": 2, "batch_size": 8}
        folder = tmp_path / name
        folder.mkdir()
        plan = make_plan(config.parse(raw, EXAMPLE), name, folder)
        box = tmp_path / "box" / name
        for push in plan.pushes:
            (box / push.remote).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(push.local, box / push.remote)
        (box / "job.json").write_text(Job.model_validate(plan.wire_job).text())
        prepare_inputs(read_job(box / "job.json"), box)
        assert run_job(box / "job.json") == 0
        manifest: dict[str, Any] = json.loads((box / "result/manifest.json").read_text())
        verify(box / "result/adapter.zip", manifest, ExpectedResult.of(plan.wire_job))
        home = tmp_path / "out" / name
        home.mkdir(parents=True)
        shutil.copyfile(box / "result/adapter.zip", home / "adapter.zip")
        return manifest

    return go


def links(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    return [(link["stage"], link["how"]) for link in manifest["chain"]["links"]]


@pytest.mark.slow
def test_a_chain_of_runs_is_named_by_its_runs_alone(run: Callable[..., dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    first = run("run-one")
    assert links(first) == [("sft", "new")]
    second = run("run-two", start="run-one", how="stack", lora={"r": 4, "lora_alpha": 8})
    assert links(second) == [("sft", "new"), ("sft", "stack")]
    assert second["chain"]["links"][0] == first["chain"]["links"][0]
    assert second["lora"]["r"] == first["lora"]["r"] + 4
    third = run("run-three", start="run-two", stage="dpo", data=PAIRS)
    assert links(third) == [("sft", "new"), ("sft", "stack"), ("dpo", "continue")]
    run("run-rm", start="run-one", stage="rm", data=PAIRS)
    section = {"rewards": [{"kind": "model", "path": "run-rm"}], "max_completion_length": 6}
    judged = run("run-ppo", start="run-one", stage="ppo", ppo=section)
    assert links(judged) == [("sft", "new"), ("ppo", "continue")]
    assert judged["judge"]["name"] == "run-rm"
    with pytest.raises(Exception, match="must not judge here: it was trained after sft"):
        run("run-other", start="run-two", stage="ppo", ppo=section)
