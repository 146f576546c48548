"""One buffer of a process, into which quantised weights are unpacked for their products."""

from __future__ import annotations

import torch
from torch import Tensor

_scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def scratch(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A buffer of at least n elements that the next call overwrites. Products on one stream use it
    in turn."""
    kept = _scratch.get((device, dtype))
    if kept is None or kept.numel() < n:
        with torch.inference_mode(False):  # a later pass may be one of training
            kept = _scratch[device, dtype] = torch.empty(n, device=device, dtype=dtype)
    return kept[:n]


def release_scratch() -> None:
    """Give the buffers back, for measurements of memory."""
    _scratch.clear()
