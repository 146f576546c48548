"""PEFT's settings for adapters: what they choose trains, is saved, and loads in stock PEFT with
equal logits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, build
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from tiny import manifest_of, write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from trainer import memory
from trainer.model.dropout import TokenKeys
from trainer.model.forward import hidden_states, target_loss
from trainer.model.load import load
from trainer.model.parts import ModelError
from trainer.result.adapter import save_model
from trainer.train import run_job
from trainer.wire.job import Job, Lora

Make = Callable[..., Path]
CPU = torch.device("cpu")
IDS = torch.arange(3, 60)[None]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("lora")

    def get(name: str) -> Path:
        if not (root / name).exists():
            if name == "gemma2_untied":  # caps its logits
                kind, settings = ARCHITECTURES["gemma2"]
                untied = AutoConfig.for_model(kind, **settings, tie_word_embeddings=False)
                made = AutoModelForCausalLM.from_config(untied)
                made.save_pretrained(root / name)
            else:
                build(name).save_pretrained(root / name)
            write_tokenizer(root / name)
        return root / name

    return get


def loaded(folder: Path, precision: str = "fp32", **lora: Any) -> tuple[Job, Any]:
    """(job, a model whose trained parameters are all away from their start)."""
    told = {"base": "tiny/random", "path": "model", "precision": precision}
    given = {"run_id": "test-run", "model": told, "data": {"files": []}}
    job = Job.model_validate({**given, "lora": {"r": 4, "lora_alpha": 8, **lora}})
    model, _ = load(job, folder, CPU, TokenKeys())
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return job, model.eval()


def trained(model: Any) -> dict[str, torch.Size]:
    return {n: p.shape for n, p in model.named_parameters() if p.requires_grad}


SETTINGS: list[tuple[str, dict[str, Any], Callable[[dict[str, torch.Size]], bool]]] = [
    ("llama", {"exclude_modules": ["down_proj", "q_proj"]},
     lambda t: not any("down_proj" in n or "q_proj" in n for n in t) and len(t) == 2 * 2 * 5),
    ("llama", {"exclude_modules": r".*layers\.0\..*"},
     lambda t: all("layers.1." in n for n in t) and len(t) == 2 * 7),
    ("llama", {"target_modules": r".*\.layers\.1\..*\.(q|v)_proj"},
     lambda t: all("layers.1.self_attn.q" in n or "layers.1.self_attn.v" in n for n in t)),
    ("llama", {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 1}},
     lambda t: sum(1 in shape for shape in t.values()) == 2),
    ("llama", {"layers_to_transform": [1]}, lambda t: all("layers.1." in n for n in t)),
    ("llama", {"layers_to_transform": 0}, lambda t: all("layers.0." in n for n in t)),
    ("llama", {"rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 6}},
     lambda t: {s[0] for n, s in t.items() if "lora_A" in n} == {2, 4, 6}),
    ("qwen3", {"alpha_pattern": {"down_proj": 32.0}}, lambda t: len(t) == 2 * 2 * 7),
    ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]},
     lambda t: sum("modules_to_save" in n for n in t) == 2),
    ("llama", {"modules_to_save": ["model.norm"], "target_modules": ["q_proj"]},
     lambda t: sum("modules_to_save" in n for n in t) == 1),
    ("llama_tied", {"modules_to_save": ["embed_tokens"]},
     lambda t: any("embed_tokens.modules_to_save" in n for n in t)),
    ("gemma2_untied", {"target_modules": ["q_proj", "lm_head"]},
     lambda t: any("lm_head" in n for n in t)),
    ("gemma2", {"modules_to_save": ["lm_head"]},  # tied: one parameter, by its first name
     lambda t: any("embed_tokens.modules_to_save" in n for n in t)),
    ("qwen3_moe", {"exclude_modules": ["k_proj"]},
     lambda t: any(".experts." in n for n in t) and not any("k_proj" in n for n in t)),
    ("qwen3_moe", {"rank_pattern": {"q_proj": 2}},
     lambda t: {s[0] for n, s in t.items() if "q_proj.lora_A" in n} == {2}),
    ("llama", {"rank_pattern": {"q_proj": 2}, "init_lora_weights": "pissa"}, lambda t: True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "lora", "right"), SETTINGS, ids=[f"{n}-{'-'.join(s)}" for n, s, _ in SETTINGS]
)
def test_what_is_chosen_trains_and_loads_in_stock_peft_with_equal_logits(
    name: str,
    lora: dict[str, Any],
    right: Callable[[dict[str, torch.Size]], bool],
    folder_of: Any,
    tmp_path: Path,
) -> None:
    from trainer.model.load import load_base
    from trainer.model.lora import add_lora, start_values

    pissa = lora.get("init_lora_weights") == "pissa"
    if pissa:  # the start is taken away again: it has to be known
        job, _ = loaded(folder_of(name), **lora)
        model = add_lora(job, load_base(job, folder_of(name), CPU), TokenKeys())
        initial = start_values(model, job)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
    else:
        (job, model), initial = loaded(folder_of(name), **lora), {}
    assert right(trained(model)), trained(model)
    save_model(model, job, tmp_path / "adapter", initial)
    base = AutoModelForCausalLM.from_pretrained(
        folder_of(name), attn_implementation="eager", dtype=torch.float32
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's, about keys that are missing
        warnings.filterwarnings("ignore", message="The following .*_pattern keys did not match")
        warnings.filterwarnings("ignore", message=".*tie.*")
        stock = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        got, want = model(IDS, use_cache=False).logits, stock(IDS, use_cache=False).logits
    assert (got - want).abs().max() < (1e-3 if pissa else 1e-5) * want.abs().max()


@pytest.mark.parametrize("lora", [{"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
                                  {"target_modules": ["q_proj", "lm_head"]}])  # fmt: skip
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_of_a_head_that_trains_is_that_of_its_logits(
    lora: dict[str, Any], precision: str, folder_of: Any
) -> None:
    _, model = loaded(folder_of("gemma2_untied"), precision, **lora)
    labels = torch.cat([IDS[:, 1:], torch.tensor([[-100]])], 1)
    at = torch.arange(IDS.shape[1] - 1)
    loss = target_loss(model, {"input_ids": IDS, "labels": labels, "targets_at": at})
    loss.backward()
    assert hidden_states(model, input_ids=IDS).dtype == getattr(
        torch, {"fp32": "float32", "bf16": "bfloat16"}[precision]
    )
    logits = model(IDS, use_cache=False).logits[0, :-1].float()
    want = torch.nn.functional.cross_entropy(logits, IDS[0, 1:], reduction="sum")
    assert abs(float(loss.detach()) - float(want.detach())) < (
        1e-4 if precision == "fp32" else 0.02
    ) * float(want.detach())
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.dtype == torch.float32 and p.grad is not None and p.grad.any(), name


def test_b_learns_faster_with_lora_plus(run_folder: Make) -> None:
    """One step from the same start: B of both runs moves by Adam's unit step, 16 times as far."""
    moved = []
    for ratio in (None, 16.0):
        path = run_folder(
            lora={"loraplus_lr_ratio": ratio}, training={"max_steps": 1, "learning_rate": 1e-4}
        )
        assert run_job(path) == 0
        import zipfile

        from safetensors.torch import load as read

        with zipfile.ZipFile(path.parent / "result" / "adapter.zip") as archive:
            tensors = read(archive.read("adapter_model.safetensors"))
        moved.append(max(float(t.abs().max()) for n, t in tensors.items() if "lora_B" in n))
    assert moved[1] == pytest.approx(16 * moved[0], rel=1e-3)
    assert manifest_of(path)["lora"]["loraplus_lr_ratio"] == 16.0


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"modules_to_save": ["embed_token"]}, "modules_to_save: this model has no 'embed_token'"),
        ({"rank_pattern": {"w_down": 2}}, "rank_pattern: no module with an adapter matches"),
        ({"target_modules": r".*nothing"}, "PEFT cannot adapt the model so: Target modules"),
        ({"exclude_modules": r".*"}, "PEFT cannot adapt the model so: All modules"),
        ({"layers_to_transform": [1, 7]}, "there is no layer 7, the model has 2: name layers of 0"),
    ],
)
def test_what_matches_nothing_is_refused(lora: dict[str, Any], said: str, folder_of: Any) -> None:
    with pytest.raises(ModelError, match=said):
        loaded(folder_of("llama"), **lora)


