"""The fastest on today's families: one line of JSON for each model and precision, and the table.

    python -m bench.families qwen3-8b:bf16 qwen3-8b:fp8 gemma-3-4b:bf16 --append \
        bench/results/families.jsonl
    python -m bench.families --table bench/results/families.jsonl
    torchrun --nproc_per_node 4 -m bench.families llama-70b:bf16 --in-parts

The protocol of docs/speed-log.md on the shapes that people download: a random-weight model, LoRA
r=16 on all linears (8 on experts), 20,000 rows with log-normal lengths packed whole to 16,384
tokens, real tokens a second. `gemm_tflops` is the card's bf16 rate on a product of 8,192 cubed,
measured in the same process. `--layers` takes fewer layers where a card is too small;
`full_depth_tok_s` then says what the whole depth would give, if the layers alone cost more.
`--peer` measures transformers and PEFT by themselves on the same rows, padded. Over several
processes each trains on rows of its own, and gradients are summed once a step; `real_tok_s` is of
all together, `peak_gib` of the fullest card. `--in-parts` keeps the frozen layers in parts, all of
them recomputed: compare it with `--layers` of the same share, recomputed, on one card.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.processes import Processes
from bench.rows import Setting, batches, lengths
from bench.shapes import SHAPES
from bench.training import BF16_TFLOPS, GIB, tell
from trainer.kernels.base_parts import BaseParts

EXPERT_RANK = 8


def configuration(model: str, layers: int | None) -> Any:
    from transformers import AutoConfig

    kind, settings = SHAPES[model]
    settings = dict(settings, max_position_embeddings=8192)
    settings.setdefault("tie_word_embeddings", False)
    if layers:
        settings["num_hidden_layers"] = layers
    return AutoConfig.for_model(kind, **settings)


def empty_model(config: Any, attention: str, r: int) -> nn.Module:
    """On the meta device but for its angles, with adapters of PEFT's on every linear."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from trainer import families

    family = families.read(config.to_dict())
    adapted = family.all_linear()
    more: dict[str, Any] = {}
    if adapted.experts:
        ends = "|".join(p.rsplit(".", 1)[-1] for p in adapted.experts)
        pattern = rf".*\.experts\.(?:{ends})"
        more = {
            "target_parameters": list(adapted.experts),
            "rank_pattern": {pattern: EXPERT_RANK},
            "alpha_pattern": {pattern: 32 * EXPERT_RANK // r},
        }
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=torch.bfloat16
        )
    inner = model.model
    inner.rotary_emb = type(inner.rotary_emb)(config)
    model.family = family
    torch.manual_seed(0)
    settings = LoraConfig(r=r, lora_alpha=32, target_modules=list(adapted.modules), **more)
    return get_peft_model(model.requires_grad_(False), settings)


@torch.no_grad()
def fill(leaf: nn.Module) -> None:
    """Random weights; norms that change nothing; adapters as PEFT starts them."""
    kind = type(leaf).__name__
    for name, p in leaf.named_parameters(recurse=False):
        if "Conv" in kind:
            p.normal_(0, 0.5)
        elif name == "A_log":  # decays from next to none to much
            p.copy_(torch.linspace(-4.0, 2.5, len(p)))
        elif p.dim() > 1:
            p.normal_(0, 0.02)
        else:
            one_more = ("Gemma3RMS", "Gemma2RMS", "GemmaRMS", "Qwen3_5RMSNorm", "Qwen3_5MoeRMSNorm")
            plain = "Norm" in kind and (kind.endswith("Gated") or not kind.startswith(one_more))
            p.fill_(1.0 if plain and name == "weight" else 0.0)
            if kind == "Gemma4RMSNorm" and p.numel() <= 512:  # of q and k: its scale is in them
                p.fill_(p.numel() ** -0.25)
    for name, b in leaf.named_buffers(recurse=False):
        b.fill_(getattr(leaf, "scalar_embed_scale", 1.0) if name == "embed_scale" else 1.0)


def fill_all(model: nn.Module, device: torch.device) -> None:
    """Random weights on the device for what is on the meta device."""
    for leaf in model.modules():
        own = [*leaf.parameters(recurse=False), *leaf.buffers(recurse=False)]
        if any(t.is_meta for t in own):
            leaf.to_empty(device=device, recurse=False)
            fill(leaf)


