"""Learned prompts as the prediction counts them."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.memory.shape import Shape
from trainer.wire.prompts import PREFIXES, PROMPT_METHODS, PromptLearning


@dataclass(frozen=True)
class Learned:
    """A learned prompt: `tokens` places in front of each row, made by a network that is `width`
    wide (None: as wide as the prompt)."""

    method: str
    tokens: int
    width: int | None = None
    lstm: bool = False

    @classmethod
    def of(cls, method: str, settings: PromptLearning) -> Learned | None:
        """Of a job's training.method and [prompt_learning]; None for other methods."""
        if method not in PROMPT_METHODS:
            return None
        lstm = settings.encoder_reparameterization_type == "LSTM"
        return cls(method, settings.num_virtual_tokens, settings.encoder_hidden_size, lstm)

    def parameters(self, shape: Shape) -> int:
        """Values that are trained."""
        h, kv, layers = shape.hidden, shape.kv_size, shape.layers
        if self.method == "prompt_tuning":
            return self.tokens * h
        if self.method == "p_tuning_v2":
            return self.tokens * 2 * layers * kv
        if self.method == "prefix_tuning":
            e, made = self.width or kv, 2 * layers * kv
            return self.tokens * kv + (kv + 1) * e + (e + 1) * made
        e = self.width or h
        if not self.lstm:
            return self.tokens * h + (h + 1) * e + (e + 1) * e + (e + 1) * h
        # two layers, both ways, each with four gates of two biases; then two linears
        gates = 2 * 4 * e * (h + e + 2) + 2 * 4 * e * (3 * e + 2)
        return self.tokens * h + gates + (2 * e + 1) * 2 * e + (2 * e + 1) * h

    def kept(self, shape: Shape, element: int) -> int:
        """Bytes that a layer keeps of each token beside what it keeps without: of a prefix, keys
        and values joined with it, and a copy of each for every head of queries."""
        if self.method not in PREFIXES:
            return 0
        return 2 * element * (shape.q_size + shape.kv_size)
