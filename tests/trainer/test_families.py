"""The table of architectures against transformers itself: its tables, modules and attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, MOST_USED, WINDOW, build, config
from chatglm import THEIRS
from torch import nn
from transformers import AttentionInterface, AutoConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from trainer import families
from trainer.families import FamilyError, read
from trainer.kernels import delta
from trainer.kernels.attention import packed_attention
from trainer.tools.convert_chatglm import qwen2_config

# in transformers 5.24 and not in the 5.23 of our lock
NEWER = {
    *("apertus1p5", "apertus1p5_text", "dory", "exaone", "hy_v4_vl", "hy_v4_vl_text"),
    *("inkling2_loop", "inkling2_loop_text", "lara_mini", "sarvam_mla", "sarvam_moe"),
}
LENGTHS = (40, 57, 33)

every = pytest.mark.parametrize(
    "name",
    [n if n in MOST_USED else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES],
)


def told(name: str) -> dict[str, Any]:
    return config(name).to_dict()


# -- transformers' tables --------------------------------------------------------------------------


def test_every_causal_model_type_of_transformers_is_in_the_table():
    causal = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    pictures = set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert causal - families.known_types() == set()
    assert pictures - families.known_types() == set()


def test_the_table_names_no_type_that_transformers_does_not_have():
    named = families.known_types() - set(CONFIG_MAPPING_NAMES)
    assert {n for n in named if n.replace("-", "_") not in CONFIG_MAPPING_NAMES} <= NEWER


def test_no_type_stands_in_two_rows():
    types = [t for row in families._file()["row"] for t in row["types"]]
    assert len(types) == len(set(types))


def test_every_row_uses_the_keys_of_the_default():
    default = families._file()["default"]
    for row in families._file()["row"]:
        assert set(row) - {"types"} <= set(default), row["types"]
        assert row.get("refuse") or row.get("packs", True) or row.get("why"), row["types"]
        assert not row.get("refuse") or row.get("hint"), row["types"]


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "qwen3_vl", "qwen2_5_vl", "mistral3"])
def test_the_text_tower_of_a_wrapper_is_where_the_table_says(kind):
    from transformers import AutoModelForImageTextToText

    settings = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(settings)
    family = read(settings.to_dict())
    tower = model.get_submodule(family.tower)
    assert family.wrapper == kind
    assert tower.config.model_type == family.model_type
    assert isinstance(tower.layers, nn.ModuleList) and len(tower.layers) == family.layers


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe", "llama4"])
def test_a_wrapper_without_a_tower_is_loaded_as_the_text_model(kind):
    from transformers import AutoModelForCausalLM

    settings = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    family = read(settings.to_dict())
    assert family.tower == "" and family.wrapper == kind
    assert model.config.model_type == family.model_type


# -- what attention is asked for, and what packs ---------------------------------------------------


class Heard:
    """Registered as an attention of its own, which hears what each layer asks of ours."""

    def __init__(self) -> None:
        self.windows: dict[int, int | None] = {}
        self.softcaps: set[float | None] = set()
        self.sinks: set[bool] = set()

    def __call__(self, module, query, key, value, attention_mask=None, **rules):
        self.windows[module.layer_idx] = rules.get("sliding_window")
        self.softcaps.add(rules.get("softcap"))
        self.sinks.add(rules.get("s_aux") is not None)
        return packed_attention(module, query, key, value, attention_mask, **rules)


def rows() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(5, 300, (n,), generator=g) for n in LENGTHS]


def pack(documents: list[torch.Tensor]) -> dict[str, Any]:
    ends = [0]
    for d in documents:
        ends.append(ends[-1] + len(d))
    cu = torch.tensor(ends, dtype=torch.int32)
    longest = max(len(d) for d in documents)
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(len(d)) for d in documents])[None],
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum")


def in_one_pack(model: nn.Module, documents: list[torch.Tensor]) -> torch.Tensor:
    logits = model(**pack(documents), use_cache=False).logits[0]
    parts = logits.split([len(d) for d in documents])
    return torch.stack([loss_of(x, d) for x, d in zip(parts, documents, strict=True)]).sum()


def gap(model: nn.Module, other: nn.Module) -> float:
    """The largest difference of a parameter's gradients, of that parameter's largest."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    kept = [(a.grad, b.grad) for a, b in pairs if a.grad is not None and b.grad is not None]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in kept if b.abs().max() > 1e-4)


