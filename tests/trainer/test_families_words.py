"""What a family says of one config.json: numbers and words, without torch."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trainer.families import FLAT, Family, FamilyError, read, whole

LAYERS = {"num_hidden_layers": 3, "sliding_window": 8}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = ("gate_proj", "up_proj", "down_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def family(kind: str, **settings: Any) -> Family:
    return read({"model_type": kind, **settings})


# -- windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "windows"),
    [
        ("mistral", {}, (8, 8, 8)),
        ("mistral", {"sliding_window": None}, (None, None, None)),
        ("llama", {"sliding_window": 0}, (None, None, None)),
        ("mistral", {"use_sliding_window": False}, (None, None, None)),
        ("llama", {}, (None, None, None)),
        ("gemma2", {}, (8, None, 8)),
        ("qwen2", {"use_sliding_window": True}, (8, 8, 8)),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, (None, 8, 8)),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}, (None, None, None)),
        ("qwen2", {}, (None, None, None)),
        ("gemma3_text", {"num_hidden_layers": 7}, (8, 8, 8, 8, 8, None, 8)),
        ("gemma3_text", {"sliding_window_pattern": 2}, (8, None, 8)),
        (
            "gemma3_text",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            (None, 8, None),
        ),
    ],
)
def test_each_layer_has_its_window(
    kind: str, settings: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    found = family(kind, **{**LAYERS, **settings})
    assert found.windows == windows
    assert found.window == (8 if any(windows) else None)


def test_a_window_in_the_mask_unpacks_rows_that_reach_it_or_whose_length_is_not_known() -> None:
    found = family("phimoe", **LAYERS)
    assert found.packs(7) and not found.packs(8) and not found.packs()
    assert family("phimoe", num_hidden_layers=3).packs(), "it has none"
    assert family("mistral", **LAYERS).packs(), "attention is told of it"


def test_a_hybrid_packs_where_every_layer_is_attention() -> None:
    hybrid = {"num_hidden_layers": 2, "layers_block_type": ["attention", "attention"]}
    assert family("granitemoehybrid", **hybrid).packs()
    assert not family("granitemoehybrid", num_hidden_layers=2).packs()
    assert not family("nemotron_h", **hybrid).packs()


# -- sizes -----------------------------------------------------------------------------------------


def test_layers_are_told_under_any_of_their_names() -> None:
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        assert family("llama", **{name: 5}).layers == 5
    assert family("llama").layers == 0
    for kinds in ({"layers_block_type": ["moe", "mlp"]}, {"hybrid_override_pattern": "M*"}):
        assert family("nemotron_h", **kinds).layers == 2, "as transformers 5 and NVIDIA write it"
    assert family("llama", num_hidden_layers=10_000).layers == 10_000
    with pytest.raises(FamilyError, match="tells of 10,001 layers"):
        _ = family("llama", num_hidden_layers=10_001).layers


def test_a_size_is_a_whole_number_below_two_to_the_fortieth() -> None:
    assert whole({"a": 0}, "a") == 0 and whole({"a": 7.0}, "a") == 7
    assert whole({"a": (1 << 40) - 1}, "a") == (1 << 40) - 1
    assert whole({"a": None, "b": False, "c": 3}, "a", "b", "c") == 3
    assert whole({"a": [3, 9, 1]}, "a") == 9 and whole({}, "a") is None
    for none in (1 << 40, -1, 0.5, True, "3", [], [3, "x"], {}):
        with pytest.raises(FamilyError, match="which is no size"):
            whole({"a": none}, "a")


def test_a_factor_is_a_number() -> None:
    assert family("glm", partial_rotary_factor=0.5).turned == 0.5
    assert family("llama").turned == 1.0
    assert family("llama", rope_parameters={"partial_rotary_factor": 0.25}).turned == 0.25
    for none in ("x", True, float("inf"), float(1 << 40), -float(1 << 40)):
        with pytest.raises(FamilyError, match="which is no number"):
            _ = family("llama", partial_rotary_factor=none).turned


def test_scores_are_capped_where_attention_asks_for_it() -> None:
    assert family("gemma2", attn_logit_softcapping=50).softcap == 50.0
    assert family("gemma2").softcap is None
    assert family("llama", attn_logit_softcapping=50).softcap is None
    assert family("gpt_oss").sinks and not family("llama").sinks


def test_a_row_is_no_longer_than_learned_positions() -> None:
    gpt2 = family("gpt2", n_layer=1, n_positions=16)
    gpt2.validate_longest(16)
    with pytest.raises(FamilyError, match="has 17 tokens, gpt2 has learned 16") as said:
        gpt2.validate_longest(17)
    assert "data.max_length to 16" in said.value.hint
    family("gpt2", n_layer=1).validate_longest(17)
    family("llama", max_position_embeddings=16).validate_longest(17)


# -- what is trained -------------------------------------------------------------------------------


def test_all_linear_takes_experts_unless_left_out_and_the_router_only_where_asked() -> None:
    moe = family("qwen3_moe", num_experts=2)
    assert moe.mixture and moe.all_linear().modules == ATTENTION
    assert (moe.all_linear().experts, moe.all_linear().router) == (EXPERTS, "")
    assert moe.all_linear(experts=False).experts == ()
    assert moe.all_linear(router=True).router == "mlp.gate"
    alone = family("qwen3_moe", num_experts=1)
    assert not alone.mixture
    assert (alone.all_linear().experts, alone.all_linear(router=True).router) == ((), "")
    dense = family("llama", num_experts=8)
    assert not dense.mixture and dense.all_linear(router=True).router == ""
    assert dense.all_linear().modules == (*ATTENTION, *DENSE)


def test_an_experts_parts_are_no_modules_of_their_own() -> None:
    moe, dense = family("qwen3_moe", num_experts=4), family("llama")
    assert moe.named(["q_proj", "gate_proj", "x"]) == (["q_proj", "x"], list(EXPERTS))
    assert moe.named(["q_proj"]) == (["q_proj"], [])
    assert dense.named(["q_proj", "gate_proj"]) == (["q_proj", "gate_proj"], [])
    shared = family("qwen2_moe", num_experts=4)
    assert shared.named(["gate_proj"]) == (["gate_proj"], []), "its dense layers have them"


def test_what_peft_takes_for_experts_has_no_adapter() -> None:
    deepseek = family("deepseek_v3", n_routed_experts=4)
    assert not any(m.split(".")[-1] in DENSE for m in deepseek.all_linear().modules)
    assert any("stay as they are: PEFT has no name for them" in w for w in deepseek.words())
    assert set(DENSE) <= set(family("deepseek_v3").all_linear().modules), "without experts"
    assert not any("PEFT" in w for w in family("qwen3_moe", num_experts=4).words())


def test_logits_are_the_models_own_where_no_row_says_how() -> None:
    assert not family("llama").own_logits and family("ctrl").own_logits
    assert family("ctrl").general and not family("llama").general


def test_the_fused_layer_knows_a_type_whose_heads_turn_whole() -> None:
    assert family("llama").fused and not family("gpt2").fused
    assert not family("llama", partial_rotary_factor=0.5).fused
    assert family("glm", partial_rotary_factor=0.5).fused, "pairs turn in place"
    assert family("qwen3_5_text", partial_rotary_factor=0.25).fused, "it has a gate"


# -- words -----------------------------------------------------------------------------------------


def test_the_plan_says_what_attention_computes() -> None:
    gemma = family("gemma2", **LAYERS, attn_logit_softcapping=50, max_position_embeddings=64)
    said = [
        "a window of 8 tokens in 2 of 3 layers",
        "attention's scores are capped at 50",
        "the longest row has 65 tokens, the model knows 64 positions: it learns what it cannot do",
        f"all-linear takes {', '.join((*ATTENTION, *DENSE))}",
    ]
    assert gemma.words(65) == said
    assert gemma.words(64) == gemma.words() == [*said[:2], said[3]]
    assert family("llama", max_position_embeddings=64).words(64) == said[3:]


def test_the_plan_says_what_experts_and_sinks_are() -> None:
    assert family("gpt_oss", **LAYERS, num_local_experts=4).words(9) == [
        "a window of 8 tokens in 2 of 3 layers",
        "attention has sinks",
        f"all-linear takes {', '.join(ATTENTION)}",
        f"and all 4 experts of a layer ({', '.join(EXPERTS)}) at rank 8; the router (mlp.router) "
        "stays as it is",
    ]


def test_the_plan_says_what_transformers_computes_itself() -> None:
    first, second, last = family("ctrl", n_layer=1).words()
    assert first == "model_type ctrl: transformers' own attention computes it"
    assert second.startswith("rows are not packed, which is slower: ")
    assert last == "all-linear takes every Linear module of the model but its head"


def test_the_plan_says_that_angles_depend_on_the_row_and_that_pictures_are_left_alone() -> None:
    text = {"model_type": "phi3", "rope_scaling": {"type": "longrope"}}
    assert "the angles of a row depend on its own length" in read(text).words()
    words = read({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}).words()
    assert words[-1].startswith("gemma3: text rows only")


# -- reading ---------------------------------------------------------------------------------------


def test_a_text_tower_takes_from_the_whole_what_it_leaves_out() -> None:
    whole_config = {"model_type": "gemma3", "tie_word_embeddings": True, "vocab_size": 7, "x": 1}
    tower = {"model_type": "gemma3_text", "vocab_size": 9}
    found = read({**whole_config, "text_config": tower})
    assert found.config == {**tower, "tie_word_embeddings": True}
    assert (found.wrapper, found.model_type) == ("gemma3", "gemma3_text")
    with pytest.raises(FamilyError, match="gemma3 tells nothing of its text tower"):
        read(whole_config)


@pytest.mark.parametrize("kind", FLAT)
def test_a_picture_model_whose_file_on_the_hub_is_flat_is_read_as_transformers_reads_it(
    kind: str,
) -> None:
    flat = {"model_type": kind, "num_hidden_layers": 5, "hidden_size": 64, "vision_config": {}}
    found = read(flat)
    assert (found.wrapper, found.model_type, found.layers) == (kind, f"{kind}_text", 5)
    whole_config = CONFIG_MAPPING[kind](**{k: v for k, v in flat.items() if k != "model_type"})
    theirs = read(whole_config.to_dict())
    assert theirs.config["num_hidden_layers"] == 5 and theirs.config["hidden_size"] == 64
    assert (theirs.model_type, theirs.tower, theirs.row) == (
        found.model_type,
        found.tower,
        found.row,
    )


def test_an_encoder_that_decodes_is_taken() -> None:
    with pytest.raises(FamilyError, match="both directions"):
        family("bert")
    assert family("bert", is_decoder=True).model_type == "bert"


def test_a_checkpoint_quantised_for_good_is_refused_by_the_methods_name() -> None:
    for key in ("quantization_config", "compression_config"):
        with pytest.raises(FamilyError, match="quantised with gptq"):
            family("llama", **{key: {"quant_method": "gptq"}})
    with pytest.raises(FamilyError, match="quantised with unknown"):
        family("llama", quantization_config={"bits": 4})
    assert family("llama", quantization_config={"quant_method": "fp8"})
    assert family("llama", quantization_config={})
    with pytest.raises(FamilyError, match="quantization_config = 'odd'"):
        family("llama", quantization_config="odd")
