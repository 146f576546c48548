"""A job of several stages: what each one leaves is what a job of its own would leave, the base is
read once, a run that was killed goes on with the stage that was not done."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny import events_of, finish, manifest_of, rows, start, wait_for
from transformers import AutoModelForCausalLM

from trainer.chained import gate_defect
from trainer.launch import prepare_inputs, read_job
from trainer.loop.guards import Stopped
from trainer.result.adapter import identity, merged_defect
from trainer.result.merge import merge
from trainer.train import run_job
from trainer.wire.chain import WEIGHTS
from trainer.wire.job import Job

Make = Callable[..., Path]
TEXTS = [{"text": f"tea number {n} is hot " * (1 + n % 4)} for n in range(12)]
PAIRS = [
    {"instruction": f"Say number {n}", "chosen": f"it is {n} ", "rejected": f"no {n} is it "}
    for n in range(12)
]
PPO: dict[str, Any] = {
    "rewards": [{"kind": "model"}],
    "max_completion_length": 4,
    "foreign_reward": True,
}
SHORT = {"num_train_epochs": 1, "max_steps": 2, "batch_size": 4}
DATA: dict[str, list[Any]] = {"pt": TEXTS, "sft": rows(12), "rm": PAIRS, "ppo": rows(12)}


def put(run: Path, name: str, content: list[Any]) -> dict[str, Any]:
    text = "\n".join(map(json.dumps, content)).encode() + b"\n"
    (run / "data" / f"{name}.jsonl").write_bytes(text)
    told = {"path": f"data/{name}.jsonl", "name": name, "size_bytes": len(text)}
    return {"files": [told | {"sha256": hashlib.sha256(text).hexdigest()}], "max_length": 512}


@pytest.fixture
def chain_of_stages(run_folder: Make) -> Callable[..., Path]:
    """chain_of_stages("sft", ("sft", {"how": "stack"}), **job keys) -> job.json."""

    def make(*stages: str | tuple[str, dict[str, Any]], **changes: Any) -> Path:
        told = [(s, {}) if isinstance(s, str) else s for s in stages]
        job = run_folder(data=DATA["sft"], training=SHORT, **changes)
        entries = [
            {"name": name, "data": put(job.parent, name, DATA[name])} | more for name, more in told
        ]
        text = json.loads(job.read_text()) | {"stages": entries}
        if any(name == "ppo" for name, _ in told):
            section = json.loads(json.dumps(PPO))
            section["rewards"][0]["path"] = "judge"
            text["ppo"] = section | changes.get("ppo", {})
        job.write_text(json.dumps(text))
        return job

    return make


def links(manifest: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(k["stage"], k["how"], k["sha256"]) for k in manifest["chain"]["links"]]


def run(job: Path) -> int:
    prepare_inputs(read_job(job), job.parent)
    return run_job(job)


@pytest.mark.slow
def test_each_stage_leaves_what_a_job_of_its_own_leaves(
    chain_of_stages: Make, run_folder: Make
) -> None:
    both = {"lora": {"r": 8}}  # of the adapter that is stacked on, and of the fresh one
    chained = chain_of_stages("pt", ("sft", both | {"how": "stack"}), ("rm", both), ("ppo", both))
    assert run(chained) == 0
    told = {"training": SHORT}
    first = run_folder(data=TEXTS, stages=[{"name": "pt"}], **told)
    assert run_job(first) == 0
    second = run_folder(data=rows(12), start=first, how="stack", **told)
    second.write_text(json.dumps(json.loads(second.read_text()) | both))
    assert run_job(second) == 0
    judge = run_folder(data=PAIRS, start=second, stages=[{"name": "rm"}], **told)
    judge.write_text(json.dumps(json.loads(judge.read_text()) | both))
    assert run_job(judge) == 0
    section = PPO | {"rewards": [{"kind": "model", "path": "judge"}]}
    last = run_folder(
        data=rows(12), start=second, judge=judge, stages=[{"name": "ppo"}], ppo=section, **told
    )
    last.write_text(json.dumps(json.loads(last.read_text()) | both))
    assert run_job(last) == 0
    mine = manifest_of(chained)
    assert links(mine) == links(manifest_of(last))
    alone = [manifest_of(job) for job in (first, second, judge, last)]
    assert [links(s) for s in mine["stages"]] == [links(m) for m in alone]


def test_the_base_is_read_once_and_each_stage_is_told(chain_of_stages: Make) -> None:
    job = chain_of_stages("sft", ("sft", {"how": "stack", "lora": {"r": 8}}))
    assert run(job) == 0
    found = events_of(job)
    began = [e for e in found if e["event"] == "started"]
    assert [(e["number"], e["stages"], e["weights_read"]) for e in began] == [(1, 2, 1), (2, 2, 1)]
    ended = [e for e in found if e["event"] == "stage_ended"]
    assert [e["path"] for e in ended] == ["stages/1-sft/result", "stages/2-sft/result"]
    assert [e["event"] for e in found].count("finished") == 1
    manifest = manifest_of(job)
    assert [s["adapter_sha256"] for s in manifest["stages"]][1] == (
        manifest["files"]["adapter.zip"]["sha256"]
    )
    assert [(stage, how) for stage, how, _ in links(manifest)] == [("sft", "new"), ("sft", "stack")]
    assert not list(job.parent.glob("stages/*/checkpoints")), "no checkpoint outlives its stage"


@pytest.mark.slow
def test_a_run_that_stopped_between_two_stages_trains_only_the_second(
    chain_of_stages: Make, tmp_path: Path
) -> None:
    job = chain_of_stages("sft", "sft")
    assert run(job) == 0
    expected = links(manifest_of(job))
    other = tmp_path / "another-box"
    shutil.copytree(job.parent, other, symlinks=True)
    for name in ("result", "stages/2-sft", "events.jsonl"):
        path = other / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(other / "stages/1-sft/adapter")
    assert run(other / "job.json") == 0
    assert links(manifest_of(other / "job.json")) == expected
    began = [e for e in events_of(other / "job.json") if e["event"] == "started"]
    assert [e["number"] for e in began] == [2]
    (other / "stages/1-sft/result/adapter.zip").write_bytes(b"another")
    shutil.rmtree(other / "result")
    with pytest.raises(Exception, match="not the one that its manifest lists"):
        run_job(other / "job.json")


@pytest.mark.slow
def test_a_gate_ends_the_run_before_the_next_stage(chain_of_stages: Make) -> None:
    job = chain_of_stages(("sft", {"max_loss": 0.001}), "sft")
    text = json.loads(job.read_text())
    text["stages"][0]["data"]["held_out"] = put(job.parent, "held", rows(4))["files"][0]
    job.write_text(json.dumps(text))
    with pytest.raises(Stopped, match=r"stage 1, sft: loss .* on held-out rows, more than 0.001"):
        run(job)
    assert (job.parent / "stages/1-sft/result/manifest.json").is_file()
    assert not (job.parent / "result").exists()


@pytest.mark.parametrize(
    "changes, numbers, said",
    [
        ({}, {"accuracy": 0.9}, ""),
        ({}, {"accuracy": 0.54}, "stage 2, rm: accuracy 0.54 on held-out rows, less than 0.55"),
        ({}, {}, ""),
        ({"min_accuracy": 0.8}, {"accuracy": 0.7}, "less than 0.8"),
        ({"min_accuracy": 0.5}, {"accuracy": 0.52}, ""),
        ({"min_accuracy": 0.5}, {}, "no held-out row gave the accuracy that its gate asks"),
        ({"foreign": True}, {"accuracy": 0.2}, ""),
    ],
)
def test_a_reward_model_that_guesses_ends_the_run_before_ppo(
    chain_of_stages: Make, changes: dict[str, Any], numbers: dict[str, float], said: str
) -> None:
    told = json.loads(chain_of_stages("sft", "rm", "ppo").read_text())
    told["ppo"]["foreign_reward"] = changes.pop("foreign", False)
    told["stages"][1] |= changes
    found = gate_defect(Job.model_validate(told), 1, numbers)
    assert (said in found) if said else not found


@pytest.mark.slow
@pytest.mark.parametrize("number, world", [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (4, 2)])
def test_a_run_killed_in_any_stage_goes_on_bit_for_bit(
    chain_of_stages: Make, number: int, world: int
) -> None:
    quick = {"training": SHORT | {"save_every_s": 0.001, "max_steps": 4}}
    stages = ("pt", "sft", "rm", "ppo")
    whole = chain_of_stages(*stages)
    for job in (whole, killed := chain_of_stages(*stages)):
        text = json.loads(job.read_text())
        text["training"] |= quick["training"]
        job.write_text(json.dumps(text))
        prepare_inputs(read_job(job), job.parent)
    assert finish(start(whole, world)) == [0] * world
    processes = start(killed, world)
    checkpoints = killed.parent / f"stages/{number}-{stages[number - 1]}/checkpoints"
    wait_for(lambda: list(checkpoints.glob("[0-9]*/manifest.json")))
    finish([process for process in processes if process.kill() is None])
    assert finish(start(killed, world)) == [0] * world
    assert links(manifest_of(killed)) == links(manifest_of(whole))
    assert manifest_of(killed)["curve"] == manifest_of(whole)["curve"]


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves_but_for_the_order_of_sums(
    chain_of_stages: Make,
) -> None:
    stages = ("sft", ("rm", {"how": "merge"}), ("ppo", {"how": "merge"}))
    one, two = (chain_of_stages(*stages) for _ in range(2))
    for job in (one, two):
        prepare_inputs(read_job(job), job.parent)
    assert finish(start(one)) == [0] and finish(start(two, 2)) == [0, 0]
    mine, theirs = (manifest_of(job)["stages"] for job in (one, two))
    for a, b in zip(mine, theirs, strict=True):
        assert a["steps"] == b["steps"] and a["final_loss"] == pytest.approx(
            b["final_loss"], abs=1e-4
        )
    ours, others = (load_file(j.parent / "stages/1-sft/adapter" / WEIGHTS) for j in (one, two))
    for name, value in ours.items():
        assert torch.allclose(value, others[name], atol=1e-5), name


@pytest.mark.slow
def test_a_stage_may_merge_the_adapter_before_into_the_base(
    chain_of_stages: Make, models: Callable[..., Path], tmp_path: Path
) -> None:
    job = chain_of_stages("sft", ("sft", {"how": "merge"}), "sft")
    assert run(job) == 0
    began = [e for e in events_of(job) if e["event"] == "started"]
    assert [e["weights_read"] for e in began] == [1, 2, 2], "the third takes the second's base over"
    manifest = manifest_of(job)
    assert [how for _, how, _ in links(manifest)] == ["new", "merge", "continue"]
    first, second, third = (stage["chain"]["base_sha256"] for stage in manifest["stages"])
    by_hand = tmp_path / "by-hand"
    merge(job.parent / "stages/1-sft/adapter", models(), by_hand, "fp32")
    assert first == identity(models()) and second == third == identity(by_hand)
    assert not merged_defect(job.parent / "stages/3-sft/adapter", by_hand)
    raw = merged_defect(job.parent / "stages/3-sft/adapter", models())
    assert "merge that one first" in raw and "(sft)" in raw
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(models()), str(job.parent / "stages/1-sft/adapter")
    ).merge_and_unload()
    ours = load_file(job.parent / "merged-1/model.safetensors")
    for name, value in ours.items():
        assert torch.allclose(value, stock.state_dict()[name], atol=1e-6), name


def test_a_reward_model_of_another_base_or_start_is_refused_before_anything_is_trained(
    chain_of_stages: Make,
) -> None:
    def judged(*stages: Any) -> None:
        told = json.loads(chain_of_stages(*stages).read_text())
        told["ppo"]["foreign_reward"] = False
        Job.model_validate(told)

    judged("sft", "rm", "ppo")
    judged("sft", ("rm", {"how": "merge"}), ("ppo", {"how": "merge"}))
    with pytest.raises(ValidationError, match="stands on another base: merge both alike"):
        judged("sft", "rm", ("ppo", {"how": "merge"}))
    with pytest.raises(ValidationError, match="not trained from what the policy starts from"):
        judged("sft", "rm", "sft", "ppo")


@pytest.mark.parametrize(
    "stages, changes, said",
    [
        ([{"name": "sft"}, {"name": "sft"}], {"training": {"method": "full"}}, "train adapters"),
        ([{"name": "sft"}, {"name": "sft"}], {"lora": {"use_dora": True}}, "use_dora"),
        ([{"name": "sft"}, {"name": "sft"}], {"kto": {"beta": 0.5}}, "nothing to any stage"),
        ([{"name": "sft"}, {"name": "ppo"}], {"ppo": {"rewards": [{"kind": "model", "path": "j"}]}},
         "come together"),
        ([], {}, "at least 1"),
    ],
)  # fmt: skip
def test_what_no_chain_can_be_is_refused_when_it_is_read(
    run_folder: Make, stages: list[Any], changes: dict[str, Any], said: str
) -> None:
    text = json.loads(run_folder().read_text()) | {"stages": stages}
    with pytest.raises(ValidationError, match=said):
        Job.model_validate(text | changes)
