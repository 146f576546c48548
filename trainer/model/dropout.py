"""Dropout whose mask is a function of (seed, layer, step, row, position, feature), not of a
generator's state.

So the same row meets the same mask on one process or eight, alone or packed, resumed or not, and
when a layer is recomputed. A 64-bit mix (after splitmix64, public domain) in wrapping integer
arithmetic, the same on CPU and GPU.
"""

from __future__ import annotations

import torch

from trainer.kernels.rotary import document_lengths

_NOISE = 7_000_003  # differs from the number of every dropout layer
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1, _MIX_2 = -4658895280553007687, -7723592293110705685


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of signed 64-bit numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser, elementwise on int64."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


class KeyedDropout(torch.nn.Module):
    """Takes the place of PEFT's lora_dropout. `keys` is shared by all of them: int64 of the shape
    of the batch, one number a token."""

    def __init__(self, p: float, layer: int, keys: TokenKeys) -> None:
        super().__init__()
        self.p, self._layer, self._keys = p, layer, keys

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self._keys.value is None:
            return x
        token = mix(self._keys.value + self._layer * 1_000_003)  # (B, T)
        feature = torch.arange(x.shape[-1], device=x.device)  # (H,)
        bits = mix(token.unsqueeze(-1) ^ (feature * _GOLDEN))  # (B, T, H)
        keep = _shift(bits, 40) >= int(self.p * (1 << 24))
        return torch.where(
            keep, x / (1.0 - self.p), torch.zeros((), dtype=x.dtype, device=x.device)
        )


class KeyedNoise:
    """NEFTune: noise on the embeddings of training, uniform in +-alpha / sqrt(L d), L the tokens of
    the row and d their width. Called as a forward hook of the embedding; keyed as KeyedDropout."""

    def __init__(self, alpha: float, keys: TokenKeys) -> None:
        self.alpha, self._keys = alpha, keys

    def __call__(self, module: torch.nn.Module, _given: object, made: torch.Tensor) -> torch.Tensor:
        keys, lengths = self._keys.value, self._keys.lengths
        if not module.training or keys is None or lengths is None:
            return made
        feature = torch.arange(made.shape[-1], device=made.device)
        bits = mix(mix(keys + _NOISE).unsqueeze(-1) ^ (feature * _GOLDEN))  # (B, T, H)
        uniform = _shift(bits, 40).float() / (1 << 23) - 1.0
        size = self.alpha / (lengths.float() * made.shape[-1]).sqrt()
        return made + (uniform * size.unsqueeze(-1)).to(made.dtype)


class TokenKeys:
    """The key of every token in the micro-batch under way; set by the loop before the forward
    pass."""

    value: torch.Tensor | None = None
    lengths: torch.Tensor | None = None  # of each token's row, in tokens

    def set(self, seed: int, step: int, rows: torch.Tensor, positions: torch.Tensor) -> None:
        """`rows` and `positions`: int64 of the shape of input_ids; the global row number and the
        place in that row of each token."""
        self.value = mix(mix(mix(rows + seed * 1_000_000_007) + step) + positions)
        self.lengths = document_lengths(positions)
