"""The order of the rows of q and k in a ChatGLM that was converted to Qwen2."""

from __future__ import annotations

import torch
from torch import Tensor

MARK = "chatglm_rows"  # in the config.json of a converted model: its rows are in our order


def row_order(size: int) -> Tensor:
    """Of one head of ``size`` rows: which old row each new row is. The turned pairs (2i, 2i+1) come
    to i and i + size/2, the pairs of the half that is not turned behind them.
    """
    pairs = torch.arange(size).reshape(2, size // 4, 2)  # turned or not, pair, which of the two
    return pairs.permute(2, 0, 1).reshape(size)


def reorder(rows: Tensor, order: Tensor) -> Tensor:
    """Weights (heads * d, in) or biases (heads * d) of q or k, each head's rows in ``order``."""
    heads: Tensor = rows.unflatten(0, (-1, len(order)))
    return heads[:, order].reshape(rows.shape)
