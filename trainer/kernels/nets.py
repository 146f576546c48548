"""The frozen parts of a gated delta net and of attention with a gate, as kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Net(NamedTuple):
    """What a gated delta net has beside its linears. Its joined projection [M, N] holds the columns
    of q and k (``keys`` heads each) and v (``values`` heads), of the gate z (as v), of beta's and
    of the decay's logits (one a value head). Every head has D columns."""

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
        """Columns of the joined projection: of q, k, v; z; beta; decay."""
        wide = self.values * self.head_dim
        return [self.mixed, wide, self.values, self.values]

    @property
    def mixed(self) -> int:
        """Columns that the convolution mixes."""
        return (2 * self.keys + self.values) * self.head_dim

    def parts(self, joined: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of a joined matrix: q k v, z, beta's logits, the decay's."""
        qkv, z, b, a = joined.split(self.sizes, 1)
        return qkv, z, b, a


class ColumnOrder(NamedTuple):
    """Where the columns of q, k, v and of attention's gate stand in a joined projection whose
    queries have a gate beside each head, so that rotary embedding turns halves of a head, whatever
    part of it turns: int32 ``dense`` for q, k, v, ``gate``, and ``back`` for the joined matrix of
    dense and gate side by side. They count runs of ``run`` columns."""

    dense: Tensor
    gate: Tensor
    back: Tensor
    turned: Tensor  # int64 [D]: a head's columns, as dense has them
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
