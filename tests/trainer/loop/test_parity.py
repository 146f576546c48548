"""Our loop against oracles: packed against alone, and transformers' Trainer with PEFT on the same
batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import manifest_of

from trainer.data import batch, packing
from trainer.data.prepare import prepare
from trainer.model.dropout import KeyedDropout, TokenKeys
from trainer.model.forward import target_loss
from trainer.model.load import load
from trainer.model.parts import causal
from trainer.train import run_job
from trainer.wire.job import Job

Make = Callable[..., Path]
CPU = torch.device("cpu")


def opened(job_path: Path) -> tuple[Job, torch.nn.Module, object]:
    job = Job.model_validate_json(job_path.read_bytes())
    model, _ = load(job, job_path.parent / "model", CPU, TokenKeys())
    with torch.no_grad():  # LoRA's B starts at zero, which would hide errors in A's gradients
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(
                    parameter, 0, 0.1, generator=torch.Generator().manual_seed(len(name))
                )
    return job, model, prepare(job, job_path.parent).rows


@pytest.mark.parametrize("kind", ["llama", "gqa", "qwen2", "gpt2"])
def test_packed_rows_have_the_logits_and_gradients_that_they_have_alone(
    run_folder: Make, kind: str
) -> None:
    _, model, rows = opened(run_folder(kind))
    chosen = [3, 0, 17, 8, 11]
    packed = batch.packed(rows, chosen, CPU)
    inputs = {k: v for k, v in packed.items() if k not in ("labels", "rows", "targets_at")}
    logits = causal(model)(**inputs, use_cache=False).logits[0]
    ends = packed["cu_seq_lens_q"].tolist()
    for row, a, b in zip(chosen, ends, ends[1:], strict=False):
        ids = torch.tensor(rows.ids[rows.starts[row] : rows.starts[row + 1]]).long()[None]
        model.get_base_model().set_attn_implementation("eager")
        # transformers' own attention, nothing of ours
        alone = causal(model)(input_ids=ids, use_cache=False).logits[0]
        model.get_base_model().set_attn_implementation("milktea")
        assert torch.allclose(logits[a:b], alone, atol=1e-5), (logits[a:b] - alone).abs().max()

    def gradients(batches: list[dict]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for one in batches:
            target_loss(model, one).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    together = gradients([packed])
    apart = gradients([batch.packed(rows, [r], CPU) for r in chosen])
    rectangle = gradients([batch.padded(rows, chosen, CPU)])
    assert len(together) >= 8 and all(g.abs().max() > 0 for g in together.values())
    for name, gradient in together.items():
        scale = gradient.abs().max()
        assert (gradient - apart[name]).abs().max() < 1e-5 * scale.clamp_min(1), name
        assert (gradient - rectangle[name]).abs().max() < 1e-5 * scale.clamp_min(1), name


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_loss_curve_and_weights_are_those_of_transformers_trainer_with_peft(
    run_folder: Make, tmp_path: Path, schedule: str
) -> None:
    """The oracle gets our batches, padded; fp32, clipping, warm-up and schedule on; 12 steps."""
    from safetensors.torch import load_file
    from transformers import Trainer, TrainingArguments

    settings = {
        "training": {
            "num_train_epochs": 3,
            "warmup_ratio": 0.25,
            "lr_scheduler_type": schedule,
            "max_grad_norm": 0.5,
        }
    }
    job_path = run_folder(**settings)
    assert run_job(job_path) == 0
    ours = [loss for _, loss in manifest_of(job_path)["curve"]]

    job = Job.model_validate_json(job_path.read_bytes())
    rows = prepare(job, job_path.parent).rows
    model, _ = load(job, job_path.parent / "model", CPU, TokenKeys())
    order = packing.Order(len(rows), 6, 3, job.training.seed)
    steps = [order.step(s) for s in range(order.total_steps)]

    def collate(found: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(f["ids"]) for f in found)
        fill = [[*f["ids"], *[0] * (width - len(f["ids"]))] for f in found]
        labels = [[*f["labels"], *[-100] * (width - len(f["labels"]))] for f in found]
        mask = [[1] * len(f["ids"]) + [0] * (width - len(f["ids"])) for f in found]
        return {
            "input_ids": torch.tensor(fill),
            "labels": torch.tensor(labels),
            "attention_mask": torch.tensor(mask),
        }

    dataset = []
    for row in [r for rows_of_step in steps for r in rows_of_step]:
        span = slice(rows.starts[row], rows.starts[row + 1])
        ids = rows.ids[span].tolist()
        dataset.append(
            {
                "ids": ids,
                "labels": [i if t else -100 for i, t in zip(ids, rows.trained[span], strict=True)],
            }
        )
    told: list[float] = []

    class Oracle(Trainer):
        def _get_train_sampler(self, *_: object, **__: object) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(dataset)

        def log(self, logs: dict[str, float], *_: object, **__: object) -> None:
            if "loss" in logs:
                told.append(logs["loss"])

    model.get_base_model().set_attn_implementation("sdpa")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "oracle"),
        per_device_train_batch_size=6,
        num_train_epochs=1,
        learning_rate=5e-3,
        max_grad_norm=0.5,
        lr_scheduler_type=schedule if schedule != "constant" else "constant_with_warmup",
        warmup_steps=math.ceil(0.25 * 12),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        optim="adamw_torch",
        weight_decay=0.0,
        disable_tqdm=True,
    )
    oracle = Oracle(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
    oracle.train()
    assert len(told) == len(ours) == 12
    assert ours == pytest.approx(told, abs=2e-5)  # Trainer rounds what it logs in some versions
    import zipfile

    with zipfile.ZipFile(job_path.parent / "result" / "adapter.zip") as archive:
        archive.extract("adapter_model.safetensors", tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    from peft import get_peft_model_state_dict

    for name, value in get_peft_model_state_dict(model).items():
        assert torch.allclose(saved[name], value, atol=1e-5), (
            name,
            (saved[name] - value).abs().max(),
        )


def test_dropout_keeps_the_right_share_and_depends_on_row_position_layer_and_step_only() -> None:
    keys = TokenKeys()
    layer, other = KeyedDropout(0.25, 0, keys), KeyedDropout(0.25, 1, keys)
    rows, positions = (
        torch.arange(200).repeat_interleave(10)[None],
        torch.arange(10).repeat(200)[None],
    )
    keys.set(42, 3, rows, positions)
    ones = torch.ones(1, 2000, 64)
    kept = layer(ones)
    assert (kept > 0).float().mean() == pytest.approx(
        0.75, abs=0.005
    ) and kept.max() == pytest.approx(4 / 3)
    assert not torch.equal(kept, other(ones))
    shuffled = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    keys.set(42, 3, rows[:, shuffled], positions[:, shuffled])
    assert torch.equal(layer(ones), kept[:, shuffled])
    keys.set(42, 4, rows, positions)
    assert not torch.equal(layer(ones), kept)
    assert torch.equal(layer.eval()(ones), ones)


def test_packing_wastes_little_and_splits_fairly() -> None:
    import random

    dice = random.Random(0)
    lengths = [min(2000, int(dice.lognormvariate(5.2, 0.7)) + 10) for _ in range(512)]
    packs = packing.pack(range(512), lengths, 4096)
    assert sorted(r for p in packs for r in p) == list(range(512))
    assert max(sum(lengths[r] for r in p) for p in packs) <= 4096
    assert sum(lengths) / (4096 * len(packs)) > 0.95
    shares = packing.share(list(range(512)), lengths, 4)
    loads = [sum(lengths[r] for r in s) for s in shares]
    assert sorted(r for s in shares for r in s) == list(range(512)) and max(loads) - min(loads) < 50


def test_an_epoch_shows_every_row_once_and_every_epoch_another_order() -> None:
    order = packing.Order(100, 8, 2.0, seed=1)
    epochs = [[r for s in range(13) for r in order.step(13 * e + s)] for e in range(2)]
    assert order.total_steps == 26
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(100)) and epochs[0] != epochs[1]
