"""Decoding steps through the fused layers. Adapters are looked up once for many steps. On a GPU one
launch runs the whole model, as a CUDA graph captured for a number of rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from trainer.kernels.decoder_layer import FastLayer
from trainer.kernels.lora import refresh
from trainer.kernels.step_layer import takes_steps
from trainer.kernels.verify import OTHERWISE, TOLERANCE, step_error

log = logging.getLogger(__name__)


def tower_of(model: nn.Module) -> Any:
    """The submodule whose layers are fused, or None."""
    return next((m for m in model.modules() if getattr(m, "fast_layers", None)), None)


def steps_of(model: nn.Module) -> list[FastLayer]:
    """The layers of the model that decode by trainer/kernels/step_layer.py."""
    tower = tower_of(model)
    if tower is None:
        return []
    trust_steps(tower)
    return [fast for fast in tower.fast_layers if fast.steps]


class HeldAdapters:
    """Several adapters that never change, all of them in the layers' buffers: in a step each row is
    answered by its own. Prefill takes the one that is active in PEFT. An adapter more makes every
    step read its weights; a row without one reads them too, and counts them 0."""

    def __init__(self, tower: Any, names: Sequence[str]) -> None:
        self._at, self._chosen = {name: n for n, name in enumerate(names)}, [""]
        self._groups = [group for fast in tower.fast_layers for group in fast.groups]
        self.like = tower.fast_layers[0].like
        for group in self._groups:
            group.hold(names)
        self.share = self.like.new_zeros(1, len(names))  # [rows, adapters]

    def choose(self, adapters: Sequence[str]) -> None:
        """From now on row n is answered by the adapter ``adapters[n]``; by none where the name is
        not of those held."""
        if list(adapters) == self._chosen:
            return
        self._chosen = list(adapters)
        share = torch.zeros(1 << (len(adapters) - 1).bit_length(), len(self._at))
        for row, name in enumerate(adapters):
            if name in self._at:
                share[row, self._at[name]] = 1.0
        share = share.to(self.like)
        if len(share) > len(self.share):
            self.share = share
        else:
            self.share[: len(share)] = share  # a captured graph reads this place


def hold_adapters(model: nn.Module, names: Sequence[str]) -> HeldAdapters | None:
    """Hold the adapters of these names in the model's fused layers, or return None where a step of
    the model computes some of them elsewhere."""
    tower = tower_of(model)
    if tower is None or not names or not trust_steps(tower):
        return None
    fused = {id(m) for fast in tower.fast_layers for g in fast.groups for m in g.modules}
    layers = [
        m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    if not all(id(m) in fused for m in layers):
        return None
    tower.held = HeldAdapters(tower, names)
    return cast(HeldAdapters, tower.held)


class ActiveAdapters:
    """The adapters that the fused layers use while tokens are decoded. Every other forward pass
    looks them up itself."""

    def __init__(self, model: nn.Module, tower: Any) -> None:
        self._tower = tower
        self._groups = [group for fast in tower.fast_layers for group in fast.groups]
        self._places: list[Tensor | None] = []
        self._active: tuple[Any, ...] | None = None
        self._first = next((m for m in model.modules() if isinstance(m, BaseTunerLayer)), None)

    def look_up(self) -> bool:
        """Copy the active adapters into the layers' buffers, unless they are there already. Returns
        True where buffers, or what is active, have changed since the last call, so that captured
        graphs are stale."""
        if (held := self._held) is not None:
            before, self._places = self._places, [held.share]
            return bool(before) and before[0] is not held.share
        first = self._first
        active = ("",) if first is None else (*first.active_adapters, first.disable_adapters)
        if self._tower.looked_up != active:
            refresh(self._groups)
            for group in self._groups:
                group.widen()
            self._tower.looked_up = active
        before, self._places = self._places, [x for g in self._groups for x in (g.a, g.wide_b)]
        was, self._active = self._active, active
        changed = was is not None and was != active  # adapters of other layers, too
        return changed or any(x is not y for x, y in zip(self._places, before, strict=False))

    @property
    def _held(self) -> HeldAdapters | None:
        held: HeldAdapters | None = getattr(self._tower, "held", None)
        return held

    def share(self, rows: slice | Tensor) -> Tensor | None:
        """[rows, adapters], how much each held adapter counts in these rows; None where the active
        one answers all."""
        return None if self._held is None else self._held.share[rows]


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
