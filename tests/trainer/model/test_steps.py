"""Decoding through the fused layers, by the twins of their kernels: what transformers' own layers
say, whichever adapter answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.kernels import step_layer, verify
from trainer.kernels.verify import step_error
from trainer.model import load, steps
from trainer.model.decode import generate
from trainer.model.dropout import TokenKeys
from trainer.model.forward import hidden_states
from trainer.model.roles import MAIN, Roles
from trainer.model.sampling import Sampling
from trainer.wire.job import Job

Make = Callable[..., Path]
CPU = torch.device("cpu")
PROMPTS = [[5 + (7 * n * n + i) % 300 for i in range(n)] for n in (3, 17, 1, 9, 30)]
WIDE = {"head_dim": 32}  # as wide as the fused layer wants heads
FUSED = ("llama", "qwen2", "qwen3", "gemma3", "mistral_window", "glm4", "phi3_window")


@pytest.fixture
def opened(run_folder: Make, tmp_path: Path) -> Callable[[str, bool], Any]:
    """opened(name, fused) -> a model in fp32 with an adapter that says something."""

    def get(name: str, fused: bool) -> Any:
        kind, settings = ARCHITECTURES[name]
        wide = {"hidden_size": 128} if name in ("qwen2", "phi3_window") else WIDE
        torch.manual_seed(7)
        config = AutoConfig.for_model(kind, **{**settings, **wide, "eos_token_id": 2})
        folder = tmp_path / name
        if not folder.exists():
            model = AutoModelForCausalLM.from_config(config)
            for p in model.parameters():
                torch.nn.init.normal_(p, float(p.ndim == 1), 0.15)
            model.save_pretrained(folder)
        job = Job.model_validate_json(run_folder(model=folder).read_bytes())
        base = load.load_base(job, folder, CPU)
        made, _ = load.assemble(job, base, CPU, TokenKeys(), fast=fused)
        torch.manual_seed(5)
        for key, p in made.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p, 0.0, 0.1)
        return made

    return get


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_step_says_what_transformers_layers_say(
    opened: Callable[[str, bool], Any], name: str
) -> None:
    fused, plain = opened(name, True), opened(name, False)
    one = generate(fused, PROMPTS, {2}, CPU, 20, width=3)
    tower = steps.tower_of(fused)
    assert tower is not None and tower.steps_trusted, "no layer is left out"
    for ours, theirs in zip(one, generate(plain, PROMPTS, {2}, CPU, 20, width=3), strict=True):
        assert ours.ids == theirs.ids
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=2e-4)


def test_an_adapter_that_is_taken_or_changed_answers_from_then_on(
    opened: Callable[[str, bool], Any],
) -> None:
    models = [opened("llama", True), opened("llama", False)]

    def said() -> list[Any]:
        found = [generate(m, PROMPTS, {2}, CPU, 8, Sampling(0.7, 1), width=2) for m in models]
        for ours, theirs in zip(*found, strict=True):
            assert ours.ids == theirs.ids
        return [a.ids for a in found[0]]

    first = said()
    for model in models:
        roles = Roles(model)
        roles.add("other", None, trained=False)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if ".other." in key:
                    p.mul_(-1.0 if "lora_B" in key else 1.0)
        roles.take("other")
    other = said()
    assert other != first
    for model in models:
        Roles(model).take(MAIN)
    assert said() == first
    for model in models:
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_B.default" in key:
                    p.mul_(2.0)
    assert said() != first


def test_a_wrong_step_fails_its_self_test(
    opened: Callable[[str, bool], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = steps.tower_of(opened("gemma3", True)).fast_layers[0]
    assert step_error(fast) < 1e-5

    def wider(q: Any, k: Any, v: Any, at: Any, rules: Any, sinks: Any) -> Any:
        return step_layer.by_twin(q, k, v, at, replace(rules, window=rules.window + 1), sinks)

    monkeypatch.setattr(verify, "by_flash", wider)
    assert step_error(fast) > 0.03


def test_a_model_without_fused_layers_has_no_steps(opened: Callable[[str, bool], Any]) -> None:
    assert steps.tower_of(opened("llama", False)) is None


def test_a_reference_says_what_the_policy_says_bit_for_bit(
    opened: Callable[[str, bool], Any],
) -> None:
    model, ids = opened("qwen3", True), torch.tensor([PROMPTS[4]])
    ends = torch.tensor([0, 30], dtype=torch.int32)
    given = {"input_ids": ids, "position_ids": torch.arange(30)[None]}
    given |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 30, "max_length_k": 30}
    policy = hidden_states(model, **given)
    with torch.no_grad():
        assert torch.equal(hidden_states(model, **given), policy)
    assert policy.requires_grad
