"""A mixture trained from end to end with its experts held in NF4, on a CPU."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from tiny import adapter_sha256, manifest_of, write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.loop.guards import Stopped
from trainer.train import run_job

pytestmark = pytest.mark.slow  # three runs by bitsandbytes' CPU backend
Make = Callable[..., Path]
WIDE = {"hidden_size": 64, "head_dim": 32, "moe_intermediate_size": 64}


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    kind, settings = ARCHITECTURES["qwen3_moe"]
    torch.manual_seed(7)
    config = AutoConfig.for_model(kind, **{**settings, **WIDE})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def in_nf4(path: Path, **limits: float) -> Path:
    told = json.loads(path.read_text())
    told["model"]["precision"] = "nf4"
    path.write_text(json.dumps(told | ({"limits": limits} if limits else {})))
    return path


# PEFT looks among modules only, and experts are parameters
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_a_mixture_learns_with_experts_in_nf4_and_stock_peft_takes_its_adapter(
    run_folder: Make, mixture: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    job = in_nf4(run_folder(model=mixture, training={"num_train_epochs": 4}))
    assert run_job(job) == 0
    found = manifest_of(job)
    curve = [x for _, x in found["curve"]]
    assert curve[-1] < curve[0] - 0.1
    assert found["kernels"]["base"] == "nf4, experts of 2 layers too"
    with zipfile.ZipFile(job.parent / "result" / "adapter.zip") as archive:
        archive.extractall(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    named = [(n, p) for n, p in model.named_parameters() if "experts" in n and "lora_B" in n]
    assert len(named) == 4 and all(p.abs().max() > 0 for _, p in named)


def test_a_resumed_run_with_experts_in_nf4_ends_in_the_same_bytes(
    run_folder: Make, mixture: Path
) -> None:
    whole, stopped = (
        in_nf4(run_folder(model=mixture, training={"max_steps": 3})) for _ in range(2)
    )
    assert run_job(whole) == 0
    told = stopped.read_text()
    with pytest.raises(Stopped, match="1 of 3 steps"):
        run_job(in_nf4(stopped, deadline_unix_s=1.0))
    stopped.write_text(told)
    assert run_job(stopped) == 0
    assert adapter_sha256(stopped) == adapter_sha256(whole)
