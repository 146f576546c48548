"""rm, dpo and kto from end to end on a tiny model: gates, metrics, processes, resume, results."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import adapter_sha256, events_of, finish, manifest_of, start

from trainer.data.errors import InvalidJob
from trainer.data.stage_rows import prepare
from trainer.loop import budget
from trainer.loop.guards import Stopped
from trainer.stages import compared, rm
from trainer.train import run_job
from trainer.wire.job import Job
from trainer.wire.stages import STAGES

Make = Callable[..., Path]
PAIRS = [
    {
        "instruction": f"Say number {n}" + " please" * (n % 5),
        "chosen": f"it is {n}" * (1 + n % 3),
        "rejected": f"no {n} " * (1 + n % 4),
    }
    for n in range(18)
]
TAGGED = [
    {"instruction": p["instruction"], "output": p[side], "kto_tag": side == "chosen"}
    for k, p in enumerate(PAIRS)
    for side in [("chosen", "rejected")[k % 2]]
]
ROWS = {"rm": PAIRS, "dpo": PAIRS, "kto": TAGGED}
# they go one way through processes and checkpoints: one of them does in the quick suite
IN_PROCESSES = pytest.mark.parametrize(
    "stage", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rm", "kto"))]
)
SETTINGS: dict[str, Any] = {"training": {"batch_size": 6, "save_every_s": 0.01}}


def steps(job: Path) -> list[dict[str, Any]]:
    return [e for e in events_of(job) if e["event"] == "step"]


def measured(job: Path) -> dict[str, list[float]]:
    [told] = [e for e in events_of(job) if e["event"] == "measured"]
    assert told["numbers"].items() <= manifest_of(job)["held_out"].items()
    numbers: dict[str, list[float]] = told["numbers"]
    return numbers


def test_dpo_starts_at_ln_two_and_learns_to_prefer(stage_run: Make, every_step_told: None) -> None:
    job = stage_run("dpo", PAIRS, held_out=PAIRS[:8], **SETTINGS)
    assert run_job(job) == 0
    told = steps(job)
    assert told[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert told[0]["margin"] == told[0]["chosen_reward"] == 0.0
    [started] = [e for e in events_of(job) if e["event"] == "started"]
    assert started["kernels"]["prompts"] == "of a group computed once"
    assert told[-1]["accuracy"] == 1.0 and told[-1]["margin"] > 0.1
    assert measured(job)["accuracy"] == [0.5, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_two_processes_with_half_the_base_each_learn_and_measure_as_one_does(
    stage: str, stage_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "CPU_TOKENS", 128)  # so that they have unequal numbers of packs
    one, two = (stage_run(stage, PAIRS, held_out=PAIRS[:8], **SETTINGS) for _ in range(2))
    assert finish(start(one)) == [0]
    monkeypatch.setenv(budget.FORCED, "1")
    assert finish(start(two, 2)) == [0, 0]
    [began] = [e for e in events_of(two) if e["event"] == "started"]
    assert "in parts over 2 processes" in began["kernels"]["base"]
    curves = [[loss for _, loss in manifest_of(job)["curve"]] for job in (one, two)]
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert measured(two) == {k: pytest.approx(v, abs=1e-4) for k, v in measured(one).items()}


@pytest.mark.parametrize("loss_type", ["orpo", "simpo"])
def test_losses_without_a_reference_learn_too(
    loss_type: str, stage_run: Make, every_step_told: None
) -> None:
    job = stage_run("dpo", PAIRS, held_out=PAIRS[:8], dpo={"loss_type": loss_type}, **SETTINGS)
    assert run_job(job) == 0
    before, after = measured(job)["accuracy"]
    assert after > before and steps(job)[-1]["loss"] < steps(job)[0]["loss"]


def test_kto_starts_without_any_reward_and_tells_wanted_from_unwanted(
    stage_run: Make, every_step_told: None
) -> None:
    job = stage_run("kto", TAGGED, held_out=TAGGED, **SETTINGS)
    assert run_job(job) == 0
    first, last = steps(job)[0], steps(job)[-1]
    assert first["loss"] == pytest.approx(0.5, abs=1e-6) and first["z"] == 0.0
    assert last["wanted_reward"] > last["unwanted_reward"]
    assert measured(job)["wanted above unwanted"][1] > 0.9


def test_a_reference_that_is_not_the_start_stops_the_run(
    stage_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the reference is the raw base though an adapter is continued."""
    real = compared.Reference

    def other(named: Any) -> compared.Reference:
        found = real(named)
        for _, kept in found._pairs:
            kept += 0.01
        return found

    monkeypatch.setattr(compared, "Reference", other)
    with pytest.raises(Stopped, match="the reference is not the model that training starts from"):
        run_job(stage_run("dpo", PAIRS, **SETTINGS))


@IN_PROCESSES
def test_a_look_at_held_out_rows_gives_the_loss_that_training_on_them_would_have(
    stage: str, stage_run: Make, every_step_told: None
) -> None:
    """Every step is of all rows, and all are held out: a look sees the next step's loss."""
    rows = ROWS[stage]
    training = {"batch_size": len(rows), "max_steps": 3, "eval_steps": 1}
    best = {"load_best_model_at_end": True, "early_stopping_patience": 3}
    job = stage_run(stage, rows, held_out=rows, training=training | best)
    assert run_job(job) == 0
    looks = [e for e in events_of(job) if e["event"] == "held_out"]
    assert [(e["step"], e["rows"]) for e in looks] == [(n, len(rows)) for n in range(4)]
    losses = [e["loss"] for e in looks]
    near = 2e-3 if stage == "kto" else 1e-5  # z is of other pairs of prompts and answers there
    assert losses[:-1] == pytest.approx([e["loss"] for e in steps(job)], abs=near)
    assert losses[-1] < losses[0]
    if stage != "rm":
        assert looks[0]["accuracy"] == 0.5 < looks[-1]["accuracy"]
    facts, (_, after) = manifest_of(job), measured(job).get("accuracy", (0, 0))
    assert facts["held_out"]["loss"] == [losses[0], min(losses[1:])]
    assert stage == "kto" or after == pytest.approx(looks[facts["result_step"]]["accuracy"])


