"""GRPO: prompts from any row, rewards by rules, groups, resume in the middle of a rollout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import adapter_sha256, events_of, finish, manifest_of, start, step_reached, wait_for

from trainer.data.prompts import PROMPTS
from trainer.data.sources import Reading
from trainer.data.tokenised import Rows
from trainer.loop.guards import Stopped
from trainer.model import decode
from trainer.model.sampling import Sampling
from trainer.stages import grpo, rollout
from trainer.stages.group_losses import advantages
from trainer.stages.rewards import reward
from trainer.train import run_job
from trainer.wire.job import Job
from trainer.wire.stages import Grpo, Reward

Make = Callable[..., Path]
ASK = "What is 1 + 2?"
# a tiny random model begins an answer with any of 320 tokens: half of them are wanted
HALF = {"kind": "format", "regex": "^[\\x00-N]"}
ROWS = [{"instruction": f"Say number {n}", "output": f"it is {n}"} for n in range(12)]
SETTINGS: dict[str, Any] = {
    "training": {"batch_size": 4, "num_train_epochs": 4, "learning_rate": 2e-2}
}
SECTION: dict[str, Any] = {
    "rewards": [HALF],
    "num_generations": 6,
    "max_completion_length": 3,
}


def steps(job: Path) -> list[dict[str, Any]]:
    return [e for e in events_of(job) if e["event"] == "step"]


@pytest.mark.slow
def test_the_reward_rises_and_held_out_answers_do_not_lose(
    stage_run: Make, every_step_told: None
) -> None:
    longer = {"num_train_epochs": 10, "learning_rate": 4e-2, "lr_scheduler_type": "constant"}
    settings = {"training": SETTINGS["training"] | longer}
    job = stage_run("grpo", ROWS, held_out=ROWS[:6], grpo=SECTION, **settings)
    assert run_job(job) == 0
    told = steps(job)
    first = sum(e["reward"] for e in told[:6]) / 6
    last = sum(e["reward"] for e in told[-6:]) / 6
    assert last > first + 0.2, (first, last)
    assert all(e["drift"] < 1e-4 for e in told), "decoding and training say the same"
    before, after = manifest_of(job)["held_out"]["reward"]
    assert after >= before


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "gspo", "cispo"])
def test_every_loss_takes_several_steps_on_the_same_answers_and_a_reference(
    loss_type: str, stage_run: Make, every_step_told: None
) -> None:
    section = SECTION | {"loss_type": loss_type, "num_iterations": 2, "beta": 0.02}
    job = stage_run("grpo", ROWS[:4], grpo=section, **SETTINGS)
    assert run_job(job) == 0
    told = steps(job)
    assert len(told) == 8
    assert [e["reward"] for e in told[::2]] == [e["reward"] for e in told[1::2]]
    [started] = [e for e in events_of(job) if e["event"] == "started"]
    assert started["kernels"]["prompts"] == "of a group computed once"


@pytest.mark.slow
def test_two_processes_draw_the_answers_of_one(stage_run: Make, every_step_told: None) -> None:
    one, two = (stage_run("grpo", ROWS[:8], grpo=SECTION, **SETTINGS) for _ in range(2))
    assert finish(start(one)) == [0] and finish(start(two, 2)) == [0, 0]
    for name in ("reward", "loss", "answer_tokens"):
        expected = [e[name] for e in steps(one)][:3]
        assert [e[name] for e in steps(two)][:3] == pytest.approx(expected, abs=1e-4), name


@pytest.mark.parametrize("iterations", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_run_killed_in_a_rollout_or_between_its_steps_ends_in_the_same_bytes(
    iterations: int, stage_run: Make
) -> None:
    section = SECTION | {"num_iterations": iterations}
    settings = {"training": SETTINGS["training"] | {"save_every_s": 0.01, "num_train_epochs": 2}}
    whole, killed = (stage_run("grpo", ROWS[:8], grpo=section, **settings) for _ in range(2))
    assert finish(start(whole)) == [0]
    [process] = start(killed)
    saved = killed.parent / "checkpoints"
    wait_for(lambda: any(saved.glob("[0-9]*/manifest.json")) and step_reached(killed) >= 1)
    process.kill()
    process.join()
    assert finish(start(killed)) == [0]
    assert adapter_sha256(killed) == adapter_sha256(whole)


def test_answers_drawn_from_another_model_stop_the_run(
    stage_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a rollout engine binds the adapter to nothing."""

    def hotter(*given: Any, **named: Any) -> list[decode.Answer]:
        *others, sampling, numbers = given
        wrong = Sampling(4 * sampling.temperature, sampling.seed, sampling.step)
        return decode.generate(*others, wrong, numbers, **named)

    monkeypatch.setattr(rollout, "generate", hotter)
    with pytest.raises(Stopped, match="the answers were drawn from another model"):
        run_job(stage_run("grpo", ROWS, grpo=SECTION, **SETTINGS))


