"""Each architecture as the trainer loads it, with its adapters, against stock transformers in eager
attention and stock PEFT, which opens the adapter that was saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, MOST_USED, folder_of
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from trainer.data import batch
from trainer.data.prepare import prepare
from trainer.kernels import experts
from trainer.model.dropout import TokenKeys
from trainer.model.forward import target_loss
from trainer.model.load import load
from trainer.model.parts import family_of
from trainer.result.adapter import save_model
from trainer.wire.job import Job

Make = Callable[..., Path]
CPU = torch.device("cpu")
CHOSEN = [3, 0, 17, 8, 11]

every = pytest.mark.parametrize(
    "name",
    [n if n in MOST_USED else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES],
)


def long_rows() -> list[dict[str, str]]:
    """Of some 60 to 200 tokens, longer than any window."""
    return [
        {"instruction": f"Say number {n}", "input": "", "output": f"it is {n} " * (3 + n % 9)}
        for n in range(24)
    ]


def opened(make: Make, folder: Path, **changes: Any) -> tuple[Job, Any, Any, int]:
    """(job, model with adapters that are not zero, rows, longest row)."""
    path = make(model=folder, data=long_rows(), **changes)
    job = Job.model_validate_json(path.read_bytes())
    rows = prepare(job, path.parent).rows
    longest = int(max(rows.lengths))
    model, _ = load(job, folder, CPU, TokenKeys(), longest=longest)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.normal_(0, 0.1, generator=g)
    return job, model.eval(), rows, longest


def stock(job: Job, model: Any, folder: Path, tmp_path: Path) -> Any:
    """What anybody gets who opens the saved adapter: eager attention, PEFT's own forward."""
    save_model(model, job, tmp_path / "adapter", {})
    try:
        base = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        )
    except ValueError:  # a class without eager attention
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's, about keys that are missing
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        warnings.filterwarnings("ignore", message="The following .*_pattern keys did not match")
        opened = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    return opened.eval()


@every
def test_loss_and_gradients_are_those_of_rows_alone_in_stock_transformers_and_peft(
    name: str, run_folder: Make, tmp_path: Path
) -> None:
    folder = folder_of(name, tmp_path / "model")
    job, ours, rows, longest = opened(run_folder, folder)
    judge = stock(job, ours, folder, tmp_path)
    packs = family_of(ours).packs(longest)
    one = (batch.packed if packs else batch.padded)(rows, CHOSEN, CPU)
    loss = target_loss(ours, one)
    loss.backward()
    want, targets = 0.0, len(one["targets_at"])
    for r in CHOSEN:
        span = slice(rows.starts[r], rows.starts[r + 1])
        ids = torch.tensor(rows.ids[span]).long()[None]
        labels = torch.where(torch.tensor(rows.trained[span]), ids[0], torch.tensor(-100))
        logits = judge(input_ids=ids, use_cache=False).logits[0]
        part = cross_entropy(logits[:-1].float(), labels[1:], reduction="sum", ignore_index=-100)
        part.backward()
        want += float(part.detach())
    assert abs(float(loss.detach()) - want) / targets < 1e-5
    found = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    judged = {n: p.grad for n, p in judge.named_parameters() if p.requires_grad}
    assert set(found) == set(judged) and len(found) >= 4
    for key, gradient in judged.items():
        if gradient is None or not gradient.abs().max() > 1e-4:
            continue
        assert (found[key] - gradient).abs().max() < 1e-3 * gradient.abs().max(), key


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_mixture_trains_its_experts_at_a_small_rank_and_not_its_router(
    name: str, run_folder: Make, tmp_path: Path
) -> None:
    folder = folder_of(name, tmp_path / "model")
    _, model, _, _ = opened(run_folder, folder, lora={"r": 16, "lora_alpha": 32})
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    held = {n: p for n, p in trained.items() if ".experts." in n}
    assert held and not any("router" in n or ".gate." in n for n in trained)
    for key, p in held.items():
        assert p.shape[0 if "lora_A" in key else 1] == 4 * 8, key  # 4 experts, rank 8
    wrapper = next(m for m in model.modules() if type(m).__name__ == "ParamWrapper")
    assert experts.factors(wrapper)[2] == 2.0  # alpha / r, as everywhere else


def test_naming_an_experts_parts_means_the_experts(run_folder: Make, tmp_path: Path) -> None:
    folder = folder_of("qwen3_moe", tmp_path / "model")
    named = {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
    _, model, _, _ = opened(run_folder, folder, lora=named)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(".experts." in n for n in trained) and any("q_proj" in n for n in trained)
    assert not any("k_proj" in n for n in trained)
