"""Held-out questions, answered greedily by the base model and by the trained one."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.data.files import read_rows
from trainer.data.prepare import Prepared, prompt_ids
from trainer.model.load import causal
from trainer.wire.job import Job

ROWS, SHOWN, NEW_TOKENS, AT_ONCE = 200, 4, 64, 64
SECONDS = 30.0  # on a rented card every second is paid for


@dataclass
class Scored:
    """Exact match, 0 to 1, and a few answers to show."""

    rows: int = 0
    before: float = 0.0
    after: float = 0.0
    samples: list[dict[str, str]] = field(default_factory=list)


def held_out(model: Any, job: Job, run: Path, data: Prepared, device: torch.device) -> Scored:
    """Rows of data.held_out, in order, as many as SECONDS allow and at most ROWS; `before` is the
    same model with its adapter switched off (only an adapter can be)."""
    if job.data.held_out is None:
        return Scored()
    rows = [
        row
        for row in read_rows(
            [(run / job.data.held_out.path, job.data.held_out.name)], job.data.format
        )[0]
        if row.turns
    ][:ROWS]
    expected = [row.turns[-1].text.strip() for row in rows]
    before: list[str] = []
    after: list[str] = []
    began = time.monotonic()
    while len(after) < len(rows) and time.monotonic() - began < SECONDS:
        prompts = [
            prompt_ids(data, row.turns[:-1]) for row in rows[len(after) : len(after) + AT_ONCE]
        ]
        after += answer(model, prompts, data, device)
        with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            before += (
                answer(model, prompts, data, device)
                if hasattr(model, "disable_adapter")
                else [""] * len(prompts)
            )
    samples = [
        {
            "prompt": "\n".join(x for x in (r.turns[-2].text, r.turns[-2].extra) if x),
            "expected": e,
            "before": b,
            "after": a,
        }
        for r, e, b, a in list(zip(rows, expected, before, after, strict=False))[:SHOWN]
    ]
    return Scored(
        len(after),
        match(before, expected[: len(before)]),
        match(after, expected[: len(after)]),
        samples,
    )


def match(answers: list[str], expected: list[str]) -> float:
    return sum(a == e for a, e in zip(answers, expected, strict=True)) / max(1, len(expected))


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
    taken: list[torch.Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(new_tokens):
        out = inner(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values  # (B, 1)
        taken.append(ids)
        done |= ids[:, 0] == stop
        if bool(done.all()):
            break
    rows = torch.cat(taken, 1).tolist()
    return [row[: row.index(stop)] if stop in row else row for row in rows]
