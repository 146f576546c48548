"""What the fused layer's RMSNorms multiply by."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """RMSNorm of the stream or of a branch: x / rms(x) times ``weight`` [K], which is fp32 where it
    stands for 1 + w."""

    weight: Tensor
    eps: float


class HeadNorms(NamedTuple):
    """RMSNorm of each head before rotary embedding: weights fp32 [3, D] of q, k and v. ``values``:
    v has one too."""

    weight: Tensor
    eps: float
    values: bool
