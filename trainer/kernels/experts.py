"""Adapters on the experts of a mixture, beside frozen weights: x W^T + s (x A^T) B^T, expert by
expert, in grouped matrix products.

PEFT owns the parameters, their names and their file. Its own forward adds s B A to every expert's
weight first and saves the sums for backward, which takes as much memory as all experts. ``attach``
makes the model compute base and adapter separately, through transformers' ExpertsInterface.

Rows are (token, expert) pairs sorted by expert. Nothing waits for the GPU. Groups may be empty.

Experts with gate, up, silu and down and without biases, and gpt-oss's with their biases and clamped
gate, are computed by one autograd function. It saves only gate and up of a pair (2f values);
backward gathers the input and computes the activation again.

``quantise`` holds the weights in FP8 or NF4. A product unpacks one projection of one layer into the
scratch that all quantised weights share, and reads it there. Without gradients, and with few pairs,
it unpacks only the experts of these.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from trainer.kernels.backend import operations
from trainer.kernels.frozen import FrozenWeight, freeze_weight
from trainer.kernels.verify import trust_unpacking

log = logging.getLogger(__name__)

NAME = "milktea"
CLAMPED = "GptOssExperts"  # the class of transformers' whose gate is clamped
RANK_STEP = 8  # grouped products take rows of a multiple of 16 bytes
TOLERANCE = 0.02  # relative error of a product in bf16
_trusted: dict[str, bool] = {}  # by device and dtype, once it is known


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [S, K], weight [E, K, N], ends int32 [E] -> [S, N]: rows up to ends[0] are multiplied by
    weight[0], the rows after them up to ends[1] by weight[1], and so on."""
    if _grouped_mm(x.device, x.dtype):
        return torch.nn.functional.grouped_mm(x, weight, offs=ends)
    return _one_by_one(x, weight, ends)


