"""The plain torch twins of ``trainer/kernels/triton_ops.py``: same names, arguments and results, on
any device and in any float type.

They define what the kernels must compute. The start-up self-test compares the two on the GPU at
hand, and the CPU runs these.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu

from trainer.kernels import delta_reference
from trainer.kernels.norms import HeadNorms

SLAB = 1 << 22  # values that NF4 decodes at once, to keep the peak low
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0

delta = delta_reference  # the twins of ``trainer/kernels/delta_ops.py``


def _lora(t: Tensor, b: Tensor) -> Tensor:
    return t.float() @ b.float().t()


def _cast(x: Tensor, column_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """FP8 copy of ``x * column_scale`` and its row scales."""
    v = x.float() if column_scale is None else x.float() * column_scale
    scale = _row_scale(v)
    return (v / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def _row_scale(v: Tensor) -> Tensor:
    return v.abs().amax(-1).clamp_min(1e-12) / FP8_MAX


def norm_forward(
    h: Tensor,
    weight: Tensor,
    eps: float,
    a: Tensor | None,
    fp8: bool,
    y: Tensor | None = None,
    t: Tensor | None = None,
    b: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    total = h
    if y is not None:
        v = h.float() + y.float()
        total = (v + _lora(t, b) if t is not None and b is not None else v).to(h.dtype)
    v = total.float()
    rstd = torch.rsqrt(v.pow(2).mean(-1) + eps)
    x = v * rstd[:, None] * weight.float()
    t_out = (x.to(h.dtype) @ a.t()) if a is not None else None
    if not fp8:
        return total, x.to(h.dtype), None, t_out, rstd
    x8, scale = _cast(x, None)
    return total, x8, scale, t_out, rstd


def norm_backward(
    dx: Tensor,
    dt: Tensor | None,
    t: Tensor | None,
    a: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
) -> Tensor:
    d = dx.float()
    if dt is not None and a is not None:
        d = d + dt.float() @ a.float()
    d = d * weight.float()
    v = h.float()
    r = rstd[:, None]
    g = d * r - v * (d * v).mean(-1, keepdim=True) * r**3
    return (g if residual is None else g + residual.float()).to(h.dtype)


def branch_forward(
    h: Tensor,
    y: Tensor,
    t: Tensor | None,
    b: Tensor | None,
    weight: Tensor,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    z = y.float()
    if t is not None and b is not None:
        z = z + _lora(t, b)
    y.copy_(z)
    v = y.float()
    rstd = torch.rsqrt(v.pow(2).mean(-1) + eps)
    total = (h.float() + v * rstd[:, None] * weight.float()) * scale
    return total.to(h.dtype), y, rstd


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool = False) -> Tensor:
    """x [M, H, D], cos and sin [M, D] with equal halves."""
    x = x.float()
    low, high = (x[..., ::2], x[..., 1::2]) if pairs else x.chunk(2, -1)
    c, s = (v.float().chunk(2, -1)[0][:, None] for v in (cos, sin))
    turned = low * c - high * s, high * c + low * s
    return torch.stack(turned, -1).flatten(-2) if pairs else torch.cat(turned, -1)


def _parts(x: Tensor, d: int, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Views [M, heads of q, k or v, D] of a joined matrix."""
    sizes = [heads * d, kv_heads * d, kv_heads * d]
    return tuple(part.unflatten(1, (-1, d)) for part in x.split(sizes, 1))


def rope_forward_(
    qkv: Tensor,
    t: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    norms: HeadNorms | None = None,
    pairs: bool = False,
) -> Tensor:
    d = cos.shape[-1]
    ends = [0, heads * d, (heads + kv_heads) * d, (heads + 2 * kv_heads) * d]
    for i in range(3):
        part = qkv[:, ends[i] : ends[i + 1]]
        v = part.float()
        if t is not None and b is not None:
            r = b.shape[1]
            v = v + _lora(t[:, i * r : (i + 1) * r], b[ends[i] : ends[i + 1]])
        if bias is not None:
            v = v + bias[ends[i] : ends[i + 1]].float()
        part.copy_(v)
    out = qkv if norms is None else qkv.clone()
    for i, part in enumerate(_parts(out, d, heads, kv_heads)):
        v = part.float()
        if norms is not None and (i < 2 or norms.values):
            v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + norms.eps) * norms.weight[i]
        part.copy_(_rotate(v, cos, sin, pairs) if i < 2 else v)
    return out