@pytest.mark.parametrize(
    "lora",
    [
        {"layers_to_transform": [0]},
        {"exclude_modules": ["experts"]},
        {"exclude_modules": r".*\.experts.*"},
        {"lora_dropout": 0.1, "target_modules": ["gate_proj"]},
    ],
)
def test_what_does_not_reach_experts_is_refused(lora: dict[str, Any], folder_of: Any) -> None:
    with pytest.raises(ModelError, match=f"lora.{next(iter(lora))} does not work on the experts"):
        loaded(folder_of("qwen3_moe"), **lora)
    loaded(folder_of("qwen3_moe"), **lora | {"target_modules": ["q_proj"]})


def test_a_router_that_is_trained_whole_computes_as_in_stock_peft(folder_of: Any) -> None:
    chosen = {"target_modules": ["q_proj"], "modules_to_save": ["gate"]}
    _, model = loaded(folder_of("qwen3_moe"), **chosen)
    base = AutoModelForCausalLM.from_pretrained(folder_of("qwen3_moe"))
    stock = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **chosen))
    missing = stock.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not any("lora" in key or "gate" in key for key in missing)
    with torch.no_grad():
        ours, theirs = model(input_ids=IDS).logits, stock.eval()(input_ids=IDS).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_layers_are_chosen_by_the_list_or_by_the_expression() -> None:
    with pytest.raises(ValidationError, match="says which layers: write them there"):
        Lora(target_modules=r".*q_proj", layers_to_transform=[0])
    for none in ([], [-1], -1):
        with pytest.raises(ValidationError, match="names no layer"):
            Lora(layers_to_transform=none)


def test_a_broken_expression_is_refused_when_the_job_is_read() -> None:
    with pytest.raises(ValidationError, match="no regular expression"):
        Lora(target_modules="(q_proj")
    with pytest.raises(ValidationError, match="no regular expression"):
        Lora(rank_pattern={"[": 2})


def test_memory_counts_whole_modules_and_the_largest_rank(folder_of: Any) -> None:
    told = json.loads((folder_of("llama") / "config.json").read_text())
    shape = memory.Shape.from_config({**told, "vocab_size": 150_000, "hidden_size": 4096})
    plain = memory.predict(shape, r=16)
    saved = memory.predict(shape, r=16, saved=("embed_tokens", "lm_head"))
    more = 2 * 150_000 * 4096 * (4 + 4 + 8) / memory.GIB
    assert saved.peak_gib - plain.peak_gib >= more
    assert Lora(r=8, rank_pattern={"q_proj": 32}).largest_rank == 32
    assert Lora(target_modules=r".*q_proj").counted_modules == "all-linear"
