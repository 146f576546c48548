"""Pure: what each GPU can do, and an estimate of its training speed in tokens a second.

Peak rates are NVIDIA's datasheet figures: dense (no sparsity), FP32 accumulation, GeForce at its
halved tensor rate. `gemm` is the share of the peak that large matrix products reach: measured on
the H200 (685 to 787 of 989 TFLOP/s in bf16, 1,393 to 1,540 of 1,979 in FP8); for the other cards an
estimate from their power limit, to be replaced when somebody measures one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from trainer import memory
from trainer.memory import Shape


@dataclass(frozen=True)
class Gpu:
    """One kind of card. `name` is vast.ai's spelling. `memory_gib` is what the driver reports, not
    the nominal size. Rates are of one GPU."""

    name: str
    memory_gib: float
    compute_capability: float
    bf16_tflops: float  # before Ampere: of fp16
    fp8_tflops: float  # 0: no FP8 units
    memory_gb_s: float
    gemm: float
    known: bool = True  # False: guessed from vast.ai's own benchmark


GPUS: tuple[Gpu, ...] = (
    Gpu("RTX 3060", 12.0, 8.6, 25.5, 0, 360, 0.90),
    Gpu("RTX 3080", 10.0, 8.6, 59.5, 0, 760, 0.90),
    Gpu("RTX 3080 Ti", 12.0, 8.6, 68.2, 0, 912, 0.90),
    Gpu("RTX 3090", 24.0, 8.6, 71.2, 0, 936, 0.90),
    Gpu("RTX 3090 Ti", 24.0, 8.6, 80.0, 0, 1008, 0.90),
    Gpu("RTX 4060 Ti", 16.0, 8.9, 44.1, 88.3, 288, 0.90),
    Gpu("RTX 4070 Ti", 12.0, 8.9, 80.2, 160.4, 504, 0.90),
    Gpu("RTX 4070S Ti", 16.0, 8.9, 88.2, 176.4, 672, 0.90),
    Gpu("RTX 4080", 16.0, 8.9, 97.5, 195.0, 717, 0.90),
    Gpu("RTX 4080S", 16.0, 8.9, 104.4, 208.9, 736, 0.90),
    Gpu("RTX 4090", 24.0, 8.9, 165.2, 330.3, 1008, 0.90),
    Gpu("RTX 4090D", 24.0, 8.9, 147.1, 294.2, 1008, 0.90),
    Gpu("RTX 5060 Ti", 16.0, 12.0, 47.4, 94.9, 448, 0.90),
    Gpu("RTX 5070 Ti", 16.0, 12.0, 87.9, 175.8, 896, 0.90),
    Gpu("RTX 5080", 16.0, 12.0, 112.6, 225.1, 960, 0.90),
    Gpu("RTX 5090", 31.8, 12.0, 209.5, 419.0, 1792, 0.90),
    Gpu("RTX A4000", 16.0, 8.6, 76.7, 0, 448, 0.75),
    Gpu("RTX A4500", 20.0, 8.6, 94.6, 0, 640, 0.75),
    Gpu("RTX A5000", 24.0, 8.6, 111.1, 0, 768, 0.75),
    Gpu("RTX A6000", 48.0, 8.6, 154.8, 0, 768, 0.75),
    Gpu("RTX 4000Ada", 20.0, 8.9, 106.9, 213.8, 360, 0.65),
    Gpu("RTX 4500Ada", 24.0, 8.9, 158.6, 317.2, 432, 0.65),
    Gpu("RTX 5000Ada", 32.0, 8.9, 261.1, 522.1, 576, 0.65),
    Gpu("RTX 6000Ada", 48.0, 8.9, 364.2, 728.5, 960, 0.65),
    Gpu("RTX PRO 6000 S", 95.6, 12.0, 480.0, 960.0, 1597, 0.70),
    Gpu("RTX PRO 6000 WS", 95.6, 12.0, 503.8, 1007.6, 1792, 0.70),
    Gpu("Tesla V100", 15.8, 7.0, 112.0, 0, 900, 0.50),
    Gpu("Tesla V100", 31.7, 7.0, 112.0, 0, 900, 0.50),
    Gpu("RTX 2080 Ti", 11.0, 7.5, 53.8, 0, 616, 0.50),
    Gpu("Titan RTX", 24.0, 7.5, 130.5, 0, 672, 0.50),
    Gpu("Q RTX 6000", 24.0, 7.5, 130.5, 0, 672, 0.50),
    Gpu("Q RTX 8000", 48.0, 7.5, 130.5, 0, 672, 0.50),
    Gpu("Tesla T4", 15.0, 7.5, 65.0, 0, 320, 0.50),
    Gpu("A10", 22.5, 8.6, 125.0, 0, 600, 0.55),
    Gpu("L4", 22.5, 8.9, 121.0, 242.0, 300, 0.55),
    Gpu("A40", 45.0, 8.6, 149.7, 0, 696, 0.75),
    Gpu("L40", 45.0, 8.9, 181.0, 362.0, 864, 0.75),
    Gpu("L40S", 45.0, 8.9, 362.0, 733.0, 864, 0.62),
    Gpu("A100 PCIE", 40.0, 8.0, 312.0, 0, 1555, 0.75),
    Gpu("A100 PCIE", 80.0, 8.0, 312.0, 0, 1935, 0.75),
    Gpu("A100 SXM4", 40.0, 8.0, 312.0, 0, 1555, 0.80),
    Gpu("A100 SXM4", 80.0, 8.0, 312.0, 0, 2039, 0.80),
    Gpu("A800 PCIE", 80.0, 8.0, 312.0, 0, 1935, 0.75),
    Gpu("H100 PCIE", 79.6, 9.0, 756.0, 1513.0, 2039, 0.65),
    Gpu("H100 NVL", 93.6, 9.0, 835.0, 1671.0, 3938, 0.70),
    Gpu("H100 SXM", 79.6, 9.0, 989.0, 1979.0, 3350, 0.744),
    Gpu("GH200 SXM", 95.6, 9.0, 989.0, 1979.0, 4000, 0.744),
    Gpu("H200 NVL", 140.4, 9.0, 835.0, 1671.0, 4800, 0.70),
    Gpu("H200", 140.4, 9.0, 989.0, 1979.0, 4800, 0.744),
    Gpu("B200", 179.1, 10.0, 2250.0, 4500.0, 8000, 0.70),
    Gpu("B300", 268.6, 10.3, 2250.0, 4500.0, 8000, 0.70),
)

AMPERE = 8.0  # the first with bf16, with torch's flash attention and Triton's kernels
MIN_COMPUTE_CAPABILITY = {
    "fp32": 7.0,
    "bf16": AMPERE,
    "fp16": 7.0,
    "fp8": 8.9,
    "nf4": AMPERE,
    "int8": AMPERE,
}
# on a card that the job names: before Ampere nf4 and int8 compute in fp16
MIN_WHERE_NAMED = MIN_COMPUTE_CAPABILITY | {"nf4": 7.0, "int8": 7.5}

# Calibrated on bench/results/families.jsonl of 2026-11-26, one H200, LoRA r = 16 on all linears.
# A token's time less matrix products and attention is element-wise work, bound by memory. These are
# its bytes in a layer: per norm and column of the stream, per column of q, k, v, and per column of
# the MLP. All dense rows are within 4 percent of the estimate.
_STREAM_BYTES, _HEADS_BYTES, _MLP_BYTES = 57.0, 36.0, 72.0
# bytes per column of a gated delta net's joined projection: the rule's matrices and states
# (Qwen3.5-9B of 2026-11-27, bf16 and FP8)
_DELTA_BYTES = 165.0
# factor of transformers' own layers: Qwen3-8B 6.4, Gemma-3-4B 5.5, full training 4.8
_PLAIN = 5.5
# bytes of a (token, expert) pair per column of the stream and of the expert: with gate and up saved
# (Qwen3-30B-A3B), all saved, all recomputed (gpt-oss)
_PAIR_BYTES = {"lean": 66.0, "plain": 240.0, "remade": 170.0}
_GROUPED = 0.7  # share of the rate of large matrix products that grouped ones reach
# time of experts' products in FP8 and NF4 against bf16: they unpack the weights of all experts in
# each pass (12 layers of Qwen3-30B-A3B on an H200, 16,384 tokens a pass)
_UNPACKED = {"nf4": 1.35, "fp8": 1.4}
_TARGETS = 0.7  # share of tokens that the head computes, always in bf16
# without a shape: bytes for each of hidden x layers, as in a Llama
_ELEMENTWISE_BYTES = 430.0
# share of a layer's cost that checkpointing adds: forward without its last product and the head
_RECOMPUTED = 0.38
# time of matrix products against bf16 (fp8: against its own peak)
_GEMM_COST = {"fp32": 4.0, "bf16": 1.0, "fp16": 1.0, "fp8": 1.0, "nf4": 1.04, "int8": 3.0}
_ATTENTION = 0.55  # share of the rate of large matrix products that attention reaches
# RTX 5090: 209.5 TFLOP/s at DLPerf 142; RTX 4090: 165 at 95; the lower of the two
_DLPERF_TO_BF16_TFLOPS = 1.5
_PARALLEL_LOSS = 0.03  # per doubling of GPUs: an all-reduce of the adapter's gradients each step


@lru_cache(maxsize=1024)
def plain(name: str) -> str:
    """A GPU's name without the differences between spellings: case, spaces, dashes, underscores,
    the vendor."""
    return re.sub(r"[\s_\-]|NVIDIA|GEFORCE", "", name.upper())


def find(name: str, memory_gib: float = 0.0) -> Gpu | None:
    """The table's row for a name in any spelling; of several sizes the one nearest to `memory_gib`.
    None when unknown."""
    same = [g for g in GPUS if plain(g.name) == plain(name)]
    return min(same, key=lambda g: abs(g.memory_gib - memory_gib)) if same else None


_SOCKETS = ("PCIE", "SXM", "NVL")


def meant(name: str) -> list[str]:
    """vast.ai's names for a name that a user wrote: "4090" is an RTX 4090, "H100" each card of that
    family. A name that the table lacks is returned as it is: the market may have it."""
    if known := find(name) or find(f"RTX {name}") or find(f"Tesla {name}"):
        return [known.name]
    family = [
        g.name
        for g in GPUS
        if plain(g.name).startswith(plain(name))
        and plain(g.name).removeprefix(plain(name)).startswith(_SOCKETS)
    ]
    return list(dict.fromkeys(family)) or [name]


def all_meant(names: Iterable[str]) -> list[str]:
    """vast.ai's names for all names that a user wrote, each once."""
    return list(dict.fromkeys(m for name in names for m in meant(name)))


