"""How fast, how much memory, how soon: one line of JSON for one configuration, appended to
bench/results/bench.jsonl on request.

    python -m bench.training --model llama-7b --precision fp8 --append bench/results/bench.jsonl
    accelerate launch --multi_gpu --num_processes 4 -m bench.training --model llama-7b

The protocol of docs/speed-log.md: a random-weight model, LoRA on all seven projections without
dropout, 20,000 rows with log-normal lengths (median 180 tokens) packed whole to a token budget, a
third of each row no target. ``real_tok_s`` counts rows' tokens only. Loss must fall and the
gradient norm be above zero, or the exit code is 1: fast and wrong is not a result.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

# packs differ by a few tokens: no fragments
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import Tensor, nn

from bench.rows import Setting, batches

# measured on one H200 with a large product of random data: the ceiling that "mfu" is a fraction of
BF16_TFLOPS = 790.0
GIB = 2**30


@dataclass(frozen=True)
class Dimensions:
    """A decoder's dimensions under transformers' names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int

    @property
    def linear_parameters(self) -> int:
        """Weights that a token meets in a product: all linears and the head."""
        h, kv = (
            self.hidden_size,
            self.hidden_size * self.num_key_value_heads // self.num_attention_heads,
        )
        return (
            self.num_hidden_layers * (2 * h * h + 2 * h * kv + 3 * h * self.intermediate_size)
            + h * self.vocab_size
        )


SHAPES = {
    "llama-7b": Dimensions(4096, 11008, 32, 32, 32, 32000),
    "llama-3-8b": Dimensions(4096, 14336, 32, 32, 8, 128256),
    "tinyllama-1.1b": Dimensions(2048, 5632, 22, 32, 4, 32000),
    "llama-160m": Dimensions(768, 2048, 12, 12, 12, 32000),
}


def build(setting: Setting, device: torch.device) -> tuple[nn.Module, dict[str, str]]:
    """The random-weight model with its adapters on ``device``, made layer by layer, and the names
    of the kernels that run."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainer.kernels.attention import register
    from trainer.kernels.patch import accelerate_model, inner_model

    shape = SHAPES[setting.model]
    config = LlamaConfig(**asdict(shape), max_position_embeddings=8192, tie_word_embeddings=False)
    config._attn_implementation = register()
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16)
    inner = inner_model(model)
    inner.rotary_emb = type(inner.rotary_emb)(config)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(0)
    model = get_peft_model(
        model.requires_grad_(False), LoraConfig(r=setting.r, lora_alpha=32, target_modules=targets)
    )
    _start_adapters(model, device)
    names = accelerate_model(
        model,
        setting.precision,
        device,
        checkpoint_layers=setting.checkpoint_layers,
        keep_transpose=setting.keep_transpose,
        materialise=_random_weights,
    )
    return model.train(), names


@torch.no_grad()
def _start_adapters(model: nn.Module, device: torch.device) -> None:
    """PEFT's own start (A uniform, B zero) for adapters that were made on the meta device."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and ("lora_A" in name or "lora_B" in name):
            module.to_empty(device=device)
            nn.init.kaiming_uniform_(
                module.weight, a=5**0.5
            ) if "lora_A" in name else nn.init.zeros_(module.weight)


@torch.no_grad()
def _random_weights(leaf: nn.Module) -> None:
    for p in leaf.parameters(recurse=False):
        if p.dim() == 1:
            p.fill_(1.0)
        else:
            p.normal_(0, 0.02)


def hidden_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The last hidden states [1, M, hidden] of one pack, by the trainer's packed attention."""
    inner = model.get_base_model()  # type: ignore[operator]
    found: Tensor = inner.model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        use_cache=False,
        cu_seq_lens_q=batch["cu"],
        cu_seq_lens_k=batch["cu"],
        max_length_q=batch["longest"],
        max_length_k=batch["longest"],
    ).last_hidden_state
    return found


