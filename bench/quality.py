"""Does FP8 or NF4 cost quality? On a model that really learns: python -m bench.quality

A model of about 90M parameters, a Llama or with `--family` another, is trained from nothing on an
order-2 Markov language whose entropy is known. Then a quarter of the language's rules change, and
LoRA learns the change over the frozen base in bf16, FP8 and NF4: same start, same rows, same order.
Prints one JSON object: held-out losses before and after, and how far each precision ends from bf16.
Needs a GPU, about two minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from bench.training import hidden_of

WORDS, CHOICES, LENGTH = 128, 8, 512
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 64},
    "gemma3_text": {"num_key_value_heads": 4, "head_dim": 64, "query_pre_attn_scalar": 64},
    "qwen3_moe": {"num_key_value_heads": 4, "head_dim": 64, "moe_intermediate_size": 512,
                  "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
}  # fmt: skip
SIZES: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}


class Language:
    """After each pair of words one of eight may follow, with probabilities 0.5, 0.2, 0.1, ...
    ``changed``: part of the pairs that other words follow than in the language of the same seed
    without change."""

    def __init__(self, device: torch.device, changed: float = 0.0) -> None:
        generator = torch.Generator(device).manual_seed(7)
        self.follow = torch.randint(
            0, WORDS, (WORDS * WORDS, CHOICES), device=device, generator=generator
        )
        other = torch.randint(
            0, WORDS, (WORDS * WORDS, CHOICES), device=device, generator=generator
        )
        where = torch.rand(WORDS * WORDS, device=device, generator=generator) < changed
        self.follow[where] = other[where]
        self.chances = torch.tensor([0.5, 0.2, 0.1, 0.08, 0.05, 0.04, 0.02, 0.01], device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}  # by rows

    def rows(self, count: int, seed: int) -> Tensor:
        """[count, LENGTH] words."""
        device = self.follow.device
        generator = torch.Generator(device).manual_seed(seed)
        out = torch.randint(0, WORDS, (count, LENGTH), device=device, generator=generator)
        picks = torch.multinomial(
            self.chances, count * LENGTH, replacement=True, generator=generator
        ).view(count, LENGTH)
        if device.type != "cuda":
            self._follow(out, picks)
            return out
        if count not in self._graphs:
            self._graphs[count] = self._captured(out.clone(), picks.clone())
        graph, words, picked = self._graphs[count]
        words.copy_(out)
        picked.copy_(picks)
        graph.replay()
        return words.clone()

    def _follow(self, words: Tensor, picks: Tensor) -> None:
        """Overwrites all words of each row but its first two with what follows them."""
        for t in range(2, LENGTH):
            words[:, t] = self.follow[words[:, t - 2] * WORDS + words[:, t - 1], picks[:, t]]

    def _captured(
        self, words: Tensor, picks: Tensor
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """(a graph of ``_follow``, the tensors that it reads and writes): 2,500 launches in one."""
        self._follow(words, picks)  # loads the kernels, which a capture may not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._follow(words, picks)
        return graph, words, picks


def train_base(device: torch.device, steps: int, family: str) -> tuple[nn.Module, float]:
    """(the trained model in bf16, its last training loss)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {**SIZES, "vocab_size": WORDS, "max_position_embeddings": LENGTH}
    settings |= {"tie_word_embeddings": False, "pad_token_id": 0, **FAMILIES[family]}
    config = AutoConfig.for_model(family, **settings)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if "num_experts" in settings:  # the only ones that mixed precision takes
        model.set_experts_implementation("eager")
    model.to(device)
    language = Language(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    loss = torch.zeros(())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                1e-3 * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            )
        rows = language.rows(128, 1000 + step)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=rows, use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits[:, 1:-1].flatten(0, 1).float(), rows[:, 2:].flatten()
        )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.to(torch.bfloat16).requires_grad_(False), float(loss.detach())


def packed(rows: Tensor) -> dict[str, Any]:
    """[count, LENGTH] -> one pack with its labels, already shifted; the first word has no rule and
    is no target."""
    count = len(rows)
    labels = rows.roll(-1, 1).clone()
    labels[:, 0] = labels[:, -1] = -100
    cu = torch.arange(0, count * LENGTH + 1, LENGTH, device=rows.device, dtype=torch.int32)
    positions = torch.arange(LENGTH, device=rows.device).repeat(count)[None]
    return {
        "input_ids": rows.reshape(1, -1),
        "position_ids": positions,
        "labels": labels.reshape(1, -1),
        "cu": cu,
        "longest": LENGTH,
    }


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Mean loss per target."""
    from trainer.model.loss import target_loss_sum

    head = model.get_base_model().lm_head.weight  # type: ignore[operator]
    targets = (LENGTH - 2) * (len(batch["cu"]) - 1)
    return target_loss_sum(hidden_of(model, batch), head, batch["labels"]) / targets


def tune(base: nn.Module, precision: str, steps: int, seed: int) -> dict[str, Any]:
    """Held-out loss on the changed language before and after ``steps`` LoRA steps over the base in
    ``precision``."""
    from peft import LoraConfig, get_peft_model

    from trainer import families
    from trainer.kernels.attention import register
    from trainer.kernels.patch import accelerate_model
    from trainer.model.load import prepare

    device = next(base.parameters()).device
    model: Any = copy.deepcopy(base)
    model.set_attn_implementation(register())
    model.family = families.read(model.config.to_dict())
    adapted = model.family.all_linear()
    torch.manual_seed(seed)
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=list(adapted.modules),
        target_parameters=list(adapted.experts) or None,
    )
    model = get_peft_model(model, config)
    names = prepare(model) | accelerate_model(model, precision, device)
    language = Language(device, changed=0.25)
    held_out = [packed(language.rows(64, 900 + i)) for i in range(8)]

    @torch.no_grad()
    def score() -> float:
        return float(sum(loss_of(model, b) for b in held_out)) / len(held_out)

    before = score()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
    first = last = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                1e-3 * min(1.0, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            )
        loss = loss_of(model, packed(language.rows(64, 50_000 + 1000 * seed + step)))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in (0, steps - 1):
            first, last = (float(loss), last) if step == 0 else (first, float(loss))
    return {
        "before": before,
        "after": score(),
        "loss_first": first,
        "loss_last": last,
        "grad_norm_last": float(norm),
        "layer": names["layer"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--base-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    device = torch.device("cuda")
    began = time.time()
    base, base_loss = train_base(device, args.base_steps, args.family)
    report: dict[str, Any] = {
        "family": args.family,
        "parameters": sum(p.numel() for p in base.parameters()),
        "entropy": round(
            float(-(Language(device).chances * Language(device).chances.log()).sum()), 4
        ),
        "chance": round(math.log(WORDS), 4),
        "base_loss": round(base_loss, 4),
        "base_s": round(time.time() - began, 1),
        "runs": [],
    }
    worst = 0.0
    for seed in range(args.seeds):
        runs = {
            precision: tune(base, precision, args.steps, seed)
            for precision in ("bf16", "fp8", "nf4")
        }
        for precision, run in runs.items():
            off = run["after"] / runs["bf16"]["after"] - 1
            worst = max(worst, off)
            report["runs"].append(
                {"seed": seed, "precision": precision, **run, "from_bf16": round(off, 5)}
            )
    print(json.dumps(report), flush=True)
    return 0 if worst <= 0.005 else 1


if __name__ == "__main__":
    sys.exit(main())
