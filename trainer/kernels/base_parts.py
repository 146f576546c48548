"""The frozen base in parts over several processes, beside an adapter that each of them holds whole:
of the frozen matrices of every decoder layer each of N processes keeps 1/N.

A layer's matrices are gathered before its forward pass, and again before its backward pass, which
recomputes it; they lie in one of two buffers, while those of the next layer are gathered into the
other. Frozen weights have no gradient, so nothing is summed here. Gathering is collective: all
processes make the same passes, in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.variable import Variable

from trainer.kernels.decoder_layer import FastLayer
from trainer.kernels.frozen import DenseWeight
from trainer.kernels.lora import Group, base_linear

ALIGNED = 128  # elements: where a matrix may begin in a buffer
BUFFERS = 2
# its name since torch 2.13, and before
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Matrix:
    """A frozen matrix, or several that are joined, of one shape; `put` lets the layer read it from
    a tensor of that shape, and from nothing where the tensor is empty."""

    shape: torch.Size
    start: int  # in the layer's row of elements
    put: Callable[[Tensor], None]


@dataclass
class LayerParts:
    matrices: list[Matrix]
    size: int  # elements of the layer, a multiple of the number of processes
    part: Tensor  # this process's


class BaseParts:
    """This process's parts of a base's decoder layers. In this order: `share` each module that was
    placed, `cut` each layer, `attach` to the model."""

    def __init__(self, device: torch.device, rank: int, world: int) -> None:
        self.device, self.rank, self.world = device, rank, world
        self.most_bytes = 0  # of parts, buffers and the layer that is cut, at any time
        self._parts: dict[int, LayerParts] = {}  # by the layer's id
        self.layers: list[LayerParts] = []  # in the model's order
        self._buffers: list[Tensor] = []
        self._held: list[int | None] = [None] * BUFFERS  # the layer that a buffer has or awaits
        self._under_way: list[Any] = [None] * BUFFERS  # the gather that fills it
        self._open: int | None = None  # the layer that reads its buffer

    # -- from a whole model to parts ---------------------------------------------------------------

    @torch.no_grad()
    def share(self, module: nn.Module) -> None:
        """Gives all processes what process 0 has in the module's own parameters and buffers, which
        lie on the device. Collective."""
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            dist.broadcast(tensor.data, 0)

    @torch.no_grad()
    def place(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        """Shares a model whose weights process 0 has in host memory, and the others on the meta
        device, and cuts its decoder layers one after the other. Collective."""
        of_layers = {id(m) for layer in layers for m in layer.modules()}
        for module in model.modules():
            if id(module) not in of_layers:
                self._bring(module)
        for layer in layers:
            for module in layer.modules():
                self._bring(module)
            self.cut(layer)

    def _bring(self, module: nn.Module) -> None:
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(t.is_meta for t in own):
            module.to_empty(device=self.device, recurse=False)
        else:
            module._apply(lambda t: t.to(self.device), recurse=False)
        self.share(module)

    @torch.no_grad()
    def cut(self, layer: nn.Module, fast: FastLayer | None = None) -> None:
        """Keeps this process's part of the layer's frozen matrices; `fast` is its fused form. The
        layer cannot compute until `attach`."""
        found = [*_joined(fast)] if fast is not None else []
        taken = {id(p) for _, _, parameters in found for p in parameters}
        found += [
            _single(p)
            for name, p in layer.named_parameters()
            if id(p) not in taken and _is_base(name, p)
        ]
        start, matrices = 0, []
        for tensor, put, _ in found:
            matrices.append(Matrix(tensor.shape, start, put))
            start += -(-tensor.numel() // ALIGNED) * ALIGNED
        size = -(-start // (ALIGNED * self.world)) * ALIGNED * self.world
        each = size // self.world
        part = found[0][0].new_zeros(each)
        for matrix, (tensor, _, _) in zip(matrices, found, strict=True):
            begin = max(matrix.start, self.rank * each)
            end = min(matrix.start + tensor.numel(), (self.rank + 1) * each)
            if begin < end:
                some = tensor.reshape(-1)[begin - matrix.start : end - matrix.start]
                part[begin - self.rank * each : end - self.rank * each] = some
        self.most_bytes = max(self.most_bytes, self.held_bytes + _bytes(size, part))
        for matrix in matrices:
            matrix.put(part.new_empty(0))
        self._parts[id(layer)] = LayerParts(matrices, size, part)

    def attach(self, layers: nn.ModuleList) -> None:
        """Lets the decoder layers, which recompute their forward pass in the backward pass, gather
        what they compute with."""
        self.layers = [self._parts[id(layer)] for layer in layers]
        most = max(layer.size for layer in self.layers)
        like = self.layers[0].part
        self._buffers = [like.new_empty(most) for _ in range(BUFFERS)]
        self.most_bytes = max(self.most_bytes, self.held_bytes)
        for number, layer in enumerate(layers):
            layer.forward = _gathering(self, number, layer.forward)

    @property
    def held_bytes(self) -> int:
        """Of this process's parts and of the buffers."""
        parts = sum(_bytes(p.part.numel(), p.part) for p in self._parts.values())
        return parts + sum(_bytes(b.numel(), b) for b in self._buffers)

    # -- a pass ------------------------------------------------------------------------------------

    def open(self, number: int, then: int) -> None:
        """Lets layer `number` read its matrices, and begins to gather those of layer `then`, if
        there is one. Collective."""
        self.close()
        self._begin(number)
        at = number % BUFFERS
        if self._under_way[at] is not None:
            self._under_way[at].wait()
            self._under_way[at] = None
        for matrix in self.layers[number].matrices:
            stop = matrix.start + matrix.shape.numel()
            matrix.put(self._buffers[at][matrix.start : stop].view(matrix.shape))
        self._open = number
        if 0 <= then < len(self.layers):
            self._begin(then)

    def _begin(self, number: int) -> None:
        """What was launched before this has read the buffer when it is filled: NCCL's stream waits
        for it."""
        at = number % BUFFERS
        if self._held[at] == number:
            return
        if self._under_way[at] is not None:
            self._under_way[at].wait()
        layer = self.layers[number]
        whole = self._buffers[at][: layer.size]
        self._under_way[at] = _gather(whole, layer.part, async_op=True)
        self._held[at] = number

    def close(self) -> None:
        """Lets no layer read a buffer."""
        if self._open is not None:
            for matrix in self.layers[self._open].matrices:
                matrix.put(self._buffers[0][:0])
        self._open = None


