"""Training in fp16: the loss scale does what torch's does, overflow is skipped and told, a run
goes on from its checkpoint to the same bytes, its gradients are those of fp32."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import adapter_sha256, events_of, finish, manifest_of, rows, start
from transformers import AutoModelForCausalLM

from trainer.loop.guards import Stopped
from trainer.loop.loss_scale import GROW_AFTER, START, LossScale
from trainer.train import run_job

Make = Callable[..., Path]


def in_fp16(make: Make, **changes: object) -> Path:
    path = make(**changes)
    told = json.loads(path.read_text())
    told["model"]["precision"] = "fp16"
    path.write_text(json.dumps(told))
    return path


def test_the_scale_moves_as_that_of_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = torch.amp.GradScaler("cpu")
    assert (usual.get_scale(), usual.get_growth_interval()) == (START, GROW_AFTER)
    monkeypatch.setattr("trainer.loop.loss_scale.GROW_AFTER", 20)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 1.0)
    theirs, ours = torch.amp.GradScaler("cpu", growth_interval=20), LossScale(on=True)
    bad = {0, 1, 21, 22, 42, 45}
    for step in range(70):
        gradient = math.inf if step in bad else 1.0
        theirs.scale(parameter.sum()).backward()
        parameter.grad.fill_(gradient)  # type: ignore[union-attr]
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        assert ours.takes(step + 1, gradient) == (step not in bad)
        assert ours.scale == theirs.get_scale(), step
    assert ours.skipped == len(bad) and ours.scale > START / 2 ** len(bad)


def test_gradients_that_overflow_at_every_scale_stop_the_run_in_words() -> None:
    scaling = LossScale(on=True)
    with pytest.raises(Stopped, match="overflow fp16 at every loss scale") as stopped:
        for step in range(20):
            scaling.takes(step + 1, math.nan, ["rows.jsonl:3"])
    assert stopped.value.samples == ["rows.jsonl:3"] and "bf16" in stopped.value.hint
    assert scaling.skipped == 17


def test_a_run_of_skipped_steps_alone_is_no_result() -> None:
    scaling = LossScale(on=True)
    for step in range(3):
        assert not scaling.takes(step + 1, math.inf)
    with pytest.raises(Stopped, match="all 3 steps overflowed"):
        scaling.validate_trained(3)
    scaling.validate_trained(4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "freeze"])
def test_a_run_in_fp16_learns_what_it_learns_in_fp32(method: str, run_folder: Make) -> None:
    changes = {"data": rows(24), "training": {"method": method, "learning_rate": 5e-3}}
    exact, half = run_folder(**changes), in_fp16(run_folder, **changes)
    assert run_job(exact) == run_job(half) == 0
    facts = manifest_of(half)
    for (_, a), (_, b) in zip(manifest_of(exact)["curve"], facts["curve"], strict=True):
        assert b == pytest.approx(a, rel=2e-3)
    assert facts["skipped_steps"] == 0
    one = next(e for e in events_of(half) if e["event"] == "step")
    assert one["loss_scale"] == START
    assert "fp16 loss within" in facts["kernels"]["compared"]
    if method == "lora":
        a, b = (logits_of_stock_peft(path) for path in (exact, half))
        base = logits_of_stock_peft(None, exact.parent / "model")
        assert float((a - b).norm()) < 0.02 * float((a - base).norm())


def logits_of_stock_peft(path: Path | None, base: Path | None = None) -> torch.Tensor:
    """Of a few ids, in fp32, with the result of a run or without."""
    ids = torch.arange(5, 25)[None]
    folder = base or path.parent / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if path is not None:
        with zipfile.ZipFile(path.parent / "result" / "adapter.zip") as archive:
            archive.extractall(path.parent / "adapter")
        model = PeftModel.from_pretrained(model, str(path.parent / "adapter"))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.slow
def test_overflow_is_skipped_and_told_and_a_resumed_run_ends_in_the_same_bytes(
    run_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.loop.loss_scale.START", 2.0**22)  # overflows a few times
    monkeypatch.setattr("trainer.loop.loss_scale.GROW_AFTER", 3)
    changes = {"data": rows(24), "lora": {"lora_dropout": 0.1}}
    straight, broken = in_fp16(run_folder, **changes), in_fp16(run_folder, **changes)
    assert run_job(straight) == 0
    told = [e["message"] for e in events_of(straight) if e["event"] == "warning"]
    skipped = manifest_of(straight)["skipped_steps"]
    assert 1 <= skipped < 6 and "1 so far), and the loss scale halved to 2.09715e+06" in told[0]
    assert len([m for m in told if "overflow fp16" in m]) == skipped
    job = json.loads(broken.read_text())
    for _ in range(skipped + 2):  # a deadline that has passed ends a run after one step
        broken.write_text(json.dumps(job | {"limits": {"deadline_unix_s": 1.0}}))
        with pytest.raises(Stopped, match="the checkpoint is whole"):
            run_job(broken)
    broken.write_text(json.dumps(job))
    assert run_job(broken) == 0
    assert adapter_sha256(broken) == adapter_sha256(straight)
    assert manifest_of(broken)["skipped_steps"] == skipped


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_skip_the_steps_that_one_skips(
    method: str, run_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.loop.loss_scale.START", 2.0**22)  # the processes inherit it
    changes = {"data": rows(24), "training": {"method": method}}
    one, two = in_fp16(run_folder, **changes), in_fp16(run_folder, **changes)
    assert finish(start(one, 1)) == [0] and finish(start(two, 2)) == [0, 0]
    found, wanted = manifest_of(two), manifest_of(one)
    assert 1 <= found["skipped_steps"] == wanted["skipped_steps"] < 6
    for (_, a), (_, b) in zip(wanted["curve"], found["curve"], strict=True):
        assert b == pytest.approx(a, rel=2e-3)
