"""Which token comes next: the most likely one, or one drawn with counter-based noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.model.dropout import mix


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Temperature 0 takes the most likely token. Above 0, tokens are drawn
    from softmax(logits / temperature) with Gumbel noise keyed by `seed` and `step`."""

    temperature: float = 0.0
    seed: int = 0
    step: int = 0


def choose(
    logits: Tensor, sampling: Sampling, numbers: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """(token, its log-probability in fp32) of each row of logits (B, V); `numbers` and `positions`
    int64 (B,)."""
    scores = logits.float()
    if sampling.temperature > 0:
        scores = scores / sampling.temperature
    every = scores.log_softmax(-1)
    if sampling.temperature > 0:
        scores = every + gumbel(sampling, numbers, positions, every.shape[-1])
    chosen = scores.argmax(-1)
    return chosen, every.gather(1, chosen[:, None])[:, 0]


def gumbel(sampling: Sampling, numbers: Tensor, positions: Tensor, size: int) -> Tensor:
    """Gumbel noise (B, size), fp32, the same on every device."""
    row = mix(mix(mix(numbers + sampling.seed * 1_000_000_007) + sampling.step) + positions)
    return noise(row, size)


def noise(keys: Tensor, size: int) -> Tensor:
    """Gumbel noise (B, size), fp32, a function of int64 keys (B,), the same on every device."""
    token = torch.arange(size, device=keys.device)
    bits = mix(keys[:, None] ^ mix(token)[None]) >> 11 & ((1 << 53) - 1)
    uniform = (bits.double() + 0.5) / (1 << 53)
    return -torch.log(-torch.log(uniform)).float()
