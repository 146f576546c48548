"""Answers to one question as they come, of one voice or of several side by side in one batch.

The caller stops by closing the generator: nothing more is computed.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data.prepare import Prepared
from trainer.model.decode import Rows, packs
from trainer.serve.apart import Apart
from trainer.serve.engine import Choice, choose
from trainer.serve.models import Models, Voice


@dataclass(frozen=True)
class Settings:
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
    settings: Settings,
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
        models.answer_as([voice.adapter])
        parts.append(rows.read([row], [list(prompt)]))
    seen = _seen(prompts, parts[0].shape[-1], models.device)
    going = [True] * n
    made, logits = 0, torch.cat(parts)
    choice = Choice(settings.temperature, settings.top_p, settings.seed)
    while True:
        scores = penalised(logits, seen, settings.repetition_penalty)
        ids = choose(scores, [choice] * n, rows.lengths[:n])[0]
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
        logits = _step(models, rows, voices, ids, longest)
        rows.lengths[:n] += 1


def _step(
    models: Models, rows: Rows | Apart, voices: Sequence[Voice], ids: Tensor, reach: int
) -> Tensor:
    adapters = [voice.adapter for voice in voices]
    if models.mixes or len(set(adapters)) == 1:
        models.answer_as(adapters)
        return rows.step(ids, reach, slice(0, len(voices)))
    parts = []
    for row, adapter in enumerate(adapters):
        models.answer_as([adapter])
        at = torch.tensor([row], device=models.device)
        parts.append(rows.step(ids[at], reach, at))
    return torch.cat(parts)


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


class Text:
    """Tokens of an answer as text, in pieces that can be shown: a character whose bytes have not
    all come waits."""

    def __init__(self, data: Prepared) -> None:
        self.decode = data.vocabulary.tokenizer.decode
        self.ids: list[int] = []
        self._from = self._shown = 0  # tokens: where decoding begins, what was shown

    def add(self, token: int) -> str:
        """What `token` adds, perhaps nothing yet."""
        self.ids.append(token)
        before = self.decode(self.ids[self._from : self._shown], skip_special_tokens=True)
        now = self.decode(self.ids[self._from :], skip_special_tokens=True)
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._from, self._shown = self._shown, len(self.ids)
        return now[len(before) :]

    @property
    def whole(self) -> str:
        """The answer so far."""
        return self.decode(self.ids, skip_special_tokens=True).strip()
