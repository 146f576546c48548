"""A whole run on the CPU: what it writes, and that the numbers do not depend on how the work is cut
up."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import adapter_sha256, events_of, manifest_of, rows

from trainer.train import run_job
from trainer.wire.digest import listed

Make = Callable[..., Path]


def curve(job: Path) -> list[float]:
    assert run_job(job) == 0
    return [loss for _, loss in manifest_of(job)["curve"]]


def test_a_run_learns_and_writes_everything_that_the_wire_promises(run_folder: Make) -> None:
    job = run_folder(held_out=rows(2), training={"num_train_epochs": 6})
    losses = curve(job)
    assert len(losses) == 24 and losses[-1] < losses[0] - 0.5
    kinds = [e["event"] for e in events_of(job)]
    assert (
        kinds[:2] == ["loading", "started"]
        and kinds[-1] == "finished"
        and {"step", "sample", "score"} <= set(kinds)
    )
    result = job.parent / "result"
    assert sorted(p.name for p in result.iterdir()) == [
        "adapter.zip",
        "loss.png",
        "manifest.json",
        "report.html",
    ]
    manifest = manifest_of(job)
    assert set(manifest["files"]) == {"adapter.zip", "loss.png"}, "the report is made at home"
    for name, said in manifest["files"].items():
        assert said == listed(result / name)
    with zipfile.ZipFile(result / "adapter.zip") as archive:
        assert set(archive.namelist()) == set(manifest["members"])
        assert {
            "adapter_config.json",
            "adapter_model.safetensors",
            "tokenizer.json",
            "README.md",
        } <= set(archive.namelist())
        assert (
            json.loads(archive.read("adapter_config.json"))["base_model_name_or_path"]
            == "tiny/random"
        )
    assert list((job.parent / "tensorboard").glob("events.*"))
    assert (
        str(job.parent)
        not in (result / "manifest.json").read_text() + (result / "report.html").read_text()
    )


def test_starting_a_finished_run_again_changes_nothing(run_folder: Make) -> None:
    job = run_folder(training={"max_steps": 2})
    curve(job)
    before = (job.parent / "result" / "manifest.json").stat().st_mtime_ns, len(events_of(job))
    assert run_job(job) == 0
    assert (
        (job.parent / "result" / "manifest.json").stat().st_mtime_ns,
        len(events_of(job)),
    ) == before


def test_equal_runs_give_equal_archives(run_folder: Make) -> None:
    first, second = (
        run_folder(lora={"lora_dropout": 0.1}, training={"max_steps": 3}) for _ in range(2)
    )
    curve(first), curve(second)
    assert adapter_sha256(first) == adapter_sha256(second)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_cut_into_micro_batches_changes_nothing(
    run_folder: Make, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    settings = {"lora": {"lora_dropout": dropout}, "training": {"num_train_epochs": 3}}
    whole = curve(run_folder(**settings))
    monkeypatch.setattr("trainer.loop.budget.CPU_TOKENS", 100)
    pieces = curve(run_folder(**settings))
    assert len(whole) == 12 and pieces == pytest.approx(whole, abs=1e-5)


def test_packed_and_padded_training_agree(run_folder: Make) -> None:
    settings = {"lora": {"lora_dropout": 0.1}}
    packed = curve(run_folder(**settings))
    padded = curve(run_folder(**settings, training={"packing": False}))
    assert padded == pytest.approx(packed, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gqa", "qwen2", "gpt2"])
def test_every_kind_of_model_learns(run_folder: Make, kind: str) -> None:
    losses = curve(run_folder(kind, training={"num_train_epochs": 4}))
    assert losses[-1] < losses[0] - 0.3


def test_torch_and_numpy_seeds_of_the_caller_do_not_matter(run_folder: Make) -> None:
    settings = {"lora": {"lora_dropout": 0.2}, "training": {"max_steps": 3}}
    torch.manual_seed(1)
    first = curve(run_folder(**settings))
    torch.manual_seed(2)
    assert curve(run_folder(**settings)) == first
