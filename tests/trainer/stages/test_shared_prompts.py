"""Pairs whose prompt a pack has once: the training is that of both sides whole, and what misreads
it is found before the first step. Other tests of pairs (test_preferences.py) train so too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import events_of, manifest_of
from transformers import AutoModelForCausalLM

from trainer import families
from trainer.data import sharing
from trainer.data.tokenised import Rows
from trainer.kernels import attention
from trainer.stages.shared_probe import difference
from trainer.train import run_job
from trainer.wire.job import Job

Make = Callable[..., Path]
PAIRS = [
    {
        "instruction": f"Say number {n}, and say it " + "very " * (10 + n % 5) + "slowly",
        "chosen": f"it is {n}" * (1 + n % 3),
        "rejected": f"no {n} " * (1 + n % 4),
    }
    for n in range(12)
]


def told(job: Path) -> str:
    [started] = [e for e in events_of(job) if e["event"] == "started"]
    return str(started["kernels"]["prompts"])


def losses(job: Path) -> list[float]:
    return [e["loss"] for e in events_of(job) if e["event"] == "step"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_sharing_trains_what_both_sides_whole_train(
    stage: str, stage_run: Make, every_step_told: None
) -> None:
    jobs = []
    for share in (None, False):
        changes = {"training": {"batch_size": 6}, stage: {"share_prompts": share}}
        jobs.append(stage_run(stage, PAIRS, held_out=PAIRS[:4], **changes))
        assert run_job(jobs[-1]) == 0
    assert told(jobs[0]) == "of a group computed once"
    assert told(jobs[1]) == f"of each row: {stage}.share_prompts is false"
    assert losses(jobs[0]) == pytest.approx(losses(jobs[1]), abs=1e-5)
    shared, whole = (manifest_of(job)["held_out"]["accuracy"] for job in jobs)
    assert shared == whole


@pytest.mark.slow
def test_groups_that_share_their_prompt_train_what_answers_one_by_one_train(
    stage_run: Make, every_step_told: None
) -> None:
    """In micro-batches that hold a part of a group, too."""
    rows = [{"instruction": pair["instruction"], "output": "it is"} for pair in PAIRS[:4]]
    section = {"rewards": [{"kind": "format", "regex": "^[\\x00-N]"}], "beta": 0.02}
    section |= {"num_generations": 6, "max_completion_length": 3}
    found = []
    for share in (None, False):
        job = stage_run("grpo", rows, grpo=section | {"share_prompts": share})
        assert run_job(job) == 0
        found.append([(e["loss"], e["grad_norm"]) for e in events_of(job) if e["event"] == "step"])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


# -- the look before the first step ----------------------------------------------------------------


def pair() -> Rows:
    """Two answers to one prompt of 80 tokens."""
    dice = np.random.default_rng(1)
    prompt = dice.integers(3, 200, 80)
    ids = [np.concatenate([prompt, dice.integers(3, 200, n)]) for n in (30, 9)]
    marks = np.concatenate([np.arange(len(x)) >= 80 for x in ids])
    starts = np.cumsum([0, *map(len, ids)]).astype(np.int64)
    return Rows(np.concatenate(ids).astype(np.int32), marks, starts, np.ones(2, bool), [""] * 2)


@pytest.fixture
def looked(models: Make) -> Callable[..., str]:
    def look(precision: str = "fp32") -> str:
        name = attention.register()
        model = AutoModelForCausalLM.from_pretrained(models("gqa"), attn_implementation=name)
        model.model.layers.extend(copy.deepcopy(model.model.layers))
        model.config.num_hidden_layers, every = 4, len(model.model.layers)
        told = difference(model, pair(), [0, 1], precision, torch.device("cpu"))
        assert len(model.model.layers) == every == 4
        return told

    return look


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_attention_that_misreads_shared_keys_is_found(
    looked: Callable[..., str], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """As where a kernel aligns queries with the first keys, or adds up only one row's gradients."""
    assert looked(precision) == ""
    real = attention.by_document

    def wrong(q: Any, k: Any, v: Any, cu: Any, rules: Any, cu_k: Any = None) -> torch.Tensor:
        if cu_k is not None:
            sizes = zip(cu.diff().tolist(), cu_k.tolist(), strict=False)
            at = torch.cat([first + torch.arange(n) for n, first in sizes])
            k, v = k[:, :, at], v[:, :, at]
        return real(q, k, v, cu, rules)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "by_document", wrong)
        assert looked(precision).startswith("states differ from those of rows alone by")
    own = "trainer.kernels.shared_keys.gather"
    monkeypatch.setattr(own, lambda grad, keys: grad.index_select(0, keys.own))
    assert looked(precision).startswith("gradients differ from those of rows alone by")


def test_a_model_that_does_not_understand_shared_keys_is_told_and_not_trained_so(
    looked: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(module: Any, *given: Any, shared_keys: Any = None, **more: Any) -> Any:
        more |= {} if shared_keys is None else {"not_known": shared_keys}
        return attention.packed_attention(module, *given, **more)

    from transformers import AttentionInterface

    monkeypatch.setitem(AttentionInterface._global_mapping, "milktea", older)
    monkeypatch.setattr(attention, "register", lambda: "milktea")
    assert "asks attention for not_known" in looked()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"rm": {"share_prompts": False}}, "rm.share_prompts is false"),
        ({"training": {"packing": False}}, "packing is false"),
        ({"lora": {"lora_dropout": 0.1}}, "drawn for each row by itself"),
        ({"training": {"neftune_noise_alpha": 5.0}}, "drawn for each row by itself"),
    ],
)
def test_when_prompts_are_shared(changes: Any, why: str, stage_run: Make) -> None:
    job = Job.model_validate_json(stage_run("rm", PAIRS, **changes).read_bytes())
    found = sharing.why_apart(job, families.read({"model_type": "llama"}), 512)
    assert (why in found) if why else not found


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "mistral", "sliding_window": 16}, ""),
        ({"model_type": "lfm2"}, "rows are not packed: its short convolutions"),
        ({"model_type": "qwen3_5_text"}, "it has a state between tokens"),
        (
            {"model_type": "phi3", "rope_scaling": {"rope_type": "longrope"}},
            "the angles of a row depend on its length",
        ),
    ],
)
def test_families_that_cannot_share_say_why(config: Any, why: str) -> None:
    found = families.read(config).why_unshared(512)
    assert found.startswith(why) if why else not found
