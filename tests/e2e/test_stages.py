"""A run of several stages on the emulator, with the real trainer: a box that is taken away in the
middle costs the stage that it trained, and no other."""

from __future__ import annotations

import json
import time
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

import rig
from ops.fakevast import FakeVast
from ops.job import config
from ops.job.plan import Plan
from ops.job.planner import new_plan
from trainer.wire import events
from trainer.wire.chain import chain_of

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "jobs/practice-chain.toml"
pytestmark = pytest.mark.slow


def plan_of(tmp_path: Path) -> Plan:
    raw = tomllib.loads(EXAMPLE.read_text("utf-8"))
    raw["training"] |= {"max_steps": 8, "save_every_s": 0.2}
    raw["results"] = {"folder": str(tmp_path / "out")}
    raw["offer"] = {"type": "interruptible"}
    raw["stages"][2].pop("min_accuracy")
    raw["stages"][3]["training"] = {"max_steps": 2, "batch_size": 4}
    raw["ppo"]["foreign_reward"] = True  # eight steps teach a reward model little
    return new_plan(config.parse(raw, EXAMPLE), tmp_path / "runs", time.time())


def undisturbed(plan: Plan, box: Path) -> list[str]:
    """The weights of each stage where nothing happens, by their sha256."""
    rig.train_here(plan, box)
    manifest = json.loads((box / "result/manifest.json").read_text())
    return [stage["chain"]["links"][-1]["sha256"] for stage in manifest["stages"]]


def test_a_box_that_is_taken_away_in_a_stage_costs_that_stage_alone(tmp_path: Path) -> None:
    own, plan = rig.Rig(tmp_path), plan_of(tmp_path)
    begun: list[tuple[int, int, int]] = []

    class Outbidding(rig.Silent):
        taken = False

        def event(self, event: events.Event, *rest: Any) -> None:
            if isinstance(event, events.Started):
                begun.append((event.number, event.step, event.weights_read))
            mirrored = list((own.runs / plan.run_id / "stages/3-rm/checkpoints").glob("[0-9]*"))
            if isinstance(event, events.Checkpoint) and mirrored and not self.taken:
                self.taken = True
                fake.do(lambda: fake.cloud.outbid(next(iter(fake.cloud.instances))))

    with FakeVast(tmp_path / "fakevast") as fake:
        outcome, lines, _ = rig.whole_run(own, fake, screen=Outbidding(), plan=plan)
        assert outcome.sha256, outcome
        assert fake.instances() == [], "a box survived the test"
    kinds = [line.kind for line in lines]
    assert kinds.count("renting") == 2
    # a busy computer may hear of the box's end when the last stage has begun
    numbers = [number for number, _, _ in begun]
    assert numbers in ([1, 2, 3, 3, 4], [1, 2, 3, 4, 4]), "what was over was not trained again"
    assert begun[3][1] > 0 or numbers[3] == 4, "it went on from the checkpoint"
    assert [reads for _, _, reads in begun] == [1, 1, 1, 1, 1], "each process read the base once"
    assert [line["number"] for line in lines if line.kind == "stage_pulled"] == [0, 1, 2]
    homes = [outcome.adapter_zip.parent / name for name in ("1-pt", "2-sft", "3-rm", ".")]
    chains = [chain_of(home / "adapter.zip") for home in homes]
    found = [chain.links[-1].sha256 for chain in chains if chain is not None]
    assert found == undisturbed(plan, tmp_path / "box")
    assert "Stage 3-rm" in (outcome.adapter_zip.parent / "report.html").read_text("utf-8")
    with zipfile.ZipFile(outcome.adapter_zip) as archive:
        archive.extractall(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(ROOT / "trainer/practice/practice_model")
    PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
