"""Start-up self-test: compares the fused layer on this GPU with its plain twin, on the first
layer's own weights. Takes about a second.

It compares the layer's output and every gradient with the same layer on
``trainer.kernels.reference``; then each part that both share with its own definition: attention,
the products with quantised weights, the loss rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trainer.kernels import attention, reference
from trainer.kernels.attention import Rules
from trainer.kernels.backend import distrust
from trainer.kernels.decoder_layer import FastLayer, Packed, run_layer
from trainer.kernels.lora import refresh
from trainer.kernels.nf4 import BLOCK, Nf4Weight
from trainer.kernels.parts import wide_angles
from trainer.kernels.shared_keys import gather, spread
from trainer.kernels.step_layer import CachePositions, by_flash, by_twin, step

log = logging.getLogger(__name__)
_unpacked: set[tuple[torch.device, str]] = set()  # what ``trust_unpacking`` has compared

# Relative errors. bf16 rounding gives 0.006; a value on the edge of an FP8 step may round either
# way, which gives 0.04. A wrong kernel gives 0.2 and more.
TOLERANCE = {"fp8": 0.1}
OTHERWISE = 0.03
# Against transformers' own layer, which in FP8 rounds in other places. A row of the families' table
# that was read wrongly gives 0.3 and more.
STOCK_TOLERANCE = {"fp8": 0.2}
NOISE = 3.0  # times the effect of rounding the input: up to this it is no error
TOKENS, ENDS = 160, [0, 50, 53, 160]
WINDOW = 20  # in place of the layer's own
STEPS, STEP_ROWS = [0, 5, 40, 63], [2, 0, 4, 1]  # cached tokens of each row; its slot of five
SHORT_ENDS = [0, 70, 71, 400]  # a document of several tiles, and three in one tile


def compile_ahead(kinds: list[FastLayer]) -> None:
    """Compile in parallel what the tests below and then the run will launch: one after the other
    takes 20 s."""
    ops, norm, like = kinds[0].ops, kinds[0].norm1, kinds[0].like
    h = torch.zeros(TOKENS, norm.weight.numel(), device=like.device, dtype=like.dtype)
    try:
        with ops.only_compiling():
            for fast in kinds:
                layer_error(fast)
                if (short := short_attention_inputs(fast)) is not None:
                    short_attention_error(*short)
            with ops.whole_tiles():  # the last norm, which no adapter follows
                rstd = ops.norm_forward(h, *norm, None, False)[-1]
                ops.norm_backward(h, None, None, None, h, norm.weight, rstd, None)
    # Triton's errors share no class; the launch will report what it was
    except Exception as why:
        log.info("the kernels were not compiled ahead: %s", why)


@torch.no_grad()
def layer_error(fast: FastLayer) -> float:
    """The largest relative error found, infinite when anything is not finite. Fills the adapters'
    buffers with random numbers, since a B of zeros would hide an error; ``refresh`` restores them
    before the next forward. The window is shortened so that documents reach it."""
    own, rules, results = fast.ops, fast.rules, []
    random, packed = _draw(fast)
    if rules.window is not None:
        fast.rules = replace(rules, window=WINDOW)
    h, dh = (random(TOKENS, fast.qkv.weight.shape[1]) for _ in range(2))
    with getattr(own, "whole_tiles", nullcontext)():  # the twin has no tiles
        for ops in (own, reference):
            fast.ops = ops
            y, kept = fast.forward(h, packed)
            dx, grads = fast.backward(dh, h, packed, kept, first=False)
            results.append([y, dx, *grads])
    fast.ops = own
    parts = [
        _largest(*results),
        _shared_attention_error(fast, random, packed),
        *(_product_error(group.weight, random) for group in fast.groups),
        _loss_error(own, random(8, 3008).float() * 3, fast.like.dtype),
    ]
    fast.rules = rules
    return max(parts) if all(part == part for part in parts) else float("inf")


def _draw(fast: FastLayer) -> tuple[Callable[..., Tensor], Packed]:
    """(a source of random numbers in the layer's dtype, a pack). Fills the adapters' buffers with
    such numbers."""
    device, dtype = fast.like.device, fast.like.dtype
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    for group in fast.groups:
        if group.a is not None and group.b is not None:
            group.a.copy_(random(*group.a.shape) * group.a.shape[1] ** -0.5)
            group.b.copy_(random(*group.b.shape) * 0.02)
    angle = (
        torch.rand(TOKENS, fast.head_dim // 2, device=device, generator=generator).repeat(1, 2) * 6
    )
    cu = torch.tensor(ENDS, dtype=torch.int32, device=device)
    return random, Packed(angle.cos().to(dtype), angle.sin().to(dtype), cu, ENDS[3] - ENDS[2])


@torch.no_grad()
def step_error(fast: FastLayer) -> float:
    """The largest relative error of a decoding step against the twin: of its output and of the keys
    and values that it writes. Fills the adapters' buffers with random numbers."""
    random, packed = _draw(fast)
    own, rules, results = fast.ops, fast.rules, []
    if rules.window is not None:
        fast.rules = replace(rules, window=WINDOW)
    h, rows = random(len(STEPS), fast.qkv.weight.shape[1]), len(STEPS) + 1
    held = [random(rows, 64, fast.kv_heads, fast.head_dim) for _ in range(2)]
    slots, positions = torch.tensor([STEP_ROWS, STEPS], device=h.device)
    place = CachePositions.of(slots, positions, 64)
    for group in fast.groups:
        group.widen()
    for ops, attend in ((own, by_flash), (reference, by_twin)):
        fast.ops, kept = ops, (held[0].clone(), held[1].clone())
        cos, sin = packed.cos[: len(STEPS)], packed.sin[: len(STEPS)]
        results.append([step(fast, h, cos, sin, place, kept, attend), *kept])
    fast.ops, fast.rules = own, rules
    return _largest(*results)


def stock_error(layer: Any, fast: FastLayer) -> float:
    """The largest relative error of output and input gradient against the transformers layer that
    ``fast`` was built from, with its adapters as they are, on documents shorter than any window;
    for a layer with experts, of the half before them. It tests whether the family's row was read
    rightly; ``layer_error`` tests whether the kernels compute it. An error counts less where the
    transformers layer itself changes much when its input is rounded, as with sharp attention."""
    random, packed = _draw(fast)
    refresh(fast.groups)
    half = int(fast.head_dim * fast.turned) // 2
    few = [x[:, :half] for x in (packed.cos, packed.sin)]
    cos, sin = wide_angles(few[0], few[1], fast.head_dim, fast.turned)
    if not half_wide(layer):
        few = [torch.cat([x, x], 1) for x in few]
    packed = Packed(cos, sin, packed.cu, packed.longest)
    # a small stream, so that what the branches add to it is most of the output
    h, dh = random(TOKENS, fast.qkv.weight.shape[1]) * 0.05, random(TOKENS, fast.norm1[0].numel())
    said = {"cu_seq_lens": packed.cu, "max_length": packed.longest}
    given: dict[str, Any] = {f"{k}_{end}": v for k, v in said.items() for end in "qk"}
    given |= {"position_embeddings": tuple(c[None] for c in few), "attention_mask": None}
    after, fast.after = fast.after, None

    def stock(x: Tensor) -> Tensor:
        if not fast.attends:  # it ignores boundaries: each document by itself
            parts = (one(part, {}) for part in x.split([b - a for a, b in pairwise(ENDS)]))
            return torch.cat(list(parts))
        return one(x, given)

    def one(x: Tensor, given: dict[str, Any]) -> Tensor:
        if after is None:
            asked = given or {"position_embeddings": None, "attention_mask": None}
            return layer(x[None], **asked)[0]  # type: ignore[no-any-return]
        # rounding may change a router's choice, which would hide or fake an error
        mixer = getattr(layer, "linear_attn", None) or layer.self_attn
        found = mixer(hidden_states=layer.input_layernorm(x[None]), **given)
        y: Tensor = found[0] if isinstance(found, tuple) else found
        return x + y[0]

    def both(run: Callable[[Tensor], Tensor], at: Tensor) -> list[Tensor | None]:
        x = at.clone().requires_grad_()
        y = run(x)
        y.backward(dh)
        return [y.detach(), x.grad]

    results = [both(partial(run_layer, fast, packed=packed), h), both(stock, h)]
    rounded = h * (1 + random(*h.shape) * torch.finfo(h.dtype).eps / 4)
    noise = _largest(both(stock, rounded), results[1])
    fast.after = after
    for p in fast.parameters:
        p.grad = None
    return _largest(*results) / max(1.0, NOISE * noise / OTHERWISE)


def half_wide(layer: Any) -> bool:
    """Whether the family's angles come once, not twice side by side."""
    config = getattr(getattr(layer, "self_attn", None), "config", None)
    return getattr(config, "model_type", "") == "gpt_oss"


def trust_short_attention(fast: FastLayer) -> bool:
    """Whether attention for short documents agrees with its twin on this GPU, on the first layer's
    heads. Where not, it is disabled for this process. False also on devices that it does not
    support."""
    if (asked := short_attention_inputs(fast)) is None:
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


def short_attention_inputs(fast: FastLayer) -> tuple[Any, ...] | None:
    """Arguments of `short_attention_error` for the first layer's heads; None where these kernels do
    not support this device."""
    device, dtype = fast.like.device, fast.like.dtype
    if not fast.attends:
        return None
    group = (fast.heads, fast.kv_heads, fast.kv_heads)
    generator = torch.Generator(device).manual_seed(1)
    m, d = SHORT_ENDS[-1], fast.head_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    q, k, v = (
        x.unflatten(1, (-1, d)) for x in random(m, sum(group) * d).split([n * d for n in group], 1)
    )
    short = attention.short_kernels(q, k, v, m, fast.rules)
    if short is None:
        return None
    angle = torch.rand(m, d // 2, device=device, generator=generator).repeat(1, 2) * 6
    cu = torch.tensor(SHORT_ENDS, dtype=torch.int32, device=device)
    packed = Packed(angle.cos().to(dtype), angle.sin().to(dtype), cu, m)
    rules = fast.rules
    if rules.window is not None:
        rules = replace(rules, window=WINDOW)
    turned = fast.head_norms is None  # else the norm's kernel undoes the rotation
    return (short, q, k, v, random(*q.shape), packed, rules, fast.sinks, fast.pairs, turned)


def short_attention_error(
    short: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    packed: Packed,
    rules: Rules,
    sinks: Tensor | None = None,
    pairs: bool = False,
    turned: bool = True,
) -> float:
    """The largest relative error of the output and of the joined gradients against
    ``trainer.kernels.reference``. ``turned``: backward also undoes rotary embedding. ``packed`` may
    have keys that documents share."""
    spans, shared = short.spans(packed.cu, len(q), rules.window), packed.shared
    out, kept = short.forward(q, k, v, spans.first, rules.scale, rules.softcap, sinks, packed.reads)
    angles = (packed.cos, packed.sin) if turned else (None, None)
    more = (spans, rules.scale, *angles, pairs, rules.softcap, packed.reads)
    got = short.backward(dout, q, k, v, out, *kept, *more)
    if shared is not None:
        k, v = spread(k, shared), spread(v, shared)
    near = (packed.cu, rules, sinks, packed.ends)
    want, _ = attention.eager_forward(q, k, v, *near)
    grads = attention.eager_backward(dout, q, k, v, *near)
    if shared is not None:
        grads = (grads[0], gather(grads[1], shared), gather(grads[2], shared))
    joined = torch.cat([x.flatten(1) for x in grads], 1)
    if turned:
        joined = reference.rope_backward(*grads, packed.cos, packed.sin, None, None, pairs)[0]
    sizes = [x[0].numel() for x in grads]
    return _largest([out, *got.split(sizes, 1)], [want, *joined.split(sizes, 1)])


def _largest(got: Iterable[Any], want: Iterable[Any]) -> float:
    """The largest relative error of pairs of tensors; NaN stays NaN."""
    errors = [
        float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-6))
        for a, b in zip(got, want, strict=True)
        if b is not None
    ]
    return max(errors) if all(e == e for e in errors) else float("nan")