@torch.no_grad()
def start_adapters(model: nn.Module, device: torch.device) -> None:
    """PEFT's own start (A uniform, B zero), in fp32 on the device."""
    for name, module in model.named_modules():
        if name.rsplit(".", 2)[-2:-1] in (["lora_A"], ["lora_B"]):
            module.to(torch.float32).to_empty(device=device)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            else:
                nn.init.zeros_(module.weight)


def build(
    setting: Setting, layers: int | None, device: torch.device, parts: BaseParts | None = None
) -> tuple[nn.Module, dict[str, str]]:
    """The trainer's own path: (the model on the device, what computes it). With `parts` no process
    ever has more than a layer of each kind beside its own."""
    from trainer.kernels.attention import register
    from trainer.kernels.patch import accelerate_model
    from trainer.model.load import checkpoint_first, prepare
    from trainer.model.parts import decoder_layers

    model = empty_model(configuration(setting.model, layers), register(), setting.r)
    start_adapters(model, device)
    names = prepare(model)
    names |= accelerate_model(
        model,
        setting.precision,
        device,
        checkpoint_layers=setting.checkpoint_layers,
        materialise=fill,
        parts=parts,
    )
    checkpoint_first(model, setting.checkpoint_layers)
    tie(model)
    if parts is not None:
        parts.attach(decoder_layers(model))
    return model.train(), names


def tie(model: Any) -> None:
    """Filling the meta device parted what a tied model shares."""
    inner = model.get_base_model()
    if inner.config.tie_word_embeddings:
        inner.lm_head.weight = inner.model.embed_tokens.weight


def as_trained(batch: dict[str, Any]) -> dict[str, Any]:
    """A pack under the names that the trainer gives it."""
    sides = {f"cu_seq_lens_{end}": batch["cu"] for end in "qk"}
    sides |= {f"max_length_{end}": batch["longest"] for end in "qk"}
    kept = ("input_ids", "position_ids", "labels", "targets_at")
    return {k: batch[k] for k in kept} | sides


