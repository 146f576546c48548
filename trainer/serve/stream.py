"""Answers to one question as they come, of one voice or of several side by side in one batch.

The caller stops by closing the generator: nothing more is computed.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.model.decode import Rows, packs
from trainer.serve.apart import Apart
from trainer.serve.engine import SamplingParams, choose, step_of
from trainer.serve.models import Models, Voice


@dataclass(frozen=True)
class ChatSettings:
    """A temperature of 0 takes the likeliest token. `repetition_penalty` divides the score of each
    token that stands in prompt or answer already (CTRL's, as transformers has it). An answer has
    at most `most` tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    most: int = 1024


class TooLong(ValueError):
    """The conversation leaves no room for an answer."""


@torch.inference_mode()
def stream(
    models: Models,
    voices: Sequence[Voice],
    prompts: Sequence[Sequence[int]],
    settings: ChatSettings,
) -> Generator[list[int | None], None, None]:
    """At each step the next token of each voice, None where its answer has ended; stop tokens are
    not told. Raises TooLong."""
    room = models.context - max(map(len, prompts))
    if room < 1:
        raise TooLong(
            f"the conversation has {max(map(len, prompts)):,} tokens, {models.context:,} are the "
            "most: begin a new one"
        )
    most = min(settings.most, room)
    n, longest = len(voices), max(map(len, prompts)) + most
    rows: Rows | Apart = Apart(models.model, models.device)
    if packs(models.model, longest):
        rows = Rows(models.model, n, longest, models.device)
    parts = []
    for row, (voice, prompt) in enumerate(zip(voices, prompts, strict=True)):
        models.read_as(voice.adapter)
        parts.append(rows.read([row], [list(prompt)]))
    seen = _seen(prompts, parts[0].shape[-1], models.device)
    going = [True] * n
    made, logits = 0, torch.cat(parts)
    sampling = SamplingParams(settings.temperature, settings.top_p, settings.seed)
    while True:
        scores = penalised(logits, seen, settings.repetition_penalty)
        ids = choose(scores, [sampling] * n, rows.lengths[:n])[0]
        seen[torch.arange(n, device=models.device), ids] = True
        told: list[int | None] = []
        for i, (token, voice) in enumerate(zip(ids.tolist(), voices, strict=True)):
            going[i] = going[i] and token not in voice.stops
            told.append(token if going[i] else None)
        made += 1
        if any(going):
            yield told
        if made >= most or not any(going):
            return
        logits = step_of(models, rows, ids, longest, [voice.adapter for voice in voices])
        rows.lengths[:n] += 1


def _seen(prompts: Sequence[Sequence[int]], size: int, device: torch.device) -> Tensor:
    found = torch.zeros(len(prompts), size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        found[row, torch.tensor(list(prompt), device=device)] = True
    return found


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V), fp32, with those of `seen` tokens made less likely."""
    logits = logits.float()
    if penalty == 1.0:
        return logits
    less = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, less, logits)
