"""Learned prompts equal stock PEFT, row by row: loss, gradients, the saved file, greedy answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import build, config
from peft import PeftModel
from torch.nn.functional import cross_entropy

from trainer import families, memory
from trainer.data import batch
from trainer.data.tokenised import Rows
from trainer.data.tokens import open_vocabulary
from trainer.kernels.attention import register
from trainer.model import load
from trainer.model.decode import generate
from trainer.model.dropout import TokenKeys
from trainer.model.forward import target_loss
from trainer.model.parts import ModelError
from trainer.model.prompts import add_prompt, continue_prompt
from trainer.result.adapter import save_model
from trainer.result.open import load_model
from trainer.wire.job import Job
from trainer.wire.prompts import PROMPT_METHODS

CPU, K = torch.device("cpu"), 5
LENGTHS = (11, 3, 17)
LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8}


def job(method: str, **settings: Any) -> Job:
    return Job.model_validate(
        {
            "run_id": "test-run",
            "model": {"base": "tiny/random", "path": "model", "precision": "fp32"},
            "data": {"files": []},
            "training": {"method": method},
            "prompt_learning": {"num_virtual_tokens": K, **settings},
        }
    )


def ours(name: str, asked: Job) -> Any:
    register()
    base = build(name, "milktea").requires_grad_(False)
    base.config.use_cache = False
    return load.assemble(asked, base, CPU, TokenKeys())[0].eval()


def drawn() -> Rows:
    ids = np.random.default_rng(3).integers(3, 300, sum(LENGTHS)).astype(np.int32)
    starts = np.cumsum([0, *LENGTHS])
    trained = np.ones(len(ids), np.bool_)
    trained[starts[:-1]] = False
    return Rows(ids, trained, starts, np.zeros(3, np.bool_), [""] * 3)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def stock_loss(model: Any, rows: Rows) -> torch.Tensor:
    """PEFT's own forward of each row alone."""
    total = torch.zeros(())
    for a, b in zip(rows.starts[:-1], rows.starts[1:], strict=True):
        ids = torch.from_numpy(rows.ids[a:b]).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, -len(ids) :]
        total = total + cross_entropy(logits[:-1], ids[1:], reduction="sum")
    return total / sum(rows.targets())


every = [("llama", m, {}) for m in PROMPT_METHODS] + [("qwen3", m, {}) for m in PROMPT_METHODS]
more = [(n, m, {}) for n in ("qwen2", "mistral", "phi3", "glm", "glm4") for m in PROMPT_METHODS]
slow = [pytest.param(*one, marks=pytest.mark.slow) for one in more]


@pytest.mark.parametrize(
    ("name", "method", "settings"), [*every, ("llama", "p_tuning", LSTM), *slow]
)
def test_packed_and_padded_rows_give_the_loss_and_gradients_of_stock_peft_alone(
    name: str, method: str, settings: dict[str, Any]
) -> None:
    asked, rows = job(method, **settings), drawn()
    model = ours(name, asked)
    stock = add_prompt(asked, build(name).requires_grad_(False)).eval()
    want = stock_loss(stock, rows)
    want.backward()
    wanted, want = gradients(stock), want.detach()
    assert wanted and all("prompt_encoder" in n for n in wanted)
    for collate in (batch.packed, batch.padded):
        model.zero_grad()
        loss = target_loss(model, collate(rows, range(3), CPU)) / sum(rows.targets())
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(want), abs=1e-5)
        found = gradients(model)
        assert found.keys() == wanted.keys()
        for key, grad in wanted.items():
            assert float((found[key] - grad).abs().max()) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-3), ("bf16", 0.1)])
@pytest.mark.parametrize("method", PROMPT_METHODS)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_gpu_gives_the_loss_and_gradients_of_the_cpu(
    name: str, method: str, precision: str, bound: float
) -> None:
    """bf16 attends by flash attention, with the prefix in front of each document's keys."""
    asked, rows, found = job(method), drawn(), []
    for device, dtype in ((CPU, "fp32"), (torch.device("cuda"), precision)):
        register()
        base = build(name, "milktea").requires_grad_(False)
        base = base.to(torch.bfloat16) if dtype == "bf16" else base
        told = asked.model.model_copy(update={"precision": dtype})
        model = load.assemble(asked.model_copy(update={"model": told}), base, device, TokenKeys())
        for collate in (batch.packed, batch.padded):
            model[0].eval().zero_grad()
            loss = target_loss(model[0], collate(rows, range(3), device)) / sum(rows.targets())
            loss.backward()
            flat = torch.cat([g.flatten().cpu() for g in gradients(model[0]).values()])
            found.append((float(loss.detach()), flat))
    want, wanted = found[0]
    for got, gradient in found[1:]:
        assert got == pytest.approx(want, rel=bound / 10)
        assert float((gradient - wanted).norm() / wanted.norm()) < bound


