"""The peak of a training, and the cards that hold it.

The peak is what `torch.cuda.max_memory_allocated` will say, in GiB, of one GPU: weights, adapter
with its gradients, optimizer, what layers keep for backward, and the largest passing need: the loss
of one chunk, or one layer's backward.

Two paths, each counted tensor by tensor: the fused layer (trainer/kernels/decoder_layer.py) for
LoRA on the families that it knows (families.toml), and transformers' own forward for the rest.
bench/results/memory-grid.jsonl and memory-plain.jsonl hold what they really took on a GPU; tests
hold the count to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from trainer.memory.counts import (
    adapter_parameters,
    linear_parameters,
    parameters,
    saved_parameters,
)
from trainer.memory.learned import Learned
from trainer.memory.shape import Shape, Targets
from trainer.memory.terms import (
    DROPOUT,
    LINEAR_BYTES,
    gathered_bytes,
    head_gradient,
    kept_fused,
    kept_plain,
    kept_without_flash,
    loss_fused,
    mixed_copies,
    padded_copies,
    passing_fused,
    passing_plain,
    weight_bytes,
    weights_in_parts,
)

CPU_TOKENS = 2048  # of a micro-batch where there is no GPU memory to fill
GIB = 1024**3

MARGIN = 0.05  # share of the predicted peak that must stay free
# what training cannot have of the total that torch reports: the CUDA context, and gaps between the
# allocator's blocks
RESERVED_GIB = 1.0

# what `predict` is told for cards before Ampere
BEFORE_AMPERE: dict[str, bool] = {"fused": False, "flash": False}

_CONSTANT_GIB = 0.10  # cuBLAS workspaces, position tables, the batch itself
_BLOCKS = 1.001  # what is kept lies in blocks of whole pages (bench/results/families.jsonl)
_NCCL_GIB = 0.4
_MEAN_ROW = 200  # tokens of a row, assumed where the data is not known
# a checkpointed layer takes this share of its time once more (bench/results/bench.jsonl: 14,559
# against 20,254 tokens/s)
_RECOMPUTED = 0.38
# a micro-batch costs as much as this many tokens more: launches, small matrix products
_LAUNCH_TOKENS = 400


@dataclass(frozen=True)
class Memory:
    """The predicted peak of one GPU, in GiB, and its parts. `lines` is the arithmetic for
    people."""

    weights_gib: float
    adapter_gib: float  # with its gradients
    optimizer_gib: float
    activations_gib: float  # kept from forward to backward
    logits_gib: float
    workspace_gib: float  # passing needs beside the logits
    peak_gib: float
    lines: tuple[str, ...]

    def fits(self, capacity_gib: float) -> bool:
        """Whether a card of which torch reports `capacity_gib` holds this with the safety
        margin."""
        return needed_gib(self.peak_gib) <= capacity_gib


def needed_gib(peak_gib: float) -> float:
    """The capacity that a predicted peak asks for: a margin for our own error, and what CUDA takes
    for itself."""
    return peak_gib * (1 + MARGIN) + RESERVED_GIB


def predict(
    shape: Shape,
    precision: str = "bf16",
    r: int = 16,
    target_modules: Targets = "all-linear",
    tokens_per_micro_batch: int = 8192,
    checkpointed_layers: int = 0,
    method: str = "lora",
    trainable_layers: int = 2,
    documents: int | None = None,
    targets: int | None = None,
    fused: bool | None = None,
    keep_transpose: bool = False,
    processes: int = 1,
    adapters: int = 1,
    frozen_adapters: int = 0,
    saved: tuple[str, ...] = (),
    learned: Learned | None = None,
    in_parts: bool = False,
    flash: bool | None = None,
) -> Memory:
    """The peak of one GPU for one micro-batch of `tokens_per_micro_batch` packed tokens in
    `documents` rows, of which `targets` (left out: all) meet the head.

    `method` is as `method_of` gives it. `trainable_layers` counts for "freeze". `fused` None: where
    the fused layer takes the model. `flash`: whether torch's flash attention computes; None: but in
    fp16. `keep_transpose` is FP8's faster form. With several `processes` NCCL's own buffers count,
    which torch does not report, and they share what method "full" holds, or with `in_parts` the
    frozen layers (see `base_splits`). On the one base `adapters` are trained, and `frozen_adapters`
    held; `saved` modules train whole beside an adapter, `learned` is a prompt, whose places are
    tokens. The first layers are the checkpointed ones: when backward reaches them, what the last
    ones kept is gone, so one layer made again counts only where no layer kept anything. Below what
    "freeze" trains nothing is kept. Raises ValueError for unknown precision, method, modules."""
    _validate_precision(precision)
    tokens, element = tokens_per_micro_batch, 4 if precision == "fp32" or method == "full" else 2
    fused = takes_fused_layer(shape, precision, r, method) if fused is None else fused
    each = _trained(shape, method, r, target_modules, trainable_layers, learned)
    trained, beside = (adapters * (n + saved_parameters(shape, saved)) for n in each)
    weights = weight_bytes(shape, precision, element, fused, keep_transpose)
    copies = padded_copies(shape, r, target_modules, element) if fused else 0
    frozen = _held(shape, r, target_modules, frozen_adapters)
    adapter = 4.0 * (trained + beside + frozen) + (adapters + frozen_adapters) * copies
    shares = processes if method == "full" or in_parts else 1
    held = _shared(shape, method, element, shares, (weights, adapter, 8.0 * trained))
    loss = loss_fused(shape, tokens, tokens if targets is None else targets, element)
    if fused:
        rows = max(1, tokens // _MEAN_ROW) if documents is None else documents
        layer = kept_fused(shape, r, element)
        passing = passing_fused(shape, precision, tokens, rows, element, keep_transpose)
    else:
        layer = _kept_plain(shape, method, precision, r, learned, element, flash)
        passing = passing_plain(shape, precision, method, tokens, element)
        loss += head_gradient(shape) if method == "full" or "lm_head" in saved else 0
        held = (held[0] + mixed_copies(shape, method, precision, trained), *held[1:])
    learning = min(trainable_layers, shape.layers) if method == "freeze" else shape.layers
    whole = min(learning, shape.layers - checkpointed_layers)  # layers that keep all
    stored = tokens * (whole * layer + (learning - whole + 1) * element * shape.hidden) * _BLOCKS
    passing += tokens * layer if whole == 0 else 0
    found = _summed((*held, stored, loss, passing), processes)
    return _with_lines(found, shape, precision, trained, tokens, checkpointed_layers)


def _shared(
    shape: Shape, method: str, element: int, processes: int, held: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Bytes of weights, of adapters with gradients and of moments that each of `processes`
    holds. Of a model that trains whole it has a part of all (trainer/loop/sharded.py), else of the
    frozen layers (trainer/kernels/base_parts.py)."""
    weights, adapter, optimizer = held
    if processes == 1:
        return held
    if method != "full":
        return weights_in_parts(shape, weights, element, processes), adapter, optimizer
    more = gathered_bytes(shape)
    return weights / processes + more, adapter / processes + more, optimizer / processes


