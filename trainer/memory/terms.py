"""The bytes of each part of the peak, counted tensor by tensor."""

from __future__ import annotations

from trainer import families
from trainer.memory.counts import (
    linear_parameters,
    outside_experts,
    parameters,
    sparse_layers,
)
from trainer.memory.shape import PADDED_EXPERT_RANK, DeltaNets, Shape, Targets

DROPOUT = ", dropout"  # follows the name of a method that trains with lora_dropout
_LOGITS_PER_CHUNK, _TILE = 2**26, 128  # trainer/model/loss.py
_FLASH_ROUND = 128  # flash attention's backward rounds each document up to so many rows
_NF4_BYTES = 0.5 + 4 / 64  # half a byte, and an fp32 scale for 64 values
# lora_dropout's random keys take so many bytes for each feature of the widest input, for a moment
_DROPOUT_BYTES = 28


def head_gradient(shape: Shape) -> int:
    """Bytes of the head's gradient, and of a chunk's."""
    return 8 * shape.vocab * shape.hidden


def gathered_bytes(shape: Shape) -> int:
    """What a process of a sharded model holds whole for a while: what lies outside the layers, and
    two layers."""
    linear = linear_parameters(shape)
    return 4 * (parameters(shape) - linear + 2 * linear // shape.layers)


def weights_in_parts(shape: Shape, weights: float, element: int, processes: int) -> float:
    """Of a frozen base whose weights are so many bytes, what a process holds that keeps a part of
    the layers, and two layers whole: one computes while the next is gathered."""
    layers = linear_parameters(shape) * element
    return weights - layers + layers / processes + 2 * layers / shape.layers


def passing_plain(shape: Shape, precision: str, method: str, tokens: int, element: int) -> float:
    """Bytes that one layer's backward in transformers' own code holds for a while."""
    wide = shape.intermediate
    if shape.mixture is not None:
        wide = shape.mixture.active * shape.mixture.width
    passing = tokens * element * (3 * wide + 3 * shape.hidden) + _unpacked(
        shape, precision, joined=False
    )
    if method.startswith("dora"):
        # a weight with its adapter added, and its norm
        passing += 16 * max(i * o for i, o in shape.linears().values())
    if method.endswith(DROPOUT):
        passing = max(passing, tokens * _DROPOUT_BYTES * shape.intermediate)
    return passing


LINEAR_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "nf4": _NF4_BYTES, "int8": 1.0}


def weight_bytes(
    shape: Shape, precision: str, element: int, fused: bool, keep_transpose: bool
) -> float:
    linear = outside_experts(shape)
    if held := holds_experts(shape, precision):
        linear = linear_parameters(shape)
    each = (
        float(element)
        if precision in ("fp32", "bf16", "fp16")
        else LINEAR_BYTES[precision] + (precision == "fp8" and keep_transpose)
    )
    scales = (
        4 * sum(shape.count(n) * o for n, (_, o) in shape.linears().items())
        if precision in ("fp8", "int8")
        else 0
    )
    # one buffer, never given back
    scratch = _unpacked(shape, precision, joined=True) if precision == "nf4" and fused else 0.0
    if held and (m := shape.mixture) is not None:
        scales += 4 * sparse_layers(shape) * m.outputs(shape.hidden) * (precision == "fp8")
        scratch = max(scratch, float(element * m.widest(shape.hidden)))
    return linear * each + (parameters(shape) - linear) * element + scales + scratch


def holds_experts(shape: Shape, precision: str) -> bool:
    """Whether the experts are held in this precision; else they stay as they were loaded."""
    return shape.mixture is not None and shape.mixture.held and precision in ("fp8", "nf4")