@pytest.mark.parametrize(
    ("method", "settings"), [*((m, {}) for m in PROMPT_METHODS), ("p_tuning", LSTM)]
)
def test_the_plan_counts_the_values_that_are_trained(method: str, settings: dict[str, Any]) -> None:
    asked = job(method, **settings)
    shape = memory.Shape.from_config(config("qwen3").to_dict())
    learned = memory.Learned.of(method, asked.prompt_learning)
    model = add_prompt(asked, build("qwen3").requires_grad_(False))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learned is not None and learned.parameters(shape) == trained


@pytest.mark.parametrize("method", ["prefix_tuning", "p_tuning"])
def test_recomputed_layers_give_the_same_gradients(method: str) -> None:
    asked, rows = job(method), drawn()
    found = []
    for recomputed in (0, 2):
        model = ours("llama", asked)
        load.checkpoint_first(model, recomputed)
        target_loss(model, batch.packed(rows, range(3), CPU)).backward()
        found.append(gradients(model))
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_the_saved_prompt_is_stock_pefts_and_answers_alike_side_by_side(
    method: str, tmp_path: Path
) -> None:
    asked, rows = job(method), drawn()
    model = ours("qwen3", asked)
    build("qwen3").save_pretrained(tmp_path / "base")
    saved = save_model(model, asked, tmp_path / "adapter", {})
    assert list(saved) == ["prompt_embeddings"]
    stock: Any = PeftModel.from_pretrained(build("qwen3"), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        mine = target_loss(model, batch.packed(rows, range(3), CPU)) / sum(rows.targets())
        assert float(stock_loss(stock, rows)) == pytest.approx(float(mine), abs=1e-5)
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17]]
    again = load_model(tmp_path / "adapter", tmp_path / "base", CPU)
    found = [generate(m, prompts, {2}, CPU, 6, width=2) for m in (model, again)]
    for prompt, one, other in zip(prompts, *found, strict=True):
        ids = list(prompt)
        for chosen, log_prob in zip(one.ids, one.log_probs, strict=True):
            with torch.no_grad():
                logits = stock(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            best = logits.log_softmax(-1).max(0)
            assert int(best.indices) == chosen
            assert float(best.values) == pytest.approx(log_prob, abs=1e-4)
            ids.append(chosen)
        assert one.ids == other.ids
    with model.disable_adapter():
        base = generate(model, prompts, {2}, CPU, 6)
    plain = generate(build("qwen3", "milktea"), prompts, {2}, CPU, 6)
    assert [a.ids for a in base] == [a.ids for a in plain] != [a.ids for a in found[0]]


def test_a_prompt_begins_as_the_text_that_is_told(
    tmp_path: Path, models: Callable[..., Path]
) -> None:
    folder = models("gqa")
    asked = job("prompt_tuning", prompt_tuning_init_text="What is 1 + 2?")
    model: Any = load.load(asked, folder, CPU, TokenKeys())[0]
    ids = open_vocabulary(folder).tokenizer.encode("What is 1 + 2?").ids
    wanted = model.get_base_model().get_input_embeddings().weight[torch.tensor((ids * K)[:K])]
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, wanted)
    save_model(model, asked, tmp_path, {})
    text = (tmp_path / "adapter_config.json").read_text()
    assert str(folder) not in text and '"tokenizer_name_or_path": "tiny/random"' in text


def test_a_prompt_goes_on_from_what_a_network_gave_and_from_no_other_base(tmp_path: Path) -> None:
    asked = job("p_tuning", encoder_hidden_size=8)
    made = save_model(ours("qwen3", asked), asked, tmp_path / "made", {})
    model = ours("qwen3", job("prompt_tuning"))
    continue_prompt(model, tmp_path / "made")
    table = model.prompt_encoder["default"].embedding.weight
    assert torch.equal(table, made["prompt_embeddings"]) and table.requires_grad
    with pytest.raises(ModelError, match=r"holds one of \[5, 32\], and this base has \[5, "):
        continue_prompt(ours("qwen3", job("p_tuning_v2")), tmp_path / "made")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mistral_window", "window"),
        ("gemma2", "window"),
        ("gpt_oss", "experts"),
        ("qwen3_5", "state"),
        ("olmo2", "proven"),
    ],
)
def test_a_family_that_no_prompt_goes_with_is_refused_by_name(name: str, why: str) -> None:
    assert why in families.read(config(name).to_dict()).why_no_prompt()


def test_a_model_that_no_prompt_goes_with_is_not_loaded_with_one() -> None:
    with pytest.raises(ModelError, match="mistral takes no learned prompt: some layers have"):
        ours("mistral_window", job("p_tuning_v2"))