class Steps:
    """Training steps without a wait for the GPU. With several processes, `world`, each has data of
    its own."""

    def __init__(
        self, model: nn.Module, data: list[dict[str, Any]], loss: Any, world: int = 1
    ) -> None:
        from trainer.loop.optim import FlatGradients

        trained = [p for p in model.parameters() if p.requires_grad]
        self.model, self.data, self.loss, self.world = model, data, loss, world
        self.gradients = FlatGradients(trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def step(self) -> int:
        batch = self.data[len(self.losses) % len(self.data)]
        self.gradients.zero()
        loss = self.loss(self.model, batch) / self.world
        loss.backward()
        self.gradients.extra[0] = loss.detach()
        if self.world > 1:
            dist.all_reduce(self.gradients.buffer)
        self.losses.append(self.gradients.extra[0].clone())
        self.norms.append(self.gradients.clip(1.0))
        self.optimizer.step()
        return int(batch["count"])


def our_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    from trainer.model.forward import target_loss

    return target_loss(model, as_trained(batch)) / len(batch["targets_at"])


def peer_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    names = ("input_ids", "attention_mask", "labels")
    loss: Tensor = model(**{k: batch[k] for k in names}, use_cache=False).loss
    return loss


def build_peer(
    setting: Setting, layers: int | None, device: torch.device
) -> tuple[nn.Module, dict[str, str]]:
    """transformers with PEFT, nothing of ours."""
    model = empty_model(configuration(setting.model, layers), "sdpa", setting.r)
    start_adapters(model, device)
    fill_all(model, device)
    tie(model.to(device))
    if setting.checkpoint_layers:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
    return model.train(), {"layer": "transformers + PEFT, sdpa, padded, rows of like length"}


def padded_batches(
    setting: Setting, vocab: int, device: torch.device, count: int = 24
) -> list[dict[str, Any]]:
    """The same rows, sorted by length within groups as transformers' Trainer does it."""
    size = sorted(lengths(setting)[: count * 80].tolist())
    made, at = [], 0
    g = torch.Generator().manual_seed(1)
    words = torch.randint(0, vocab, (300,), generator=g)
    while at < len(size):
        rows = max(1, setting.tokens // size[min(at + 64, len(size) - 1)])
        part = torch.tensor(size[at : at + rows])
        at += rows
        wide = int(part.max())
        where = torch.arange(wide)[None]
        drawn = torch.empty(len(part), wide).geometric_(0.02, generator=g).long().clamp(max=300)
        ids, seen = words[drawn - 1], where < part[:, None]
        target = seen & (where >= (part * 0.3).long()[:, None])
        made.append({
            "input_ids": ids.to(device), "attention_mask": seen.long().to(device),
            "labels": ids.masked_fill(~target, -100).to(device), "count": int(part.sum()),
        })  # fmt: skip
    order = torch.randperm(len(made), generator=g).tolist()
    return [made[i] for i in order[:count]]


def gemm_tflops(device: torch.device) -> float:
    """The card's rate on a product of 8,192 cubed in bf16, random data."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(30):
        a @ b
    end.record()
    torch.cuda.synchronize()
    seconds: float = begin.elapsed_time(end) * 1e-3
    return 30 * 2 * 8192**3 / seconds / 1e12


def full_depth(speed: float, model: str, layers: int) -> float:
    """Tokens a second with all of the model's layers, if what is not the head costs by layer."""
    _, settings = SHAPES[model]
    whole = int(settings["num_hidden_layers"])
    head: float = 4 * settings["hidden_size"] * settings["vocab_size"] * 0.7 / (BF16_TFLOPS * 1e12)
    return 1.0 / (head + (1.0 / speed - head) * whole / layers)


def measure(setting: Setting, asked: argparse.Namespace, all_of: Processes) -> dict[str, Any]:
    """Builds, warms up, runs and reports one model."""
    layers, peer, device, world = asked.layers, asked.peer, all_of.device, all_of.world
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    vocab = SHAPES[setting.model][1]["vocab_size"]
    depth = layers or SHAPES[setting.model][1]["num_hidden_layers"]
    parts = BaseParts(device, all_of.rank, world) if asked.in_parts else None
    if parts is not None:
        setting = replace(setting, checkpoint_layers=depth)
    made = build_peer if peer else partial(build, parts=parts)
    model, names = made(setting, layers, device)
    all_of.say(f"{setting.model}: {depth} layers stand after {time.perf_counter() - began:.0f} s")
    count = 24 if setting.tokens <= 32768 else asked.warm + setting.steps + 1
    rows = padded_batches if peer else partial(batches, rank=all_of.rank, world=world)
    data = rows(setting, vocab, device, count=count)
    steps = Steps(model, data, peer_loss if peer else our_loss, world)
    steps.step()
    all_of.wait()
    first = time.perf_counter() - began
    all_of.say(f"first step after {first:.0f} s")
    for _ in range(asked.warm):
        steps.step()
    all_of.wait()
    start = time.perf_counter()
    tokens = sum(steps.step() for _ in range(setting.steps))
    all_of.wait()
    speed = all_of.summed(tokens) / (time.perf_counter() - start)
    all_of.say(f"{setting.steps} steps: {speed:,.0f} tok/s")
    if asked.profile:
        write_profile(steps.step, asked.profile)
    losses, norms = (torch.stack(x).float().tolist() for x in (steps.losses, steps.norms))
    peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0
    held = None if parts is None else round(parts.held_bytes / GIB, 2)
    return {
        "model": setting.model,
        "precision": setting.precision,
        "gpus": world,
        "card": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "layers": depth,
        "real_tok_s": round(speed, 1),
        "full_depth_tok_s": round(world * full_depth(speed / world, setting.model, depth), 1),
        "peak_gib": round(all_of.largest(peak), 2),
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[-1], 4),
        "grad_norm_last": round(norms[-1], 5),
        "first_step_s": round(first, 1),
        "tokens": setting.tokens,
        "rows": setting.rows,
        "checkpoint_layers": setting.checkpoint_layers,
        "r": setting.r,
        "peer": peer,
        "kernels": names,
        "base_in_parts_gib": held,
    }


def write_profile(step: Callable[[], object], out: Path) -> None:
    """The kernels of one more step, by time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    table = seen.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=70
    )
    out.write_text(table)


def table(path: Path) -> str:
    """The rows of a file as a table for people: the last one of each model, precision and way."""
    last: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        last[tuple(row[k] for k in ("model", "precision", "card", "peer", "layers", "commit"))] = (
            row
        )
    said = ["| model | precision | card | layers | tok/s | full depth, at 790 | peak GiB | by |"]
    said += ["|---|---|---|---|---|---|---|---|"]
    for row in last.values():
        at_790 = row["full_depth_tok_s"] * BF16_TFLOPS / row["gemm_tflops"]
        said.append(
            f"| {row['model']} | {row['precision']} | {row['card'].removeprefix('NVIDIA ')} | "
            f"{row['layers']} | {row['real_tok_s']:,.0f} | {at_790:,.0f} | {row['peak_gib']} | "
            f"{row['kernels']['layer']} |"
        )
    return "\n".join(said)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="NAME:PRECISION, NAME of " + ", ".join(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    for name, value in (("steps", 8), ("tokens", 16384), ("checkpoint-layers", 0), ("r", 16)):
        parser.add_argument("--" + name, type=int, default=value)
    parser.add_argument("--warm", type=int, default=2, help="steps before those that are measured")
    parser.add_argument("--rows", default="alpaca", help="alpaca, or a fixed row length")
    parser.add_argument("--peer", action="store_true", help="transformers and PEFT by themselves")
    parser.add_argument("--profile", type=Path, help="write one step's kernels to this file")
    parser.add_argument("--append", type=Path, help="add the lines to this file")
    parser.add_argument("--table", type=Path, help="print this file as a table instead")
    parser.add_argument(
        "--in-parts", action="store_true", help="keep the frozen layers in parts over the processes"
    )
    parser.add_argument("--cpu", action="store_true", help="try a small model without a GPU")
    parser.add_argument("--commit", default="", help="of the code measured, for the line")
    asked = parser.parse_args()
    if asked.table:
        print(table(asked.table))
        return 0
    if not asked.cpu and not torch.cuda.is_available():
        print("bench.families measures a GPU, and torch sees none here", file=sys.stderr)
        return 3
    all_of = Processes.join(asked.cpu)
    if asked.in_parts and all_of.world == 1:
        print("--in-parts wants several processes: accelerate launch", file=sys.stderr)
        return 2
    rate = 0.0 if asked.cpu else round(gemm_tflops(all_of.device), 1)
    wrong = sum(not measured(name, asked, all_of, rate) for name in asked.models)
    if all_of.world > 1:
        dist.destroy_process_group()
    return 1 if wrong else 0


def measured(name: str, asked: argparse.Namespace, all_of: Processes, rate: float) -> bool:
    """Measures NAME:PRECISION and tells its line; whether that is a result."""
    model, precision = name.split(":")
    settings = ("steps", "tokens", "checkpoint_layers", "r", "rows")
    setting = Setting(model, precision, **{k: getattr(asked, k) for k in settings})
    try:
        line = measure(setting, asked, all_of)
    except (RuntimeError, ValueError) as why:  # out of memory, most often: said, not a row
        print(f"{name}: {type(why).__name__}: {str(why)[:400]}", file=sys.stderr, flush=True)
        if all_of.world > 1:  # the others wait for this one: the launcher ends them
            os._exit(1)
        line = None
    gc.collect()
    torch.cuda.empty_cache()
    if line is None:
        return False
    launched = "python" if all_of.world == 1 else f"torchrun --nproc_per_node {all_of.world}"
    command = " ".join([launched, "-m bench.families", *sys.argv[1:]])
    line |= {"gemm_tflops": rate, "command": command, "date": time.strftime("%Y-%m-%d")}
    if all_of.rank == 0:
        tell(line | ({"commit": asked.commit} if asked.commit else {}), asked.append)
    learned = line["loss_last"] < line["loss_first"] and line["grad_norm_last"] > 0
    return learned and math.isfinite(line["loss_last"])


if __name__ == "__main__":
    sys.exit(main())
