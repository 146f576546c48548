"""Adapters that a run takes up: continued, stacked, beside each other on one base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import write_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from trainer.kernels.patch import accelerate_model
from trainer.loop.optim import FlatGradients, optimizer_of
from trainer.model.dropout import TokenKeys
from trainer.model.load import load
from trainer.model.parts import ModelError, causal
from trainer.model.roles import Roles, continue_from, stack_on
from trainer.result.adapter import identity, save_model
from trainer.wire.job import Job

Models = Callable[..., Path]
HOST = torch.device("cpu")
PACK: dict[str, Any] = {
    "position_ids": torch.arange(6)[None],
    "cu_seq_lens_q": torch.tensor([0, 6], dtype=torch.int32),
    "cu_seq_lens_k": torch.tensor([0, 6], dtype=torch.int32),
    "max_length_q": 6,
    "max_length_k": 6,
}
IDS = torch.tensor([[5, 9, 12, 40, 7, 33]])


def job(**lora: Any) -> Job:
    file = {"path": "data/x", "name": "x", "sha256": "0" * 64, "size_bytes": 1}
    told = {
        "run_id": "a-run",
        "model": {"base": "tiny/random", "precision": "fp32"},
        "data": {"files": [file]},
        "lora": {"r": 4, "lora_alpha": 8, **lora},
    }
    return Job.model_validate(told)


def made(base: Path, seed: int | None = None, **lora: Any) -> tuple[Any, Job]:
    """A model with a fresh adapter; with a seed, one that was trained somehow."""
    told = job(**lora)
    model, _ = load(told, base, HOST, TokenKeys())
    if seed is not None:
        dice = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=dice)
    return model, told


def said(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return causal(model)(input_ids=IDS).logits


@pytest.fixture
def base(models: Models) -> Path:
    return models("gqa")


@pytest.fixture
def before(base: Path, tmp_path: Path) -> tuple[Path, Tensor]:
    """An adapter's folder, and what the model says with it."""
    model, told = made(base, seed=1)
    save_model(model, told, tmp_path / "before", {})
    return tmp_path / "before", said(model)


def test_a_continued_adapter_says_what_it_said(base: Path, before: tuple[Path, Tensor]) -> None:
    folder, expected = before
    model, _ = made(base)
    continue_from(model, folder)
    assert torch.equal(said(model), expected)


def test_a_stacked_adapter_keeps_the_first_as_it_is_and_loads_in_stock_peft(
    base: Path, before: tuple[Path, Tensor], tmp_path: Path
) -> None:
    folder, expected = before
    model, told = made(base, r=6, lora_alpha=9)  # 4 of before, 2 of its own, at another scale
    stack_on(model, folder)
    assert torch.allclose(said(model), expected, atol=1e-5)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in trained.items()}
    gradients = FlatGradients(trained.values())
    optimizer = optimizer_of([list(trained.values())], told.training, HOST)
    for _ in range(3):
        gradients.zero()
        causal(model)(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    for name, parameter in trained.items():
        moved = parameter.detach() != start[name]
        moved = moved if "lora_A" in name else moved.t()
        assert not moved[:4].any() and moved[4:].any(), name
    save_model(model, told, tmp_path / "after", {})
    stock = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    with torch.no_grad():
        found = PeftModel.from_pretrained(stock, str(tmp_path / "after"))(input_ids=IDS).logits
    assert torch.allclose(found, said(model), atol=1e-5)


def test_roles_on_one_base_say_what_each_says_alone(
    base: Path, before: tuple[Path, Tensor], tmp_path: Path
) -> None:
    """One of another rank; who trains and who does not stays as it was said."""
    other, told = made(base, seed=2, r=8, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    save_model(other, told, tmp_path / "other", {})
    model, _ = made(base)
    continue_from(model, before[0])
    roles = Roles(model)
    roles.add("judge", tmp_path / "other", trained=False)
    roles.add("value", None, trained=True)
    for name, expected in (("judge", said(other)), ("value", before[1]), ("default", before[1])):
        roles.take(name)
        assert torch.allclose(said(model), expected, atol=1e-6), name
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".default." in name or "value" in name), name
    assert not roles.head("value").weight.any(), "without a reward model the value says 0"


@pytest.mark.parametrize(
    "lora, said_why",
    [
        ({"r": 8}, "lora.r, or the base, is another"),
        ({"target_modules": ["q_proj"]}, "has other modules than this model"),
    ],
)
def test_an_adapter_that_does_not_fit_is_told(
    lora: dict[str, Any], said_why: str, base: Path, before: tuple[Path, Tensor]
) -> None:
    model, _ = made(base, **lora)
    with pytest.raises(ModelError, match=said_why):
        continue_from(model, before[0])


def test_a_stack_that_leaves_out_modules_of_the_first_is_refused(
    base: Path, before: tuple[Path, Tensor]
) -> None:
    model, _ = made(base, r=8, target_modules=["q_proj"])
    with pytest.raises(ModelError, match=r"lora\.target_modules leaves out"):
        stack_on(model, before[0])


def test_a_base_is_known_by_its_weights(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in base.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert identity(copy) == identity(base)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert identity(copy) != identity(base)


def test_roles_compute_by_the_fused_layer_what_they_compute_by_peft(
    tmp_path: Path,
) -> None:
    """A role of another rank and with other modules: the layer looks adapters up at every forward
    pass."""
    base = tmp_path / "wide"  # heads of 32, which the layer takes
    write_model(base, "gqa", hidden_size=128, intermediate_size=192)
    first, told = made(base, seed=1)
    save_model(first, told, tmp_path / "before", {})
    other, told = made(base, seed=2, r=20, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    save_model(other, told, tmp_path / "other", {})
    for fused in (False, True):
        model, _ = made(base)
        continue_from(model, tmp_path / "before")
        if fused:
            names = accelerate_model(model, "fp32", HOST)
            assert names["layer"].startswith("fused")
        roles = Roles(model)
        roles.add("value", tmp_path / "other", trained=True)
        found = {}
        for name in ("default", "value", "default"):
            roles.take(name)
            model.zero_grad()
            causal(model)(input_ids=IDS, labels=IDS, **PACK).loss.backward()
            found[name] = {
                n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
            }
            assert all(f".{name}." in n for n, g in found[name].items() if g.any())
        if not fused:
            expected = found
            continue
        for name, gradients in expected.items():
            for key, gradient in gradients.items():
                assert torch.allclose(found[name][key], gradient, atol=1e-5), key
