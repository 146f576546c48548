"""A short run of each architecture that people tune most, on a GPU, as wide as the fused layer
wants it: it ends with a result, or is refused in words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from architectures import ARCHITECTURES, MOST_USED
from tiny import events_of, manifest_of, write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.data.prepare import InvalidJob
from trainer.model.load import ModelError
from trainer.train import run_job

Make = Callable[..., Path]
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "head_dim": 32,
    "global_head_dim": 64,
    "moe_intermediate_size": 64,
    "query_pre_attn_scalar": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "shared_expert_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
}


def wide(name: str, folder: Path) -> Path:
    """The architecture, four times as wide as in tests/architectures.py, with random weights."""
    kind, settings = ARCHITECTURES[name]
    asked = {k: WIDE.get(k, v) for k, v in settings.items()}
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **asked))
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "fp32") for name in ("llama", "qwen3", "gemma3", "gpt_oss")),
        *((name, precision) for precision in ("fp16", "nf4") for name in MOST_USED),
        *((name, "int8") for name in ("llama", "qwen3")),
    ],
)
def test_a_card_that_says_that_it_is_a_turing_trains_without_bf16_or_is_refused_in_words(
    name: str, precision: str, run_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    AcceleratorState._reset_state(reset_partial_state=True)
    path = run_folder(model=wide(name, tmp_path / name), training={"max_steps": 6})
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"model": told["model"] | {"precision": precision}}))
    try:
        assert run_job(path) == 0
    except ModelError as refused:
        assert precision != "fp32" and "not computed in fp16" in str(refused), refused
        assert name.startswith(("gemma", "gpt_oss")), refused
        print("MASKED", name, precision, "refused:", refused)
        return
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
    events, facts = events_of(path), manifest_of(path)
    losses = [loss for _, loss in facts["curve"]]
    assert len(losses) == 6 and all(math.isfinite(x) for x in losses)
    assert losses[-1] < losses[0] or name not in ("llama", "qwen2", "qwen3", "glm4")
    assert not any(word in json.dumps(facts["kernels"]) for word in ("Triton", "flash", "fused,"))
    assert precision == "fp32" or facts["skipped_steps"] < 6
    peak = max(e["gpu_memory_gib"] for e in events if e["event"] == "step")
    seen = {"skipped": facts.get("skipped_steps"), "gib": peak} | facts["kernels"]
    print("MASKED", name, precision, losses[0], losses[-1], json.dumps(seen))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "nf4", "fp8"])
@pytest.mark.parametrize("name", MOST_USED)
def test_a_short_run_ends_with_a_result_or_is_refused_in_words(
    name: str, precision: str, run_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    path = run_folder(model=wide(name, tmp_path / name), training={"max_steps": 6})
    told = json.loads(path.read_text())
    told["model"]["precision"] = precision
    path.write_text(json.dumps(told))
    try:
        assert run_job(path) == 0
    except (InvalidJob, ModelError) as refused:
        assert precision != "bf16" and precision in str(refused), refused
        print("RAN", name, precision, "refused:", refused)
        return
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
    losses = [e["loss"] for e in events_of(path) if e["event"] == "step"]
    assert losses and all(math.isfinite(x) for x in losses)
    facts = manifest_of(path)["kernels"]
    print("RAN", name, precision, losses[0], losses[-1], json.dumps(facts))
