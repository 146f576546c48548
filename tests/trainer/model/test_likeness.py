"""The start-up comparison with stock transformers: sound models pass, and each planted fault is
caught with its module."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, MOST_USED, build, config
from tiny import events_of, manifest_of, write_tokenizer
from torch import nn
from transformers import AutoConfig

from trainer import families
from trainer.data import batch
from trainer.kernels import attention, experts, rotary
from trainer.kernels.attention import Rules
from trainer.kernels.decoder_layer import FastLayer
from trainer.model import forward, likeness, load, small_copy
from trainer.result import adapter
from trainer.train import run_job
from trainer.wire.job import Job

Patch = pytest.MonkeyPatch
Make = Callable[..., Path]
CPU = torch.device("cpu")
BUSY = ("llama", "qwen3", "gemma2", "gpt_oss", "qwen3_moe", "qwen3_5")


def job(**settings: Any) -> Job:
    model = {"base": "tiny/random", "path": "model", "precision": "fp32"}
    return Job.model_validate(
        {"run_id": "test-run", "model": model, "data": {"files": []}, **settings}
    )


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """folder_of(name) -> a model's folder, made once a module."""
    root = tmp_path_factory.mktemp("likeness")

    def get(name: str) -> Path:
        if not (root / name).exists():
            if name == "phi3_long":
                long_rope(root / name)
            elif name == "llama_wide":  # as wide as the fused layer wants heads
                settings = {**ARCHITECTURES["llama_tied"][1], "head_dim": 32}
                AutoConfig.for_model("llama", **settings).save_pretrained(root / name)
            else:
                build(name).save_pretrained(root / name)
        return root / name

    return get


