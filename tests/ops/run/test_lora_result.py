"""Which tensors and which config are the LoRA that a job asked for: each rule alone, as a function
of names and shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ops.run.expected import CONFIG, ExpectedResult, Invalid
from ops.run.lora_result import validate_lora
from trainer.wire.tensors import Tensor

ASKED = ExpectedResult("base", 4, (), "lora", 8, ("q_proj", "v_proj"), False, False)
Q, V = "model.layers.0.q_proj", "model.layers.0.v_proj"


def tensor(name: str, *shape: int, zero: bool = False, dtype: str = "float32") -> Tensor:
    return Tensor(name, dtype, shape, True, zero)


def pair(module: str, r: int = 4, **more: Any) -> list[Tensor]:
    a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    return [tensor(a, r, 16), tensor(b, 16, r, **more)]


def config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "base_model_name_or_path": "base",
        "target_modules": ["q_proj", "v_proj"],
        "use_dora": False,
        "use_rslora": False,
    } | changes


def judge(
    tensors: list[Tensor], told: Any = None, asked: ExpectedResult = ASKED, **changes: Any
) -> str:
    """What is wrong with them; "" where nothing is."""
    files = {CONFIG: config(**changes) if told is None else told}
    try:
        validate_lora({t.name: t for t in tensors}, files, asked)
    except Invalid as invalid:
        return str(invalid)
    return ""


BOTH = [*pair(Q), *pair(V)]


def test_pairs_of_each_target_are_what_was_asked_for() -> None:
    assert judge(BOTH) == ""
    nothing = replace(ASKED, lora_alpha=None, target_modules=None, use_dora=None, use_rslora=None)
    assert judge(BOTH, lora_alpha=3, asked=nothing) == ""
    assert judge(pair("q_proj"), asked=nothing, target_modules=["q_proj"]) == ""
    with pytest.raises(Invalid, match=f"lacks {CONFIG}"):
        validate_lora({t.name: t for t in BOTH}, {}, ASKED)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "LOHA"}, "is not a LoRA's"),
        ({"r": 8}, "has r 8, the job asked for 4"),
        ({"r": 4.0}, "has r 4.0"),
        ({"r": True}, "has r True"),
        ({"base_model_name_or_path": "x"}, "of base model 'x'"),
        ({"lora_alpha": 16}, "has lora_alpha 16, the job asked for 8"),
        ({"use_dora": True}, "has use_dora True"),
        ({"use_rslora": True}, "has use_rslora True"),
        ({"target_modules": ["q_proj"]}, "has target_modules"),
        ({"target_modules": "q_proj"}, "has target_modules"),
        ({"target_modules": None}, "has target_modules"),
        ({"modules_to_save": "lm_head"}, "has modules_to_save"),
        ({"modules_to_save": [1]}, "has modules_to_save"),
        ({"rank_pattern": {"q_proj": 2.0}}, "has a rank_pattern"),
        ({"rank_pattern": {"(a+)+": 4}}, "has a rank_pattern"),
        ({"rank_pattern": [4]}, "has a rank_pattern"),
    ],
)
def test_a_config_that_says_something_else_is_named(changes: dict[str, Any], said: str) -> None:
    assert said in judge(BOTH, **changes)


def test_a_config_that_is_no_object_is_none_of_a_lora() -> None:
    assert "is not a LoRA's" in judge(BOTH, told=["LORA"])


def test_pissa_comes_home_with_its_rank_or_twice_of_it_and_any_alpha_then() -> None:
    asked = replace(ASKED, init_lora_weights="pissa")
    twice = [*pair(Q, 8), *pair(V, 8)]
    assert judge(twice, asked=asked, r=8, lora_alpha=16) == ""
    assert judge(BOTH, asked=asked) == ""
    assert "lora_alpha" in judge(BOTH, asked=asked, lora_alpha=16)
    assert "has r 12" in judge([*pair(Q, 12), *pair(V, 12)], asked=asked, r=12)
    assert "has r 2" in judge([*pair(Q, 2), *pair(V, 2)], asked=asked, r=2)
    assert "use_rslora" in judge(twice, asked=asked, r=8, use_rslora=True)


def test_each_tensor_belongs_to_a_target_or_to_a_module_to_save() -> None:
    head = tensor("model.lm_head.weight", 40, 16)
    assert "lm_head.weight belongs to no LoRA" in judge([*BOTH, head])
    assert judge([*BOTH, head], modules_to_save=["lm_head"]) == ""
    assert judge([*BOTH, tensor("lm_head.weight", 40, 16)], modules_to_save=["lm_head"]) == ""
    assert "belongs to no LoRA" in judge([*BOTH, head], modules_to_save=["head"])
    assert "o_proj is none of" in judge([*BOTH, *pair("model.o_proj")])
    assert "xq_proj is none of" in judge([*BOTH, *pair("model.xq_proj")])
    assert "target 'v_proj' has no tensors" in judge(pair(Q))
    assert judge([*pair("q_proj"), *pair("v_proj")]) == "", "the whole name is an end too"


def test_an_expression_has_to_name_each_module_that_was_asked_for() -> None:
    tower = r"model\.text\..*\.(q_proj|v_proj)"
    assert judge(BOTH, target_modules=tower) == ""
    assert "has target_modules" in judge(BOTH, target_modules=r".*\.(q_proj|o_proj)")


EXPERTS = replace(ASKED, target_modules=("q_proj", "gate_up_proj", "down_proj"))


def test_experts_are_target_parameters_and_named_by_their_holder() -> None:
    holder = "model.layers.0.mlp.experts"
    side_by_side = [
        *pair(Q),
        tensor(f"{holder}.lora_A.weight", 32, 16),
        tensor(f"{holder}.lora_B.weight", 8, 32),
        tensor(f"{holder}.base_layer.lora_A.weight", 32, 8),
        tensor(f"{holder}.base_layer.lora_B.weight", 16, 32, dtype="bfloat16"),
    ]
    named = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", 7],
    }
    assert judge(side_by_side, asked=EXPERTS, **named) == ""
    whole = {**named, "target_parameters": [f"{holder}.gate_up_proj"]}
    assert judge(side_by_side, asked=EXPERTS, **whole) == "", "the whole name is one too"
    assert "is none of" in judge(
        side_by_side, asked=EXPERTS, **{**named, "target_parameters": ["perts.gate_up_proj"]}
    )
    assert "has target_modules" in judge(side_by_side, asked=EXPERTS, target_modules=["q_proj"])
    without = replace(EXPERTS, target_modules=("q_proj", "v_proj", "down_proj"))
    assert "has target_modules" in judge(side_by_side, asked=without, **named)
    more = {**named, "target_modules": ["q_proj", "o_proj"]}
    assert "has target_modules" in judge(side_by_side, asked=EXPERTS, **more)
    for a, b in (((32, 16), (8, 31)), ((32, 16, 1), (8, 32)), ((32, 16), (8, 32, 1)), ((32,), ())):
        odd = [*pair(Q), tensor(f"{holder}.lora_A", *a), tensor(f"{holder}.lora_B", *b)]
        assert "has lora_A" in judge(odd, asked=EXPERTS, **named), (a, b)


def test_both_halves_of_each_module_are_there() -> None:
    (qa, qb), v = pair(Q), pair(V)
    assert "q_proj lacks its lora_B" in judge([qa, *v])
    assert "q_proj lacks its lora_A" in judge([qb, *v])
    saved = tensor("model.lm_head.weight", 4, 4)
    asked = replace(ASKED, target_modules=None)
    none = {"target_modules": "x", "modules_to_save": ["lm_head"]}
    assert "holds no LoRA pair" in judge([saved], asked=asked, **none)


def embedding(a_zero: bool = False, b_zero: bool = False) -> list[Tensor]:
    return [
        tensor("model.embed.lora_embedding_A", 4, 40, zero=a_zero),
        tensor("model.embed.lora_embedding_B", 16, 4, zero=b_zero),
    ]


def test_an_embeddings_pair_has_names_of_its_own_and_begins_at_the_other_half() -> None:
    asked = replace(ASKED, target_modules=("embed",))
    both = {"asked": asked, "target_modules": ["embed"]}
    assert judge(embedding(), **both) == ""
    assert "lacks its lora_embedding_B" in judge(embedding()[:1], **both)
    assert "lacks its lora_embedding_A" in judge(embedding()[1:], **both)
    assert "lora_embedding_B is all zero" in judge(embedding(b_zero=True), **both)
    assert "nothing was learnt" in judge(embedding(a_zero=True), **both)


def test_a_half_that_no_initialisation_leaves_zero_is_not_zero() -> None:
    dead = [tensor(f"{Q}.lora_A.weight", 4, 16, zero=True), pair(Q)[1]]
    assert "q_proj.lora_A.weight is all zero" in judge([*dead, *pair(V)])
    assert "one half of each of the 2 modules is zero" in judge(
        [*pair(Q, zero=True), *pair(V, zero=True)]
    )
    assert judge([*pair(Q, zero=True), *pair(V)]) == "", "one module learnt"


def test_a_dora_has_a_vector_of_as_many_numbers_as_its_output() -> None:
    asked = replace(ASKED, use_dora=True, target_modules=("q_proj",))
    both: dict[str, Any] = {"asked": asked, "use_dora": True, "target_modules": ["q_proj"]}

    def vector(*shape: int, zero: bool = False) -> Tensor:
        return tensor(f"{Q}.lora_magnitude_vector", *shape, zero=zero)

    assert judge([*pair(Q), vector(16)], **both) == ""
    assert judge([*pair(Q), vector(1, 16)], **both) == ""
    assert "lacks its lora_magnitude_vector" in judge(pair(Q), **both)
    assert "does not fit" in judge([*pair(Q), vector(4)], **both)
    assert "does not fit" in judge([*pair(Q), vector(16, zero=True)], **both)
    assert "has a DoRA vector" in judge([*BOTH, vector(16)])


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ((4, 16), (16, 4), ""),
        ((4, 16, 3, 3), (16, 4, 1, 1), ""),
        ((4,), (16, 4), "says r 4"),
        ((4, 16), (16,), "says r 4"),
        ((5, 16), (16, 4), "says r 4"),
        ((4, 16), (16, 5), "says r 4"),
        ((4, 16), (4, 16), "says r 4"),
    ],
)
def test_the_rank_is_the_first_of_a_and_the_second_of_b(
    a: tuple[int, ...], b: tuple[int, ...], said: str
) -> None:
    odd = [tensor(f"{Q}.lora_A.weight", *a), tensor(f"{Q}.lora_B.weight", *b)]
    told = judge([*odd, *pair(V)])
    assert told == "" if said == "" else said in told


def test_both_halves_have_one_dtype() -> None:
    assert "lora_A in float32 and lora_B in bfloat16" in judge(
        [*pair(Q, dtype="bfloat16"), *pair(V)]
    )


def test_a_rank_pattern_holds_for_the_modules_that_it_names() -> None:
    pattern = {"rank_pattern": {"q_proj": 2, "layers.1.v_proj": 9}}
    assert judge([*pair(Q, 2), *pair(V)], **pattern) == ""
    assert "says r 2" in judge(BOTH, **pattern)
    assert judge(BOTH, rank_pattern={"proj": 2}) == "", "a part of a name is no module"
    assert judge(BOTH, rank_pattern=None) == ""