def micro_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Summed loss of one pack, as the trainer computes it."""
    from trainer.model.loss import target_loss_sum

    head = model.get_base_model().lm_head.weight  # type: ignore[operator]
    return target_loss_sum(hidden_of(model, batch), head, batch["labels"], batch["targets_at"])


class TimedSteps:
    """Training steps without a wait for the GPU: losses and norms stay there until asked for."""

    def __init__(
        self, model: nn.Module, setting: Setting, device: torch.device, world: int, rank: int
    ) -> None:
        from trainer.loop.optim import FlatGradients

        self.model, self.setting, self.world = model, setting, world
        trained = [p for p in model.parameters() if p.requires_grad]
        self.gradients = FlatGradients(trained)
        self.optimizer = torch.optim.AdamW(
            trained, lr=1e-3, weight_decay=0.0, fused=device.type == "cuda"
        )
        self.data = batches(setting, SHAPES[setting.model].vocab_size, device, rank, world)
        self.taken = 0
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def step(self) -> int:
        """One optimizer step; returns the real tokens of this rank."""
        self.gradients.zero()
        tokens = 0
        total: Tensor | float = 0.0
        for _ in range(self.setting.accumulate):
            batch = self.data[self.taken % len(self.data)]
            self.taken += 1
            share = 1.0 / (len(batch["targets_at"]) * self.setting.accumulate * self.world)
            loss = micro_loss(self.model, batch) * share
            loss.backward()
            total = total + loss.detach()
            tokens += batch["count"]
        self.gradients.extra[0] = total
        if self.world > 1:
            torch.distributed.all_reduce(self.gradients.buffer)
        self.losses.append(self.gradients.extra[0].clone())
        self.norms.append(self.gradients.clip(1.0))
        self.optimizer.step()
        return tokens


def _timed_steps(
    loop: TimedSteps, steps: int, device: torch.device, world: int
) -> tuple[float, float, dict[str, Any]]:
    """Three steps to warm up, then `steps` measured ones: (tokens of all GPUs, seconds of the
    slowest, the times of single steps and of launching)."""
    for _ in range(3):
        loop.step()
    if world > 1:
        torch.distributed.barrier()
    torch.cuda.synchronize()
    began = time.perf_counter()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    tokens: float = 0
    for mark in marks[:-1]:
        mark.record()
        tokens += loop.step()
    marks[-1].record()
    launched = time.perf_counter() - began
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    if world > 1:
        total = torch.tensor([tokens, seconds], device=device, dtype=torch.float64)
        torch.distributed.all_reduce(total[:1])
        torch.distributed.all_reduce(total[1:], torch.distributed.ReduceOp.MAX)
        tokens, seconds = total.tolist()
    times = [round(a.elapsed_time(b), 1) for a, b in pairwise(marks)][:8]
    return tokens, seconds, {"step_ms": times, "launch_s": round(launched, 2)}


def measure(
    setting: Setting, device: torch.device, world: int = 1, rank: int = 0
) -> dict[str, Any]:
    """Build, warm up, run and report one configuration."""
    cache = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    warm = cache.is_dir() and any(cache.iterdir())
    started = time.time() - _process_start()
    model, names = build(setting, device)
    built = time.time() - _process_start()
    loop = TimedSteps(model, setting, device, world, rank)
    loop.step()
    torch.cuda.synchronize()
    first = time.time() - _process_start()
    tokens, seconds, timing = _timed_steps(loop, setting.steps, device, world)
    speed = tokens / seconds
    losses, norms = (torch.stack(x).tolist() for x in (loop.losses, loop.norms))
    flops = 4 * SHAPES[setting.model].linear_parameters * speed / world
    return {
        "model": setting.model,
        "precision": setting.precision,
        "gpus": world,
        "real_tok_s": round(speed, 1),
        "mfu": round(flops / BF16_TFLOPS / 1e12, 4),
        "mfu_of_tflops": BF16_TFLOPS,
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[-1], 4),
        "grad_norm_last": round(norms[-1], 5),
        "first_step_s": round(first, 1),
        "imports_s": round(started, 1),
        "model_s": round(built - started, 1),
        **timing,
        "run_s": round(seconds, 2),
        "triton_cache": "warm" if warm else "cold",
        **{k: v for k, v in asdict(setting).items() if k not in ("model", "precision")},
        "kernels": names,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": (
            f"accelerate launch --multi_gpu --num_processes {world}" if world > 1 else "python"
        )
        + " -m bench.training "
        + " ".join(sys.argv[1:]),
    }


def _process_start() -> float:
    """Unix time at which this process began, from the kernel."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    booted = time.time() - float(Path("/proc/uptime").read_text().split()[0])
    return booted + ticks / os.sysconf("SC_CLK_TCK")


def profile(setting: Setting, device: torch.device, out: Path) -> None:
    """Writes the kernels of one step, by time, to ``out``."""
    model, _ = build(setting, device)
    loop = TimedSteps(model, setting, device, 1, 0)
    for _ in range(4):
        loop.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    ) as recorded:
        loop.step()
        torch.cuda.synchronize()
    out.write_text(
        recorded.key_averages().table(
            sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90
        )
    )


def attempted(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, or its error as a line: out of memory, most often, and the next one
    goes. What it held of a GPU is free when this returns."""
    try:
        return measure()
    except Exception as why:
        return {"error": f"{type(why).__name__}: {str(why)[:300]}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def tell(line: dict[str, Any], append: Path | None) -> None:
    """Prints a measurement as one line of JSON, and adds it to the file `append`, if any."""
    print(json.dumps(line), flush=True)
    if append:
        with append.open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Setting()
    parser.add_argument("--model", choices=SHAPES, default=defaults.model)
    parser.add_argument("--precision", choices=["bf16", "fp8", "nf4"], default=defaults.precision)
    for name in ("r", "tokens", "checkpoint_layers", "accumulate", "steps", "pack"):
        parser.add_argument(
            "--" + name.replace("_", "-"), type=int, default=getattr(defaults, name)
        )
    parser.add_argument("--rows", default=defaults.rows, help="alpaca, or a fixed row length")
    parser.add_argument(
        "--keep-transpose",
        action="store_true",
        help="fp8: a transposed copy of the base for backward",
    )
    parser.add_argument("--append", type=Path, help="add the line to this file as well")
    parser.add_argument(
        "--profile", type=Path, help="write one step's kernels to this file instead"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.training measures a GPU, and torch sees none here", file=sys.stderr)
        return 3
    world, rank, local = (
        int(os.environ.get(k, d))
        for k, d in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
    )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group("nccl", device_id=device)
    setting = Setting(**{k: getattr(args, k) for k in asdict(defaults)})
    if args.profile:
        profile(setting, device, args.profile)
        return 0
    line = measure(setting, device, world, rank)
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank:
        return 0
    tell(line, args.append)
    learned = line["loss_last"] < line["loss_first"] and line["grad_norm_last"] > 0
    if not learned:
        print(
            "the loss did not fall or the gradient norm is zero: this is no result", file=sys.stderr
        )
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())