def _shared_attention_error(
    fast: FastLayer, random: Callable[..., Tensor], packed: Packed
) -> float:
    """Error of attention, which both sides of ``layer_error`` share, against its definition."""
    if not fast.attends:
        return 0.0
    sizes = (fast.heads, fast.kv_heads, fast.kv_heads)
    q, k, v = (random(TOKENS, n, fast.head_dim) for n in sizes)
    return _attention_error(q, k, v, random(*q.shape), packed, fast.rules, fast.sinks)


def _attention_error(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    packed: Packed,
    rules: Rules,
    sinks: Tensor | None,
) -> float:
    more = (rules, sinks)
    out, kept = attention.flash_forward(q, k, v, packed.cu, packed.longest, *more)
    got = attention.flash_backward(dout, q, k, v, out, kept, packed.cu, packed.longest, *more)
    want, _ = attention.eager_forward(q, k, v, packed.cu, *more)
    return _largest([out, *got], [want, *attention.eager_backward(dout, q, k, v, packed.cu, *more)])


def _product_error(weight: Any, random: Any) -> float:
    """Error of both products of a frozen weight against plain ones with the weight that torch
    itself decodes."""
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
    dense = _decoded(weight)
    return _largest(
        [weight.forward(x, None), weight.backward(dy, None)],
        [x.float() @ dense.float().t(), dy.float() @ dense.float()],
    )


