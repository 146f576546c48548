"""How fast learned prompts train beside LoRA: one line of JSON for each model and method.

    python -m bench.prompts llama-7b qwen3-8b --append bench/results/prompts.jsonl

Random-weight shapes in bf16, the rows of bench/rows.py, the micro-batch and the recomputed layers
that the trainer plans for this card. LoRA r 16 runs in the fused layers, learned prompts of 20
places in transformers' own with the trainer's attention, as in a run. `real_tok_s` counts the
tokens of rows, not the learned places.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.families import Steps, build, configuration, fill_all, gemm_tflops, our_loss
from bench.rows import Setting, batches
from bench.shapes import SHAPES
from bench.training import GIB, attempted, tell
from trainer import families
from trainer.kernels.attention import register
from trainer.loop import budget
from trainer.model.dropout import TokenKeys
from trainer.model.load import assemble
from trainer.wire.job import Job
from trainer.wire.prompts import PROMPT_METHODS

METHODS = ("lora", *PROMPT_METHODS)


def job_of(method: str, tokens: int) -> Job:
    told: dict[str, Any] = {
        "run_id": "bench-prompts",
        "model": {"base": "random", "path": "model", "precision": "bf16"},
        "data": {"files": []},
        "training": {"method": method},
    }
    if method in PROMPT_METHODS:
        told["prompt_learning"] = {"num_virtual_tokens": tokens}
    return Job.model_validate(told)


def prompted(
    job: Job, model: str, layers: int | None, checkpoint: int, device: torch.device
) -> tuple[nn.Module, dict[str, str]]:
    """The trainer's model of a learned prompt, with random weights."""
    from transformers import AutoModelForCausalLM

    config = configuration(model, layers)
    config.use_cache = False
    with torch.device("meta"):
        base: Any = AutoModelForCausalLM.from_config(
            config, attn_implementation=register(), dtype=torch.bfloat16
        )
    base.model.rotary_emb = type(base.model.rotary_emb)(config)
    fill_all(base, device)
    base.family = families.read(config.to_dict())
    if config.tie_word_embeddings:
        base.lm_head.weight = base.model.embed_tokens.weight
    return assemble(job, base.requires_grad_(False), device, TokenKeys(), checkpoint)


def measure(model: str, method: str, asked: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job, plan = job_of(method, asked.places), (asked.tokens, 0)
    if device.type == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            configuration(model, asked.layers).save_pretrained(folder)
            capacity = budget.capacity_of(device)
            found = budget.solve(job, Path(folder), 2048 + asked.places, capacity, 1)
        assert found is not None, "no micro-batch fits this card"
        plan = found
    setting = Setting(model, "bf16", r=16, tokens=plan[0], checkpoint_layers=plan[1])
    if method == "lora":
        made, names = build(setting, asked.layers, device)
    else:
        made, names = prompted(job, model, asked.layers, plan[1], device)
    data = batches(setting, SHAPES[model][1]["vocab_size"], device, count=8)
    steps = Steps(made, data, our_loss)
    for _ in range(asked.warm):
        steps.step()
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    tokens = sum(steps.step() for _ in range(asked.steps))
    wait(device)
    losses = torch.stack(steps.losses).float().tolist()
    return {
        "real_tok_s": round(tokens / (time.perf_counter() - began), 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "tokens": plan[0],
        "checkpoint_layers": plan[1],
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[-1], 4),
        "kernels": names,
    }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", choices=SHAPES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    for name, value in (("steps", 6), ("warm", 2), ("places", 20), ("tokens", 2048)):
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--append", type=Path, help="add the lines to this file")
    asked = parser.parse_args()
    device, wrong = torch.device("cuda" if torch.cuda.is_available() else "cpu"), 0
    rate = round(gemm_tflops(device), 1) if device.type == "cuda" else 0.0
    for model, method in ((m, k) for m in asked.models for k in asked.methods):
        told: dict[str, Any] = {"model": model, "precision": "bf16", "method": method}
        told |= attempted(partial(measure, model, method, asked))
        wrong += "error" in told
        told |= {"places": asked.places if method != "lora" else 0, "gemm_tflops": rate}
        told |= {"card": torch.cuda.get_device_name() if rate else "cpu"}
        told |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        tell(told, asked.append)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
