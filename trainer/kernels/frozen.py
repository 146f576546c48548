"""Frozen weights, each in the form of its precision. ``trainer/kernels/fp8.py`` and
``trainer/kernels/nf4.py`` hold the quantised forms."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from trainer.kernels.fp8 import Fp8Weight
from trainer.kernels.nf4 import Nf4Weight


class FrozenWeight(Protocol):
    """W [N, K]. ``column_scale`` [N] is not None exactly when both products take FP8 input with row
    scales: forward takes ``quantise_rows(x)``, backward takes ``quantise_rows(dy *
    column_scale)``."""

    shape: tuple[int, int]
    column_scale: Tensor | None

    def forward(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """x [M, K] -> x W^T [M, N]."""
        ...

    def backward(self, dy: Tensor, scale: Tensor | None) -> Tensor:
        """dy [M, N] -> dy W [M, K]."""
        ...

    def rows(self, start: int, stop: int) -> FrozenWeight:
        """W[start:stop], sharing this one's storage."""
        ...

    def blocks(self, count: int, chosen: Tensor) -> FrozenWeight:
        """Of ``count`` blocks of equally many rows those that ``chosen`` int64 [C] names, one
        behind the other, copied."""
        ...

    def dense(self) -> Tensor:
        """W [N, K] in the compute dtype; a new tensor unless it is stored in that form."""
        ...

    def unpack(self) -> Tensor:
        """W [N, K] in the compute dtype, of a quantised weight in the scratch, which the next one
        overwrites."""
        ...


class DenseWeight:
    """As loaded: bf16 on a GPU, fp32 in tests."""

    column_scale: Tensor | None = None

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.shape = (weight.shape[0], weight.shape[1])

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return torch.mm(x, self.weight.t())

    def backward(self, dy: Tensor, scale: Tensor | None = None) -> Tensor:
        return torch.mm(dy, self.weight)

    def rows(self, start: int, stop: int) -> DenseWeight:
        return DenseWeight(self.weight[start:stop])

    def blocks(self, count: int, chosen: Tensor) -> DenseWeight:
        return DenseWeight(self.weight.unflatten(0, (count, -1))[chosen].flatten(0, 1))

    def dense(self) -> Tensor:
        return self.weight

    def unpack(self) -> Tensor:
        return self.weight


def freeze_weight(weight: Tensor, precision: str, **options: bool) -> FrozenWeight:
    """``weight [N, K]`` on its final device -> its frozen form. fp32 and bf16 keep the tensor; fp8
    and nf4 quantise it, and the original may be freed.

    ``keep_transpose`` (fp8 only) also stores the transposed copy that backward reads: one byte a
    parameter more, a few ms a pass less."""
    if precision == "fp8":
        return Fp8Weight(weight, **options)
    if precision == "nf4":
        return Nf4Weight(weight)
    return DenseWeight(weight)
