"""The NF4 frozen base: half a byte a parameter plus a scale for every 64 (QLoRA, arXiv 2305.14314,
section 3).

The packed form is bitsandbytes' own (blocks of 64 in row order, high nibble first, fp32 absmax),
made and read here without it, so that the fast path has no compiled extension; a test compares the
two. A product first writes the weight in the compute dtype into a scratch buffer, one for the
process, and multiplies by that: at 8k tokens the copy costs a few percent of the product.
"""

from __future__ import annotations

from copy import copy
from typing import cast

import torch
from torch import Tensor

from trainer.kernels.backend import operations
from trainer.kernels.scratch import scratch

BLOCK = 64
# The 16 quantiles of a normal distribution, scaled to [-1, 1], with an exact zero: the paper's
# appendix E.
CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def quantise_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K], K a multiple of 64 -> packed uint8 [N K / 2], absmax fp32 [N K / 64]. Rows are taken
    in slabs to keep the peak low."""
    codebook = torch.tensor(CODEBOOK, device=weight.device)
    middles = (codebook[1:] + codebook[:-1]) / 2
    packed, scales = [], []
    for slab in weight.split(1024):
        blocks = slab.float().reshape(-1, BLOCK)
        absmax = blocks.abs().amax(-1)
        index = (
            torch.bucketize(blocks / absmax.clamp_min(1e-30)[:, None], middles)
            .to(torch.uint8)
            .view(-1, 2)
        )
        packed.append(index[:, 0] << 4 | index[:, 1])
        scales.append(absmax)
    return torch.cat(packed), torch.cat(scales)


class Nf4Weight:
    """W [N, K] in NF4. Products run in the dtype that the weight had."""

    column_scale: Tensor | None = None

    def __init__(self, weight: Tensor) -> None:
        if weight.shape[1] % BLOCK:
            raise ValueError(
                f"NF4 takes rows in blocks of {BLOCK}, this weight has {weight.shape[1]} "
                "columns: use precision bf16 or fp8"
            )
        self.shape = (weight.shape[0], weight.shape[1])
        self.dtype = weight.dtype
        self.packed, self.absmax = quantise_nf4(weight)
        self.codebook = torch.tensor(CODEBOOK, device=weight.device)

    def unpack(self) -> Tensor:
        out = scratch(self.shape[0] * self.shape[1], self.packed.device, self.dtype).view(
            self.shape
        )
        ops = operations(self.packed.device)
        return cast(Tensor, ops.dequantise_nf4(self.packed, self.absmax, self.codebook, out, BLOCK))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return torch.mm(x, self.unpack().t())

    def backward(self, dy: Tensor, scale: Tensor | None = None) -> Tensor:
        return torch.mm(dy, self.unpack())

    def rows(self, start: int, stop: int) -> Nf4Weight:
        part, k = copy(self), self.shape[1]
        part.packed, part.absmax = (
            self.packed[start * k // 2 : stop * k // 2],
            self.absmax[start * k // BLOCK : stop * k // BLOCK],
        )
        part.shape = (stop - start, k)
        return part

    def blocks(self, count: int, chosen: Tensor) -> Nf4Weight:
        part, (n, k) = copy(self), self.shape
        part.packed = self.packed.view(count, -1)[chosen].flatten()
        part.absmax = self.absmax.view(count, -1)[chosen].flatten()
        part.shape = (len(chosen) * n // count, k)
        return part

    def dense(self) -> Tensor:
        return self.unpack().clone()
