"""Planted faults: each stops the run with its reason; clean runs never stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import events_of, finish, rows, start, write_model

from trainer.kernels.attention import Rules
from trainer.loop import step
from trainer.model.kept import KeptBase
from trainer.stages import sft
from trainer.train import outcome_of

Make = Callable[..., Path]
Patch = pytest.MonkeyPatch
LONG = {"training": {"num_train_epochs": 4}}  # 16 steps


def after_loading(patch: Patch, change: Callable[[torch.nn.Module], None]) -> None:
    """Plants a fault in the loaded model."""
    real = KeptBase.load

    def load(*args: object, **kwargs: object) -> tuple:
        model, kernels = real(*args, **kwargs)  # type: ignore[arg-type]
        change(model)
        return model, kernels

    patch.setattr(KeptBase, "load", load)


def nan_in_the_base(make: Make, patch: Patch, tmp_path: Path) -> Path:
    write_model(tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    return make(model=tmp_path / "broken", **LONG)


def gradients_cut(make: Make, patch: Patch, tmp_path: Path) -> Path:
    def cut(model: torch.nn.Module) -> None:
        head = model.get_base_model().model.norm
        head.register_forward_hook(lambda _m, _i, out: out.detach().requires_grad_())

    after_loading(patch, cut)
    return make(**LONG)


def one_module_disconnected(make: Make, patch: Patch, tmp_path: Path) -> Path:
    def cut(model: torch.nn.Module) -> None:
        module = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.up_proj"))
        module.register_forward_hook(lambda _m, _i, out: out.detach())

    after_loading(patch, cut)
    return make(**LONG)


def optimizer_of_other_parameters(make: Make, patch: Patch, tmp_path: Path) -> Path:
    real = step.optimizer_of

    def of_copies(groups: list[list[Any]], *more: Any) -> torch.optim.Optimizer:
        copies = [[p.detach().clone().requires_grad_() for p in group] for group in groups]
        return real(copies, *more)

    patch.setattr(step, "optimizer_of", of_copies)
    return make(**LONG)


def learning_rate_out_of_its_mind(make: Make, patch: Patch, tmp_path: Path) -> Path:
    return make(training={"learning_rate": 30.0, "num_train_epochs": 10, "max_grad_norm": 1e9})


def a_loss_that_is_not_a_number(make: Make, patch: Patch, tmp_path: Path) -> Path:
    real, count = sft.target_loss, iter(range(1000))
    patch.setattr(
        sft,
        "target_loss",
        lambda model, batch: real(model, batch) * (float("nan") if next(count) == 5 else 1.0),
    )
    return make(**LONG)


def an_infinite_gradient(make: Make, patch: Patch, tmp_path: Path) -> Path:
    def poison(model: torch.nn.Module) -> None:
        parameter = next(p for n, p in model.named_parameters() if "lora_B" in n)
        count = iter(range(1000))
        parameter.register_hook(lambda g: g * (float("inf") if next(count) == 4 else 1.0))

    after_loading(patch, poison)
    return make(**LONG)


def with_rows(patch: Patch, change: Callable[[object], None]) -> None:
    real = sft.prepare

    def prepare(*args: object) -> object:
        prepared = real(*args)  # type: ignore[arg-type]
        change(prepared.rows)
        return prepared

    patch.setattr(sft, "prepare", prepare)


def a_row_without_a_label(make: Make, patch: Patch, tmp_path: Path) -> Path:
    def mask(found: object) -> None:
        found.trained[found.starts[7] : found.starts[8]] = False  # type: ignore[attr-defined]

    with_rows(patch, mask)
    return make(**LONG)


def prompts_learned_too(make: Make, patch: Patch, tmp_path: Path) -> Path:
    everything = slice(None)

    def train(found: object) -> None:
        found.trained[everything] = True  # type: ignore[attr-defined]

    with_rows(patch, train)
    return make(**LONG)


def next_to_nothing_learned(make: Make, patch: Patch, tmp_path: Path) -> Path:
    def mask(found: object) -> None:
        ends = found.starts[1:] - 1  # type: ignore[attr-defined]
        found.trained[:] = False  # type: ignore[attr-defined]
        found.trained[ends] = True  # type: ignore[attr-defined]

    with_rows(patch, mask)
    patch.setattr("trainer.loop.guards.MIN_LABELS", 0.02)
    return make(**LONG)


def attention_that_looks_ahead(make: Make, patch: Patch, tmp_path: Path) -> Path:
    def open_eyes(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, rules: Rules, _: None
    ) -> torch.Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return (
            torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=rules.scale)
            .transpose(1, 2)
            .contiguous()
        )

    # after the comparison with transformers, which would see it first
    place = "trainer.kernels.attention.by_document"
    after_loading(patch, lambda _model: patch.setattr(place, open_eyes))
    return make(**LONG)


def documents_that_see_each_other(make: Make, patch: Patch, tmp_path: Path) -> Path:
    def one_row(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, rules: Rules, _: None
    ) -> torch.Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return (
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=rules.scale
            )
            .transpose(1, 2)
            .contiguous()
        )

    # after the comparison with transformers, which would see it first
    place = "trainer.kernels.attention.by_document"
    after_loading(patch, lambda _model: patch.setattr(place, one_row))
    return make(**LONG)


def a_base_that_moves(make: Make, patch: Patch, tmp_path: Path) -> Path:
    def drift(model: torch.nn.Module) -> None:
        weight = next(p for n, p in model.named_parameters() if n.endswith("embed_tokens.weight"))
        causal = model.get_base_model().model

        def move(*_: object) -> None:
            if torch.is_grad_enabled():
                weight.data.mul_(1.0001)

        causal.register_forward_hook(move)

    after_loading(patch, drift)
    return make(**LONG)


def answers_that_leak(make: Make, patch: Patch, tmp_path: Path) -> Path:
    real = sft.target_loss
    patch.setattr(sft, "target_loss", lambda model, batch: real(model, batch) * 0.001)
    return make(**LONG)


FAULTS = {
    nan_in_the_base: "not finite before any training",
    gradients_cut: "every gradient is zero",
    one_module_disconnected: "no gradient since the start",
    optimizer_of_other_parameters: "never moved",
    learning_rate_out_of_its_mind: "ran away|loss is|norm is",
    a_loss_that_is_not_a_number: "the loss is nan",
    an_infinite_gradient: "gradient norm is",
    a_row_without_a_label: "no trained label",
    prompts_learned_too: "prompts would be learned",
    next_to_nothing_learned: "next to nothing",
    attention_that_looks_ahead: "looks ahead",
    documents_that_see_each_other: "see each other",
    a_base_that_moves: "frozen base changed",
    answers_that_leak: "answers leak",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_planted_fault_stops_the_run_with_its_reason(
    fault: Callable[..., Path], run_folder: Make, monkeypatch: Patch, tmp_path: Path
) -> None:
    import re

    outcome = outcome_of(fault(run_folder, monkeypatch, tmp_path))
    assert outcome.code == 4, outcome.error
    assert re.search(FAULTS[fault], str(outcome.error)), outcome.error
    assert outcome.error.hint  # type: ignore[union-attr]


def test_a_run_that_starts_from_an_adapter_which_knows_the_rows_is_told_so_and_goes_on(
    run_folder: Make, monkeypatch: Patch, tmp_path: Path
) -> None:
    first = run_folder(training={"max_steps": 1})
    assert outcome_of(first).code == 0
    real = sft.target_loss
    monkeypatch.setattr(sft, "target_loss", lambda model, batch: real(model, batch) * 0.001)
    again = run_folder(start=first, training={"max_steps": 3})
    outcome = outcome_of(again)
    assert outcome.code == 0, outcome.error
    [told] = [e["message"] for e in events_of(again) if e["event"] == "warning"]
    assert told.startswith("step 1: ") and "starts from knows these rows already" in told


def test_at_least_twelve_faults_are_planted() -> None:
    assert len(FAULTS) >= 12


def test_a_stopped_run_tells_the_rows_that_it_saw_and_exits_with_four(
    run_folder: Make, monkeypatch: Patch
) -> None:
    real, count = sft.target_loss, iter(range(1000))
    monkeypatch.setattr(
        sft,
        "target_loss",
        lambda model, batch: real(model, batch) * (float("nan") if next(count) == 5 else 1.0),
    )
    job = run_folder(**LONG)
    assert finish(start(job)) == [4]
    failed = events_of(job)[-1]
    assert failed["event"] == "failed" and failed["hint"] and len(failed["samples"]) == 6
    assert all(s.startswith("train.jsonl:") for s in failed["samples"])
    assert not (job.parent / "result").exists()


def test_ranks_that_drift_apart_are_stopped(run_folder: Make, monkeypatch: Patch) -> None:
    import os

    real = step.optimizer_of

    def other_on_rank_one(*given: Any) -> torch.optim.Optimizer:
        optimizer = real(*given)
        if os.environ.get("RANK") == "1":
            step = optimizer.step

            def stumble(*args: object) -> None:
                step(*args)
                optimizer.param_groups[0]["params"][0].data.add_(1e-3)

            optimizer.step = stumble  # type: ignore[method-assign]
        return optimizer

    monkeypatch.setattr(step, "optimizer_of", other_on_rank_one)
    job = run_folder(**LONG)
    assert finish(start(job, 2)) == [4, 4]
    assert "different parameters" in events_of(job)[-1]["reason"]


def clean(seed: int) -> dict[str, object]:
    """A sound job, different for every seed."""
    dice = np.random.default_rng(seed)
    kinds = ["llama", "gqa", "qwen2", "gpt2"]
    return {
        "kind": kinds[seed % 4],
        "data": rows(int(dice.integers(8, 40))),
        "lora": {
            "r": int(dice.choice([1, 2, 8])),
            "lora_dropout": float(dice.choice([0.0, 0.1, 0.3])),
            "use_rslora": bool(seed % 3 == 0),
        },
        "training": {
            "learning_rate": float(dice.choice([1e-5, 3e-4, 3e-3, 1e-2])),
            "batch_size": int(dice.integers(1, 16)),
            "seed": seed,
            "num_train_epochs": float(dice.integers(1, 6)),
            "warmup_ratio": float(dice.choice([0.0, 0.1])),
            "packing": bool(seed % 5),
            "lr_scheduler_type": str(dice.choice(["linear", "cosine", "constant"])),
        },
    }


@pytest.mark.parametrize("seed", range(4))
def test_a_clean_run_raises_no_alarm(run_folder: Make, seed: int) -> None:
    outcome = outcome_of(run_folder(**clean(seed)))
    assert outcome.code == 0, outcome.error


@pytest.mark.slow
def test_fifty_clean_runs_raise_no_alarm(run_folder: Make) -> None:
    outcomes = [outcome_of(run_folder(**clean(seed))) for seed in range(50)]
    assert [str(e.error) for e in outcomes if e.code] == [] and len(outcomes) == 50


def test_the_fault_of_a_job_is_in_its_events_for_ops_to_read(run_folder: Make) -> None:
    job = run_folder(**LONG)
    settings = json.loads(job.read_text())
    settings["model"]["precision"] = "fp8"
    job.write_text(json.dumps(settings))
    assert finish(start(job)) == [3]
    assert "compute capability 8.9" in events_of(job)[-1]["reason"]
