"""Adapters that could be put on nothing are refused in the plan, by the names that are known."""

from __future__ import annotations

from typing import Any

import pytest

from ops.errors import PreflightError
from ops.job.adapted import validate_names, validate_targets
from ops.job.job_file import JobFile
from ops.job.model_shape import family_of
from trainer import memory
from trainer.wire.job import Lora

CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SHAPE = memory.Shape.from_config(CONFIG)
LINEARS = [*SHAPE.linears()]
NAMES = {f"model.layers.{n}.mlp{name}" for n in (0, 1) for name in ("", ".up_proj")}


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"target_modules": ["q_porj"]}, "target_modules: q_porj is not among q_proj"),
        ({"exclude_modules": LINEARS}, "leaves nothing to adapt"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leaves nothing"),
        ({"target_modules": r".*w_proj"}, "target_modules: no module of the model matches"),
        ({"rank_pattern": {"w_proj": 2}}, "rank_pattern: no module of the model matches"),
        ({"alpha_pattern": {r"layers\.7\..*": 2}}, "alpha_pattern: no module of the model"),
        ({"modules_to_save": ["score"]}, "modules_to_save: no module of the model matches"),
    ],
)
def test_what_matches_nothing_is_refused_before_renting(lora: dict[str, Any], said: str) -> None:
    with pytest.raises(PreflightError, match=said) as caught:
        validate_targets(Lora(**lora), SHAPE)
        validate_names(Lora(**lora), NAMES)
    assert caught.value.hint


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["lm_head", "embed_tokens", "model.layers.0.mlp.up_proj"]},
        {"target_modules": r".*layers\.(0|1)\..*"},
        {"rank_pattern": {"^model.layers.0.mlp.up_proj": 2}},
        {"modules_to_save": ["lm_head", "mlp"]},
        {"exclude_modules": ["q_proj"]},
    ],
)
def test_what_peft_takes_is_taken(lora: dict[str, Any]) -> None:
    validate_targets(Lora(**lora), SHAPE)
    validate_names(Lora(**lora), NAMES)


def test_adapters_of_the_head_and_of_whole_names_are_counted() -> None:
    head = memory.adapter_parameters(SHAPE, 4, ["lm_head"])
    assert head == 4 * (32 + 320)
    whole = memory.adapter_parameters(SHAPE, 4, ["model.layers.0.self_attn.q_proj", "lm_head"])
    assert whole == head + memory.adapter_parameters(SHAPE, 4, ["q_proj"])


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"router_aux_loss_coef": 0.1}, "llama has no experts to balance"),
        ({"method": "freeze", "freeze_trainable_layers": 3}, "= 3: the model has 2"),
    ],
)
def test_a_setting_that_the_architecture_has_no_place_for_is_refused(
    training: dict[str, Any], said: str
) -> None:
    told = {"name": "case", "model": {"base": "tea/tiny"}, "data": {"files": ["a.jsonl"]}}
    job = JobFile.model_validate({**told, "limits": {"max_usd": 1.0}, "training": training})
    with pytest.raises(PreflightError, match=said) as caught:
        family_of(job, CONFIG, 10, [])
    assert caught.value.hint
