"""The keys and values of several answers, a row each, beside which a model decodes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from trainer.kernels.step_layer import CachePositions
from trainer.model.prompts import Places, Prompt, in_front


class Keys(Cache):
    """KV cache of `size` answers, (size, longest, heads, D) a layer. The next tokens go to
    `packed`, (rows, positions) of packed tokens, or to `place`, one token a row, which sees the
    first `kept` keys of its row. `steady`: adapters are not looked up. `prefix`: the learned keys
    that a prefill puts in front of each document, their places, and the documents' rows."""

    def __init__(self, size: int, longest: int) -> None:
        super().__init__(layers=[])
        self.size, self.longest, self.kept = size, longest, longest
        self.packed: tuple[Tensor, Tensor] | None = None
        self.place: CachePositions | None = None
        self.rows: slice | Tensor = slice(0, size)
        self.steady = False
        self.prefix: tuple[Prompt, Places, Tensor] | None = None
        self.held: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        new = (key_states, value_states)
        if self.place is None:
            self.put(layer_idx, *(x[0].transpose(0, 1) for x in new))
            return new if self.prefix is None else self._with_prefix(layer_idx, new)
        held, at = self.of(layer_idx), self.place
        for kept, x in zip(held, new, strict=True):
            kept[at.slots, at.positions] = x[:, :, 0]
        keys, values = (x[self.rows, : self.kept].transpose(1, 2) for x in held)
        return keys, values

    def put(self, layer: int, keys: Tensor, values: Tensor) -> None:
        assert self.packed is not None
        if layer not in self.held:
            room = (self.size, self.longest)
            self.held[layer] = (
                keys.new_zeros(*room, *keys.shape[1:]),
                values.new_zeros(*room, *values.shape[1:]),
            )
        for kept, x in zip(self.held[layer], (keys, values), strict=True):
            kept[self.packed] = x

    def _with_prefix(self, layer: int, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """`new` with the prefix in front of each document; it is put into the documents' rows."""
        assert self.prefix is not None
        prompt, places, rows = self.prefix
        learned = (prompt.keys[layer], prompt.values[layer])
        for kept, one in zip(self.held[layer], learned, strict=True):
            kept[rows, : prompt.tokens] = one.to(kept.dtype)
        keys, values = (in_front(x, one, places) for x, one in zip(new, learned, strict=True))
        return keys, values

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.held[layer]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def grow(self, size: int, longest: int) -> None:
        """Make room for `size` rows of `longest` tokens; cached tokens keep their places."""
        for layer, held in self.held.items():
            more = [x.new_zeros(size, longest, *x.shape[2:]) for x in held]
            for x, old in zip(more, held, strict=True):
                x[: self.size, : self.longest] = old
            self.held[layer] = (more[0], more[1])
        self.size, self.longest = size, longest

    def move(self, here: int, there: int) -> None:
        """Copy row `here` to row `there`."""
        for keys, values in self.held.values():
            keys[there], values[there] = keys[here], values[here]
