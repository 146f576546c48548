"""Where the document of each token begins and ends in a pack."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """For each token of a pack the first token of its document and the one after its last: int32
    [M] each."""

    first: Tensor
    past: Tensor


# of the latest pack, by window: all layers of a pass share them
_latest: dict[int | None, Spans] = {}
_latest_of: list[tuple[Tensor, int, int]] = []


def spans(cu: Tensor, tokens: int, window: int | None = None) -> Spans:
    """Spans of the boundaries ``cu`` int32 [documents + 1], the last of which is ``tokens``. A
    query sees itself and ``window - 1`` tokens before it. Does not wait for the GPU."""
    key = (cu, tokens, 0 if cu.is_inference() else cu._version)
    if not _latest_of or _latest_of[0][0] is not cu or _latest_of[0][1:] != key[1:]:
        _latest_of[:] = [key]
        _latest.clear()
    if window not in _latest:
        _latest[window] = _spans(cu, tokens, window)
    return _latest[window]


def _spans(cu: Tensor, tokens: int, window: int | None) -> Spans:
    at = torch.arange(tokens, device=cu.device, dtype=cu.dtype)
    document = torch.bucketize(at, cu[1:], right=True)
    first, past = cu[document], cu[document + 1]
    if window is None:
        return Spans(first, past)
    return Spans(torch.maximum(first, at - (window - 1)), torch.minimum(past, at + window))