def _decoded(weight: Any) -> Tensor:
    """A frozen weight as torch itself decodes it."""
    if not isinstance(weight, Nf4Weight):
        dense: Tensor = weight.dense()
        return dense
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.packed.device)
    return reference.dequantise_nf4(weight.packed, weight.absmax, weight.codebook, out, BLOCK)


def trust_unpacking(weight: Any, device: torch.device, precision: str) -> None:
    """Compares the first and the last rows of a quantised weight, unpacked whole on this device,
    with what torch decodes; where they differ, or the kernel does not run, plain torch does the
    work of this process. Once for each device and precision."""
    if (asked := (device, precision)) in _unpacked:
        return
    _unpacked.add(asked)
    n = weight.shape[0]
    few = min(TOKENS, n)
    try:
        whole = weight.unpack()
        error = _largest(
            [whole[:few].clone(), whole[n - few :].clone()],
            [_decoded(weight.rows(0, few)), _decoded(weight.rows(n - few, n))],
        )
    # a card that lacks the memory or the instructions: Triton's errors share no class
    except Exception as why:
        distrust(f"{precision} weights are not unpacked here ({type(why).__name__}: {why})")
        return
    if not error < OTHERWISE:
        distrust(f"the self-test of unpacking {precision} is off by {error:.4f}")


def _loss_error(ops: ModuleType, logits: Tensor, dtype: torch.dtype) -> float:
    targets = torch.arange(len(logits), device=logits.device) * 300
    everywhere = targets.clone()
    targets[3] = -100
    return _largest(
        [
            *ops.cross_entropy_rows(logits, targets, dtype),
            *ops.log_prob_rows(logits, everywhere),
        ],
        [
            *reference.cross_entropy_rows(logits, targets, dtype),
            *reference.log_prob_rows(logits, everywhere),
        ],
    )
