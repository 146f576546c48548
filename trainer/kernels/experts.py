"""Adapters on the experts of a mixture, beside frozen weights: x W^T + s (x A^T) B^T, expert by
expert, in grouped matrix products.

PEFT keeps the parameters, their names and their file; its own forward adds s B A to every expert's
weight first and keeps the sums for backward, which takes as much memory as all experts. ``attach``
makes the model compute them split instead, through transformers' ExpertsInterface.

Rows are (token, expert) pairs sorted by expert. Nothing waits for the GPU. Groups may be empty.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

log = logging.getLogger(__name__)

NAME = "milktea"
RANK_STEP = 8  # grouped products want rows of whole 16 bytes
TOLERANCE = 0.02  # of a product's norm, in bf16
_trusted: dict[str, bool] = {}  # by device and type, once it is known


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [S, K], weight [E, K, N], ends int32 [E] -> [S, N]: rows up to ends[0] meet weight[0], the
    rows after them up to ends[1] meet weight[1], and so on."""
    if _grouped_mm(x.device, x.dtype):
        return torch.nn.functional.grouped_mm(x, weight, offs=ends)
    return _one_by_one(x, weight, ends)


def _one_by_one(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same, one product an expert: waits for the device."""
    stops = ends.tolist()
    parts = [x[a:b] @ weight[e] for e, (a, b) in enumerate(zip([0, *stops], stops, strict=False))]
    return torch.cat(parts)


def _grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped product is there and right on this device: on some cards it was seen
    to be silently wrong for transposed views."""
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
    None. In PEFT's file A is expert by expert, and in B the expert's number runs fastest.

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


def adapted(
    x: Tensor, weight: Tensor, ends: Tensor, wrapper: Any | None, transposed: bool
) -> Tensor:
    """x [S, in] -> [S, out] through the frozen experts and their adapter. `weight` is
    [E, out, in], or transposed [E, in, out]."""
    y = grouped(x, weight if transposed else weight.transpose(-2, -1), ends)
    found = None if wrapper is None else factors(wrapper)
    if found is None:
        return y
    a, b, scaling = found
    short = -a.shape[1] % RANK_STEP
    a = pad(a.to(x.dtype), (0, 0, 0, short)).contiguous()
    b = pad((b * scaling).to(x.dtype), (0, short)).contiguous()
    u = grouped(x, a.transpose(-2, -1), ends)
    return y + grouped(u, b.transpose(-2, -1), ends)


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls. hidden_states [T, h], top_k_index and top_k_weights [T, k]
    -> [T, h]."""
    tokens, k = top_k_index.shape
    expert, order = torch.sort(top_k_index.reshape(-1))
    counted = torch.histc(
        expert.float() if expert.device.type == "cpu" else expert.int(),
        bins=self.num_experts, min=0, max=self.num_experts - 1,
    )  # fmt: skip
    ends = torch.cumsum(counted, 0, dtype=torch.int32)
    wrappers: dict[str, Any] = getattr(self, "adapters_of_experts", {})
    first = "gate_up_proj" if self.has_gate else "up_proj"

    def product(x: Tensor, name: str) -> Tensor:
        weight = getattr(self, name)
        y = adapted(x.to(weight.dtype), weight, ends, wrappers.get(name), self.is_transposed)
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y

    y = product(hidden_states[order // k], first)
    y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
    y = product(y, "down_proj")
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return y[back].view(tokens, k, -1).sum(1).to(hidden_states.dtype)


def attach(model: nn.Module) -> int:
    """Compute the adapters that PEFT put on parameters of experts split from their weights. Returns
    the number of layers. Experts outside the interface (Llama 4) keep PEFT's way."""
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