@every
def test_a_family_that_packs_gives_what_its_rows_give_alone_in_eager(name):
    """Rows of 33 to 57 tokens, windows of 16; stock transformers, row by row, is the judge."""
    family = read(told(name))
    if not family.packs(max(LENGTHS)):
        assert family.why_unpacked(max(LENGTHS))
        return
    heard, documents = Heard(), rows()
    AttentionInterface.register("heard", heard)
    alone, packed = build(name), build(name, "heard")
    packed.load_state_dict(alone.state_dict())
    assert bool(delta.by_document(packed)) == family.row["delta"]
    want = torch.zeros(())
    for d in documents:
        loss = loss_of(alone(input_ids=d[None], use_cache=False).logits[0], d)
        loss.backward()
        want += loss.detach()
    got = in_one_pack(packed, documents)
    got.backward()
    assert abs(float(got.detach() - want)) / sum(LENGTHS) < 1e-5
    # these are steep: a millionth more or less in the embeddings changes gradients by 2 %
    assert gap(packed, alone) < (1e-2 if family.row["delta"] else 1e-3)
    every_layer = dict(enumerate(family.windows))
    assert heard.windows == {i: w for i, w in every_layer.items() if i in heard.windows}
    assert len(heard.windows) == len(every_layer) or family.row["delta"]
    assert heard.softcaps == {family.softcap}
    assert heard.sinks == {family.sinks}


@pytest.mark.parametrize("name", ["stablelm", "lfm2", "nemotron", "bloom", "llama4"])
def test_a_family_that_is_said_not_to_pack_computes_something_else_in_a_pack(name):
    """So that none is unpacked for nothing."""
    family = read(told(name))
    assert family.why_unpacked()
    AttentionInterface.register("milktea", packed_attention)
    model = build(name, "eager" if family.row["own"] else "milktea")
    alone, documents = build(name), rows()
    with torch.no_grad():
        together = float(in_one_pack(model, documents))
        want = sum(
            float(loss_of(alone(input_ids=d[None], use_cache=False).logits[0], d))
            for d in documents
        )
    assert abs(together - want) > 1e-3


# -- what adapters take ----------------------------------------------------------------------------


