"""The practice jobs that learn from rewards and from preferences, as a user has them: what each is
to reach, from five seeds."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rig
from ops.job import config
from ops.job.planner import make_plan

JOBS = Path(__file__).parents[2] / "jobs"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Path]:
    """trained("practice-ppo", seed) runs that job in this process, every step told; the run
    folder."""
    monkeypatch.setattr("trainer.loop.progress.EVENT_EVERY_S", 0.0)

    def go(name: str, seed: int) -> Path:
        path = JOBS / f"{name}.toml"
        raw: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
        raw["training"]["seed"] = seed
        (folder := tmp_path / "run").mkdir()
        plan = make_plan(config.parse(raw, path), "a-run", folder)
        box = tmp_path / "box"
        rig.train_here(plan, box)
        return box

    return go


def held_out(box: Path) -> dict[str, list[float]]:
    manifest = json.loads((box / "result/manifest.json").read_text())
    found: dict[str, list[float]] = manifest["held_out"]
    return found


def rewards(box: Path) -> list[float]:
    """The mean reward of each step's answers; the largest is 1."""
    lines = [json.loads(line) for line in (box / "events.jsonl").read_text().splitlines()]
    return [line["reward"] for line in lines if line["event"] == "step"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["practice-ppo", "practice-grpo"])
def test_the_reward_rises_from_near_none_to_nearly_all(
    name: str, seed: int, trained: Callable[[str, int], Path]
) -> None:
    box = trained(name, seed)
    told = rewards(box)
    assert told[0] < 0.2 and sum(told[-3:]) / 3 > 0.8, told
    before, after = held_out(box)["reward"]
    assert before < 0.2 and after > 0.8


@pytest.mark.parametrize("seed", range(5))
def test_dpo_orders_held_out_pairs_and_forgets_no_wanted_answer(
    seed: int, trained: Callable[[str, int], Path]
) -> None:
    told = held_out(trained("practice-dpo", seed))
    assert told["accuracy"][1] >= 0.95, told
    before, after = (-x for x in told["chosen log-probability"])  # of sft on the same prompts
    assert after <= 1.1 * before, told
