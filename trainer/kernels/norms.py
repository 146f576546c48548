"""Parameters of the fused layer's RMSNorms."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """RMSNorm of the stream or of a branch: x / rms(x) times ``weight`` [K], which is fp32 where it
    is 1 + w."""

    weight: Tensor
    eps: float


class HeadNorms(NamedTuple):
    """RMSNorm of each head before rotary embedding: weights fp32 [3, D] of q, k and v. ``values``:
    v is normed too."""

    weight: Tensor
    eps: float
    values: bool