def long_rope(folder: Path) -> None:
    settings = {**ARCHITECTURES["phi3"][1], "original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4}
    rope |= {"long_factor": [3.0, 5.0, 7.0, 9.0], "original_max_position_embeddings": 64}
    AutoConfig.for_model("phi3", **settings, rope_parameters=rope).save_pretrained(folder)


def compared(folder: Path, packed: bool | None = None, **settings: Any) -> str:
    family = families.read(json.loads((folder / "config.json").read_text()))
    packs = family.packs(200) if packed is None else packed
    return likeness.compare(job(**settings), folder, CPU, packs)


@pytest.mark.parametrize("name", BUSY)  # test_to_the_end.py trains every architecture
def test_a_sound_model_is_like_transformers(name: str, folder_of: Any) -> None:
    assert compared(folder_of(name)).startswith("fp32 loss within")


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_rows_that_are_padded_are_like_transformers_too(name: str, folder_of: Any) -> None:
    assert compared(folder_of(name), packed=False).startswith("fp32 loss within")


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_weights_that_train_themselves_are_compared_too(method: str, folder_of: Any) -> None:
    assert compared(folder_of("qwen3"), training={"method": method}).startswith("fp32 loss")


def test_the_fused_layers_eager_twin_is_like_transformers(
    folder_of: Any, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(load, "takes_fast_path", lambda *_: True)
    assert compared(folder_of("llama_wide")).startswith("fp32 loss within")


def test_modules_that_only_the_whole_model_has_are_no_fault(folder_of: Any) -> None:
    named = {"target_modules": ["layers.7.self_attn.q_proj"]}
    assert compared(folder_of("llama"), lora=named).startswith("fp32 loss within")


# -- planted faults -------------------------------------------------------------------------------


def attention_with(patch: Patch, change: Callable[..., tuple[Any, ...]]) -> None:
    """Packed attention on changed arguments: (q, k, v, sinks, cu, longest, rules)."""
    real = attention._packed
    patch.setattr(attention, "_packed", lambda *given: real(*change(*given[:7]), *given[7:]))


def window_ignored(patch: Patch) -> None:
    def change(q: Any, k: Any, v: Any, sinks: Any, cu: Any, longest: int, rules: Rules) -> Any:
        return q, k, v, sinks, cu, longest, Rules(rules.scale, None, rules.softcap)

    attention_with(patch, change)


def window_one_too_wide(patch: Patch) -> None:
    def change(q: Any, k: Any, v: Any, sinks: Any, cu: Any, longest: int, rules: Rules) -> Any:
        wide = None if rules.window is None else rules.window + 1
        return q, k, v, sinks, cu, longest, Rules(rules.scale, wide, rules.softcap)

    attention_with(patch, change)


def cap_ignored(patch: Patch) -> None:
    def change(q: Any, k: Any, v: Any, sinks: Any, cu: Any, longest: int, rules: Rules) -> Any:
        return q, k, v, sinks, cu, longest, Rules(rules.scale, rules.window)

    attention_with(patch, change)


def scale_wrong(patch: Patch) -> None:
    def change(q: Any, k: Any, v: Any, sinks: Any, cu: Any, longest: int, rules: Rules) -> Any:
        return q, k, v, sinks, cu, longest, Rules(1.05 * rules.scale, rules.window, rules.softcap)

    attention_with(patch, change)


def sinks_ignored(patch: Patch) -> None:
    attention_with(patch, lambda q, k, v, _sinks, *rest: (q, k, v, None, *rest))


def boundaries_ignored(patch: Patch) -> None:
    def change(q: Any, k: Any, v: Any, sinks: Any, cu: Any, longest: int, rules: Rules) -> Any:
        return q, k, v, sinks, cu[[0, -1]], q.shape[2], rules

    attention_with(patch, change)


def angles_of_the_whole_pack(patch: Patch) -> None:
    patch.setattr(rotary, "by_document", lambda _model: 0)


def cap_of_logits_ignored(patch: Patch) -> None:
    patch.setattr(forward, "logit_rules", lambda *_: (1.0, None))


def targets_across_rows(patch: Patch) -> None:
    def shifted(rows: Any, span: slice) -> np.ndarray:
        following = np.append(rows.ids[span.start + 1 : span.stop], rows.ids[0])
        return following.astype(np.int64)

    patch.setattr(batch, "_shifted", shifted)


def after_assembling(patch: Patch, change: Callable[[nn.Module], None]) -> None:
    real = load.assemble

    def assemble(*given: Any, **named: Any) -> Any:
        model, names = real(*given, **named)
        change(model)
        return model, names

    patch.setattr(load, "assemble", assemble)


def module_of(model: nn.Module, end: str) -> Any:
    return next(m for n, m in model.named_modules() if n.endswith(end))


def adapter_not_applied(patch: Patch) -> None:
    def off(model: nn.Module) -> None:
        module_of(model, "layers.1.mlp.up_proj")._disable_adapters = True

    after_assembling(patch, off)


def adapter_scaled_wrong(patch: Patch) -> None:
    def change(model: nn.Module) -> None:
        module_of(model, "layers.0.self_attn.v_proj").scaling["default"] *= 1.5

    after_assembling(patch, change)


def gradient_lost(patch: Patch) -> None:
    def cut(model: nn.Module) -> None:
        up = module_of(model, "layers.1.mlp.up_proj")
        up.register_forward_hook(lambda _m, _i, out: out.detach())

    after_assembling(patch, cut)


def norm_off_by_one(patch: Patch) -> None:
    def change(model: nn.Module) -> None:
        module_of(model, "layers.1.input_layernorm").weight.data += 1.0

    after_assembling(patch, change)


def experts_scaled_wrong(patch: Patch) -> None:
    real = experts.factors

    def factors(wrapper: Any) -> Any:
        found = real(wrapper)
        return None if found is None else (*found[:2], 2 * found[2])

    patch.setattr(experts, "factors", factors)


FAULTS = [
    (window_ignored, "mistral_window", "model.layers.0.self_attn"),
    (window_ignored, "gpt_oss", "model.layers.0.self_attn"),
    (window_ignored, "gemma3", "model.layers.0.self_attn"),
    (window_one_too_wide, "qwen2_window", "model.layers.1.self_attn"),
    (cap_ignored, "gemma2", "model.layers.0.self_attn"),
    (scale_wrong, "llama", "model.layers.0.self_attn"),
    (sinks_ignored, "gpt_oss", "model.layers.0.self_attn"),
    (boundaries_ignored, "qwen3", "model.layers.0.self_attn"),
    (angles_of_the_whole_pack, "phi3_long", "model.rotary_emb"),
    (cap_of_logits_ignored, "gemma2", "the head and its loss"),
    (targets_across_rows, "llama", "the head and its loss"),
    (adapter_not_applied, "qwen3", "model.layers.1.mlp.up_proj"),
    (adapter_scaled_wrong, "llama", "model.layers.0.self_attn.v_proj"),
    (gradient_lost, "llama", "model.layers.1.mlp.up_proj (its gradient)"),
    (norm_off_by_one, "qwen3", "model.layers.1.input_layernorm"),
    (experts_scaled_wrong, "qwen3_moe", "model.layers.0.mlp.experts"),
]


@pytest.mark.parametrize(
    ("fault", "name", "module"), FAULTS, ids=[f"{f.__name__}-{n}" for f, n, _ in FAULTS]
)
def test_a_planted_fault_is_caught_and_its_module_named(
    fault: Callable[[Patch], None], name: str, module: str, folder_of: Any, monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    with pytest.raises(likeness.Unlike) as told:
        compared(folder_of(name))
    assert told.value.module.startswith(module), str(told.value)
    assert module in str(told.value)


def test_a_fault_of_the_fused_layer_is_named_by_its_layer(
    folder_of: Any, monkeypatch: Patch
) -> None:
    real = FastLayer.forward

    def forward(self: FastLayer, *given: Any, **named: Any) -> Any:
        rules = self.rules
        self.rules = dataclasses.replace(rules, scale=1.1 * rules.scale)
        try:
            return real(self, *given, **named)
        finally:
            self.rules = rules

    monkeypatch.setattr(load, "takes_fast_path", lambda *_: True)
    monkeypatch.setattr(FastLayer, "forward", forward)
    with pytest.raises(likeness.Unlike, match=r"model\.layers\.0: packed rows"):
        compared(folder_of("llama_wide"))


def test_attention_that_is_asked_for_more_than_it_knows_is_a_fault(
    folder_of: Any, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(attention, "SILENT", set())
    with pytest.raises(likeness.Unlike, match="packed attention does not know"):
        compared(folder_of("llama"))


# -- in a run -------------------------------------------------------------------------------------


def test_a_run_stops_before_its_first_step_with_the_module_named(
    run_folder: Make, folder_of: Any, monkeypatch: Patch
) -> None:
    folder = folder_of("mistral_window")
    write_tokenizer(folder)
    path = run_folder(model=folder)
    window_ignored(monkeypatch)
    with pytest.raises(Exception, match=r"model\.layers\.0\.self_attn: packed rows are not"):
        run_job(path)
    assert not [e for e in events_of(path) if e["event"] == "step"]


def test_a_run_tells_what_was_compared_and_how_long_it_took(run_folder: Make) -> None:
    path = run_folder()
    assert run_job(path) == 0
    told = manifest_of(path)["kernels"]["compared"]
    assert "of transformers, in " in told and told.endswith(" s")


# -- the copy -------------------------------------------------------------------------------------


def shrunk(kind: str, **settings: Any) -> Any:
    return small_copy.small(AutoConfig.for_model(kind, **settings))


def test_the_copy_has_one_layer_of_each_kind_wherever_it_stands() -> None:
    late = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28}
    text = shrunk("qwen2", num_hidden_layers=32, **late)
    assert text.layer_types == ["full_attention", "sliding_attention"]
    assert text.num_hidden_layers == 2 and text.sliding_window == small_copy.WINDOW
    gemma = shrunk("gemma3_text", num_hidden_layers=26)
    assert gemma.layer_types == ["sliding_attention", "full_attention"]


def test_the_copy_of_a_mixture_keeps_a_dense_layer_and_one_with_experts() -> None:
    text = shrunk("deepseek_v3", num_hidden_layers=61, first_k_dense_replace=3)
    assert text.num_hidden_layers == 2
    with torch.device("meta"):
        model = load.auto_class("deepseek_v3").from_config(text)
    kinds = [type(layer.mlp).__name__ for layer in model.model.layers]
    assert kinds == ["DeepseekV3MLP", "DeepseekV3MoE"]


def test_the_copy_of_a_huge_mixture_is_narrow_and_keeps_its_experts() -> None:
    text = shrunk("gpt_oss", num_hidden_layers=36, num_local_experts=128)
    assert small_copy._parameters(text) < small_copy.MOST_PARAMETERS
    assert text.num_local_experts == 128 and text.hidden_size == 2880


def test_layers_that_share_keys_and_values_share_them_in_the_copy() -> None:
    text = config("gemma3n")
    text.num_kv_shared_layers = 2
    made = small_copy.small(text)
    assert made.num_hidden_layers == 4 and made.num_kv_shared_layers == 2


def test_a_copy_that_transformers_cannot_compute_is_told_and_no_fault(
    folder_of: Any, tmp_path: Path
) -> None:
    told = json.loads((folder_of("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "hidden_act": "no such thing"}))
    assert compared(tmp_path).startswith("not compared with transformers: KeyError")


# -- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MOST_USED)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_a_sound_model_is_like_transformers_on_the_gpu(
    name: str, precision: str, folder_of: Any, tmp_path: Path
) -> None:
    folder, model = folder_of(name), {"base": "tiny/random", "path": "model"}
    told = json.loads((folder / "config.json").read_text())
    if "linear_key_head_dim" in told:  # the delta rule's kernels take 16 columns or more
        told |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
        (tmp_path / "config.json").write_text(json.dumps(told))
        folder = tmp_path
    packs = families.read(told).packs(200)
    asked = job(model={**model, "precision": precision})
    told = likeness.compare(asked, folder, torch.device("cuda"), packs)
    print("LIKE", name, precision, told)
    assert told.startswith("fp32 loss within")
    assert ("bf16 loss within" in told) == (precision != "fp32")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama3_8b", "qwen3_8b", "gemma3_4b"])
def test_real_widths_are_like_transformers_on_the_gpu(name: str, tmp_path: Path) -> None:
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "llama3_8b": ("llama", {"hidden_size": 4096, "intermediate_size": 14336,
                                "num_attention_heads": 32, "num_key_value_heads": 8}),
        "qwen3_8b": ("qwen3", {"hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128,
                               "num_attention_heads": 32, "num_key_value_heads": 8}),
        "gemma3_4b": ("gemma3_text", {"hidden_size": 2560, "intermediate_size": 10240,
                                      "num_attention_heads": 8, "num_key_value_heads": 4,
                                      "head_dim": 256, "num_hidden_layers": 34}),
    }  # fmt: skip
    kind, settings = kinds[name]
    AutoConfig.for_model(kind, **settings).save_pretrained(tmp_path)
    model = {"base": "tiny/random", "path": "model", "precision": "bf16"}
    told = likeness.compare(job(model=model), tmp_path, torch.device("cuda"), True)
    print("LIKE", name, told)
    assert "bf16 loss within" in told


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("fault", "name"), [
    (window_ignored, "mistral_window"), (cap_ignored, "gemma2"), (sinks_ignored, "gpt_oss"),
    (boundaries_ignored, "qwen3"), (adapter_not_applied, "qwen3"),
    (cap_of_logits_ignored, "gemma2"),
])  # fmt: skip
def test_a_planted_fault_is_caught_on_the_gpu(
    fault: Callable[[Patch], None], name: str, folder_of: Any, monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    model = {"base": "tiny/random", "path": "model", "precision": "bf16"}
    with pytest.raises(likeness.Unlike):
        likeness.compare(job(model=model), folder_of(name), torch.device("cuda"), True)


# -- the save, rehearsed ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "freeze", "lora"])
def test_a_mixture_ends_with_a_result_by_each_method(
    method: str, run_folder: Make, folder_of: Any
) -> None:
    folder = folder_of("qwen3_moe")
    write_tokenizer(folder)
    path = run_folder(model=folder, training={"method": method, "max_steps": 2})
    assert run_job(path) == 0
    names = manifest_of(path)["tensors"]
    assert any("experts" in n for n in names) and manifest_of(path)["method"] == method


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_cannot_be_saved_stops_before_the_first_step(
    method: str, run_folder: Make, folder_of: Any, monkeypatch: Patch
) -> None:
    folder = folder_of("qwen3_moe")
    write_tokenizer(folder)
    path = run_folder(model=folder, training={"method": method, "max_steps": 2})
    real = adapter.save_model

    def forgets(*given: Any) -> dict[str, torch.Tensor]:
        tensors = real(*given)
        return {k: v for k, v in tensors.items() if "experts" not in k}

    monkeypatch.setattr(adapter, "save_model", forgets)
    with pytest.raises(adapter.ResultError, match="were trained"):
        run_job(path)
    assert not [e for e in events_of(path) if e["event"] == "step"]