def head_norm_backward_(
    d: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    norms: HeadNorms,
    pairs: bool = False,
) -> None:
    size = cos.shape[-1]
    grads, before = (_parts(x, size, heads, kv_heads) for x in (d, qkv))
    for i, (part, x) in enumerate(zip(grads, before, strict=True)):
        g, v = part.float(), x.float()
        if i < 2:
            g = _rotate(g, cos, -sin, pairs)
        elif not norms.values:
            continue
        rstd = torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + norms.eps)
        g, v = g * norms.weight[i], v * rstd
        part.copy_(rstd * (g - v * (g * v).mean(-1, keepdim=True)))


def rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    b: Tensor | None,
    column_scale: Tensor | None,
    pairs: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    parts = [
        _rotate(dq, cos, -sin, pairs).flatten(1),
        _rotate(dk, cos, -sin, pairs).flatten(1),
        dv.float().flatten(1),
    ]
    out = torch.cat(parts, 1).to(dq.dtype)
    return (out, *joined_backward(out, b, column_scale, [x.shape[1] for x in parts]))


def joined_backward(
    d: Tensor, b: Tensor | None, column_scale: Tensor | None, parts: list[int]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dt = None
    if b is not None:
        dt = torch.cat([x @ y for x, y in zip(d.split(parts, 1), b.split(parts), strict=True)], 1)
    return (None, None, dt) if column_scale is None else (*_cast(d, column_scale), dt)


def cast_outer(
    x: Tensor, column_scale: Tensor | None, scale: Tensor | None, t: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    out = None
    if scale is not None and column_scale is not None:
        out = (x.float() * column_scale / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    product = None
    if t is not None:
        product = (
            torch.mm(x.t(), t, out_dtype=torch.float32)
            if x.is_cuda and x.dtype != torch.float32
            else torch.mm(x.t(), t).float()
        )
    return out, product


def quantise_rows(
    x: Tensor, column_scale: Tensor | None, p: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return (*_cast(x, column_scale), x @ p if p is not None else None)


def _gate_up(gu: Tensor, t: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    g, u = gu.float().chunk(2, -1)
    if t is None or b is None:
        return g, u
    (tg, tu), (bg, bu) = t.chunk(2, -1), b.chunk(2, 0)
    return g + _lora(tg, bg), u + _lora(tu, bu)


def _activation(g: Tensor, tanh: bool) -> Tensor:
    return gelu(g, approximate="tanh") if tanh else g * torch.sigmoid(g)


def _slope(g: Tensor, tanh: bool) -> Tensor:
    """The derivative of ``_activation``."""
    if not tanh:
        sig = torch.sigmoid(g)
        return sig * (1 + g * (1 - sig))
    a, c = 0.7978845608028654, 0.044715
    t = torch.tanh(a * (g + c * g**3))
    return 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * a * (1 + 3 * c * g * g)


def swiglu_forward(
    gu: Tensor,
    t: Tensor | None,
    b: Tensor | None,
    a: Tensor | None,
    fp8: bool,
    gelu: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    g, u = _gate_up(gu, t, b)
    act = (_activation(g, gelu) * u).to(gu.dtype)
    t_out = act @ a.t() if a is not None else None
    return (*_cast(act, None), t_out) if fp8 else (act, None, t_out)


def swiglu_backward(
    gu: Tensor,
    t: Tensor | None,
    b: Tensor | None,
    dact: Tensor,
    dt: Tensor | None,
    a: Tensor | None,
    column_scale: Tensor | None,
    gelu: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    g, u = _gate_up(gu, t, b)
    da = dact.float()
    if dt is not None and a is not None:
        da = da + dt.float() @ a.float()
    gated = _activation(g, gelu)
    # in fp32 the inputs are views: compute before writing
    act, dgu = gated * u, torch.cat([da * u * _slope(g, gelu), da * gated], -1)
    dact.copy_(act)
    gu.copy_(dgu)
    dt_out = None
    if b is not None:
        (dg, du), (bg, bu) = gu.chunk(2, -1), b.chunk(2, 0)
        dt_out = torch.cat([dg @ bg, du @ bu], -1)
    return dact, gu, None if column_scale is None else _row_scale(gu.float() * column_scale), dt_out


def gate_forward_(gu: Tensor, more: Tensor | None) -> Tensor:
    if more is not None:
        gu += more
    g, u = gu.float().chunk(2, -1)
    return (_activation(g, False) * u).to(gu.dtype)


def gate_backward_(
    gu: Tensor, dact: Tensor, more: Tensor | None, share: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    g, u = gu.float().chunk(2, -1)
    da = dact.float() if more is None else dact.float() + more.float()
    gated = _activation(g, False)
    act, near = gated * u, da * share.float()[:, None]
    dgu = torch.cat([near * u * _slope(g, False), near * gated], -1)
    dshare = (act * da).sum(-1)
    dact.copy_(act)
    gu.copy_(dgu)
    return dact, gu, dshare


def clamped_forward_(
    gu: Tensor, more: Tensor | None, bias: Tensor, expert: Tensor, alpha: float, limit: float
) -> Tensor:
    v = gu.float() + bias.float()[expert]
    gu.copy_(v if more is None else v + more.float())
    g, u = gu[:, ::2].float().clamp(max=limit), gu[:, 1::2].float().clamp(-limit, limit)
    return (g * torch.sigmoid(alpha * g) * (u + 1)).to(gu.dtype)


def clamped_backward_(
    gu: Tensor, dact: Tensor, more: Tensor | None, share: Tensor, alpha: float, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    g, u = gu[:, ::2].float(), gu[:, 1::2].float()
    near_g, near_u = g <= limit, u.abs() <= limit
    g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    da = dact.float() if more is None else dact.float() + more.float()
    sig = torch.sigmoid(alpha * g)
    act, near = g * sig * (u + 1), da * share.float()[:, None]
    dg = near * (u + 1) * sig * (1 + alpha * g * (1 - sig)) * near_g
    dgu = torch.stack([dg, near * g * sig * near_u], -1).flatten(1)
    dshare = (act * da).sum(-1)
    dact.copy_(act)
    gu.copy_(dgu)
    return dact, gu, dshare


def combine(
    y: Tensor,
    more: Tensor | None,
    back: Tensor,
    share: Tensor,
    bias: Tensor | None = None,
    expert: Tensor | None = None,
) -> Tensor:
    v = y.float() if more is None else y.float() + more.float()
    if bias is not None:
        v = v + bias.float()[expert]
    each = v[back].view(*share.shape, -1) * share.float()[..., None]
    return each.sum(1).to(y.dtype)


def residual_add(h: Tensor, y: Tensor, t: Tensor | None, b: Tensor | None) -> Tensor:
    v = h.float() + y.float()
    return (v + _lora(t, b) if t is not None and b is not None else v).to(h.dtype)


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    dlogits_dtype: torch.dtype,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    x = logits.float() * scale
    if cap is not None:
        x = cap * torch.tanh(x / cap)
    counted = targets >= 0
    log_p = x.log_softmax(-1)
    at = targets.clamp_min(0)[:, None]
    loss = -log_p.gather(1, at)[:, 0] * counted
    grad = log_p.exp()
    grad.scatter_add_(1, at, torch.full_like(at, -1, dtype=grad.dtype))
    grad = grad * scale
    if cap is not None:
        grad = grad * (1 - (x / cap).square())
    return loss, (grad * counted[:, None]).to(dlogits_dtype)


def log_prob_rows(
    logits: Tensor, targets: Tensor, scale: float = 1.0, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    x = logits.float() * scale
    if cap is not None:
        x = cap * torch.tanh(x / cap)
    every = x.log_softmax(-1)
    return every.gather(1, targets[:, None])[:, 0], -(every.exp() * every).sum(-1)


def dequantise_nf4(
    packed: Tensor, absmax: Tensor, codebook: Tensor, out: Tensor, block: int
) -> Tensor:
    byte = torch.arange(256, device=packed.device)
    both = torch.stack([codebook[byte >> 4], codebook[byte & 15]], -1)  # of each byte
    blocks, step = out.view(-1, block), SLAB // block
    for at in range(0, len(blocks), step):
        some = packed[at * block // 2 : (at + step) * block // 2]
        values = both[some.int()].view(-1, block)
        blocks[at : at + step] = values.mul_(absmax[at : at + step, None])
    return out


def dequantise_rows(w: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    return out.copy_(w).mul_(scale[:, None])


def transpose_fp8(w: Tensor, out: Tensor | None = None) -> Tensor:
    if out is None:
        return w.view(torch.uint8).t().contiguous().view(FP8)
    out.view(torch.uint8).copy_(w.view(torch.uint8).t())
    return out
