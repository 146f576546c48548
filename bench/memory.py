"""The grid that the memory oracle (trainer/memory) is fitted to; lines are appended to the file.

    python -m bench.memory bench/results/memory-grid.jsonl

Each line is one configuration after three training steps in a process that ran others before:
``model`` and its six dimensions, ``precision``, ``keep_transpose``, ``r``, ``tokens`` of the
micro-batch (all used), ``documents`` in it, ``targets`` (positions that meet the head),
``checkpoint_layers`` of ``num_hidden_layers``; then what the allocator saw: ``peak_allocated_gib``
and ``peak_reserved_gib`` over the steps, ``static_allocated_gib`` before the first (weights,
adapters, gradients; no optimizer state yet), ``load_peak_gib`` while the model was made. The CUDA
context (about 0.5 GiB) is in none of them. Lines without ``peak_allocated_gib`` are remarks.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.rows import Setting
from bench.training import GIB, SHAPES, TimedSteps, build
from trainer.kernels.patch import inner_model
from trainer.kernels.scratch import release_scratch

MODELS = [
    Setting("llama-7b", "bf16"),
    Setting("llama-7b", "fp8"),
    Setting("llama-7b", "fp8", keep_transpose=True, r=64),
    Setting("llama-7b", "nf4"),
    Setting("llama-3-8b", "fp8"),
    Setting("tinyllama-1.1b", "bf16"),
    Setting("tinyllama-1.1b", "nf4", r=64),
]
# tokens, fraction of layers checkpointed
LOADS = [(4096, 1.0), (8192, 0.5), (8192, 1.0), (16384, 0.0)]


def measure_grid(path: Path, device: torch.device) -> None:
    """Appends one line per configuration to ``path``."""
    for base in MODELS:
        torch.cuda.reset_peak_memory_stats()
        model, _ = build(base, device)
        load_peak = torch.cuda.max_memory_allocated()
        layers: Any = inner_model(model).fast_layers
        for tokens, fraction in LOADS:
            setting = replace(base, tokens=tokens, checkpoint_layers=round(fraction * len(layers)))
            for i, layer in enumerate(layers):
                layer.checkpoint = i < setting.checkpoint_layers
            line = _measure(model, setting, device) | {"load_peak_gib": round(load_peak / GIB, 4)}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        del model, layers
        release_scratch()
        gc.collect()
        torch.cuda.empty_cache()


def _measure(model: torch.nn.Module, setting: Setting, device: torch.device) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    loop = TimedSteps(model, setting, device, 1, 0)
    first = loop.data[0]
    static = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        loop.step()
    torch.cuda.synchronize()
    seen = {
        "peak_allocated_gib": torch.cuda.max_memory_allocated(),
        "peak_reserved_gib": torch.cuda.max_memory_reserved(),
    }
    seen["static_allocated_gib"] = static
    for p in loop.gradients.parameters:
        p.grad = None
    inputs = {
        "documents": len(first["cu"]) - 1,
        "targets": len(first["targets_at"]),
        "tokens": first["count"],
    }
    return (
        asdict(setting)
        | asdict(SHAPES[setting.model])
        | inputs
        | {k: round(v / GIB, 4) for k, v in seen.items()}
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="JSON lines; the grid is appended")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.memory measures a GPU, and torch sees none here", file=sys.stderr)
        return 3
    measure_grid(arguments.file, torch.device("cuda", 0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