def like(name: str) -> list[str]:
    """Known names that resemble `name`, nearest first, for an error message."""
    known = {plain(g.name): g.name for g in GPUS}
    prefixed = [n for p, n in known.items() if p.startswith(plain(name)) and plain(name)]
    close = [known[p] for p in difflib.get_close_matches(plain(name), known, 3, 0.6)]
    return list(dict.fromkeys(prefixed + close))


def that_hold(memory_gib: float, precision: str = "bf16") -> list[Gpu]:
    """The cards with at least `memory_gib` that support `precision`, smallest and then slowest
    first: the first is the suggestion when the requested card is too small."""
    minimum = MIN_COMPUTE_CAPABILITY[precision]
    fits = [g for g in GPUS if g.memory_gib >= memory_gib and g.compute_capability >= minimum]
    return sorted(fits, key=lambda g: (g.memory_gib, g.bf16_tflops))


def from_benchmark(
    name: str, memory_gib: float, compute_capability: float, dlperf: float, memory_gb_s: float
) -> Gpu | None:
    """An estimate of a card that the table lacks, from vast.ai's DLPerf of one GPU. None without
    DLPerf."""
    if dlperf <= 0:
        return None
    tflops = _DLPERF_TO_BF16_TFLOPS * dlperf
    fp8 = 2 * tflops if compute_capability >= MIN_COMPUTE_CAPABILITY["fp8"] else 0.0
    return Gpu(
        name,
        memory_gib,
        compute_capability,
        tflops,
        fp8,
        memory_gb_s or 6 * tflops,
        0.7,
        known=False,
    )


