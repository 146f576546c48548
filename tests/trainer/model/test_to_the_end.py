"""Each architecture from its first step to what people use: the adapter in stock PEFT, the merged
model in stock transformers, a run that goes on from a checkpoint, full and freeze."""

from __future__ import annotations

import json
import math
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, folder_of
from peft import PeftModel
from tiny import adapter_sha256, events_of, manifest_of
from transformers import AutoModelForCausalLM

from trainer.outcome import DONE
from trainer.result.merge import certified_merge
from trainer.train import outcome_of

# PEFT looks for the names of patterns among modules only, and experts are parameters
PATTERNS = "The following .*_pattern keys did not match"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(f"ignore:{PATTERNS}:RuntimeWarning"),
]
Make = Callable[..., Path]
every = pytest.mark.parametrize("name", ARCHITECTURES)
STEPS = 4
IDS = torch.arange(3, 43).reshape(2, 20) * 7 % 300
ROWS = [
    {"instruction": f"Say {n}", "input": "", "output": f"it is {n} " * (3 + n % 9)}
    for n in range(12)
]


def trained(job: Path) -> dict[str, Any]:
    """The manifest of a run that is made now, once it found itself like stock transformers."""
    end = outcome_of(job)
    assert end.code == DONE, end.error
    manifest = manifest_of(job)
    assert all(math.isfinite(loss) for _, loss in manifest["curve"])
    assert manifest["kernels"]["compared"].startswith("fp32 loss within")
    return manifest


def unzipped(job: Path, folder: Path) -> Path:
    with zipfile.ZipFile(job.parent / "result" / "adapter.zip") as archive:
        archive.extractall(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.Tensor(model.eval()(IDS, use_cache=False).logits.float())


def stock(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    """Logits of stock transformers, with stock PEFT's adapter on it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PEFT's, about keys that are missing
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            warnings.filterwarnings("ignore", message=PATTERNS)
            model = PeftModel.from_pretrained(model, str(adapter))
    return logits(model)


@every
def test_an_adapter_is_merged_and_a_run_goes_on_to_the_same_bytes(
    name: str, run_folder: Make, tmp_path: Path
) -> None:
    folder = folder_of(name, tmp_path / "model")
    asked = {"max_steps": STEPS, "learning_rate": 2e-2, "save_every_s": 0.0001}
    job = run_folder(model=folder, data=ROWS, training=asked)
    trained(job)
    adapter = unzipped(job, tmp_path / "adapter")
    with_adapter, plain = stock(folder, adapter), stock(folder)
    certified_merge(adapter, folder, tmp_path / "merged", "fp32", [], "cpu")
    learned = float((with_adapter - plain).abs().max())
    assert learned > 1e-3
    assert (stock(tmp_path / "merged") - with_adapter).abs().max() < 1e-4 * max(1.0, learned)
    saved = sorted((job.parent / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    first = saved[0]
    assert 0 < int(first.name) < STEPS
    again = run_folder(model=folder, data=ROWS, training=asked)
    shutil.copytree(first, again.parent / "checkpoints" / first.name)
    trained(again)
    begun = next(e for e in events_of(again) if e["event"] == "started")
    assert begun["step"] == int(first.name)
    assert adapter_sha256(again) == adapter_sha256(job)


@every
@pytest.mark.parametrize("method", ["full", "freeze"])
def test_weights_that_were_trained_open_in_stock_transformers(
    name: str, method: str, run_folder: Make, tmp_path: Path
) -> None:
    folder = folder_of(name, tmp_path / "model")
    asked = {"method": method, "max_steps": 2, "learning_rate": 1e-3}
    if method == "freeze":
        asked["freeze_trainable_layers"] = 1
    job = run_folder(model=folder, data=ROWS, training=asked)
    assert trained(job)["method"] == method
    opened = unzipped(job, tmp_path / "weights")
    found, plain = stock(opened), stock(folder)
    assert torch.isfinite(found).all() and (found - plain).abs().max() > 1e-4
    assert (
        json.loads((opened / "config.json").read_text())["model_type"]
        == (json.loads((folder / "config.json").read_text())["model_type"])
    )
