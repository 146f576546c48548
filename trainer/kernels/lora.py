"""LoRA pairs beside frozen weights. A and B stay PEFT's own parameters; the fast path reads bf16
copies of them.

A ``Group`` is one to three linears that read one input (q, k, v; gate, up) with one joined frozen
weight. Their A stack to [G*R, K] and their B to [N, R], R the rank padded to a power of two that
the matrix units take. A linear without an adapter keeps zero rows. One linear that is all of them
already (qkv_proj, gate_up_proj) stands for each with its rows of B and the same A.
``frozen_linear`` is the same for one linear outside a fused layer, by ordinary autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.kernels.backend import operations
from trainer.kernels.frozen import FrozenWeight, freeze_weight

Adapter = tuple[nn.Parameter, nn.Parameter, float]  # A [r, K], B [N, r], scaling


MOST_RANK = 64


def padded_rank(r: int) -> int:
    """The rank padded to a power of two of at least 16, as the matrix units take it."""
    return max(16, 1 << (r - 1).bit_length())


def base_linear(module: nn.Module) -> nn.Linear:
    """The frozen linear inside a PEFT layer, or the module itself."""
    wrapped: Any = module
    return cast(
        nn.Linear, wrapped.get_base_layer() if hasattr(module, "get_base_layer") else module
    )


def adapter_of(module: Any, named: str | None = None) -> Adapter | None:
    """(A [r, K], B [N, r], scaling) of one LoRA adapter of a PEFT linear, or None where it has none
    there: of the adapter ``named``, by default of the one that is active.

    Raises ValueError for what the fast path does not compute: several active adapters, DoRA, LoRA
    bias, dropout, merged weights."""
    if not hasattr(module, "lora_A"):
        return None
    wanted = [named] if named is not None else module.active_adapters
    if named is None and getattr(module, "disable_adapters", False):
        return None
    active = [name for name in wanted if name in module.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise ValueError(f"{len(active)} adapters are active at once")
    name = active[0]
    if getattr(module, "use_dora", {}).get(name) or name in getattr(module, "lora_variant", {}):
        raise ValueError("a LoRA variant (DoRA or another) is used")
    if getattr(module.lora_dropout[name], "p", 0.0):
        raise ValueError("lora_dropout is not 0")
    if module.lora_B[name].bias is not None or module.merged:
        raise ValueError("the adapter has a bias or is merged")
    return module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]


@dataclass
class Group:
    """Linears of one input. ``refresh`` must run before every forward: it finds the active adapters
    and copies them. ``generation`` counts these look-ups."""

    weight: FrozenWeight
    sizes: list[int]  # output features of each part
    modules: list[nn.Module]  # one for each part, or one for all
    like: Tensor  # empty, of the compute dtype on the weight's device
    adapters: list[Adapter | None] = field(default_factory=list)  # of each module
    rank: int = 0
    a: Tensor | None = None  # [G*R, K]
    b: Tensor | None = None  # [N, R], times scaling
    wide_a: Tensor | None = None  # [T, K], of decoding steps: see ``widen`` and ``hold``
    wide_b: Tensor | None = None  # [N, T]
    generation: int = 0

    @classmethod
    def of(
        cls,
        modules: Sequence[nn.Module],
        precision: str,
        dtype: torch.dtype,
        sizes: Sequence[int] | None = None,
        **options: bool,
    ) -> Group:
        """Join the linears' weights (each module's weight becomes a view or is given up) and make
        room for their adapters. ``sizes``: the parts of one linear that is joined already."""
        linears = [base_linear(m) for m in modules]
        joined = (
            torch.cat([x.weight.data for x in linears])
            if len(linears) > 1
            else linears[0].weight.data
        )
        of_modules = [x.weight.shape[0] for x in linears]
        joined = joined.to(dtype)
        weight = freeze_weight(joined, precision, **options)
        group = cls(weight, list(sizes or of_modules), list(modules), joined.new_empty(0))
        for linear, view in zip(linears, joined.split(of_modules), strict=True):
            keep = view if precision in ("bf16", "fp32") else joined.new_empty(0)
            linear.weight = nn.Parameter(keep, requires_grad=False)
        group.look_up()
        return group

    @property
    def _joined(self) -> bool:
        return len(self.modules) < len(self.sizes)

    def look_up(self) -> None:
        """Find the active adapters and allocate their buffers. Raises ValueError for a rank above
        ``MOST_RANK``."""
        self.adapters = [adapter_of(m) for m in self.modules]
        self.generation += 1
        ranks = [a[0].shape[0] for a in self.adapters if a is not None]
        rank = padded_rank(max(ranks)) if ranks else 0
        if rank > MOST_RANK:
            raise ValueError(f"rank {max(ranks)} is above {MOST_RANK}")
        if rank == self.rank:
            return
        n, k = self.weight.shape
        self.rank = rank
        self.a = self.like.new_zeros(len(self.sizes) * rank, k) if rank else None
        self.b = self.like.new_zeros(n, rank) if rank else None

    def widen(self) -> None:
        """Copy ``b`` to the diagonal of ``wide_b``, so that one product gives the adapters' terms
        of all parts; ``wide_a`` is ``a``. ``wide_b`` does not follow later changes of ``b``."""
        self.wide_a = self.a
        if self.b is None or len(self.sizes) == 1:
            self.wide_b = self.b
            return
        width = len(self.sizes) * self.rank
        if self.wide_b is None or self.wide_b.shape[1] != width:
            self.wide_b = self.b.new_zeros(len(self.b), width)
        parts = enumerate(zip(self.b.split(self.sizes), self.wide_b.split(self.sizes), strict=True))
        for i, (rows, wide) in parts:
            wide[:, i * self.rank : (i + 1) * self.rank] = rows

    @torch.no_grad()
    def hold(self, names: Sequence[str]) -> None:
        """Fill ``wide_a`` and ``wide_b`` with all adapters of these names instead, one behind the
        other in T: of adapter n the n-th of as many equal parts. Later changes are not followed."""
        found = [[adapter_of(m, name) for m in self.modules] for name in names]
        ranks = [x[0].shape[0] for adapters in found for x in adapters if x is not None]
        self.wide_a = self.wide_b = None
        if not ranks:
            return
        (n, k), rank, parts = self.weight.shape, padded_rank(max(ranks)), len(self.sizes)
        a = self.like.new_zeros(len(names), parts, rank, k)
        b = self.like.new_zeros(n, len(names), parts, rank)
        for at, adapters in enumerate(found):
            each = self._split(adapters[0]) if self._joined else adapters
            for part, (rows, adapter) in enumerate(zip(b.split(self.sizes), each, strict=True)):
                if adapter is not None:
                    its_a, its_b, scaling = adapter
                    a[at, part, : len(its_a)] = its_a
                    rows[:, at, part, : len(its_a)] = its_b
                    rows[:, at, part] *= scaling
        self.wide_a, self.wide_b = a.flatten(0, 2), b.flatten(1)

    def slots(self) -> Iterator[tuple[Tensor, Tensor, Adapter | None]]:
        """Yields the places in ``a`` and ``b`` of each part's active adapter, with the adapter, and
        the rows and columns that no adapter fills, with None."""
        if self.a is None or self.b is None:
            return
        adapters = self._split(self.adapters[0]) if self._joined else self.adapters
        for i, (rows, adapter) in enumerate(
            zip(torch.split(self.b, self.sizes), adapters, strict=True)
        ):
            r = 0 if adapter is None else adapter[0].shape[0]
            mine = self.a[i * self.rank : (i + 1) * self.rank]
            if adapter is not None:
                yield mine[:r], rows[:, :r], adapter
            if r < self.rank:
                yield mine[r:], rows[:, r:], None

    def _split(self, adapter: Adapter | None) -> list[Any]:
        """The adapter of one joined linear, split by part: each has its rows of B."""
        if adapter is None:
            return [None] * len(self.sizes)
        a, b, scaling = adapter
        return [(a, rows, scaling) for rows in b.detach().split(self.sizes)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for adapter in self.adapters if adapter is not None for p in adapter[:2]]

    def gradients(self, da: Tensor | None, db: Tensor | None) -> list[Tensor | None]:
        """da [G*R, K], db [N, G*R] (only its diagonal blocks are read) -> gradients in the order of
        ``parameters``."""
        if self._joined:
            return self._joined_gradients(da, db)
        grads: list[Tensor | None] = []
        start = 0
        for i, (size, adapter) in enumerate(zip(self.sizes, self.adapters, strict=True)):
            if adapter is not None and da is not None and db is not None:
                a, b, scaling = adapter
                at, r = i * self.rank, a.shape[0]
                grads.append(da[at : at + r].to(a.dtype))
                grads.append((db[start : start + size, at : at + r] * scaling).to(b.dtype))
            start += size
        return grads

    def _joined_gradients(self, da: Tensor | None, db: Tensor | None) -> list[Tensor | None]:
        adapter = self.adapters[0]
        if adapter is None or da is None or db is None:
            return []
        a, b, scaling = adapter
        r = a.shape[0]
        of_a = da.unflatten(0, (len(self.sizes), -1))[:, :r].sum(0)
        blocks = enumerate(db.split(self.sizes))
        of_b = torch.cat([rows[:, i * self.rank : i * self.rank + r] for i, rows in blocks])
        return [of_a.to(a.dtype), (of_b * scaling).to(b.dtype)]


@torch.no_grad()
def refresh(groups: Sequence[Group]) -> None:
    """Finds the active adapters and copies them into the groups' buffers, in four launches for the
    whole model. An adapter that PEFT has switched off counts as none.

    A backward pass needs the buffers of its own forward: see ``validate_latest``."""
    for group in groups:
        group.look_up()
    slots = [slot for group in groups for slot in group.slots()]
    filled = [(a, b, adapter) for a, b, adapter in slots if adapter is not None]
    if empty := [x for a, b, adapter in slots if adapter is None for x in (a, b)]:
        torch._foreach_zero_(empty)
    if filled:
        b_slots = [b for _, b, _ in filled]
        torch._foreach_copy_([a for a, _, _ in filled], [a.data for _, _, (a, _, _) in filled])
        torch._foreach_copy_(b_slots, [b.data for _, _, (_, b, _) in filled])
        torch._foreach_mul_(b_slots, [scaling for _, _, (_, _, scaling) in filled])


def validate_latest(group: Group, generation: int) -> None:
    """Raises RuntimeError where a backward pass follows another forward than its own: the adapters
    that its forward used are then no longer in the buffers."""
    if group.generation != generation:
        raise RuntimeError(
            "another forward pass came between a forward pass and its backward pass, and took its "
            "adapters' place: run passes without a gradient before the one with"
        )


def outer(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x summed over tokens, in fp32: [M, N], [M, K] -> [N, K]."""
    if dy.is_cuda and dy.dtype != torch.float32:
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return torch.mm(dy.t(), x).float()


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight) -> Tensor:
        ctx.weight = weight
        if weight.column_scale is None:
            return weight.forward(x, None)
        x8, scale, _ = operations(x.device).quantise_rows(x, None, None)
        return weight.forward(x8, scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        weight, dy = ctx.weight, dy.contiguous()
        if weight.column_scale is None:
            return weight.backward(dy, None), None
        d8, scale, _ = operations(dy.device).quantise_rows(dy, weight.column_scale, None)
        return weight.backward(d8, scale), None


def frozen_linear(x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
    """x [..., K] -> x W^T + bias [..., N]; the gradient goes to x only."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = _FrozenProduct.apply(flat, weight)  # type: ignore[no-untyped-call]
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias
