"""Rows of a model whose attention is transformers' own: each has a cache of its own, and is stepped
alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.parts import causal, name_of_cache


class Apart:
    """The same interface as decode.Rows, for any model of transformers."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.inner, self.device = causal(model), device
        self.name = name_of_cache(self.inner)
        self.caches: dict[int, Any] = {}
        self.lengths = torch.zeros(1, dtype=torch.int64, device=device)

    def read(self, rows: list[int], prompts: Sequence[list[int]]) -> Tensor:
        """The logits of what follows each prompt, (rows, V)."""
        more = max(rows) + 1 - len(self.lengths)
        if more > 0:
            self.lengths = torch.cat([self.lengths, self.lengths.new_zeros(more)])
        made = []
        for row, prompt in zip(rows, prompts, strict=True):
            self.lengths[row] = len(prompt)
            made.append(self._forward(row, torch.tensor([prompt], device=self.device), None))
        return torch.cat(made)

    def step(self, last: Tensor, reach: int, rows: slice | Tensor) -> Tensor:
        """The logits of what follows `last` (rows,), (rows, V)."""
        numbers = range(rows.start, rows.stop) if isinstance(rows, slice) else rows.tolist()
        made = [
            self._forward(row, last[i].view(1, 1), self.caches[row])
            for i, row in enumerate(numbers)
        ]
        return torch.cat(made)

    def _forward(self, row: int, ids: Tensor, cache: Any) -> Tensor:
        out = self.inner(input_ids=ids, use_cache=True, logits_to_keep=1, **{self.name: cache})
        self.caches[row] = out[self.name]
        logits: Tensor = out.logits[:, -1]
        return logits

    def move(self, here: int, there: int) -> None:
        """Row `here` takes the place of row `there`."""
        self.caches[there] = self.caches.pop(here)
        self.lengths[there] = self.lengths[here]