@IN_PROCESSES
def test_two_processes_give_the_numbers_of_one(
    stage: str, stage_run: Make, every_step_told: None
) -> None:
    one, two = (stage_run(stage, ROWS[stage], **SETTINGS) for _ in range(2))
    assert finish(start(one)) == [0] and finish(start(two, 2)) == [0, 0]
    for name in [n for n in steps(one)[0] if n in ("loss", "accuracy", "margin", "z")]:
        expected = [e[name] for e in steps(one)]
        assert [e[name] for e in steps(two)] == pytest.approx(expected, abs=2e-4), name


@IN_PROCESSES
def test_a_resumed_run_ends_in_the_same_bytes(stage: str, stage_run: Make) -> None:
    """Stopped after its first step, in the first epoch, when half of the reference is known."""
    rows = ROWS[stage]
    whole, stopped = (stage_run(stage, rows, held_out=rows[:8], **SETTINGS) for _ in range(2))
    assert finish(start(whole)) == [0]
    told = json.loads(stopped.read_text())
    stopped.write_text(json.dumps(told | {"limits": {"deadline_unix_s": 1.0}}))
    assert finish(start(stopped)) == [4]
    stopped.write_text(json.dumps(told))
    assert finish(start(stopped)) == [0]
    assert adapter_sha256(stopped) == adapter_sha256(whole)
    assert manifest_of(stopped)["held_out"] == manifest_of(whole)["held_out"]


def test_stock_peft_reads_the_reward_model_and_scores_as_we_did(
    stage_run: Make, models: Make, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    job = stage_run("rm", PAIRS, held_out=PAIRS[:8], **SETTINGS)
    assert run_job(job) == 0
    found = measured(job)
    assert found["accuracy"][1] > found["accuracy"][0] and found["accuracy"][1] > 0.9
    assert {"correlation with length", "reward deviation"} <= set(found)
    with zipfile.ZipFile(job.parent / "result" / "adapter.zip") as archive:
        archive.extractall(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(models("gqa"), num_labels=1)
    base.config.pad_token_id = 0
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    data = prepare(Job.model_validate_json(job.read_bytes()), job.parent).rows
    with torch.no_grad():
        theirs = [
            float(model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, 0])
            for ids in np.split(data.ids, data.starts[1:-1])[:16]
        ]
    rewards = torch.tensor(theirs, dtype=torch.float64)
    lengths = torch.tensor(data.targets()[:16], dtype=torch.float64)
    again = rm.describe(rewards.view(-1, 2), lengths.view(-1, 2))
    for name, (_, after) in found.items():
        assert again[name] == pytest.approx(after, abs=1e-5), name


def test_a_score_follows_length_where_longer_is_what_was_preferred() -> None:
    lengths = torch.tensor([[9.0, 3.0], [8.0, 2.0], [7.0, 6.0], [2.0, 9.0]], dtype=torch.float64)
    told = rm.describe(lengths * 2 + 1, lengths)
    assert told["correlation with length"] == pytest.approx(1.0)
    assert told["accuracy"] == 0.75
    assert told["accuracy, quartile 4 of length difference"] == 0.0


def test_over_length_pairs_are_refused_or_dropped_whole_and_never_cut(stage_run: Make) -> None:
    long = [*PAIRS, {"instruction": "x", "chosen": "y", "rejected": "it is long " * 60}]

    def rows(policy: str) -> Any:
        settings = {"max_length": 150, "over_length": policy}
        job = stage_run("dpo", long, settings, **SETTINGS)
        return prepare(Job.model_validate_json(job.read_bytes()), job.parent).rows

    with pytest.raises(InvalidJob) as refused:
        rows("refuse")
    assert any(s.startswith("train.jsonl:19: ") for s in refused.value.samples)
    kept = rows("drop")
    assert len(kept) % 2 == 0 and "train.jsonl:19" not in kept.where
    assert any(n.startswith("train.jsonl:19: ") and n.endswith("dropped") for n in kept.notes)
    assert all(ids[-1] == 2 for ids in np.split(kept.ids, kept.starts[1:-1]))
    with pytest.raises(InvalidJob, match="would change what is compared: an answer stays whole"):
        rows("truncate")


def test_tags_of_one_kind_alone_teach_nothing(stage_run: Make) -> None:
    job = stage_run("kto", [row | {"kto_tag": True} for row in TAGGED])
    with pytest.raises(InvalidJob, match="every answer is wanted"):
        prepare(Job.model_validate_json(job.read_bytes()), job.parent)


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_dropout_would_blur_the_comparison_and_is_refused(stage: str, stage_run: Make) -> None:
    job = stage_run(stage, ROWS[stage], lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.1})
    with pytest.raises(InvalidJob, match="which dropout blurs"):
        run_job(job)


@pytest.mark.parametrize("stage", ROWS)
def test_full_training_is_refused_where_a_second_model_would_be_needed(
    stage: str, stage_run: Make
) -> None:
    assert STAGES[stage].methods == ("lora",)  # type: ignore[index]
    with pytest.raises(ValueError, match=f"stage {stage} is trained by"):
        Job.model_validate_json(
            stage_run(stage, ROWS[stage], training={"method": "full"}).read_bytes()
        )
