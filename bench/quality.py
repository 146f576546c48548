"""Does FP8 or NF4 cost quality? On a model that really learns: python -m bench.quality

A model is trained from nothing on an order-2 Markov language whose entropy is known: a Qwen3 of
23 M parameters, or with `--family` another. Then a quarter of the language's rules change, and LoRA
learns the change over the frozen base in bf16, FP8 and NF4: same start, same rows, same order.

Tells its progress, and then prints one JSON object, which `--out` also writes to a file: held-out
losses before and after, how much of what there was to learn is learned, and how far each precision
ends from bf16. Exits with 1 where a precision ends more than 0.5 % above bf16, or where less than
half was learned. Needs a GPU, three minutes; `--cpu` tries a tiny model.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.training import hidden_of

CHANCES = (0.5, 0.2, 0.1, 0.08, 0.05, 0.04, 0.02, 0.01)  # of the words that may follow a pair
ENTROPY = -sum(p * math.log(p) for p in CHANCES)  # no model's loss is lower
CHANGED = 0.25  # of the pairs
WORST, LEAST = 0.005, 0.5  # above bf16's loss; of what there was to learn
PRECISIONS = ("bf16", "fp8", "nf4")
HEADS: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": HEADS,
    "gemma3_text": {**HEADS, "query_pre_attn_scalar": 64},
    "qwen3_moe": {**HEADS, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
}


@dataclass(frozen=True)
class Sizes:
    """Of the model, the language and the batches; rows have `length` words."""

    words: int = 64
    length: int = 256
    hidden: int = 512
    layers: int = 8
    rows: int = 128  # of a batch
    held_out: int = 512  # rows

    def config(self, family: str) -> Any:
        from transformers import AutoConfig

        settings = {
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "moe_intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(4, self.hidden // 64),
            "vocab_size": self.words,
            "max_position_embeddings": self.length,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
        }
        return AutoConfig.for_model(family, **settings | FAMILIES[family])


TINY = Sizes(words=16, length=32, hidden=64, layers=2, rows=16, held_out=32)


class Language:
    """After each pair of words one of eight may follow, with probabilities CHANCES. `changed`: part
    of the pairs that other words follow than in the language of the same seed without change."""

    def __init__(self, words: int, device: torch.device, changed: float = 0.0) -> None:
        self.words, self.device, pairs = words, device, words * words
        made = torch.Generator().manual_seed(7)
        follow, other = (
            torch.rand(pairs, words, generator=made).topk(len(CHANCES)).indices for _ in range(2)
        )
        where = torch.rand(pairs, generator=made) < changed
        self.follow = torch.where(where[:, None], other, follow).to(device)

    def rows(self, count: int, length: int, seed: int) -> Tensor:
        """[count, length] words. All rows of a run are made at once: it takes `length` steps."""
        made = torch.Generator(self.device).manual_seed(seed)
        given: dict[str, Any] = {"device": self.device, "generator": made}
        out = torch.randint(0, self.words, (length, count), **given)
        ends = torch.tensor(CHANCES, device=self.device).cumsum(0)[:-1]
        picks = torch.bucketize(torch.rand(length, count, **given), ends)
        for t in range(2, length):
            out[t] = self.follow[out[t - 2] * self.words + out[t - 1], picks[t]]
        return out.t().contiguous()


def scheduled(optimizer: torch.optim.Optimizer, step: int, steps: int, warm: int) -> None:
    """Sets the rate of a step: up over `warm` steps, then down along a cosine."""
    for group in optimizer.param_groups:
        along = min(1.0, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        group["lr"] = 1e-3 * along


def train_base(
    sizes: Sizes, device: torch.device, steps: int, family: str
) -> tuple[nn.Module, list[float]]:
    """(the trained model in bf16, its losses on the rows of the first and the last step)."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        sizes.config(family), attn_implementation="sdpa", dtype=torch.float32
    )
    if "num_experts" in FAMILIES[family]:  # the only ones that mixed precision takes
        model.set_experts_implementation("eager")
    model.to(device)
    rows = Language(sizes.words, device).rows(steps * sizes.rows, sizes.length, 1000)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=fused
    )
    losses: list[Tensor] = []
    for step, batch in enumerate(rows.split(sizes.rows)):
        scheduled(optimizer, step, steps, 20)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits[:, 1:-1].flatten(0, 1).float(), batch[:, 2:].flatten()
        )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step % 50 == 49:
            say(f"base, step {step + 1} of {steps}: loss {float(losses[-1]):.4f}")
    ends = [float(losses[0]), float(losses[-1])]
    return model.to(torch.bfloat16).requires_grad_(False), ends