def tokens_per_second(
    gpu: Gpu,
    precision: str,
    model_parameters: float,
    shape: Shape | None = None,
    recomputed: float = 0.0,
    num_gpus: int = 1,
    full: bool = False,
    row_tokens: float = 340.0,
    fused: bool | None = None,
) -> float:
    """Real tokens a second of training on packed rows, all GPUs together; 0 when the card lacks the
    precision.

    LoRA takes 4 N FLOPs a token: 2 N forward, 2 N for the gradients of activations, none for frozen
    weights; `full` takes 2 N more. `recomputed` is the share of layers that are checkpointed.
    `row_tokens` is the length of the row that the mean token is in: causal attention costs 7 of
    them x the queries' width x layers. `shape` gives N, in a mixture the active part; without a
    shape N is `model_parameters`, and the rest follows the Llama family. `fused`: whether the
    trainer's own layers compute; None: where they support the family."""
    peak = gpu.fp8_tflops if precision == "fp8" else gpu.bf16_tflops
    if peak <= 0:
        return 0.0
    rate, work = gpu.gemm * 1e12, 6 if full else 4
    each = work * _GEMM_COST[precision] / (rate * peak)
    wide = each * peak / gpu.bf16_tflops  # of the products that stay in bf16
    if shape is None:
        hidden_layers = 131_072 * (model_parameters / 6.74e9) ** (2 / 3)
        gemm_s, heads_layers = each * model_parameters, hidden_layers
        moved = _ELEMENTWISE_BYTES * hidden_layers
    else:
        if fused is None:
            fused = not full and memory.takes_fused_layer(shape, precision, 16, "lora")
        active, experts = memory.active_parameters(shape), memory.active_in_experts(shape)
        head = _TARGETS * shape.vocab * shape.hidden
        unpacked = _UNPACKED[precision] if memory.holds_experts(shape, precision) else 1.0
        grouped = unpacked * experts / _GROUPED
        gemm_s = each * (active - experts) + wide * (grouped + head)
        heads_layers = shape.q_size * shape.attending
        moved = _elementwise_bytes(shape, fused)
    attention_s = 7 * row_tokens * heads_layers / (rate * gpu.bf16_tflops * _ATTENTION)
    token_s = gemm_s + attention_s + moved / (gpu.memory_gb_s * 1e9)
    scaling = (1 - _PARALLEL_LOSS) ** (num_gpus.bit_length() - 1)
    speed: float = num_gpus * scaling / (token_s * (1 + recomputed * _RECOMPUTED))
    return speed


def _elementwise_bytes(shape: Shape, fused: bool) -> float:
    """Memory traffic in bytes of one token through all layers, forward and backward, beside the
    matrix products."""
    m = shape.mixture
    stream = _STREAM_BYTES * shape.norms * shape.hidden
    heads = _HEADS_BYTES * (shape.q_size + 2 * shape.kv_size)
    dense = shape.layers if m is None else m.dense_layers
    moved = shape.layers * stream + shape.attending * heads
    moved += dense * _MLP_BYTES * shape.intermediate
    if shape.delta is not None:
        moved += shape.delta.layers * _DELTA_BYTES * shape.delta.joined
    moved *= 1.0 if fused else _PLAIN
    if m is not None:
        way = "lean" if fused and m.lean else "remade" if fused else "plain"
        pairs = (shape.layers - dense) * m.active
        moved += pairs * _PAIR_BYTES[way] * (shape.hidden + m.width)
    return moved
