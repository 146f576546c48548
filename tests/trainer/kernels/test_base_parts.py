"""The frozen base in parts: what its layers compute, what a process holds of it, and when it is
kept so. One process that gathers from itself, in this one; two on the CPU, marked slow."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_bytes
from tiny import adapter_sha256, events_of, finish, manifest_of, rows, start
from torch import nn

from trainer import memory
from trainer.kernels.base_parts import BaseParts
from trainer.loop import budget
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


def test_processes_hold_all_of_a_layer_together_and_each_its_part_and_two_buffers() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(
        nn.ModuleDict({"a": nn.Linear(40, 24), "b": nn.Linear(24, 16)}) for _ in range(6)
    ).requires_grad_(False)
    kept, whole = [], [[p.clone() for p in layer.parameters() if p.dim() == 2] for layer in layers]
    for rank in range(3):
        mine, parts = copy.deepcopy(layers), BaseParts(HOST, rank, world=3)
        for layer in mine:
            parts.cut(layer)
        parts.attach(mine)
        assert not any(p.numel() for p in mine.parameters() if p.dim() == 2)
        kept.append(parts)
        size = parts.layers[0].size
        assert parts.held_bytes == 4 * (6 * size // 3 + 2 * size) == parts.most_bytes
    for number, matrices in enumerate(whole):
        row = torch.cat([parts.layers[number].part for parts in kept])
        for matrix, want in zip(kept[0].layers[number].matrices, matrices, strict=True):
            found = row[matrix.start : matrix.start + want.numel()].view(want.shape)
            assert torch.equal(found, want)


def test_a_base_is_kept_in_parts_where_it_fits_no_card_whole_and_is_counted_so() -> None:
    shape = memory.Shape(
        hidden=8192, layers=80, intermediate=28672, heads=64, kv_heads=8, head_dim=128, vocab=128256
    )
    assert memory.solve(shape, 79.2, processes=4) is None
    solved = memory.solve(shape, 79.2, processes=4, in_parts=True)
    assert solved is not None and solved[1] == 80
    whole, part = (
        memory.predict(shape, checkpointed_layers=80, processes=4, in_parts=x)
        for x in (False, True)
    )
    layers = 2 * memory.linear_parameters(shape) / memory.GIB
    assert whole.weights_gib - part.weights_gib == pytest.approx(layers * (3 / 4 - 2 / 80))
    assert whole.adapter_gib == part.adapter_gib
    takes = [("sft", "lora", "bf16"), ("dpo", "lora, dropout", "fp32")]
    leaves = [("ppo", "lora", "bf16"), ("sft", "dora", "bf16"), ("sft", "lora", "nf4")]
    assert [memory.base_splits(*one) for one in takes + leaves] == [True, True, *[False] * 3]


# -- whole runs on two processes -------------------------------------------------------------------


def trained(job: Path) -> dict[str, torch.Tensor]:
    with zipfile.ZipFile(job.parent / "result" / "adapter.zip") as archive:
        return load_bytes(archive.read("adapter_model.safetensors"))


def kernels(job: Path) -> dict[str, str]:
    return next(e for e in events_of(job) if e["event"] == "started")["kernels"]


@pytest.mark.slow
def test_two_processes_with_half_the_base_each_train_as_one_does(
    run_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "CPU_TOKENS", 128)  # so that they have unequal numbers of packs
    one, two = (run_folder(held_out=rows(3)) for _ in range(2))
    assert finish(start(one)) == [0]
    monkeypatch.setenv(budget.FORCED, "1")
    assert finish(start(two, 2)) == [0, 0]
    assert "in parts over 2 processes" in kernels(two)["base"] and "base" not in kernels(one)
    curves = [[loss for _, loss in manifest_of(job)["curve"]] for job in (one, two)]
    assert curves[1] == pytest.approx(curves[0], abs=1e-5) and len(curves[0]) == 8
    want, found = trained(one), trained(two)
    assert found.keys() == want.keys()
    assert all((found[n] - want[n]).abs().max() < 1e-4 for n in want)
    [warned] = [e for e in events_of(two) if e["event"] == "warning"]
    assert "not answered: the base is in parts" in warned["message"]
    assert [e["loss"] for e in events_of(two) if e["event"] == "held_out"] == pytest.approx(
        [e["loss"] for e in events_of(one) if e["event"] == "held_out"], abs=1e-5
    )


@pytest.mark.slow
def test_a_run_in_parts_that_was_stopped_ends_as_an_undisturbed_one_to_the_bit(
    run_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(budget.FORCED, "1")
    whole, stopped = run_folder(), run_folder(limits={"deadline_unix_s": 1.0})
    assert finish(start(whole, 2)) == [0, 0]
    assert set(finish(start(stopped, 2))) == {4}
    told = json.loads(stopped.read_text()) | {"limits": {"deadline_unix_s": None}}
    stopped.write_text(json.dumps(told))
    assert finish(start(stopped, 2)) == [0, 0]
    assert [e["step"] for e in events_of(stopped) if e["event"] == "started"] == [0, 1]
    assert adapter_sha256(stopped) == adapter_sha256(whole)
