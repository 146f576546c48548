"""Greedy answers of a loaded model, without transformers' `generate`."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from trainer.data.prepare import Prepared
from trainer.model.load import causal

NEW_TOKENS, AT_ONCE = 64, 64  # of one answer; prompts in one batch


@torch.no_grad()
def answer(
    model: nn.Module,
    prompts: list[list[int]],
    data: Prepared,
    device: torch.device,
    new_tokens: int = NEW_TOKENS,
) -> list[str]:
    """Greedy answers, up to the stop token or `new_tokens`. Prompts of one length go together, so
    nothing is padded."""
    inner, training = causal(model), model.training
    model.eval()
    answers: list[str] = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups: list[list[int]] = []
    for i in order:
        if groups and len(groups[-1]) < AT_ONCE and len(prompts[groups[-1][0]]) == len(prompts[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    for group in groups:
        for i, ids in zip(
            group,
            _decode(inner, [prompts[i] for i in group], data.stop_id, device, new_tokens),
            strict=True,
        ):
            answers[i] = data.vocabulary.tokenizer.decode(ids, skip_special_tokens=True).strip()
    model.train(training)
    return answers


def _decode(
    inner: nn.Module, prompts: list[list[int]], stop: int, device: torch.device, new_tokens: int
) -> list[list[int]]:
    ids, cache = torch.tensor(prompts, device=device), None  # (B, P)
    name = _name_of_cache(inner)
    taken: list[torch.Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(new_tokens):
        out = inner(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
        ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out[name]  # (B, 1)
        taken.append(ids)
        done |= ids[:, 0] == stop
        if bool(done.all()):
            break
    rows = torch.cat(taken, 1).tolist()
    return [row[: row.index(stop)] if stop in row else row for row in rows]


def _name_of_cache(model: nn.Module) -> str:
    """What this transformers calls the keys and values of earlier tokens, as argument and output:
    "cache" from 5.24 on, "past_key_values" before."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"
