"""Held-out questions, answered greedily by the base model and by the trained one."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.data.files import read_rows
from trainer.data.prepare import Prepared, prompt_ids, reading_of
from trainer.model.decode import AT_ONCE, answer
from trainer.wire.job import Job

ROWS, SHOWN = 200, 4
SECONDS = 30.0  # a rented card costs by the second


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
            [(run / job.data.held_out.path, job.data.held_out.name)], reading_of(job.data)
        )[0]
        if row.turns and row.turns[-1].text.strip()
    ][:ROWS]
    expected = [row.turns[-1].text.strip() for row in rows]
    before: list[str] = []
    after: list[str] = []
    began = time.monotonic()
    while len(after) < len(rows) and time.monotonic() - began < SECONDS:
        prompts = [
            prompt_ids(data, row.turns[:-1], row.tools)
            for row in rows[len(after) : len(after) + AT_ONCE]
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
