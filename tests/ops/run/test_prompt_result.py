"""Which tensors and which config are the learned prompt that a job asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ops.run.expected import CONFIG, ExpectedResult, Invalid
from ops.run.prompt_result import NAME, validate_prompt
from trainer.wire.tensors import Tensor

PREFIX = ExpectedResult("base", 16, (), "p_tuning_v2", virtual_tokens=4)
SIZES = {"token_dim": 16, "num_layers": 3, "num_attention_heads": 2}


def tensor(*shape: int, name: str = NAME, zero: bool = False, dtype: str = "float32") -> Tensor:
    return Tensor(name, dtype, shape, True, zero)


def judge(*tensors: Tensor, asked: ExpectedResult = PREFIX, **changes: Any) -> str:
    """What is wrong with them; "" where nothing is."""
    told = {
        "peft_type": "PREFIX_TUNING",
        "base_model_name_or_path": "base",
        "num_virtual_tokens": 4,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }
    files = {CONFIG: told | SIZES | changes}
    try:
        validate_prompt({t.name: t for t in tensors}, files, asked)
    except Invalid as invalid:
        return str(invalid)
    return ""


GOOD = tensor(4, 2 * 3 * 16)


def test_a_prompt_of_each_method_is_what_was_asked_for() -> None:
    assert judge(GOOD) == ""
    projected = replace(PREFIX, method="prefix_tuning")
    assert judge(GOOD, asked=projected, prefix_projection=True) == ""
    for method, kind in (("p_tuning", "P_TUNING"), ("prompt_tuning", "PROMPT_TUNING")):
        asked = replace(PREFIX, method=method)
        assert judge(tensor(4, 16), asked=asked, peft_type=kind) == ""


@pytest.mark.parametrize(
    ("tensors", "changes", "words"),
    [
        ([GOOD, tensor(4, 4, name="model.layers.0.q_proj.lora_A.weight")], {}, "alone"),
        ([tensor(4, 96, name="prompt_embedding")], {}, "alone"),
        ([tensor(5, 96)], {}, "says float32"),
        ([tensor(4, 95)], {}, "says float32"),
        ([tensor(96, 4)], {}, "says float32"),
        ([tensor(4, 96, dtype="int8")], {}, "says float32"),
        ([tensor(4, 96, zero=True)], {}, "all zero"),
        ([GOOD], {"peft_type": "LORA"}, "asked for PREFIX_TUNING"),
        ([GOOD], {"base_model_name_or_path": "other/base"}, "base model"),
        ([GOOD], {"num_virtual_tokens": 5}, "num_virtual_tokens"),
        ([GOOD], {"num_virtual_tokens": True}, "num_virtual_tokens"),
        ([GOOD], {"inference_mode": False}, "inference_mode"),
        ([GOOD], {"prefix_projection": True}, "prefix_projection"),
        ([GOOD], {"num_layers": 10**9}, "no size"),
        ([GOOD], {"num_layers": "3"}, "no size"),
        ([GOOD], {"token_dim": -16}, "no size"),
        ([GOOD], {"num_attention_heads": 3}, "for 3 heads"),
        ([GOOD], {"num_transformer_submodules": 2}, "submodules"),
        ([GOOD], {"auto_mapping": {"base_model_class": "X"}}, "auto_mapping"),
        ([GOOD], {"tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs"),
        ([GOOD], {"tokenizer_name_or_path": "evil/tokenizer"}, "not the base's"),
        ([GOOD], {"revision": "evil"}, "revision"),
    ],
)
def test_what_a_hostile_box_could_send_instead_is_refused(
    tensors: list[Tensor], changes: dict[str, Any], words: str
) -> None:
    assert words in judge(*tensors, **changes)


def test_an_archive_without_its_configuration_is_refused() -> None:
    with pytest.raises(Invalid, match=f"lacks {CONFIG}"):
        validate_prompt({NAME: GOOD}, {}, PREFIX)
