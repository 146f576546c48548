"""The frozen base in parts: what its layers compute, and what a process holds of it. One process
that gathers from itself, in this one; two on the CPU, marked slow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainer.model import load
from trainer.model.dropout import TokenKeys
from trainer.model.forward import target_loss
from trainer.model.parts import decoder_layers
from trainer.wire.job import Job

Make = Callable[..., Path]
HOST = torch.device("cpu")


def micro() -> dict[str, Any]:
    """Two documents in one pack."""
    ids = torch.arange(40)[None] % 300
    labels = torch.where(torch.arange(40)[None] % 3 == 0, ids.roll(-1, 1), -100)
    ends = torch.tensor([0, 25, 40], dtype=torch.int32)
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(25), torch.arange(15)])[None],
        "labels": labels,
        "targets_at": torch.nonzero(labels[0] != -100)[:, 0],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": 25,
        "max_length_k": 25,
    }


def built(job: Job, folder: Path, shard: int | None) -> nn.Module:
    model, names = load.load(job, folder, HOST, TokenKeys(), shard=shard)
    assert names["layer"].startswith("transformers")
    assert ("in parts over 1" in names.get("base", "")) == (shard is not None)
    return model


def gradients(model: nn.Module) -> list[torch.Tensor]:
    dice = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zeros would hide A's gradient
            p.data = torch.randn(p.shape, generator=dice) * 0.05
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = None
    loss = target_loss(model, micro())
    loss.backward()
    return [loss.detach(), *(p.grad for p in trained if p.grad is not None)]


@pytest.mark.parametrize("kind", ["gqa", "gpt2"])
def test_transformers_layers_compute_the_same_from_parts_pass_after_pass(
    run_folder: Make, models: Make, alone: None, kind: str
) -> None:
    job = Job.model_validate_json(run_folder(kind).read_bytes())
    whole, parts = (built(job, models(kind), shard) for shard in (None, 0))
    want = gradients(whole)
    for _ in range(2):
        found = gradients(parts)
        assert len(found) == len(want) > 8
        assert all(
            torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(found, want, strict=True)
        )
        with torch.no_grad():
            assert torch.allclose(target_loss(parts, micro()), want[0], rtol=1e-5)
    frozen = [p for p in decoder_layers(parts).parameters() if not p.requires_grad and p.dim() == 2]
    assert not frozen  # between two passes no layer holds its matrices
