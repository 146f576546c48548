"""The loss that balances a mixture's experts is transformers' own, in value and in gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from transformers import AutoModelForCausalLM

from trainer.model.dropout import TokenKeys
from trainer.model.forward import target_loss
from trainer.model.load import load
from trainer.model.parts import ModelError
from trainer.wire.job import Job

CPU, IDS = torch.device("cpu"), torch.arange(3, 60)[None]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("balance")

    def get(name: str) -> Path:
        if not (root / name).exists():
            build(name).save_pretrained(root / name)
        return root / name

    return get


def job(coefficient: Any, method: str = "full") -> Job:
    training = {"method": method, "router_aux_loss_coef": coefficient}
    model = {"base": "tiny/random", "path": "model", "precision": "fp32"}
    given = {"run_id": "test-run", "model": model, "data": {"files": []}, "training": training}
    return Job.model_validate(given)


def batch() -> dict[str, torch.Tensor]:
    labels = torch.cat([IDS[:, 1:], torch.tensor([[-100]])], 1)
    return {"input_ids": IDS, "labels": labels, "targets_at": torch.arange(IDS.shape[1] - 1)}


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "granitemoe"])
def test_loss_and_routers_gradients_are_those_of_transformers(name: str, folder_of: Any) -> None:
    model, _ = load(job(0.5), folder_of(name), CPU, TokenKeys())
    ours = target_loss(model, batch())
    ours.backward()
    stock = AutoModelForCausalLM.from_pretrained(
        folder_of(name), attn_implementation="eager", dtype=torch.float32
    )
    stock.router_aux_loss_coef = 0.5
    theirs = stock(IDS, labels=IDS, output_router_logits=True, use_cache=False).loss
    targets = IDS.shape[1] - 1
    (theirs * targets).backward()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()) * targets, rel=1e-5)
    wanted = {n: p.grad for n, p in stock.named_parameters() if "router" in n or ".gate." in n}
    found = dict(model.named_parameters())
    assert wanted
    for key, gradient in wanted.items():
        assert gradient is not None
        grad = found[key].grad
        assert grad is not None
        assert (grad - gradient).abs().max() < 1e-4 * gradient.abs().max(), key


def test_the_default_is_the_familys_own_and_none_is_added_unasked(folder_of: Any) -> None:
    told = {}
    for coefficient in (0.0, "default", 0.9):
        model, _ = load(job(coefficient, "lora"), folder_of("gpt_oss"), CPU, TokenKeys())
        told[coefficient] = float(target_loss(model, batch()).detach())
    own = AutoModelForCausalLM.from_pretrained(folder_of("gpt_oss")).config.router_aux_loss_coef
    added = (told[0.9] - told[0.0]) * own / 0.9
    assert told["default"] - told[0.0] == pytest.approx(added, rel=0.05, abs=1e-4)
    assert told[0.9] > told[0.0]


@pytest.mark.parametrize("name", ["deepseek_v3", "llama"])
def test_a_family_without_such_a_loss_refuses_the_setting(name: str, folder_of: Any) -> None:
    with pytest.raises(ModelError, match="has no loss that balances"):
        load(job("default", "lora"), folder_of(name), CPU, TokenKeys())