def test_masked_answers_count_neither_above_nor_below(stage_run: Make) -> None:
    job = stage_run("grpo", ROWS[:4], grpo=SECTION | {"mask_truncated": True}, **SETTINGS)
    stage = grpo.Stage(Job.model_validate_json(job.read_bytes()), job.parent)
    starts, marks = np.asarray([0, 3, 7]), np.asarray([0, 1, 1, 0, 1, 1, 1], np.bool_)
    rows = Rows(np.zeros(7, np.int32), marks, starts, np.ones(2, np.bool_), ["a", "b"])
    answers = rollout.Rollout(0, rows, {"ended": torch.tensor([True, False])})
    assert answers.lengths.tolist() == [2, 3]
    assert stage._count(answers) == 2
    answers.made["ended"] = torch.tensor([False, False])
    assert stage._count(answers) == 1, "nothing is divided by zero"


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"instruction": ASK, "output": "three"}, "three"),
        ({"instruction": ASK}, ""),
        ({"prompt": ASK, "answer": "three"}, "three"),
        ({"prompt": [{"role": "user", "content": ASK}], "solution": "three"}, "three"),
        ({"messages": [{"role": "user", "content": ASK}]}, ""),
        ({"conversations": [{"from": "human", "value": ASK}]}, ""),
        ({"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": "3"}]}, "3"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_prompt_is_read_with_and_without_an_answer(
    row: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    [read], defects = PROMPTS.read([(file, file.name)], Reading())
    assert not defects and [t.text for t in read.turns] == [ASK, expected]


def test_a_row_without_a_prompt_is_told_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "fine"}\n{"prompt": " "}\n{"instruction": 3}\n')
    found, defects = PROMPTS.read([(file, file.name)], Reading())
    assert len(found) == 1
    assert [str(d).split(": ")[0] for d in defects] == ["rows.jsonl:2:12", "rows.jsonl:3:17"]


def test_rules_give_what_they_say() -> None:
    rules = {
        "match": Reward(kind="match"),
        "contains": Reward(kind="contains"),
        "format": Reward(kind="format", regex="^it is"),
        "length": Reward(kind="length", tokens=10),
    }
    given = {name: reward([rule], " it is three\n", 5, "three") for name, rule in rules.items()}
    assert given == {"match": 0.0, "contains": 1.0, "format": 1.0, "length": 0.5}
    both = [Reward(kind="contains", weight=2.0), Reward(kind="format", regex="x", weight=9.0)]
    assert reward(both, "three", 1, "three") == 2.0
    assert reward([rules["match"]], "three", 1, " three ") == 1.0
    assert reward([rules["contains"]], "three", 1, "") == 0.0
    assert reward([rules["length"]], "", 25, "") == 0.0


@pytest.mark.parametrize(
    "rule, said",
    [
        ({"kind": "format"}, "needs one"),
        ({"kind": "match", "regex": "x"}, "regex belongs to"),
        ({"kind": "format", "regex": "("}, "unterminated"),
    ],
)
def test_a_rule_that_says_nothing_is_refused(
    rule: dict[str, Any], said: str, stage_run: Make
) -> None:
    with pytest.raises(ValueError, match=said):
        Job.model_validate_json(stage_run("grpo", ROWS, grpo={"rewards": [rule]}).read_bytes())


def test_advantages_are_those_of_their_definitions() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    plain = advantages(Grpo(scale_rewards="none"), rewards)
    assert plain.tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4]
    loo = advantages(Grpo(scale_rewards="rloo"), rewards)
    assert loo[0].tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    group = advantages(Grpo(scale_rewards="group"), rewards)
    assert group[0].tolist() == pytest.approx((plain[0] / (0.5 + 1e-4)).tolist())
    spread = float(rewards.double().std())
    whole = advantages(Grpo(scale_rewards="batch"), rewards)
    assert whole[0].tolist() == pytest.approx((plain[0] / (spread + 1e-4)).tolist())