class _Backward(torch.autograd.Function):
    """A layer's output as it is. Its gradient is the first thing that the layer's backward pass
    meets."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, parts: BaseParts, number: int) -> Tensor:
        ctx.parts, ctx.number = parts, number
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        ctx.parts.open(ctx.number, ctx.number - 1)
        if ctx.number == 0:
            Variable._execution_engine.queue_callback(ctx.parts.close)
        return dout, None, None


def _gathering(
    parts: BaseParts, number: int, forward: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    def gathered(*args: Any, **kwargs: Any) -> Tensor:
        parts.open(number, number + 1)
        out = forward(*args, **kwargs)
        parts.close()
        if torch.is_grad_enabled() and out.requires_grad:
            out = _Backward.apply(out, parts, number)  # type: ignore[no-untyped-call]
        return out

    return gathered


_Found = tuple[Tensor, Callable[[Tensor], None], list[Tensor]]


def _joined(fast: FastLayer) -> Iterable[_Found]:
    """(weight, what takes its place, the parameters that are views of it) of each group."""
    groups = [*fast.groups, *(fast.beside.groups if fast.beside is not None else [])]
    return [_of_group(group) for group in groups]


def _of_group(group: Group) -> _Found:
    weight, linears = group.weight, [base_linear(m) for m in group.modules]
    assert isinstance(weight, DenseWeight), "quantised weights are not kept in parts"
    rows = [x.out_features for x in linears]

    def put(tensor: Tensor) -> None:
        weight.weight = tensor
        views = tensor.split(rows) if tensor.numel() else [tensor] * len(rows)
        for linear, view in zip(linears, views, strict=True):
            linear.weight.data = view

    return weight.weight, put, [x.weight for x in linears]


def _single(parameter: nn.Parameter) -> _Found:
    def put(tensor: Tensor) -> None:
        parameter.data = tensor

    return parameter.data, put, [parameter]


def _is_base(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix, or the matrices of all experts."""
    matrix = parameter.dim() == 2 or (parameter.dim() == 3 and ".experts." in name)
    return matrix and not parameter.requires_grad


def _bytes(elements: int, like: Tensor) -> int:
    return elements * like.element_size()
