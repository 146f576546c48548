"""A step of decoding through the fused layers: adapters looked up once for many steps, and on a GPU
one launch for the whole model, as a graph that was captured for a number of rows.
"""

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
    """The part of a model whose layers are fused; None where none is."""
    return next((m for m in model.modules() if getattr(m, "fast_layers", None)), None)


class ActiveAdapters:
    """Which adapters the fused layers compute by while tokens are decoded. Any forward pass that is
    no such step looks them up by itself."""

    def __init__(self, model: nn.Module, tower: Any) -> None:
        self._tower = tower
        self._groups = [group for fast in tower.fast_layers for group in fast.groups]
        self._places: list[Tensor | None] = []
        self._first = next((m for m in model.modules() if isinstance(m, BaseTunerLayer)), None)

    def look_up(self) -> bool:
        """Copies those that are active now, if they are not yet there; True where they are in other
        places than at the call before, which a graph does not know."""
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
    """Marks the layers that decode by trainer/kernels/step_layer.py, after a layer of each kind was
    compared with its twin on this device; True where all do."""
    layers: list[FastLayer] = tower.fast_layers
    if not hasattr(tower, "steps_trusted"):
        # products of few rows are summed in parts: not in bf16, as no training's product is
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
    # a card that lacks the memory or the instructions: Triton's errors share no class
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
    """`compute(last, n)` -> logits of the first n rows, captured for numbers of rows that are
    powers of two, or `most`. Rows beyond those that are asked for are computed too: what they then
    hold must not matter. The logits are overwritten by the next step. Who computes is not held
    here: it holds the graphs, and both must go when it does."""

    def __init__(self, most: int, tower: Any) -> None:
        self._most, self._tower = most, tower
        self._made: dict[int, _Graph] = {}

    def step(self, compute: Callable[[Tensor, int], Tensor], last: Tensor) -> Tensor:
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
        if n not in self._tower.stepped:  # what is made at a first call is made now
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                compute(given, n)
            torch.cuda.current_stream().wait_stream(beside)
            self._tower.stepped.add(n)
        graph = torch.cuda.CUDAGraph()
        # a thread that reads data may meanwhile ask for memory
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = compute(given, n)
        return _Graph(graph, given, logits)