def padded_copies(shape: Shape, r: int, targets: Targets, element: int) -> int:
    """The fused path's copies of A and B in the compute dtype: ranks padded, zeros for a linear
    without one beside others."""
    outside = [t for t in targets if t not in families.EXPERT_PARTS]
    named = targets if shape.mixture is None or targets == "all-linear" else outside
    rank, names = _padded_rank(r), set(shape.targeted(named))
    parts = {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}
    groups = shape.groups()
    if shape.mixture is not None:  # the experts' copies are made in each pass, and kept
        groups = {g: groups[g] for g in ("qkv", "o")}
    sizes = [parts[g] * i + o for g, (i, o) in groups.items() if names & _JOINED[g]]
    total = shape.layers * sum(sizes)
    if (d := shape.delta) is not None:
        mixers = [parts[g] * i + o for g, (i, o) in groups.items() if g in ("qkv", "o")]
        total -= d.layers * sum(mixers)
        if names & set(d.linears(0)):
            total += d.layers * (4 * shape.hidden + d.joined + d.wide + shape.hidden)
    kept = 0
    if shape.mixture is not None and shape.mixture.lean:
        kept = sparse_layers(shape) * shape.mixture.adapter(shape.hidden, PADDED_EXPERT_RANK)
    return total * rank * element + kept * element


_JOINED = {
    "qkv": {"q_proj", "k_proj", "v_proj", "qkv_proj"},
    "o": {"o_proj"},
    "gate_up": {"gate_proj", "up_proj", "gate_up_proj"},
    "down": {"down_proj"},
}


def _padded_rank(r: int) -> int:
    return max(16, 1 << (r - 1).bit_length())


def kept_fused(shape: Shape, r: int, element: int) -> float:
    """What a layer keeps of one token: its input, what its mixer keeps, the middle of the stream,
    gate and up, the inner products with A, the branches where these have norms; the norms' numbers
    in fp32. Where layers are of two kinds, their mean."""
    h, f, rank = shape.hidden, shape.intermediate, _padded_rank(r)
    share = shape.attending / shape.layers
    mixer = _attention_keeps(shape, rank, element)
    if shape.delta is not None:
        mixer += (1 - share) * _delta_keeps(shape.delta, rank, element)
    if (m := shape.mixture) is not None:
        experts = m.kept_lean(h) if m.lean else 0
        beside = element * (2 * m.shared + h + 3 * rank) if m.shared and m.lean else 0
        return mixer + element * 2 * h + 4 + experts + beside
    return mixer + element * (shape.norms * h + 2 * f + 3 * rank) + 4 * shape.norms


def _attention_keeps(shape: Shape, rank: int, element: int) -> float:
    """q k v, the gate, attention's output and its log-sum for each head, what A made; a mean over
    all layers."""
    columns = sum(
        n * ((3 if shape.gate else 2) * q + 2 * kv) for n, q, kv in shape.attention_sizes()
    )
    rest = element * 4 * rank + 4 * shape.heads
    return (element * columns + shape.attending * rest) / shape.layers


def _delta_keeps(nets: DeltaNets, rank: int, element: int) -> float:
    """The joined projection, the rule's output, the systems of chunks of 64, sums of decays, what A
    made."""
    systems = 64 * nets.values
    return element * (nets.joined + nets.wide + systems + 5 * rank) + 4 * nets.values


def kept_plain(shape: Shape, method: str, precision: str, r: int) -> float:
    """What a layer of transformers and PEFT keeps of one token, in bytes: fp32 copies in the norms,
    q k v, attention's output, gate, up and their product; with LoRA an fp32 copy of each linear's
    input, with dropout its mask; with DoRA each linear's output besides."""
    h, f, q, kv = shape.hidden, shape.intermediate, shape.q_size, shape.kv_size
    more: float = shape.state_bytes + 10 * h * (shape.norms - 2)  # a norm keeps fp32 copies
    more += 10 * (q + kv) if shape.qk_norm else 0
    if shape.mixture is not None:
        dense = shape.mixture.dense_layers / shape.layers
        more += (1 - dense) * (shape.mixture.kept(h) + 10 * shape.mixture.shared)
        f = round(dense * f)
    return more + _kept_of_llama(shape, f, method, precision, r)


def kept_without_flash(shape: Shape) -> float:
    """What attention document by document keeps of one token in a layer beside what flash attention
    does, in bytes: a copy of each head of k and v for every head of q, and its output twice."""
    q, kv = shape.q_size, shape.kv_size
    return shape.attending / shape.layers * 2 * (q if kv == q else 3 * q)