def grouped_outer(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """dy^T x over the rows of each group: [S, N], [S, K], ends int32 [E] -> [E, N, K]."""
    if _grouped_mm(x.device, x.dtype):
        return torch.nn.functional.grouped_mm(dy.t(), x, offs=ends)
    stops = ends.tolist()
    return torch.stack([dy[a:b].t() @ x[a:b] for a, b in zip([0, *stops], stops, strict=False)])


def _one_by_one(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``grouped`` with one product per expert; waits for the device."""
    stops = ends.tolist()
    parts = [x[a:b] @ weight[e] for e, (a, b) in enumerate(zip([0, *stops], stops, strict=False))]
    return torch.cat(parts)


def _grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product exists and is right on this device: on some cards it is
    silently wrong for transposed views."""
    key = f"{device}, {dtype}"
    if key not in _trusted:
        _trusted[key] = _probe(device, dtype)
        if not _trusted[key]:
            log.warning("torch's grouped product is not used on %s: experts one by one", key)
    return _trusted[key]


@torch.no_grad()
def _probe(device: torch.device, dtype: torch.dtype) -> bool:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    made = torch.Generator().manual_seed(0)
    x = torch.randn(48, 64, generator=made).to(device, dtype)
    ends = torch.tensor([16, 16, 21, 48], dtype=torch.int32, device=device)
    for n in (8, 32):
        straight = torch.randn(4, 64, n, generator=made).to(device, dtype)
        turned = torch.randn(4, n, 64, generator=made).to(device, dtype).transpose(-2, -1)
        for weight in (straight, turned):
            try:
                got = torch.nn.functional.grouped_mm(x, weight, offs=ends).float()
            except RuntimeError as why:
                log.warning("torch's grouped product does not run on %s: %s", device, why)
                return False
            want = _one_by_one(x.float(), weight.float(), ends)
            if not (got - want).norm() < TOLERANCE * want.norm():
                return False
    return True


def factors(wrapper: Any) -> tuple[Tensor, Tensor, float] | None:
    """(A [E, r, in], B [E, out, r], scaling) of the active adapter of PEFT's wrapper of experts, or
    None. In PEFT's file A is stored expert by expert, and in B the expert's index runs fastest.

    Raises ValueError for several active adapters at once."""
    if wrapper.disable_adapters or wrapper.merged:
        return None
    active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise ValueError(f"{len(active)} adapters of the experts are active at once")
    a, b = wrapper.lora_A[active[0]].weight, wrapper.lora_B[active[0]].weight
    a = a.reshape(wrapper.num_experts, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, wrapper.num_experts).permute(2, 0, 1)
    return a, b, wrapper.scaling[active[0]]


def factors_of(
    wrapper: Any | None, dtype: torch.dtype, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """(A [E, r, in], s B [E, out, r]) in the form that grouped products take: in `dtype`, the rank
    padded, of the `chosen` experts alone where given; None without an adapter. Differentiable."""
    found = None if wrapper is None else factors(wrapper)
    if found is None:
        return None
    a, b, scaling = found
    if chosen is not None:
        a, b = a[chosen], b[chosen]
    short = -a.shape[1] % RANK_STEP
    a = pad(a.to(dtype), (0, 0, 0, short)).contiguous()
    return a, pad((b * scaling).to(dtype), (0, short)).contiguous()


class HeldExperts:
    """The frozen weights [E, out, in] of one projection of all experts of a layer, in FP8 or NF4:
    quantised by the rows of their outputs, as linears are."""

    def __init__(self, weight: Tensor, precision: str, transposed: bool) -> None:
        """`weight` is [E, out, in], or transposed [E, in, out]. Raises ValueError for a width that
        the precision does not take."""
        rows = weight.transpose(-2, -1) if transposed else weight
        self.shape = rows.shape
        self.rows: FrozenWeight = freeze_weight(rows.reshape(-1, rows.shape[-1]), precision)

    def unpack(self, chosen: Tensor | None = None) -> Tensor:
        """[E, out, in] in the dtype that the weights had, in the scratch; of the experts `chosen`
        int64 [C] alone, [C, out, in], where given."""
        if chosen is None:
            return self.rows.unpack().view(self.shape)
        some = self.rows.blocks(self.shape[0], chosen)
        return some.unpack().view(-1, *self.shape[1:])


def held_in(experts: Any) -> dict[str, HeldExperts]:
    """The quantised weights of a layer's experts by the parameter's name; empty where they are as
    they were loaded."""
    found: dict[str, HeldExperts] = getattr(experts, "held_experts", {})
    return found


def read_weight(experts: Any, name: str, chosen: Tensor | None = None) -> Tensor:
    """The weights of experts [E, out, in]: quantised ones in the scratch, of the `chosen` experts
    alone where given."""
    held = held_in(experts).get(name)
    if held is not None:
        return held.unpack(chosen)
    weight: Tensor = getattr(experts, name)
    return weight.transpose(-2, -1) if experts.is_transposed else weight


class Pairs(NamedTuple):
    """(token, expert) pairs sorted by expert: each pair's expert [S], its original index [S], its
    token [S], the end of each expert's pairs int32 [E], and the sorted positions [S] of each
    token's pairs.
    Where ``chosen`` int64 [C] names the experts that are unpacked, ``ends`` are of these alone."""

    expert: Tensor
    order: Tensor
    token: Tensor
    ends: Tensor
    back: Tensor
    chosen: Tensor | None = None


def sort_pairs(index: Tensor, experts: int) -> Pairs:
    """The pairs of index [T, k]."""
    expert, order = torch.sort(index.reshape(-1))
    counted = torch.histc(
        expert.float() if expert.device.type == "cpu" else expert.int(),
        bins=experts, min=0, max=experts - 1,
    )  # fmt: skip
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    ends = torch.cumsum(counted, 0, dtype=torch.int32)
    return Pairs(expert, order, order // index.shape[1], ends, back)


def pairs_of(experts: Any, index: Tensor) -> Pairs:
    """``sort_pairs`` for these experts. Where they are quantised and no gradient is asked, few
    pairs choose what is unpacked: of each pair its expert, twice where two have the same."""
    count = experts.num_experts
    pairs = sort_pairs(index, count)
    if torch.is_grad_enabled() or not held_in(experts) or 2 * len(pairs.expert) > count:
        return pairs
    ends = torch.arange(1, len(pairs.expert) + 1, device=index.device, dtype=torch.int32)
    return pairs._replace(ends=ends, chosen=pairs.expert)


class _Unpacked(torch.autograd.Function):
    """``grouped`` by quantised weights, which are unpacked once more for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: HeldExperts, pairs: Pairs) -> Tensor:
        ctx.held, ctx.ends = held, pairs.ends
        return grouped(x, held.unpack(pairs.chosen).transpose(-2, -1), pairs.ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return grouped(dy.contiguous(), ctx.held.unpack(), ctx.ends), None, None


def adapted(x: Tensor, experts: Any, name: str, pairs: Pairs, wrapper: Any | None) -> Tensor:
    """x [S, in] -> [S, out] through one projection of the frozen experts and its adapter."""
    held, weight, ends = held_in(experts).get(name), getattr(experts, name), pairs.ends
    if held is not None:
        apply: Any = _Unpacked.apply
        y: Tensor = apply(x, held, pairs)
    else:
        y = grouped(x, weight if experts.is_transposed else weight.transpose(-2, -1), ends)
    found = factors_of(wrapper, x.dtype, pairs.chosen)
    if found is None:
        return y
    a, b = found
    return y + grouped(grouped(x, a.transpose(-2, -1), ends), b.transpose(-2, -1), ends)


class _Gated(torch.autograd.Function):
    """See ``gated``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, share: Tensor, experts: Any, pairs: Pairs, *lora: Tensor
    ) -> Tensor:
        ops, ends = operations(x.device), pairs.ends
        a1, b1, a2, b2 = lora or (None,) * 4
        xs = x[pairs.token]
        up = read_weight(experts, "gate_up_proj", pairs.chosen).transpose(1, 2)
        gu, more, t, u = grouped(xs, up, ends), None, None, None
        if a1 is not None and b1 is not None:
            t = grouped(xs, a1.transpose(1, 2), ends)
            more = grouped(t, b1.transpose(1, 2), ends)
        del xs
        act = _gate(experts, pairs, gu, more)
        down = read_weight(experts, "down_proj", pairs.chosen).transpose(1, 2)
        y, more = grouped(act, down, ends), None
        if a2 is not None and b2 is not None:
            u = grouped(act, a2.transpose(1, 2), ends)
            more = grouped(u, b2.transpose(1, 2), ends)
        ctx.save_for_backward(x, share, gu, t, u, *lora)
        ctx.experts, ctx.pairs = experts, pairs
        bias = (experts.down_proj_bias, pairs.expert) if experts.has_bias else ()
        return cast(Tensor, ops.combine(y, more, pairs.back, share, *bias))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, share, gu, t, u, *lora = ctx.saved_tensors
        experts, pairs = ctx.experts, ctx.pairs
        ops, ends = operations(x.device), pairs.ends
        grads: list[Tensor] = []
        dys, more = dout.contiguous()[pairs.token], None
        each = share.reshape(-1)[pairs.order]
        dact = grouped(dys, read_weight(experts, "down_proj"), ends)
        if lora:
            a1, b1, a2, b2 = lora
            du = grouped(dys, b2, ends)
            more = grouped(du, a2, ends)
        if (clamped := _clamped(experts)) is None:
            act, dgu, dshare = ops.gate_backward_(gu, dact, more, each)
        else:
            act, dgu, dshare = ops.clamped_backward_(gu, dact, more, each, *clamped)
        if lora:
            near = each[:, None].to(x.dtype)
            grads = [grouped_outer(du * near, act, ends), grouped_outer(dys, u * near, ends)]
        del act, dact, dys
        dxs, more = grouped(dgu, read_weight(experts, "gate_up_proj"), ends), None
        if lora:
            dt = grouped(dgu, b1, ends)
            more = grouped(dt, a1, ends)
            of_up = grouped_outer(dt, x[pairs.token], ends), grouped_outer(dgu, t, ends)
            grads = [*of_up, *grads]
        dx = ops.combine(dxs, more, pairs.back, torch.ones_like(share))
        dshare = dshare[pairs.back].view_as(share)
        if experts.has_bias:  # the trick above leaves out what stands beside the weights
            index = pairs.expert[pairs.back].view_as(share)
            dshare = dshare + (dout @ experts.down_proj_bias.t()).gather(1, index)
        return dx, dshare.to(share.dtype), None, None, *grads


def _gate(experts: Any, pairs: Pairs, gu: Tensor, more: Tensor | None) -> Tensor:
    """The activation [S, f] of gu [S, 2f], to which the adapter's part `more` and biases are added
    in place."""
    ops, clamped = operations(gu.device), _clamped(experts)
    if clamped is None:
        return cast(Tensor, ops.gate_forward_(gu, more))
    bias = experts.gate_up_proj_bias
    return cast(Tensor, ops.clamped_forward_(gu, more, bias, pairs.expert, *clamped))


def _clamped(experts: Any) -> tuple[float, float] | None:
    """(alpha, limit) of gpt-oss's gate, or None for the plain one."""
    if type(experts).__name__ != CLAMPED:
        return None
    return float(experts.alpha), float(experts.limit)


def lean(experts: Any) -> bool:
    """Whether ``gated`` supports these experts: gate, up, silu and down, nothing else, or gpt-oss's
    with their biases and clamped gate."""
    if not getattr(experts, "has_gate", False) or experts.has_post_expert_norm:
        return False
    if _clamped(experts) is not None:
        return bool(experts.has_bias)
    own = type(experts)._apply_gate is _default_apply_gate and not experts.has_bias
    return own and isinstance(experts.act_fn, (nn.SiLU, SiLUActivation))


def gated(experts: Any, x: Tensor, index: Tensor, share: Tensor) -> Tensor | None:
    """down(act(gate x) up x) of each pair, times its share, summed by token: [T, h] -> [T, h].
    None where the experts are of another form, train, or have an adapter on one half only."""
    if not lean(experts):
        return None
    wrappers: dict[str, Any] = getattr(experts, "adapters_of_experts", {})
    up = experts.gate_up_proj
    if any(p.requires_grad for p in experts.parameters(recurse=False)):
        return None
    pairs = pairs_of(experts, index)
    names = ("gate_up_proj", "down_proj")
    found = [factors_of(wrappers.get(n), up.dtype, pairs.chosen) for n in names]
    if None in found and any(found):
        return None
    lora = [factor for pair in found if pair is not None for factor in pair]
    apply: Any = _Gated.apply
    out: Tensor = apply(x.to(up.dtype), share, experts, pairs, *lora)
    return out.to(x.dtype)


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward that transformers calls: hidden_states [T, h], top_k_index and top_k_weights [T,
    k] -> [T, h]."""
    out = gated(self, hidden_states, top_k_index, top_k_weights)
    if out is not None:
        return out
    tokens, k = top_k_index.shape
    pairs = pairs_of(self, top_k_index)
    wrappers: dict[str, Any] = getattr(self, "adapters_of_experts", {})
    first, last = names_of(self)

    def product(x: Tensor, name: str) -> Tensor:
        y = adapted(x.to(getattr(self, name).dtype), self, name, pairs, wrappers.get(name))
        return y + getattr(self, f"{name}_bias")[pairs.expert] if self.has_bias else y

    y = product(hidden_states[pairs.token], first)
    y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
    y = product(y, last)
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[pairs.order].unsqueeze(-1)
    return y[pairs.back].view(tokens, k, -1).sum(1).to(hidden_states.dtype)


def names_of(experts: Any) -> tuple[str, str]:
    """The parameters of the first and the second product."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


@torch.no_grad()
def quantise(module: nn.Module, precision: str) -> int:
    """Hold the frozen experts inside `module` in FP8 or NF4, where that is the `precision`, and
    compute them by ``forward``; their parameters become empty. Returns the number of layers.
    Experts that train, and those outside transformers' interface (Llama 4), stay as they are.
    Raises ValueError for a width that the precision does not take."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if precision not in ("fp8", "nf4"):
        return 0
    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
    layers = 0
    found: list[Any] = [m for m in module.modules() if "down_proj" in m._parameters]
    for experts in found:
        if not hasattr(experts, "has_gate") or experts.down_proj.requires_grad:
            continue
        experts.held_experts = {}
        for name in names_of(experts):
            weight = getattr(experts, name).data
            held = HeldExperts(weight, precision, experts.is_transposed)
            trust_unpacking(held.rows, weight.device, precision)
            experts.held_experts[name] = held
            setattr(experts, name, nn.Parameter(weight.new_empty(0), requires_grad=False))
        experts.config._experts_implementation = NAME
        layers += 1
    return layers


def attach(model: nn.Module) -> int:
    """Make the adapters that PEFT put on parameters of experts compute beside the weights. Returns
    the number of layers. Experts outside the interface (Llama 4) keep PEFT's forward."""
    from peft.tuners.lora.layer import ParamWrapper
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
    layers = set()
    for wrapper in [m for m in model.modules() if isinstance(m, ParamWrapper)]:
        experts: Any = wrapper.get_base_layer()
        if wrapper.num_experts < 2:
            continue
        if not hasattr(experts, "has_gate"):
            continue
        held = getattr(experts, "adapters_of_experts", {})
        experts.adapters_of_experts = {**held, wrapper.parameter_name: wrapper}
        experts.config._experts_implementation = NAME
        inner: Any = wrapper.base_layer
        wrapper.forward = inner.__call__  # type: ignore[method-assign]
        layers.add(id(experts))
    return len(layers)
