"""Decoding steps through the fused layers. Adapters are looked up once for many steps. On a GPU one
launch runs the whole model, as a CUDA graph captured for a number of rows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from trainer.kernels.decoder_layer import FastLayer
from trainer.kernels.lora import refresh
from trainer.kernels.step_layer import takes_steps
from trainer.kernels.verify import OTHERWISE, TOLERANCE, step_error

log = logging.getLogger(__name__)


def tower_of(model: nn.Module) -> Any:
    """The submodule whose layers are fused, or None."""
    return next((m for m in model.modules() if getattr(m, "fast_layers", None)), None)


class ActiveAdapters:
    """The adapters that the fused layers use while tokens are decoded. Every other forward pass
    looks them up itself."""

    def __init__(self, model: nn.Module, tower: Any) -> None:
        self._tower = tower
        self._groups = [group for fast in tower.fast_layers for group in fast.groups]
        self._places: list[Tensor | None] = []
        self._first = next((m for m in model.modules() if isinstance(m, BaseTunerLayer)), None)

    def look_up(self) -> bool:
        """Copy the active adapters into the layers' buffers, unless they are there already. Returns
        True where the buffers have changed since the last call, so that captured graphs are
        stale."""
        first = self._first
        active = ("",) if first is None else (*first.active_adapters, first.disable_adapters)
        if self._tower.looked_up != active:
            refresh(self._groups)
            for group in self._groups:
                group.widen()
            self._tower.looked_up = active
        before, self._places = self._places, [x for g in self._groups for x in (g.a, g.wide_b)]
        return any(x is not y for x, y in zip(self._places, before, strict=False))


def trust_steps(tower: Any) -> bool:
    """Mark the layers that decode by trainer/kernels/step_layer.py, after comparing one layer of
    each kind with its twin on this device. Returns True where all layers do."""
    layers: list[FastLayer] = tower.fast_layers
    if not hasattr(tower, "steps_trusted"):
        # products of few rows are split sums: keep these in fp32, as in training
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        kinds = {fast.kind: fast for fast in layers if takes_steps(fast)}
        right = {kind: not fast.like.is_cuda or _is_right(fast) for kind, fast in kinds.items()}
        for fast in layers:
            fast.steps = right.get(fast.kind, False)
        tower.looked_up, tower.stepped = None, set()
        tower.steps_trusted = all(f.steps for f in layers) and len(layers) == len(tower.layers)
    return bool(tower.steps_trusted)


def _is_right(fast: FastLayer) -> bool:
    limit = TOLERANCE["fp8"] if fast.qkv.weight.column_scale is not None else OTHERWISE
    try:
        error = step_error(fast)
    # too little memory, no such instruction: Triton's errors share no class
    except Exception as why:
        log.warning("the fused step does not run here (%s: %s)", type(why).__name__, why)
        return False
    if not error < limit:
        log.warning("the fused step's self-test is off by %.4f: not used", error)
    return error < limit


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    last: Tensor
    logits: Tensor


class Graphs:
    """CUDA graphs of one step. `compute(last, n)` returns logits of the first n rows. A graph is
    captured for each n that is a power of two, or `most`; rows beyond those asked for are computed
    too, so their contents must not matter. The next step overwrites the logits. `compute` is passed
    to each call and not stored: its owner holds this object, and both must be freed together."""

    def __init__(self, most: int, tower: Any) -> None:
        self._most, self._tower = most, tower
        self._made: dict[int, _Graph] = {}

    def step(self, compute: Callable[[Tensor, int], Tensor], last: Tensor) -> Tensor:
        """Logits after `last` (rows,) of that many first rows."""
        n = min(self._most, 1 << (len(last) - 1).bit_length())
        if n not in self._made:
            self._made[n] = self._capture(compute, last, n)
        made = self._made[n]
        made.last[: len(last)].copy_(last)
        made.graph.replay()
        return made.logits[: len(last)]

    def _capture(self, compute: Callable[[Tensor, int], Tensor], last: Tensor, n: int) -> _Graph:
        given = last.new_zeros(n)
        given[: len(last)] = last
        if n not in self._tower.stepped:  # warm up: first calls compile and allocate
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                compute(given, n)
            torch.cuda.current_stream().wait_stream(beside)
            self._tower.stepped.add(n)
        graph = torch.cuda.CUDAGraph()
        # a thread that reads data may allocate memory during the capture
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = compute(given, n)
        return _Graph(graph, given, logits)