def _kept_of_llama(shape: Shape, f: int, method: str, precision: str, r: int) -> float:
    """The part that Llama's layers have too, whose MLP is `f` wide."""
    h, q, kv = shape.hidden, shape.q_size, shape.kv_size
    if precision == "fp32":
        return 68 * h + 16 * f
    # mixed precision; the stream between layers is fp32 where the embeddings are
    if method in ("full", "freeze"):
        return (28 if method == "full" else 24) * h + 4 * q + 4 * kv + 8 * f + 4 * shape.heads + 8
    kept, dora = (
        28 * h + 8 * q + 4 * kv + 10 * f + 28 * r + 4 * shape.heads + 8,
        method.startswith("dora"),
    )
    if dora:
        kept += 14 * h + 4 * q + 12 * kv + 12 * f
    return (
        kept if not method.endswith(DROPOUT) else kept + (16 * h + 5 * f if dora else 5 * h + q + f)
    )


def mixed_copies(shape: Shape, method: str, precision: str, trained: int) -> float:
    """The bf16 copies of linears that train, which mixed precision holds from forward to
    backward."""
    if precision == "fp32" or method not in ("full", "freeze"):
        return 0.0
    # freeze: as measured
    return (3.0 if method == "freeze" else 2.0) * min(trained, linear_parameters(shape))


def loss_fused(shape: Shape, tokens: int, targets: int, element: int) -> float:
    """The final norm's input and output, the targets' states and their gradient; then logits: the
    next chunk's beside the last one's and its gradient."""
    rows = max(16, _LOGITS_PER_CHUNK // shape.vocab)
    rows -= rows % _TILE if rows > _TILE else 0
    logits = min(targets, rows) * (4 + element) + min(max(targets - rows, 0), rows) * 4
    return 2 * (tokens + targets) * element * shape.hidden + logits * shape.vocab


def passing_fused(
    shape: Shape, precision: str, tokens: int, documents: int, element: int, keep_transpose: bool
) -> float:
    """The most that one layer's backward holds beside what was kept: in attention's own backward,
    in the rotation after it, or around gate and up. FP8 adds casts of a byte, and the transposed
    weight where it is made on the fly."""
    h, f = shape.hidden, shape.intermediate
    _, q, kv = max(shape.attention_sizes(), key=lambda kind: kind[1])
    cast = 1 if precision == "fp8" else 0
    # the gradients of the output and of the middle, and of attention's output
    streams = element * (2 * h + q)
    rounded = tokens + _FLASH_ROUND * documents
    # grouped heads: k's and v's gradients for every query head first
    expanded = 0 if kv == q else 2 * element * q
    flash = tokens * (streams + element * (q + 2 * kv) + expanded) + rounded * 4 * (q + shape.heads)
    # q and k made again behind their norms
    turned = element if shape.qk_norm else 0
    rotate = tokens * (streams + (2 * element + turned + cast) * (q + 2 * kv))
    flash += tokens * turned * (q + 2 * kv)
    mlp: float = tokens * (element * (h + f) + cast * (h + 2 * f))
    if (m := shape.mixture) is not None:
        cast = 0  # experts compute in bf16
        mlp = tokens * (element * m.active * (3 * h + 4 * m.width) if m.lean else 2 * m.kept(h))
    on_the_fly = cast and not keep_transpose
    if (d := shape.delta) is not None:
        # the rule's backward: q, k, v again, nine matrices as wide as v, the states of all chunks
        # and their gradients, one chunk of 64 more for each document
        states = 2 * element * (tokens / 64 + documents) * d.values * d.key_dim * d.value_dim
        rule = tokens * (element * (h + d.joined + d.mixed + 10 * d.wide)) + states
        mlp = max(mlp, rule)
    return max(flash, rotate + on_the_fly * h * (q + 2 * kv), mlp + on_the_fly * 2 * h * f)


def _unpacked(shape: Shape, precision: str, joined: bool) -> float:
    """The largest weight unpacked to two bytes for its product, where it is held quantised."""
    sizes = shape.groups() if joined and shape.gated else shape.linears()
    return (
        2.0 * max(i * o for i, o in sizes.values()) if precision in ("fp8", "nf4", "int8") else 0.0
    )