def packed(rows: Tensor) -> dict[str, Any]:
    """[count, length] -> one pack with its labels, already shifted; the first word has no rule and
    is no target."""
    count, length = rows.shape
    labels = rows.roll(-1, 1).clone()
    labels[:, 0] = labels[:, -1] = -100
    cu = torch.arange(0, count * length + 1, length, device=rows.device, dtype=torch.int32)
    positions = torch.arange(length, device=rows.device).repeat(count)[None]
    return {
        "input_ids": rows.reshape(1, -1),
        "position_ids": positions,
        "labels": labels.reshape(1, -1),
        "targets": count * (length - 2),
        "cu": cu,
        "longest": length,
    }


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Mean loss per target."""
    from trainer.model.loss import target_loss_sum

    head = model.get_base_model().lm_head.weight  # type: ignore[operator]
    targets: int = batch["targets"]
    return target_loss_sum(hidden_of(model, batch), head, batch["labels"]) / targets


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """Mean loss per target over batches of equal size."""
    losses = [float(loss_of(model, packed(rows))) for rows in batches]
    return sum(losses) / len(losses)


def adapted(base: nn.Module, precision: str, seed: int) -> tuple[Any, str]:
    """(a copy of the base in `precision` with a new adapter, what computes its layers)."""
    from peft import LoraConfig, get_peft_model

    from trainer import families
    from trainer.kernels.attention import register
    from trainer.kernels.patch import accelerate_model
    from trainer.model.load import prepare

    model: Any = copy.deepcopy(base)
    model.set_attn_implementation(register())
    model.family = families.read(model.config.to_dict())
    found = model.family.all_linear()
    torch.manual_seed(seed)
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=list(found.modules),
        target_parameters=list(found.experts) or None,
    )
    model = get_peft_model(model, config)
    prepare(model)
    device = next(base.parameters()).device
    return model, accelerate_model(model, precision, device)["layer"]


def tune(base: nn.Module, precision: str, sizes: Sizes, steps: int, seed: int) -> dict[str, Any]:
    """Held-out loss on the changed language before and after `steps` LoRA steps over the base in
    `precision`."""
    model, layer = adapted(base, precision, seed)
    device = next(base.parameters()).device
    language = Language(sizes.words, device, CHANGED)
    held_out = language.rows(sizes.held_out, sizes.length, 900).split(sizes.rows)
    rows = language.rows(steps * sizes.rows, sizes.length, 50_000 + seed).split(sizes.rows)
    before = score(model, held_out)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=device.type == "cuda")
    losses, norm = [], torch.zeros(())
    for step, batch in enumerate(rows):
        scheduled(optimizer, step, steps, 10)
        loss = loss_of(model, packed(batch))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    after = score(model, held_out)
    return {
        "before": before,
        "after": after,
        "learned": round((before - after) / (before - ENTROPY), 4),
        "loss_first": float(losses[0]),
        "loss_last": float(losses[-1]),
        "grad_norm_last": float(norm),
        "layer": layer,
    }


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    device = torch.device("cpu" if asked.cpu else "cuda")
    sizes, began = TINY if asked.cpu else Sizes(), time.time()
    base, losses = train_base(sizes, device, asked.base_steps, asked.family)
    report: dict[str, Any] = {
        "family": asked.family,
        "card": "cpu" if asked.cpu else torch.cuda.get_device_name(),
        "parameters": sum(p.numel() for p in base.parameters()),
        "entropy": round(ENTROPY, 4),
        "chance": round(math.log(sizes.words), 4),
        "base_loss_first": round(losses[0], 4),
        "base_loss": round(losses[1], 4),
        "base_s": round(time.time() - began, 1),
        "runs": [],
    }
    say(f"the base stands after {report['base_s']} s")
    for seed in range(asked.seeds):
        plain = math.nan
        for precision in PRECISIONS:
            run = tune(base, precision, sizes, asked.steps, seed)
            plain = run["after"] if precision == "bf16" else plain
            off = run["after"] / plain - 1
            say(
                f"seed {seed}, {precision}: held-out loss {run['before']:.4f} -> "
                f"{run['after']:.4f}, {off:+.3%} from bf16; {run['layer']}"
            )
            report["runs"].append(
                {"seed": seed, "precision": precision, **run, "from_bf16": round(off, 5)}
            )
    report["seconds"] = round(time.time() - began, 1)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, default="qwen3")
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    parser.add_argument("--cpu", action="store_true", help="try a tiny model without a GPU")
    asked = parser.parse_args()
    report = measured(asked)
    print(json.dumps(report), flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(report) + "\n", encoding="utf-8")
    runs = report["runs"]
    good = all(r["from_bf16"] <= WORST and r["learned"] >= LEAST for r in runs)
    return 0 if good and runs else 1


if __name__ == "__main__":
    sys.exit(main())
