"""Peak memory where the fused layer is not used: full, freeze, LoRA with dropout, DoRA.

    python -m bench.plain_memory --append bench/results/memory-plain.jsonl

The trainer's own model, batches, loss and optimizer on one GPU, three steps each, as
trainer/train.py takes them; a line for each setting with the fields of bench/memory.py, and
`method` as memory.method_of says it. Needs the room of bench/real_job.py's models, which it makes.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import real_job
from bench.training import GIB, SHAPES, tell
from trainer import memory
from trainer.data import batch, packing
from trainer.data.prepare import prepare
from trainer.loop.optim import FlatGradients, optimizer_of
from trainer.model.dropout import TokenKeys
from trainer.model.forward import target_loss
from trainer.model.load import load
from trainer.wire.job import Job

MODELS = ("tinyllama-1.1b", "llama-160m")
METHODS: dict[str, dict[str, Any]] = {
    "full": {"training": {"method": "full"}},
    "freeze": {"training": {"method": "freeze"}},
    "lora": {"lora": {"lora_dropout": 0.05}},
    "dora": {"lora": {"use_dora": True}},
}
# tokens, fraction of layers checkpointed
LOADS = [(4096, 0.0), (4096, 1.0), (8192, 0.0), (8192, 0.5), (16384, 1.0)]


def measure(
    job: Job, run: Path, data: Any, tokens: int, fraction: float, shape: Any
) -> dict[str, Any]:
    device, keys = torch.device("cuda"), TokenKeys()
    layers = round(fraction * shape.num_hidden_layers)
    model, names = load(job, run / "model", device, keys, layers)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients, optimizer = FlatGradients(trained), optimizer_of([trained], job.training, device)
    chosen = packing.pack(range(len(data)), data.lengths, tokens)[0]
    micro = batch.on(device, batch.packed(data, chosen, torch.device("cpu")))
    static = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for step in range(3):
        gradients.zero()
        keys.set(0, step, micro["rows"], micro["position_ids"])
        with (
            nullcontext()
            if job.training.method == "lora"
            else torch.autocast("cuda", torch.bfloat16)
        ):
            loss = target_loss(model, micro) / len(micro["targets_at"])
        loss.backward()
        gradients.clip(1.0)
        optimizer.step()
    torch.cuda.synchronize()
    seen = {
        "peak_allocated_gib": torch.cuda.max_memory_allocated(),
        "peak_reserved_gib": torch.cuda.max_memory_reserved(),
    }
    return {
        "tokens": micro["input_ids"].numel(),
        "documents": len(chosen),
        "targets": len(micro["targets_at"]),
        "checkpoint_layers": layers,
        "kernels": names,
        "static_allocated_gib": round(static / GIB, 4),
    } | {k: round(v / GIB, 4) for k, v in seen.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("/tmp/real-job"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--append", type=Path, help="add the lines to this file as well")
    args = parser.parse_args()
    for name in MODELS:
        model, run = args.folder / name, args.folder / "run"
        if not model.is_dir():
            real_job.base_model(model, name)
        real_job.job(run, model, "bf16", "lora", 1, 1, 1)
        job_json = json.loads((run / "job.json").read_text())
        data = prepare(Job.model_validate(job_json), run).rows
        for method in args.methods:
            more = METHODS[method]
            job = Job.model_validate(job_json | {k: job_json[k] | v for k, v in more.items()})
            told_method = memory.method_of(
                job.training.method, job.lora.use_dora, job.lora.lora_dropout
            )
            for tokens, fraction in LOADS:
                gc.collect()
                torch.cuda.empty_cache()
                line = {
                    "model": name,
                    "method": told_method,
                    "precision": "bf16",
                    "r": job.lora.r,
                } | asdict(SHAPES[name])
                line |= measure(job, run, data, tokens, fraction, SHAPES[name])
                tell(line, args.append)
    return 0


if __name__ == "__main__":
    sys.exit(main())