def _held(shape: Shape, r: int, target_modules: Targets, frozen_adapters: int) -> int:
    """Values of adapters that are not trained."""
    each = adapter_parameters(shape, r, target_modules) if frozen_adapters else 0
    return frozen_adapters * each


def _kept_plain(
    shape: Shape,
    method: str,
    precision: str,
    r: int,
    learned: Learned | None,
    element: int,
    flash: bool | None,
) -> float:
    """What a layer of transformers keeps of one token, in bytes."""
    flash = precision != "fp16" if flash is None else flash
    # in fp32 `kept_plain` counts what attention without flash keeps
    more = 0.0 if flash or precision == "fp32" else kept_without_flash(shape)
    if learned is None:
        return more + kept_plain(shape, method, precision, r)
    return more + kept_plain(shape, method, precision, 0) + learned.kept(shape, element)


def _validate_precision(precision: str) -> None:
    if precision not in LINEAR_BYTES:
        raise ValueError(f"precision {precision!r} is none of {', '.join(LINEAR_BYTES)}")


def _summed(parts: tuple[float, float, float, float, float, float], processes: int) -> Memory:
    """Bytes of each part, in the order of `Memory` -> their peak."""
    w, a, o, s, lo, p = (x / GIB for x in parts)
    constant = _CONSTANT_GIB + (_NCCL_GIB if processes > 1 else 0)
    return Memory(w, a, o, s, lo, p, w + a + o + s + max(lo, p) + constant, ())


def _with_lines(
    found: Memory, shape: Shape, precision: str, trained: int, tokens: int, recomputed: int
) -> Memory:
    stored, loss, layer = found.activations_gib, found.logits_gib, found.workspace_gib
    held = found.adapter_gib + found.optimizer_gib
    passing = found.peak_gib - found.weights_gib - held - stored
    lines = (
        f"weights      {found.weights_gib:7.2f} GiB = {parameters(shape) / 1e9:.2f} B parameters, "
        f"the layers' in {precision}",
        f"trained      {held:7.2f} GiB = {trained / 1e6:.1f} M values, their copies, "
        "gradients and two moments",
        f"activations  {stored:7.2f} GiB = {tokens:,} tokens x {stored * GIB / tokens / 1e6:.2f} "
        f"MB, {recomputed} of {shape.layers} layers recomputed",
        f"passing      {passing:7.2f} GiB = the larger of the loss {loss:.2f} and one layer's "
        f"backward {layer:.2f}",
        f"peak         {found.peak_gib:7.2f} GiB; a card needs {needed_gib(found.peak_gib):.1f} "
        "GiB",
    )
    return replace(found, lines=lines)


