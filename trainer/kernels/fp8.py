"""The FP8 frozen base: one byte a parameter, both matrix products of LoRA training on the FP8
units.

The base never changes, so each weight is cast once, e4m3 with one scale per output row. Forward
multiplies it by activations cast per token. Backward needs dX = dY W, and W's scale sits on the
axis that is summed over: fold it into dY (multiply its columns), cast that per token, and reuse the
same FP8 bytes, transposed. Adapters, norms, attention, the head and all sums stay bf16 or fp32.
Error against bf16 on random data is about 0.037 of each product; the quality test in
docs/speed-log.md says what that costs.
"""

from __future__ import annotations

from copy import copy
from functools import cache
from typing import cast

import torch
from torch import Tensor

from trainer.kernels.backend import operations
from trainer.kernels.scratch import scratch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


@cache
def matmul_mode(device: torch.device) -> str:
    """How FP8 products run on ``device``, found by trying: ``rowwise`` (scaled inside the product;
    Hopper and newer), ``unscaled`` (FP8 product with unit scales, rows and columns scaled after it;
    Ada, 8.9), or ``dequantise`` (cards without FP8 units, CPUs: the memory is saved, not the
    time)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return "dequantise"
    a = torch.randn(32, 64, device=device).to(FP8)
    b = torch.randn(48, 64, device=device).to(FP8)
    s, z = torch.rand(32, device=device) + 0.5, torch.rand(48, device=device) + 0.5
    want = (a.float() * s[:, None]) @ (b.float() * z[:, None]).t()
    for mode in ("rowwise", "unscaled"):
        try:
            got = _product(a, s, b.t(), z, mode).float()
        except RuntimeError:
            continue  # this torch or card lacks the mode: try the next
        if (got - want).norm() < 0.02 * want.norm():
            return mode
    return "dequantise"


def _product(x: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor | None, mode: str) -> Tensor:
    """x FP8 [M, K] with scale [M]; w FP8 [K, N], column-major; w_scale [N] or None for ones -> bf16
    [M, N]."""
    if mode == "rowwise":
        columns = (
            w_scale[None] if w_scale is not None else torch.ones(1, w.shape[1], device=x.device)
        )
        return torch._scaled_mm(
            x, w, scale[:, None], columns, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    one = torch.ones((), device=x.device)
    y = torch._scaled_mm(x, w, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    y *= scale[:, None].to(y.dtype)
    return y if w_scale is None else y.mul_(w_scale.to(y.dtype))


class Fp8Weight:
    """See the module's docstring. ``w8`` [N, K] FP8, ``column_scale`` [N] fp32: W = column_scale[:,
    None] * w8."""

    def __init__(self, weight: Tensor, keep_transpose: bool = False) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.dtype = weight.dtype
        self.w8, self.column_scale, _ = operations(weight.device).quantise_rows(
            weight.contiguous(), None, None
        )
        self.mode = matmul_mode(weight.device)
        if any(side % 16 for side in self.shape):
            self.mode = "dequantise"  # the FP8 units take multiples of 16
        kept = keep_transpose and self.mode != "dequantise"
        self.w8_t: Tensor | None = (
            operations(self.w8.device).transpose_fp8(self.w8) if kept else None
        )
        self.ones = (
            torch.ones(self.shape[1], device=weight.device) if self.mode == "rowwise" else None
        )

    def forward(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """x FP8 [M, K], scale [M] -> [M, N]."""
        assert scale is not None
        if self.mode == "dequantise":
            return torch.mm(self._decode(x, scale), self.dense().t())
        return _product(x, scale, self.w8.t(), self.column_scale, self.mode)

    def backward(self, dy: Tensor, scale: Tensor | None) -> Tensor:
        """dy: FP8 of (the gradient times column_scale) [M, N], scale [M] -> [M, K]."""
        assert scale is not None
        if self.mode == "dequantise":
            return torch.mm(self._decode(dy, scale), self.w8.to(self.dtype))
        w8_t = (
            self.w8_t
            if self.w8_t is not None
            else operations(self.w8.device).transpose_fp8(self.w8)
        )
        return _product(dy, scale, w8_t.t(), self.ones, self.mode)

    def rows(self, start: int, stop: int) -> Fp8Weight:
        part = copy(self)
        part.w8, part.column_scale, part.w8_t = (
            self.w8[start:stop],
            self.column_scale[start:stop],
            None,
        )
        part.shape = (stop - start, self.shape[1])
        return part

    def blocks(self, count: int, chosen: Tensor) -> Fp8Weight:
        part = copy(self)
        bytes_of = self.w8.view(torch.uint8).view(count, -1)  # not every torch gathers FP8
        part.w8 = bytes_of[chosen].view(FP8).view(-1, self.shape[1])
        part.column_scale = self.column_scale.view(count, -1)[chosen].flatten()
        part.w8_t, part.shape = None, (len(part.w8), self.shape[1])
        return part

    def dense(self) -> Tensor:
        return cast(Tensor, self.w8.float() * self.column_scale[:, None]).to(self.dtype)

    def unpack(self) -> Tensor:
        out = scratch(self.w8.numel(), self.w8.device, self.dtype).view(self.shape)
        ops = operations(self.w8.device)
        return cast(Tensor, ops.dequantise_rows(self.w8, self.column_scale, out))

    def _decode(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x.float() * scale[:, None]).to(self.dtype)
