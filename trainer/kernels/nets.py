"""Frozen parameters of a gated delta net, and the column order of gated attention, in the form that
kernels take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Net(NamedTuple):
    """Parameters of a gated delta net beside its linears. The columns of its joined projection [M,
    N] are q and k (``keys`` heads each), v and the gate z (``values`` heads each), and the logits
    of beta and of the decay (one per value head). Every head has D columns."""

    taps: Tensor  # [columns of q, k, v; W] of the convolution
    rate: Tensor  # fp32 [HV]: exp(A_log)
    shift: Tensor  # fp32 [HV]: dt_bias
    weight: Tensor  # [D] of the norm under the gate
    eps: float
    keys: int
    values: int
    head_dim: int

    @property
    def sizes(self) -> list[int]:
        """Columns of the joined projection: q, k and v together; z; beta; decay."""
        wide = self.values * self.head_dim
        return [self.mixed, wide, self.values, self.values]

    @property
    def mixed(self) -> int:
        """Number of columns that the convolution mixes: those of q, k and v."""
        return (2 * self.keys + self.values) * self.head_dim

    def parts(self, joined: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of a joined matrix: q, k and v together; z; beta's logits; the decay's logits."""
        qkv, z, b, a = joined.split(self.sizes, 1)
        return qkv, z, b, a


class ColumnOrder(NamedTuple):
    """Column order of a joined projection in which each query head is followed by its gate. The new
    order lets rotary embedding turn the two halves of a head, even where it turns only a part of
    the head. The int32 indices count runs of ``run`` columns: ``dense`` picks q, k, v; ``gate``
    picks the gate; ``back`` picks the joined matrix from dense and gate side by side."""

    dense: Tensor
    gate: Tensor
    back: Tensor
    turned: Tensor  # int64 [D]: the order of a head's columns in dense
    run: int

    @classmethod
    def of(
        cls, heads: int, kv_heads: int, head_dim: int, turned: float, like: Tensor
    ) -> ColumnOrder:
        half, angles = head_dim // 2, int(head_dim * turned) // 2
        rest = torch.arange(2 * angles, head_dim)
        low, high = rest.split([half - angles, half - angles])
        head = torch.cat([torch.arange(angles), low, torch.arange(angles, 2 * angles), high])
        wide = heads * head_dim
        pairs = torch.arange(heads)[:, None] * (2 * head_dim)
        keys = 2 * wide + torch.arange(kv_heads)[:, None] * head_dim
        values = 2 * wide + kv_heads * head_dim + torch.arange(kv_heads * head_dim)
        dense = torch.cat([(pairs + head).flatten(), (keys + head).flatten(), values])
        gate = (pairs + head_dim + torch.arange(head_dim)).flatten()
        back = torch.cat([dense, gate]).argsort()
        run = 4 if half % 4 == 0 and angles % 4 == 0 else 1
        ours = [(x[::run] // run).to(like.device, torch.int32) for x in (dense, gate, back)]
        return cls(ours[0], ours[1], ours[2], head.to(like.device), run)
