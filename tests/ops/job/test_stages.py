"""[[stages]] in a job file: what each stage becomes, what is refused, what the plan reckons."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ops.errors import ConfigError, PreflightError
from ops.job import config
from ops.job.needs import largest, of_stages
from ops.job.planner import make_plan
from ops.market.cost import Workload
from ops.market.ranking import Needs
from trainer.wire.job import Job
from trainer.wire.stages import DECODED

EXAMPLE = Path(__file__).parents[3] / "jobs/practice-chain.toml"
GRPO = EXAMPLE.with_name("practice-grpo.toml")
SFT, RM, PPO = {"stage": "sft"}, {"stage": "rm"}, {"stage": "ppo"}
JUDGED = {"rewards": [{"kind": "model", "path": "rm"}]}


def parsed(*stages: dict[str, Any], **changes: Any) -> config.JobFile:
    raw = tomllib.loads(EXAMPLE.read_text("utf-8")) | {"stages": list(stages)}
    raw = {k: v for k, v in raw.items() if k != "ppo" or PPO in stages} | changes
    return config.parse(raw, EXAMPLE)


def test_the_example_becomes_four_jobs_that_take_up_each_other(tmp_path: Path) -> None:
    plan = make_plan(config.load(EXAMPLE), "a-run", tmp_path)
    job = Job.model_validate(plan.wire_job)
    assert [part.stage for part, _ in job.parts()] == ["pt", "sft", "rm", "ppo"]
    assert [part.lora.r for part, _ in job.parts()] == [8, 16, 16, 16], "sft is stacked on pt"
    assert [None if p.start is None else p.start.name for p, _ in job.parts()] == [
        None,
        "stages/1-pt",
        "stages/2-sft",
        "stages/2-sft",
    ]
    judge = job.part(3).judge
    assert judge is not None and judge.name == "stages/3-rm"
    sent = [p.remote for p in plan.pushes if p.remote.startswith("data/")]
    assert len(sent) == len(set(sent)) == 6, "sft and ppo read the same files, sent once"
    assert [w.stage for w in plan.workload.each] == ["pt", "sft", "rm", "ppo"]
    assert [round(w.work, 1) for w in plan.workload.each] == [1, 1, 1, 8.6]
    assert not (tmp_path / "stages").exists(), "the folder is as a plan leaves it"


@pytest.mark.parametrize(
    "stages, changes, said",
    [
        ((), {}, "it names none"),
        ((SFT, SFT), {"stage": "sft"}, "a file with .*stages.* names it there"),
        ((SFT | {"how": "stack"}, SFT), {}, "the first stage takes up what start names"),
        ((SFT, SFT | {"lora": {"r": 4}}), {}, 'stages.1.lora.r: .* set how = "stack"'),
        ((SFT, SFT | {"max_loss": 1.0}), {}, "a gate of the last stage would stop nothing"),
        ((PPO | {"min_accuracy": 0.5}, SFT), {}, "stage ppo measures none"),
        ((SFT, RM), {"kto": {"beta": 0.2}}, r"\[kto\] says nothing to any stage"),
        ((SFT, {"stage": "sft", "training": {"learning_rat": 1}}), {}, "stages.1: .*unknown key"),
        ((SFT, {"stage": "sfd"}), {}, "stages.1.stage"),
    ],
)
def test_what_no_chain_can_be_is_refused_by_its_place(
    stages: tuple[dict[str, Any], ...], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        parsed(*stages, **changes)


@pytest.mark.parametrize(
    "section, said",
    [
        ({"beta": float("inf")}, "dpo.beta: Input should be a finite number"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing says nothing to loss_type"),
        ({"loss_type": "orpo", "simpo_gamma": 2.0}, "simpo_gamma says nothing to loss_type"),
    ],
)
def test_a_setting_that_its_loss_cannot_use_is_refused(section: dict[str, Any], said: str) -> None:
    example = EXAMPLE.with_name("practice-dpo.toml")
    with pytest.raises(ConfigError, match=said):
        config.parse(tomllib.loads(example.read_text("utf-8")) | {"dpo": section}, example)


def test_a_stage_that_needs_a_reward_model_that_no_stage_before_makes_is_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(Exception, match="holds no adapter"):
        make_plan(parsed(SFT, PPO, ppo=JUDGED), "a-run", tmp_path)


def test_a_machine_must_hold_the_largest_stage() -> None:
    needs = [Needs(min_gpu_memory_gib=gib, min_cpu_ram_gib=30 - gib) for gib in (3.0, 9.0, 5.0)]
    found = largest(needs, of_stages([Workload(1e5, 1e6, disk_gib=20.0)] * 3))
    assert (found.min_gpu_memory_gib, found.min_cpu_ram_gib) == (9.0, 27.0)
    assert found.disk_gib == 20.0


def test_answers_of_the_model_are_counted_at_their_longest(tmp_path: Path) -> None:
    raw = tomllib.loads(GRPO.read_text("utf-8"))

    def load(longest: int, answers: int) -> Workload:
        section = raw["grpo"] | {"max_completion_length": longest, "num_generations": answers}
        return make_plan(config.parse(raw | {"grpo": section}, GRPO), "a-run", tmp_path).workload

    short, long, more = load(8, 4), load(108, 4), load(8, 12)
    assert more.tokens == 3 * short.tokens and more.least_tokens == short.least_tokens
    prompts = raw["training"]["max_steps"] * raw["training"]["batch_size"]
    assert long.tokens - short.tokens == pytest.approx(100 * 4 * prompts, rel=0.02)
    assert long.least_tokens == short.least_tokens + 100
    assert "answers at their longest" in long.counted


def test_a_reward_that_looks_for_an_answer_is_refused_where_rows_say_none(tmp_path: Path) -> None:
    data = tmp_path / "asked.jsonl"
    data.write_text('{"prompt": "1 + 1", "answer": "2"}\n{"prompt": "1 + 2"}\n' * 9)
    raw = tomllib.loads(GRPO.read_text("utf-8")) | {"grpo": {"rewards": [{"kind": "match"}]}}
    raw["data"] = {"files": [str(data)], "max_length": 128}
    with pytest.raises(PreflightError, match="9 of 18 rows say no answer") as refused:
        make_plan(config.parse(raw, GRPO), "a-run", tmp_path)
    assert "asked.jsonl:2" in str(refused.value)


def test_a_prompt_that_a_pair_computes_once_is_paid_once(tmp_path: Path) -> None:
    """On this computer's CPU; a long question in front of the file's own makes prompts long."""
    data = tmp_path / "pairs.jsonl"
    asked = "Answer in the language that was asked for, and in no other one. " * 8
    row = {"instruction": asked, "chosen": "Yes.", "rejected": "No, never."}
    data.write_text("".join(json.dumps(row | {"input": str(n)}) + "\n" for n in range(5)))
    plans = []
    for share in (None, False):
        raw = tomllib.loads(EXAMPLE.with_name("practice-dpo.toml").read_text("utf-8"))
        raw["data"] = {"files": [str(data)], "max_length": 512}
        raw["dpo"] |= {} if share is None else {"share_prompts": share}
        (folder := tmp_path / str(share)).mkdir()
        plans.append(make_plan(config.parse(raw, EXAMPLE), "a-run", folder))
    shared, whole = (plan.workload for plan in plans)
    [told] = [note for note in plans[0].notes if note.endswith("computed, and paid, once")]
    once = int(told.split()[0].replace(",", ""))
    assert once > 5 * 64 and shared.tokens == whole.tokens - once
    assert shared.row_tokens == whole.row_tokens and shared.least_tokens == whole.least_tokens
    assert not any("paid, once" in note for note in plans[1].notes)


def test_a_prompt_that_a_groups_answers_share_is_priced_by_what_a_micro_batch_holds(
    tmp_path: Path,
) -> None:
    data = tmp_path / "prompts.jsonl"
    asked = "Answer in the language that was asked for, and in no other one. " * 8
    rows = [{"instruction": asked, "input": str(n), "answer": "Yes."} for n in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plans = []
    for share in (None, False):
        raw = tomllib.loads(EXAMPLE.with_name("practice-grpo.toml").read_text("utf-8"))
        raw["data"] = {"files": [str(data)], "max_length": 512}
        raw["training"] |= {"batch_size": 5, "max_steps": 1}
        raw["grpo"] |= {"num_generations": 4, "max_completion_length": 16}
        raw["grpo"] |= {} if share is None else {"share_prompts": share}
        (folder := tmp_path / str(share)).mkdir()
        plans.append(make_plan(config.parse(raw, EXAMPLE), "a-run", folder))
    shared, whole = (plan.workload for plan in plans)
    [told] = [note for note in plans[0].notes if note.endswith("priced so")]
    common = int(told.split()[0].replace(",", ""))
    prompt = whole.least_tokens - 16
    assert common == 5 * (prompt - 1) and shared.tokens == whole.tokens == 4 * 5 * (prompt + 16)
    assert shared.shared == 3 * common and whole.shared == 0
    learned = whole.work - DECODED
    assert whole.work_in(1 << 14) == whole.work == shared.work_in(prompt + 16)
    assert shared.work_in(1 << 14) == whole.work - learned * 3 * common / whole.tokens
    assert shared.work_in(prompt + 32) == whole.work - learned * 2 * common / whole.tokens
