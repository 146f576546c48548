"""Triton kernels for what lies between the projections of a gated delta net and of gated attention.
``trainer/kernels/delta_reference.py`` has the twins of the same names.

Shapes: M tokens, HK heads of q and k, HV heads of v, D columns of every head, N columns of the
joined projection (``trainer/kernels/nets.py::Net``).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from trainer.kernels import delta_device as jit
from trainer.kernels import delta_reference
from trainer.kernels.delta_reference import EPS
from trainer.kernels.nets import Net
from trainer.kernels.spans import Spans

ROWS, WARPS = 16, 4  # tokens of a tile with one head's columns


def mix_forward(joined: Tensor, net: Net, at: Spans) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [M, HK, D] of unit norm and v [M, HV, D]: silu of the causal convolution of the joined
    projection's columns, within documents."""
    m, (keys, values, d) = len(joined), (net.keys, net.values, net.head_dim)
    out = joined.new_empty(m * net.mixed)
    jit.mix_forward[(triton.cdiv(m, ROWS), 2 * keys + values)](
        *(joined, net.taps, at.first, out, m, joined.stride(0), EPS), **_fixed(net)
    )
    q, k, v = out.split([m * keys * d, m * keys * d, m * values * d])
    return q.view(m, keys, d), k.view(m, keys, d), v.view(m, values, d)


def mix_backward_(
    d: Tensor, joined: Tensor, of_rule: tuple[Tensor, Tensor, Tensor, Tensor], net: Net, at: Spans
) -> None:
    """Writes the gradient of the mixed columns into ``d [M, N]``. ``of_rule``: dq, two terms of dk,
    and dv, all [M, HV, D]."""
    m, c = len(joined), net.mixed
    grad = joined.new_empty(m, c)
    heads = 2 * net.keys + net.values
    jit.mix_backward_outer[(triton.cdiv(m, ROWS), heads)](
        *(joined, net.taps, at.first, *of_rule, grad, m, joined.stride(0), EPS), **_fixed(net)
    )
    jit.mix_backward_inner[(triton.cdiv(m, ROWS), triton.cdiv(c, 128))](
        *(grad, net.taps, at.past, d, m, d.stride(0)),
        C=c,
        W=net.taps.shape[1],
        BM=ROWS,
        BN=128,
        num_warps=WARPS,
    )


def _fixed(net: Net) -> dict[str, Any]:
    sizes = {"HK": net.keys, "HV": net.values, "D": net.head_dim, "W": net.taps.shape[1]}
    return {**sizes, "BM": ROWS, "num_warps": WARPS}


def decay_forward(joined: Tensor, net: Net) -> tuple[Tensor, Tensor]:
    """(decay (logarithms), beta), fp32 [M, HV]."""
    _, _, b, a = net.parts(joined)
    beta, decay = (joined.new_empty(len(b), net.values, dtype=torch.float32) for _ in range(2))
    jit.decay_forward[(triton.cdiv(len(b), 64),)](
        *(b, a, net.rate, net.shift, beta, decay, len(b), joined.stride(0)), **_of_heads(net)
    )
    return decay, beta


def decay_backward_(d: Tensor, joined: Tensor, ddecay: Tensor, dbeta: Tensor, net: Net) -> None:
    """Writes the gradients of both logits into ``d [M, N]``."""
    (_, _, b, a), (_, _, db, da) = net.parts(joined), net.parts(d)
    jit.decay_backward[(triton.cdiv(len(b), 64),)](
        *(b, a, net.rate, net.shift, dbeta, ddecay, db, da, len(b), joined.stride(0)),
        **_of_heads(net),
    )


def _of_heads(net: Net) -> dict[str, Any]:
    return {"HV": net.values, "PAD": triton.next_power_of_2(net.values), "BM": 64, "num_warps": 4}


def gated_norm_forward(o: Tensor, joined: Tensor, net: Net) -> Tensor:
    """RMSNorm of each head of ``o [M, HV, D]`` times silu(z) -> [M, HV D]."""
    (m, heads, d), z = o.shape, net.parts(joined)[1]
    out = o.new_empty(m, heads * d)
    jit.gated_norm_forward[(triton.cdiv(m, ROWS), heads)](
        *(o, z, net.weight, out, m, joined.stride(0), net.eps), HV=heads, D=d, BM=ROWS, num_warps=4
    )
    return out


def gated_norm_backward_(dout: Tensor, o: Tensor, joined: Tensor, d: Tensor, net: Net) -> Tensor:
    """Overwrites ``dout [M, HV D]`` with the gradient of o, writes z's into ``d [M, N]``, and
    returns what ``gated_norm_forward`` did."""
    m, heads, size = o.shape
    out = torch.empty_like(dout)
    jit.gated_norm_backward[(triton.cdiv(m, ROWS), heads)](
        *(dout, o, net.parts(joined)[1], net.weight, out, net.parts(d)[1], m, joined.stride(0)),
        *(net.eps,),
        HV=heads,
        D=size,
        BM=ROWS,
        num_warps=4,
    )
    return out


def rule_forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, cu: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See ``trainer.kernels.delta_fla.forward``. fp32 inputs take the twin, because fla-core rounds
    their products to TF32."""
    if q.dtype == torch.float32:
        return delta_reference.rule_forward(q, k, v, decay, beta, cu)
    from trainer.kernels import delta_fla

    return delta_fla.forward(q, k, v, decay, beta, cu)


def rule_backward(
    dout: Tensor, of_rule: tuple[Tensor, ...], kept: tuple[Tensor, ...], cu: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
    """``of_rule``: q, k, v, decay, beta -> ((dq, two terms of dk, dv), d(decay), d(beta))."""
    if dout.dtype == torch.float32:
        return delta_reference.rule_backward(dout, of_rule, kept, cu)
    from trainer.kernels import delta_fla

    q, k, v, _, beta = of_rule
    found = delta_fla.backward(dout, q, k, v, beta, delta_fla.SavedChunks(*kept), cu)
    dq, dk, dv, ddecay, dbeta = found
    return (dq, *dk, dv), ddecay, dbeta


def gate_forward(x: Tensor, gate: Tensor) -> Tensor:
    """x sigmoid(gate); x and gate have one shape."""
    out = torch.empty_like(x)
    n = x.numel()
    jit.gate_forward[(triton.cdiv(n, 2048),)](x, gate, out, n, BN=2048, num_warps=4)
    return out


def gate_backward_(dout: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrites ``dout`` with the gradient of x. Returns (what ``gate_forward`` returned,
    d(gate))."""
    out, dgate, n = torch.empty_like(x), torch.empty_like(gate), x.numel()
    jit.gate_backward[(triton.cdiv(n, 2048),)](dout, x, gate, out, dgate, n, BN=2048, num_warps=4)
    return out, dgate


def pick(x: Tensor, index: Tensor, run: int) -> Tensor:
    """The runs of ``run`` columns ``index [n]`` of x [M, N] -> [M, n run]. Four columns of 16 bits
    are moved as one number."""
    m, n, dtype = len(x), len(index), x.dtype
    whole = run * x.element_size() == 8
    if not whole:
        index = (index[:, None] * run + torch.arange(run, device=x.device)).flatten().int()
        n *= run
    given = x.view(torch.int64) if whole else x
    out = given.new_empty(m, n)
    jit.pick[(triton.cdiv(m, 16), triton.cdiv(n, 256))](
        given, index, out, m, given.stride(0), n, BM=16, BN=256, num_warps=4
    )
    return out.view(dtype)