def linear_names(model: nn.Module) -> list[str]:
    """Of the decoder layers: where a Linear stands, without the layer's number."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    path, layers = max(lists, key=lambda item: len(item[1]))
    names = set()
    for layer in layers:
        for n, m in layer.named_modules():
            if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D":
                names.add(n)
    assert path
    return sorted(names)


def ends_in(name: str, chosen: str) -> bool:
    return name == chosen or name.endswith("." + chosen)


@every
def test_all_linear_names_every_linear_of_the_layers_and_nothing_else(name):
    family = read(told(name))
    model = build(name)
    found = linear_names(model)
    modules = family.all_linear().modules
    if not modules:
        return
    kept_out = {n for n in found if left_out(n, family)}
    missed = [n for n in found if n not in kept_out and not any(ends_in(n, m) for m in modules)]
    assert missed == []
    assert [n for n in kept_out if any(ends_in(n, m) for m in modules)] == []


# gates of one value a token are no place for a low rank; Gemma 3n's side paths neither
LEFT = {
    *("shared_expert_gate", "linear_left", "linear_right", "modality_router"),
    *("correction_coefs", "prediction_coefs", "per_layer_input_gate", "per_layer_projection"),
}


def left_out(name: str, family: families.Family) -> bool:
    router = family.row["router"]
    if router and (ends_in(name, router) or name.startswith(router + ".")):
        return True
    if family.mixture and family.model_type in families._file()["peft"]["types"]:
        if name.split(".")[-1] in families._file()["peft"]["names"]:
            return True
    # Mamba's kernels read this weight themselves, so that an adapter on it would do nothing
    return name.split(".")[-1] in LEFT or name in ("mamba.out_proj", "mixer.out_proj")


def test_the_types_whose_names_peft_takes_for_experts_are_those_of_peft():
    from peft.utils import transformers_weight_conversion as peft

    taken = {k for k, v in peft._MODEL_TO_CONVERSION_PATTERN.items() if v == "qwen2_moe"}
    listed = set(families._file()["peft"]["types"])
    since_5_24 = {"sarvam_mla"}  # PEFT's table is a part of transformers'
    assert listed - since_5_24 <= taken
    assert {k for k in taken - listed if families._table().get(k, {}).get("experts")} == set()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "mixtral"])
def test_peft_puts_adapters_on_what_the_table_says_and_on_nothing_else(name):
    from peft import LoraConfig, get_peft_model

    adapted = read(told(name)).all_linear()
    model = get_peft_model(
        build(name),
        LoraConfig(
            target_modules=list(adapted.modules),
            target_parameters=list(adapted.experts),
            task_type="CAUSAL_LM",
        ),
    )
    held = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    inside = {n.replace(".base_layer", "") for n in held}
    experts = {n for n in inside if n.endswith(".experts")}
    assert len(experts) * 2 == len([n for n in held if ".experts" in n]) > 0
    rest = {n.split(".layers.")[1].split(".", 1)[1] for n in inside - experts}
    assert all(any(ends_in(n, m) for m in adapted.modules) for n in rest)
    linear = [n for n in linear_names(build(name)) if any(ends_in(n, m) for m in adapted.modules)]
    assert rest == set(linear)


@every
def test_the_experts_are_parameters_of_the_model(name):
    family = read(told(name))
    if not family.mixture:
        return
    parameters = dict(build(name).named_parameters())
    for expert in family.all_linear().experts:
        held = [p for n, p in parameters.items() if n.endswith(expert)]
        assert held, expert
        assert all(p.ndim == 3 and p.shape[0] == family.experts for p in held)
        hidden = family.config["hidden_size"]
        if "gate_up" in expert:
            assert all(
                (p.shape[1] == hidden) == (family.row["stored"] == "transposed") for p in held
            )


# -- reading ---------------------------------------------------------------------------------------


def test_a_picture_model_is_read_by_its_text_tower():
    family = read({
        "model_type": "gemma3", "vision_config": {"hidden_size": 1152},
        "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34,
                        "sliding_window": 1024},
    })  # fmt: skip
    assert (family.model_type, family.wrapper) == ("gemma3_text", "gemma3")
    assert family.windows.count(1024) == 29 and family.windows[5] is None
    assert any("text rows only" in w for w in family.words())


def test_a_window_that_is_switched_off_is_none():
    shape = {"model_type": "qwen2", "num_hidden_layers": 4, "sliding_window": 4096}
    assert read({**shape, "use_sliding_window": False}).window is None
    on = read({**shape, "use_sliding_window": True, "max_window_layers": 2})
    assert on.windows == (None, None, 4096, 4096)


def test_a_window_in_the_mask_only_is_packed_while_no_row_reaches_it():
    phimoe = read({"model_type": "phimoe", "num_hidden_layers": 2, "sliding_window": WINDOW})
    assert phimoe.packs(WINDOW - 1)
    assert not phimoe.packs(WINDOW) and "16 tokens" in phimoe.why_unpacked(WINDOW)


def test_granite_without_mamba_layers_may_be_packed():
    shape = {"model_type": "granitemoehybrid", "num_hidden_layers": 2}
    assert read({**shape, "layer_types": ["attention", "attention"]}).packs()
    assert not read({**shape, "layer_types": ["mamba", "attention"]}).packs()


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_scaling": {"type": "longrope"}},
        {"rope_parameters": {"rope_type": "dynamic"}},
        {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}},
    ],
)
def test_angles_that_depend_on_a_rows_length_are_seen(settings):
    assert read({"model_type": "phi3", "num_hidden_layers": 2, **settings}).long_rope
    assert not read({"model_type": "phi3", "num_hidden_layers": 2}).long_rope


def test_a_converted_chatglm_has_the_same_angles_at_every_length():
    theirs = THEIRS | {"padded_vocab_size": 300}
    family = read(qwen2_config(theirs))
    assert not family.long_rope and not family.why_no_prompt() and not family.why_unshared()
    other = qwen2_config(theirs)
    other["rope_parameters"]["long_factor"][1] *= 2
    assert read(other).long_rope


@pytest.mark.parametrize(
    ("settings", "reason", "hint"),
    [
        ({"model_type": "bert"}, "both directions", "causal"),
        ({"model_type": "bart"}, "encoder with a decoder", "causal"),
        ({"model_type": "internlm2"}, "not among transformers' causal", "convert"),
        ({"model_type": "whisper"}, "pictures or sound", "language model"),
        ({"model_type": "gemma4_assistant"}, "draft model", "-assistant"),
        ({}, "no model_type", "transformers reads"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "awq", "nf4"),
        (
            {"model_type": "internvl_chat", "llm_config": {"model_type": "qwen2"}},
            "internvl_chat is not among transformers' causal",
            "convert",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_next_step(settings, reason, hint):
    with pytest.raises(FamilyError, match=reason) as said:
        read(settings)
    assert hint in said.value.hint


LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
SLIDING = LLAMA | {"model_type": "qwen3", "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (LLAMA | {"rope_scaling": {"type": "ntk-by-parts"}}, "'ntk-by-parts', which transformers"),
        (LLAMA | {"is_causal": False}, "reads later tokens too"),
        (LLAMA | {"num_attention_heads": 0}, "num_attention_heads = 0"),
        (LLAMA | {"num_key_value_heads": 3}, "which 3 key-value heads do not divide"),
        (LLAMA | {"model_type": "mistral", "sliding_window": 0}, "sliding_window = 0"),
        (SLIDING | {"sliding_window": None}, "and no sliding_window"),
        (SLIDING | {"num_hidden_layers": 3, "sliding_window": 8}, "3 layers, and of 2 in layer_ty"),
    ],
)
def test_what_transformers_would_raise_for_is_refused_from_the_configuration(settings, reason):
    with pytest.raises(FamilyError, match=reason):
        read(settings)


def test_an_embedding_model_in_the_shape_of_a_decoder_is_refused():
    with pytest.raises(FamilyError, match="reads later tokens too"):
        read({"model_type": "gemma3_text", "use_bidirectional_attention": True})
    assert read({"model_type": "gemma4_text", "use_bidirectional_attention": "vision"})


def test_a_quantised_text_tower_is_refused_as_a_quantised_model_is():
    text = {"model_type": "gemma3_text", "quantization_config": {"quant_method": "awq"}}
    with pytest.raises(FamilyError, match="quantised with awq"):
        read({"model_type": "gemma3", "text_config": text})


def test_a_checkpoint_whose_values_can_be_restored_is_taken():
    for method in ("mxfp4", "fp8"):
        assert read({"model_type": "gpt_oss", "quantization_config": {"quant_method": method}})


def test_the_plan_says_what_a_mixture_trains():
    words = "; ".join(read(told("qwen3_moe")).words())
    assert "all 4 experts" in words and "router (mlp.gate) stays" in words


def test_the_plan_says_why_rows_are_not_packed():
    words = read(told("qwen3_next")).words()
    assert words[0].startswith("rows are not packed") and "gated delta nets" in words[0]


def test_the_plan_says_what_packs_gated_delta_nets():
    words = read(told("qwen3_5")).words()
    assert "packed by fla-core" in words[0] and "one by one" in words[0]


SIZES = {"model_type": "qwen2", "num_hidden_layers": 2, "sliding_window": 8, "hidden_size": 64}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", "${HOME}"),
        ("num_hidden_layers", [[4]]),
        ("num_hidden_layers", []),
        ("num_hidden_layers", 1e308),
        ("num_hidden_layers", float("nan")),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 2.5),
        ("num_hidden_layers", 1 << 39),
        ("sliding_window", {"a": 1}),
        ("layer_types", [7]),
        ("layer_types", 7),
        ("max_position_embeddings", "many"),
        ("rope_parameters", [1]),
    ],
)
def test_a_size_that_is_none_is_refused_with_its_name(name, value):
    family = read(SIZES | {name: value})
    with pytest.raises(FamilyError, match=rf"{name}|layers") as said:
        family.words(4), family.positions, family.turned
    assert "fetch it again" in said.value.hint


def test_the_largest_of_a_list_of_sizes_counts_and_false_is_none():
    assert read(SIZES | {"num_hidden_layers": [2, 5.0, 3]}).layers == 5
    assert read(SIZES | {"sliding_window": False}).window is None