def method_of(method: str, use_dora: bool = False, lora_dropout: float = 0.0) -> str:
    """A job's method as it is told here: "full", "freeze", "lora" or "dora", the last two with
    DROPOUT behind them where there is any."""
    return (
        method
        if method != "lora"
        else ("dora" if use_dora else "lora") + (DROPOUT if lora_dropout else "")
    )


def base_splits(stage: str, method: str, precision: str) -> bool:
    """Whether several processes can share the frozen layers of a training by this method, as
    `method_of` gives it."""
    learns = stage in ("pt", "sft", "rm", "dpo")
    return learns and method.removesuffix(DROPOUT) == "lora" and precision in ("bf16", "fp32")


def takes_fused_layer(shape: Shape, precision: str, r: int, method: str) -> bool:
    """Whether trainer/kernels/patch.py patches in the fused layer."""
    plain = (
        shape.gated
        and shape.fused
        and not shape.other_bias
        and shape.head_dim in (32, 64, 128, 256, 512)
    )
    return plain and method == "lora" and r <= 64 and precision not in ("int8", "fp16")


def solve(
    shape: Shape,
    capacity_gib: float,
    precision: str = "bf16",
    r: int = 16,
    target_modules: Targets = "all-linear",
    method: str = "lora",
    min_tokens: int = 2048,
    max_tokens: int = 16384,
    **more: Any,
) -> tuple[int, int] | None:
    """The fastest (tokens of a micro-batch, layers to checkpoint) that a card of `capacity_gib`, as
    torch reports its total memory, holds; or None.

    `min_tokens` is the longest row: a micro-batch must hold one. A checkpointed layer is computed
    forward twice, a small micro-batch costs its launches; of all that fits the pair with the least
    time a token wins, never one that does not fit.
    """
    best: tuple[float, int, int] | None = None
    for tokens in _budgets(min_tokens, max_tokens):
        layers = _fewest_checkpointed(
            shape, capacity_gib, precision, r, target_modules, tokens, method, more
        )
        if layers is None:
            continue
        time = (1 + _RECOMPUTED * layers / shape.layers) * (1 + _LAUNCH_TOKENS / tokens)
        if best is None or time < best[0]:
            best = (time, tokens, layers)
    return best and (best[1], best[2])


def min_gpu_memory_gib(
    shape: Shape,
    precision: str = "bf16",
    r: int = 16,
    target_modules: Targets = "all-linear",
    method: str = "lora",
    min_tokens: int = 2048,
    **more: Any,
) -> float:
    """The smallest card, as torch reports it, on which `solve` finds a way: the longest row alone,
    all layers recomputed."""
    smallest = predict(
        shape, precision, r, target_modules, min_tokens, shape.layers, method, **more
    )
    return needed_gib(smallest.peak_gib)


def _trained(
    shape: Shape,
    method: str,
    r: int,
    targets: Targets,
    trainable_layers: int,
    learned: Learned | None,
) -> tuple[int, int]:
    """How many values are trained, and how many of them are an adapter's own copy beside the
    weights."""
    if learned is not None:
        count = learned.parameters(shape)
        return count, count
    if method.removesuffix(DROPOUT) in ("lora", "dora"):
        adapter = adapter_parameters(shape, r, targets)
        return adapter, adapter
    if method == "full":
        return parameters(shape), 0
    if method == "freeze":
        return min(trainable_layers, shape.layers) * linear_parameters(shape) // shape.layers, 0
    raise ValueError(f"method {method!r} is none of lora, dora, full, freeze, and learns no prompt")


def _budgets(min_tokens: int, max_tokens: int) -> list[int]:
    doubled = [2**k for k in range(8, 21) if min_tokens < 2**k < max_tokens]
    return sorted({min_tokens, *doubled, max(min_tokens, max_tokens)}, reverse=True)


def _fewest_checkpointed(
    shape: Shape,
    capacity: float,
    precision: str,
    r: int,
    targets: Targets,
    tokens: int,
    method: str,
    more: dict[str, Any],
) -> int | None:
    def fits(layers: int) -> bool:
        return predict(shape, precision, r, targets, tokens, layers, method, **more).fits(capacity)

    if fits(0) and not more.get("in_parts"):
        return 0
    if not fits(shape.layers):
        return None
    if more.get("in_parts"):
        return shape.layers
    # low does not fit, high does; one checkpointed layer may cost more than it saves, never two
    low, high = 0, shape.layers
    while high - low > 1:
        middle = math.ceil((low + high) / 2)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
