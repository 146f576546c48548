"""Does this GPU compute what the plain twins compute? Asked once, at start, of the first layer's
own weights. Takes about a second.

The fused layer's output and every gradient against the same layer on ``trainer.kernels.reference``;
then the parts that both share, each against its own definition: attention, the products with
quantised weights, the loss rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trainer.kernels import attention, reference
from trainer.kernels.decoder_layer import FastLayer, Packed
from trainer.kernels.nf4 import BLOCK, Nf4Weight

log = logging.getLogger(__name__)

# Relative errors. bf16 rounding gives 0.006; where a value falls on the edge of an FP8 step the two
# may round apart, which gives 0.04. A wrong kernel gives 0.2 and more.
TOLERANCE = {"fp8": 0.1}
OTHERWISE = 0.03
TOKENS, ENDS = 160, [0, 50, 53, 160]
SHORT_ENDS = [0, 70, 71, 400]  # a document of several tiles, and three in one tile


def compile_ahead(fast: FastLayer) -> None:
    """Compiles, many at a time, what the tests below and then the run will launch: one after the
    other takes 20 s where nothing is compiled."""
    width = fast.norm1.numel()
    h = torch.zeros(TOKENS, width, device=fast.norm1.device, dtype=fast.norm1.dtype)
    try:
        with fast.ops.only_compiling():
            layer_error(fast)
            if (short := _short_attention(fast)) is not None:
                short_attention_error(*short)
            with fast.ops.whole_tiles():  # the last norm, which no adapter follows
                rstd = fast.ops.norm_forward(h, fast.norm1, fast.eps1, None, False)[-1]
                fast.ops.norm_backward(h, None, None, None, h, fast.norm1, rstd, None)
    # Triton's errors share no class; what it was will be told where it is launched
    except Exception as why:
        log.info("the kernels were not compiled ahead: %s", why)


@torch.no_grad()
def layer_error(fast: FastLayer) -> float:
    """The largest relative error found, infinite when anything is not finite. Fills the adapters'
    buffers with random numbers, since a B of zeros would hide an error; ``refresh`` puts the true
    values back before the next forward."""
    device, dtype, width = fast.norm1.device, fast.norm1.dtype, fast.qkv.weight.shape[1]
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    for group in fast.groups:
        if group.a is not None and group.b is not None:
            group.a.copy_(random(*group.a.shape) * group.a.shape[1] ** -0.5)
            group.b.copy_(random(*group.b.shape) * 0.02)
    h, dh = random(TOKENS, width), random(TOKENS, width)
    angle = (
        torch.rand(TOKENS, fast.head_dim // 2, device=device, generator=generator).repeat(1, 2) * 6
    )
    cu = torch.tensor(ENDS, dtype=torch.int32, device=device)
    packed = Packed(angle.cos().to(dtype), angle.sin().to(dtype), cu, ENDS[3] - ENDS[2])
    own, results = fast.ops, []
    with getattr(own, "whole_tiles", nullcontext)():  # the twin has no tiles
        for ops in (own, reference):
            fast.ops = ops
            y, kept = fast.forward(h, packed)
            dx, grads = fast.backward(dh, h, packed, kept, first=False)
            results.append([y, dx, *grads])
    fast.ops = own
    q, k, v = (random(TOKENS, n, fast.head_dim) for n in (fast.heads, fast.kv_heads, fast.kv_heads))
    parts = [
        _largest(*results),
        _attention_error(q, k, v, random(*q.shape), packed, fast.scale),
        *(_product_error(group.weight, random) for group in fast.groups),
        _loss_error(own, random(8, 3008).float() * 3, dtype),
    ]
    return max(parts) if all(part == part for part in parts) else float("inf")


def trust_short_attention(fast: FastLayer) -> bool:
    """Whether attention for short documents computes on this GPU what its twin does, on the first
    layer's heads. Where not, it is refused for this process. False as well where it is not for this
    device."""
    if (asked := _short_attention(fast)) is None:
        return False
    try:
        error = short_attention_error(*asked)
    # a card that lacks the memory or the instructions: Triton's errors share no class
    except Exception as why:
        attention.validate_lengths(f"it does not run here ({type(why).__name__}: {why})")
        return False
    if not error < OTHERWISE:
        attention.validate_lengths(f"its self-test is off by {error:.4f}")
    return error < OTHERWISE


def _short_attention(
    fast: FastLayer,
) -> tuple[Any, Tensor, Tensor, Tensor, Tensor, Packed, float] | None:
    """What `short_attention_error` is asked about the first layer's heads; None where these kernels
    are not for this device."""
    device, dtype, group = (
        fast.norm1.device,
        fast.norm1.dtype,
        (fast.heads, fast.kv_heads, fast.kv_heads),
    )
    generator = torch.Generator(device).manual_seed(1)
    m, d = SHORT_ENDS[-1], fast.head_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    q, k, v = (
        x.unflatten(1, (-1, d)) for x in random(m, sum(group) * d).split([n * d for n in group], 1)
    )
    short = attention.short_kernels(q, k, v, m)
    if short is None:
        return None
    angle = torch.rand(m, d // 2, device=device, generator=generator).repeat(1, 2) * 6
    cu = torch.tensor(SHORT_ENDS, dtype=torch.int32, device=device)
    return (
        short,
        q,
        k,
        v,
        random(*q.shape),
        Packed(angle.cos().to(dtype), angle.sin().to(dtype), cu, m),
        fast.scale,
    )


def short_attention_error(
    short: Any, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, packed: Packed, scale: float
) -> float:
    """The largest relative error of the output and of the joined gradients, turned back by the
    angles, against ``trainer.kernels.reference``."""
    spans = short.spans(packed.cu, len(q))
    out, kept = short.forward(q, k, v, spans.first, scale)
    got = short.backward(dout, q, k, v, out, *kept, spans, scale, packed.cos, packed.sin)
    want, _ = attention.eager_forward(q, k, v, packed.cu, scale)
    grads = attention.eager_backward(dout, q, k, v, packed.cu, scale)
    turned = reference.rope_backward(*grads, packed.cos, packed.sin, None, None)[0]
    return _largest(
        [out, *got.split([x[0].numel() for x in grads], 1)],
        [want, *turned.split([x[0].numel() for x in grads], 1)],
    )


def _largest(got: Iterable[Any], want: Iterable[Any]) -> float:
    """The largest relative error of pairs of tensors; NaN stays NaN."""
    errors = [
        float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-6))
        for a, b in zip(got, want, strict=True)
        if b is not None
    ]
    return max(errors) if all(e == e for e in errors) else float("nan")


def _attention_error(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, packed: Packed, scale: float
) -> float:
    out, kept = attention.flash_forward(q, k, v, packed.cu, packed.longest, scale)
    got = attention.flash_backward(dout, q, k, v, out, kept, packed.cu, packed.longest, scale)
    want, _ = attention.eager_forward(q, k, v, packed.cu, scale)
    return _largest([out, *got], [want, *attention.eager_backward(dout, q, k, v, packed.cu, scale)])


def _product_error(weight: Any, random: Any) -> float:
    """Both products of a frozen weight against plain ones with the weight that torch itself
    decodes."""
    n, k = weight.shape
    x, dy = random(TOKENS, k), random(TOKENS, n)
    if weight.column_scale is not None:
        x8, x_scale, _ = reference.quantise_rows(x, None, None)
        d8, d_scale, _ = reference.quantise_rows(dy, weight.column_scale, None)
        want = [
            (x8.float() * x_scale[:, None]) @ weight.dense().float().t(),
            (d8.float() * d_scale[:, None]) @ weight.w8.float(),
        ]
        return _largest([weight.forward(x8, x_scale), weight.backward(d8, d_scale)], want)
    dense = weight.dense()
    if isinstance(weight, Nf4Weight):
        dense = reference.dequantise_nf4(
            weight.packed, weight.absmax, weight.codebook, torch.empty_like(dense), BLOCK
        )
    return _largest(
        [weight.forward(x, None), weight.backward(dy, None)],
        [x.float() @ dense.float().t(), dy.float() @ dense.float()],
    )


def _loss_error(ops: ModuleType, logits: Tensor, dtype: torch.dtype) -> float:
    targets = torch.arange(len(logits), device=logits.device) * 300
    targets[3] = -100
    return _largest(
        ops.cross_entropy_rows(logits, targets, dtype),
        reference.cross_entropy_rows(logits, targets, dtype),
    )
