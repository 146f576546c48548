"""Plain torch twins of ``trainer/kernels/delta_ops.py``, on any device and in any float type."""

from __future__ import annotations

from functools import cache
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from trainer.kernels.nets import Net
from trainer.kernels.spans import Spans

EPS = 1e-6  # of the norms of q and k


def convolve(x: Tensor, taps: Tensor, first: Tensor) -> Tensor:
    """silu of the causal convolution of each column, within documents. x [M, C], taps [C, W], first
    [M] (the token at which each token's document begins) -> [M, C]."""
    return silu(correlate(x, taps, first)).to(x.dtype)


def correlate(x: Tensor, taps: Tensor, first: Tensor) -> Tensor:
    """The convolution of ``convolve`` without silu, fp32."""
    tokens, width = len(x), taps.shape[1]
    behind = torch.arange(tokens, device=x.device) - first
    total = x.float() * taps[:, -1].float()
    for back in range(1, width):
        earlier = pad(x, (0, 0, back, 0))[:tokens].float()
        kept = (behind >= back)[:, None]
        total = total + torch.where(kept, earlier, 0.0) * taps[:, -1 - back].float()
    return total


def unit(x: Tensor) -> Tensor:
    """x [..., D] scaled to unit norm."""
    v = x.float()
    return (v * torch.rsqrt(v.square().sum(-1, keepdim=True) + EPS)).to(x.dtype)


def rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cu: Tensor) -> Tensor:
    """See ``trainer.kernels.delta.rule``. Each document becomes a row, padded at the end."""
    lengths = cu.diff().tolist()
    longest = max(lengths)
    rows = []
    for x in (q, k, v, decay, beta):
        parts = x.split(lengths)
        full = [pad(p, (0, 0) * (p.ndim - 1) + (0, longest - len(p))) for p in parts]
        rows.append(torch.stack(full))
    out, _ = _alone()(*rows)
    return torch.cat([row[:n] for row, n in zip(out, lengths, strict=True)])


@cache
def _alone() -> Any:
    """transformers' own rule in plain torch, even where fla-core replaces it."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    return unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)


# -- the twins of ``trainer/kernels/delta_ops.py`` -------------------------------------------------


def mix_forward(joined: Tensor, net: Net, at: Spans) -> tuple[Tensor, Tensor, Tensor]:
    qkv = net.parts(joined)[0]
    return _heads(convolve(qkv, net.taps, at.first), net)


def _heads(mixed: Tensor, net: Net) -> tuple[Tensor, Tensor, Tensor]:
    d = net.head_dim
    q, k, v = mixed.split([net.keys * d, net.keys * d, net.values * d], 1)
    q, k, v = (x.unflatten(1, (-1, d)) for x in (q, k, v))
    return unit(q), unit(k), v


def mix_backward_(
    d: Tensor, joined: Tensor, of_rule: tuple[Tensor, Tensor, Tensor, Tensor], net: Net, at: Spans
) -> None:
    dq, dk, more, dv = of_rule
    by_key = [x.unflatten(1, (net.keys, -1)).sum(2) for x in (dq, dk + more)]
    with torch.enable_grad():
        qkv = net.parts(joined)[0].detach().requires_grad_()
        made = _heads(convolve(qkv, net.taps, at.first), net)
        (found,) = torch.autograd.grad(made, qkv, [*by_key, dv])
    net.parts(d)[0].copy_(found)


def decay_forward(joined: Tensor, net: Net) -> tuple[Tensor, Tensor]:
    _, _, b, a = net.parts(joined)
    return -net.rate * softplus(a.float() + net.shift), b.float().sigmoid()


def decay_backward_(d: Tensor, joined: Tensor, ddecay: Tensor, dbeta: Tensor, net: Net) -> None:
    (_, _, b, a), (_, _, db, da) = net.parts(joined), net.parts(d)
    beta = b.float().sigmoid()
    db.copy_(dbeta * beta * (1 - beta))
    da.copy_(-ddecay * net.rate * (a.float() + net.shift).sigmoid())


def gated_norm_forward(o: Tensor, joined: Tensor, net: Net) -> Tensor:
    x, z = o.float(), net.parts(joined)[1].unflatten(1, (net.values, -1)).float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + net.eps) * net.weight.float()
    return (x * silu(z)).to(o.dtype).flatten(1)


def gated_norm_backward_(dout: Tensor, o: Tensor, joined: Tensor, d: Tensor, net: Net) -> Tensor:
    with torch.enable_grad():
        x, whole = (t.detach().requires_grad_() for t in (o, joined))
        out = gated_norm_forward(x, whole, net)
        dx, dz = torch.autograd.grad(out, (x, whole), dout)
    dout.copy_(dx.flatten(1))
    net.parts(d)[1].copy_(net.parts(dz)[1])
    return out.detach()


def rule_forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cu: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return rule(q, k, v, decay, beta, cu), ()


def rule_backward(
    dout: Tensor, of_rule: tuple[Tensor, ...], kept: tuple[Tensor, ...], cu: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
    q, k, v, decay, beta = of_rule
    group = v.shape[1] // q.shape[1]
    given = (*(x.repeat_interleave(group, 1) for x in (q, k)), v, decay, beta)
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in given]
        out = rule(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], cu)
        dq, dk, dv, ddecay, dbeta = torch.autograd.grad(out, inputs, dout)
    return (dq, dk, torch.zeros_like(dk), dv), ddecay, dbeta


def gate_forward(x: Tensor, gate: Tensor) -> Tensor:
    return (x.float() * gate.float().sigmoid()).to(x.dtype)


def gate_backward_(dout: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    s, d = gate.float().sigmoid(), dout.float()
    out, dgate = gate_forward(x, gate), (d * x.float() * s * (1 - s)).to(gate.dtype)
    dout.copy_(d * s)
    return out, dgate


def pick(x: Tensor, index: Tensor, run: int) -> Tensor:
    made: Tensor = x.unflatten(1, (-1, run))
    return made.index_select(1, index).flatten(1)
