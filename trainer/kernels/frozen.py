"""A weight that never changes, in the form that its precision wants. ``trainer/kernels/fp8.py`` and
``trainer/kernels/nf4.py`` hold the other two."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from trainer.kernels import reference

log = logging.getLogger(__name__)
_without_triton: list[str] = []  # why, once it is known


def operations(device: torch.device) -> ModuleType:
    """``trainer.kernels`` where it can run, else its twin ``trainer.kernels.reference``: on CPUs,
    without Triton, or after ``distrust``."""
    if device.type != "cuda" or _without_triton:
        return reference
    try:
        from trainer.kernels import triton_ops
    except ImportError as why:
        distrust(f"Triton is not usable: {why}")
        return reference
    return triton_ops


def distrust(why: str) -> None:
    """From now on plain torch does the kernels' work in this process; says so in the log."""
    _without_triton.append(why)
    log.warning("%s; plain torch does its work", why)


class FrozenWeight(Protocol):
    """W [N, K]. ``column_scale`` [N] is not None exactly when both products want their input in FP8
    with row scales: forward takes ``quantise_rows(x)``, backward takes
    ``quantise_rows(dy * column_scale)``."""

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

    def dense(self) -> Tensor:
        """W as the trainer sees it, [N, K] in the compute dtype; a new tensor unless it is stored
        so."""
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

    def dense(self) -> Tensor:
        return self.weight


def freeze_weight(weight: Tensor, precision: str, **options: bool) -> FrozenWeight:
    """``weight [N, K]`` on its final device -> its frozen form. fp32, bf16: kept; fp8, nf4:
    quantised, the original may be freed.

    ``keep_transpose`` (fp8 only) stores the transposed copy that backward wants: one byte a
    parameter more, a few ms a pass less."""
    if precision == "fp8":
        from trainer.kernels.fp8 import Fp8Weight

        return Fp8Weight(weight, **options)
    if precision == "nf4":
        from trainer.kernels.nf4 import Nf4Weight

        return Nf4Weight(weight)
    return DenseWeight(weight)
