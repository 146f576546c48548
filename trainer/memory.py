"""Pure: how much GPU memory a training needs, before any weight is loaded. No torch: ops uses it to
choose cards.

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
from typing import Any, Literal

from trainer import families
from trainer.families import EXPERT_RANK, Family, FamilyError, whole

GIB = 1024**3

MARGIN = 0.05  # share of the predicted peak that must stay free
# what training cannot have of the total that torch reports: the CUDA context, and gaps between the
# allocator's blocks
RESERVED_GIB = 1.0

DROPOUT = ", dropout"  # follows the name of a method that trains with lora_dropout

_CONSTANT_GIB = 0.10  # cuBLAS workspaces, position tables, the batch itself
_NCCL_GIB = 0.4
_LOGITS_PER_CHUNK = 2**26  # trainer/model/loss.py
_MEAN_ROW = 200  # tokens of a row, assumed where the data is not known
_FLASH_ROUND = 128  # flash attention's backward rounds each document up to so many rows
_NF4_BYTES = 0.5 + 4 / 64  # half a byte, and an fp32 scale for 64 values
# lora_dropout's random keys take so many bytes for each feature of the widest input, for a moment
_DROPOUT_BYTES = 28
# a checkpointed layer takes this share of its time once more (bench/results/bench.jsonl: 14,559
# against 20,254 tokens/s)
_RECOMPUTED = 0.38
# a micro-batch costs as much as this many tokens more: launches, small matrix products
_LAUNCH_TOKENS = 400

_EXPERT_RANKS = 8  # of an expert's adapter in products: padded to whole 16 bytes

Targets = list[str] | tuple[str, ...] | Literal["all-linear"]


@dataclass(frozen=True)
class Mixture:
    """The experts of a decoder, and what stands beside them."""

    experts: int
    active: int  # experts that one token meets
    width: int  # intermediate size of one expert
    gated: bool  # an expert has gate and up, else up alone
    dense_layers: int  # layers that have an MLP in the experts' place
    shared: int  # width of the experts that every token meets, 0 for none
    others_adapted: bool  # whether dense and shared parts can have adapters
    lean: bool = False  # whether the trainer's own function computes them, which keeps little

    @classmethod
    def of(cls, family: Family) -> Mixture:
        """Raises ValueError naming what config.json lacks."""
        config = family.config
        width = whole(config, "moe_intermediate_size", "expert_ffn_hidden_size", "ffn_dim")
        width = width or _need(config, "intermediate_size")
        active = _need(config, "num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
        shared = whole(
            config,
            "shared_expert_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
        )
        if shared is None:
            shared = width * (whole(config, "n_shared_experts", "num_shared_experts") or 0)
        layers = family.layers
        dense = whole(config, "first_k_dense_replace", "num_dense_layers") or 0
        kinds = config.get("layers_block_type")
        if isinstance(kinds, list) and "moe" in kinds:  # one thing a layer
            dense = layers - kinds.count("moe")
        return cls(
            family.experts,
            active,
            width,
            any("gate" in name for name in family.row["experts"]),
            min(dense, layers),
            shared,
            any(m in family.row["dense"] for m in family.all_linear().modules),
            family.fused and family.row["stored"] == "plain",
        )

    def weights(self, hidden: int) -> int:
        """Parameters of one layer's experts."""
        return self.experts * self.width * hidden * (3 if self.gated else 2)

    def adapter(self, hidden: int, r: int) -> int:
        """Parameters of the adapters of rank r on one layer's experts."""
        up = (2 if self.gated else 1) * self.width
        return self.experts * r * (hidden + up + self.width + hidden)

    def kept_lean(self, hidden: int) -> int:
        """The same of experts that keep gate and up alone, with what orders the pairs and chooses
        the experts; and the states that go in."""
        pairs = self.active * (2 * (2 * self.width + 2 * _EXPERT_RANKS) + 40)
        return pairs + 2 * hidden + 4 + 10 * self.experts

    def kept(self, hidden: int) -> int:
        """Bytes that a layer keeps of a token: for each expert that it meets what goes in, what
        comes out of both products, and the activation's parts, in bf16."""
        return self.active * (2 * (2 * hidden + 5 * self.width) + 24)


@dataclass(frozen=True)
class Shape:
    """A decoder's dimensions, as its config.json tells them."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool = False  # the head is the embedding
    gated: bool = True  # gate and up projections (SwiGLU), else one fc (GPT-2)
    qkv_bias: bool = False
    other_bias: bool = False  # whether all other linear layers and the norms have a bias
    qk_norm: bool = False
    positions: int = 0  # number of learned position embeddings
    fused: bool = True  # whether the fused layer knows this class
    norms: int = 2  # norms of the residual stream in a layer
    # linear modules of a layer where they are not q, k, v, o, gate, up, down: name, inputs, outputs
    modules: tuple[tuple[str, int, int], ...] = ()
    mixture: Mixture | None = None
    state_bytes: int = 0  # bytes a token that a layer with a state keeps beside its linears
    other_parameters: int = 0  # what the sizes above miss of the whole; negative: they exceed it

    def __post_init__(self) -> None:
        """From JSON too: a mixture as a dict, modules as lists."""
        if isinstance(self.mixture, dict):
            object.__setattr__(self, "mixture", Mixture(**self.mixture))
        object.__setattr__(self, "modules", tuple((n, i, o) for n, i, o in self.modules))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Shape:
        """From a parsed config.json. Raises ValueError naming what is missing."""
        try:
            family: Family | None = families.read(config)
        except FamilyError:  # not for training, or ChatGLM before it is converted
            family = None
        config = config.get("text_config") or config if family is None else family.config
        kind = str(config.get("model_type", ""))
        if kind == "gpt2":
            return cls._from_gpt2(config)
        hidden, heads = _need(config, "hidden_size"), _need(config, "num_attention_heads")
        plain = cls(
            vocab=_need(config, "padded_vocab_size", "vocab_size"),
            hidden=hidden,
            layers=_need(config, "num_hidden_layers", "num_layers"),
            heads=heads,
            kv_heads=whole(config, "num_key_value_heads", "multi_query_group_num") or heads,
            head_dim=whole(config, "head_dim", "kv_channels") or hidden // heads,
            intermediate=_width(config),
            tied=bool(config.get("tie_word_embeddings", kind.startswith("gemma"))),
            qkv_bias=bool(
                config.get("attention_bias")
                or config.get("add_qkv_bias")
                or kind.startswith("qwen2")
            ),
            other_bias=False,
            qk_norm=family.row["qk_norm"] != "none" if family else kind.startswith("qwen3"),
            # ChatGLM is converted to Llama's layer
            fused=family.fused if family else kind in ("", "chatglm"),
            norms=4 if family and family.row["norms"] == "before and after" else 2,
        )
        if family is None:
            return plain
        mixture = Mixture.of(family) if family.mixture else None
        state = _state_bytes(config) if family.row["state"] else 0
        made = replace(plain, mixture=mixture, state_bytes=state)
        return replace(made, modules=_modules(made, family))

    @classmethod
    def _from_gpt2(cls, config: dict[str, Any]) -> Shape:
        hidden, heads = _need(config, "n_embd"), _need(config, "n_head")
        return cls(
            vocab=_need(config, "vocab_size"),
            hidden=hidden,
            layers=_need(config, "n_layer"),
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            intermediate=whole(config, "n_inner") or 4 * hidden,
            tied=bool(config.get("tie_word_embeddings", True)),
            gated=False,
            qkv_bias=True,
            other_bias=True,
            positions=_need(config, "n_positions"),
        )

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    def linears(self) -> dict[str, tuple[int, int]]:
        """One layer's linear modules by the name that PEFT matches: (inputs, outputs)."""
        h, f, q, kv = self.hidden, self.intermediate, self.q_size, self.kv_size
        if self.modules:
            return {name: (i, o) for name, i, o in self.modules}
        if not self.gated:
            return {
                "attn.c_attn": (h, q + 2 * kv),
                "attn.c_proj": (q, h),
                "mlp.c_fc": (h, f),
                "mlp.c_proj": (f, h),
            }
        attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
        return attention | {"gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}

    def groups(self) -> dict[str, tuple[int, int]]:
        """A gated layer's linears as the fused path joins those of one input: (inputs, outputs)."""
        h, f, q, kv = self.hidden, self.intermediate, self.q_size, self.kv_size
        return {"qkv": (h, q + 2 * kv), "o": (q, h), "gate_up": (h, 2 * f), "down": (f, h)}

    def targeted(self, target_modules: Targets) -> dict[str, tuple[int, int]]:
        """The linear modules of one layer that get an adapter. Raises ValueError when a name
        matches none."""
        linears = self.linears()
        if target_modules == "all-linear":
            return linears
        chosen = {
            n: s
            for n, s in linears.items()
            if n in target_modules or n.split(".")[-1] in target_modules
        }
        unknown = [
            t for t in target_modules if not any(t in (n, n.split(".")[-1]) for n in linears)
        ]
        if unknown:
            raise ValueError(
                f"target_modules: {', '.join(unknown)} is not among {', '.join(linears)}"
            )
        return chosen


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


MLP_NAMES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "w1", "w2", "w3")


EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")


def needed_gib(peak_gib: float) -> float:
    """The capacity that a predicted peak asks for: a margin for our own error, and what CUDA takes
    for itself."""
    return peak_gib * (1 + MARGIN) + RESERVED_GIB


def linear_parameters(shape: Shape) -> int:
    """Weights of all layers' linear modules and experts, without biases."""
    return _outside_experts(shape) + _in_experts(shape)


def active_parameters(shape: Shape) -> int:
    """Weights that one token meets in matrix products, the head's apart: of a mixture the experts
    that it is sent to."""
    return _outside_experts(shape) + active_in_experts(shape)


def active_in_experts(shape: Shape) -> int:
    """Of these the experts' part."""
    m = shape.mixture
    return 0 if m is None else _in_experts(shape) * m.active // m.experts


def _outside_experts(shape: Shape) -> int:
    sizes = shape.linears()
    if shape.mixture is None:
        return shape.layers * sum(i * o for i, o in sizes.values())
    m, h = shape.mixture, shape.hidden
    mlp = {n for n in sizes if n in MLP_NAMES}
    attention = sum(i * o for n, (i, o) in sizes.items() if n not in mlp)
    dense = sum(i * o for n, (i, o) in sizes.items() if n in mlp)
    shared = 3 * h * m.shared + h * m.experts  # and the router
    return (
        shape.layers * attention + m.dense_layers * dense + (shape.layers - m.dense_layers) * shared
    )


def _sparse(shape: Shape) -> int:
    """Layers with experts."""
    return 0 if shape.mixture is None else shape.layers - shape.mixture.dense_layers


def _in_experts(shape: Shape) -> int:
    m = shape.mixture
    return 0 if m is None else (shape.layers - m.dense_layers) * m.weights(shape.hidden)


def parameters(shape: Shape) -> int:
    """All parameters of the base model, as `model.num_parameters()` counts them (a tied head
    once)."""
    embeddings = (shape.vocab * (1 if shape.tied else 2) + shape.positions) * shape.hidden
    norms = (shape.norms * shape.layers + 1) * shape.hidden * (2 if shape.other_bias else 1)
    norms += shape.layers * 2 * shape.head_dim if shape.qk_norm else 0
    biases = shape.layers * (shape.q_size + 2 * shape.kv_size) if shape.qkv_bias else 0
    if shape.other_bias:
        qkv = {"q_proj", "k_proj", "v_proj", "attn.c_attn"}
        biases += shape.layers * sum(o for n, (_, o) in shape.linears().items() if n not in qkv)
    return linear_parameters(shape) + embeddings + norms + biases + shape.other_parameters


def adapter_parameters(shape: Shape, r: int, target_modules: Targets = "all-linear") -> int:
    """Weights of a LoRA adapter: r rows of A and r columns of B for each targeted module, and the
    experts' at their own rank."""
    m, h = shape.mixture, shape.hidden
    if m is None:
        return shape.layers * sum(r * (i + o) for i, o in shape.targeted(target_modules).values())
    named = target_modules != "all-linear"
    outside = [t for t in target_modules if t not in families.EXPERT_PARTS] if named else []
    chosen = shape.targeted(outside if named else "all-linear")
    attention = sum(r * (i + o) for n, (i, o) in chosen.items() if n not in MLP_NAMES)
    total = shape.layers * attention
    sparse = shape.layers - m.dense_layers
    if not named or len(outside) < len(target_modules):
        total += sparse * m.adapter(h, min(r, EXPERT_RANK))
    if m.others_adapted and not named:
        dense = sum(r * (i + o) for n, (i, o) in chosen.items() if n in MLP_NAMES)
        total += m.dense_layers * dense + sparse * (3 * r * (h + m.shared) if m.shared else 0)
    return total


def saved_parameters(shape: Shape, saved: tuple[str, ...]) -> int:
    """Weights of whole modules that train beside an adapter: embeddings, head, linears, norms."""
    outside, linears, total = shape.vocab * shape.hidden, shape.linears(), 0
    for name in saved:
        last = name.split(".")[-1]
        if last in EMBEDDINGS:
            total += outside
        elif last in linears:
            total += shape.layers * linears[last][0] * linears[last][1]
        else:
            total += shape.layers * shape.hidden
    return total


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
) -> Memory:
    """The peak of one GPU for one micro-batch of `tokens_per_micro_batch` packed tokens in
    `documents` rows, of which `targets` (left out: all) meet the head.

    `method` is as `method_of` gives it. `trainable_layers` counts for "freeze". `fused` None: where
    the fused layer takes the model. `keep_transpose` is FP8's faster form. With several `processes`
    NCCL's own buffers count, which torch does not report, and method "full" is shared among them.
    On the one base `adapters` are trained, and `frozen_adapters` held beside them; `saved` are the
    modules that train whole beside an adapter. The first layers are the checkpointed ones: when
    backward reaches them, what the last ones kept is gone, so one layer made again counts only
    where no layer kept anything. Below the layers that "freeze" trains nothing is kept. Raises
    ValueError for unknown precisions, methods, modules.
    """
    _validate_precision(precision)
    tokens, element = tokens_per_micro_batch, 4 if precision == "fp32" or method == "full" else 2
    fused = takes_fused_layer(shape, precision, r, method) if fused is None else fused
    rows = max(1, tokens // _MEAN_ROW) if documents is None else documents
    each = _trained(shape, method, r, target_modules, trainable_layers)
    trained, beside = (adapters * (n + saved_parameters(shape, saved)) for n in each)
    weights = _weight_bytes(shape, precision, element, fused, keep_transpose)
    held = adapter_parameters(shape, r, target_modules) if frozen_adapters else 0
    adapter: float = 4 * (trained + beside + frozen_adapters * held)
    if fused:
        adapter += (adapters + frozen_adapters) * _padded_copies(shape, r, target_modules, element)
    optimizer: float = trained * 8
    if method == "full" and processes > 1:  # trainer/loop/sharded.py: each has a part of all
        weights, adapter = (x / processes + _gathered_bytes(shape) for x in (weights, adapter))
        optimizer /= processes
    loss = _loss_fused(shape, tokens, tokens if targets is None else targets, element)
    if fused:
        layer = _kept_fused(shape, r, element)
        passing = _passing_fused(shape, precision, tokens, rows, element, keep_transpose)
    else:
        layer = _kept_plain(shape, method, precision, r)
        passing = _passing_plain(shape, precision, method, tokens, element)
        loss += _head_gradient(shape) if method == "full" or "lm_head" in saved else 0
        weights += _mixed_copies(shape, method, precision, trained)
    learning = min(trainable_layers, shape.layers) if method == "freeze" else shape.layers
    whole = min(learning, shape.layers - checkpointed_layers)  # layers that keep all they need
    stored = tokens * (whole * layer + (learning - whole + 1) * element * shape.hidden)
    passing += tokens * layer if whole == 0 else 0
    found = _summed((weights, adapter, optimizer, stored, loss, passing), processes)
    return _with_lines(found, shape, precision, trained, tokens, checkpointed_layers)


def _validate_precision(precision: str) -> None:
    if precision not in _LINEAR_BYTES:
        raise ValueError(f"precision {precision!r} is none of {', '.join(_LINEAR_BYTES)}")


def _summed(parts: tuple[float, float, float, float, float, float], processes: int) -> Memory:
    """Bytes of each part, in the order of `Memory` -> their peak."""
    w, a, o, s, lo, p = (x / GIB for x in parts)
    constant = _CONSTANT_GIB + (_NCCL_GIB if processes > 1 else 0)
    return Memory(w, a, o, s, lo, p, w + a + o + s + max(lo, p) + constant, ())


def _head_gradient(shape: Shape) -> int:
    """Bytes of the head's gradient, and of a chunk's."""
    return 8 * shape.vocab * shape.hidden


def _gathered_bytes(shape: Shape) -> int:
    """What a process of a sharded model holds whole for a while: what lies outside the layers, and
    two layers."""
    linear = linear_parameters(shape)
    return 4 * (parameters(shape) - linear + 2 * linear // shape.layers)


def _passing_plain(shape: Shape, precision: str, method: str, tokens: int, element: int) -> float:
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


def takes_fused_layer(shape: Shape, precision: str, r: int, method: str) -> bool:
    """Whether trainer/kernels/patch.py patches in the fused layer."""
    plain = (
        shape.gated
        and shape.fused
        and not shape.other_bias
        and shape.head_dim in (32, 64, 128, 256, 512)
    )
    return plain and method == "lora" and r <= 64 and precision != "int8"


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


_LINEAR_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "nf4": _NF4_BYTES, "int8": 1.0}


def _need(config: dict[str, Any], *names: str) -> int:
    value = whole(config, *names)
    if not value:
        raise ValueError(
            f"config.json (model_type {config.get('model_type', 'unknown')!r}) has no "
            f"{' or '.join(names)}"
        )
    return value


def _width(config: dict[str, Any]) -> int:
    """Of the MLP: the widest where layers differ, an expert's where there are only experts."""
    return _need(config, "intermediate_size", "ffn_hidden_size", "moe_intermediate_size")


def _modules(shape: Shape, family: Family) -> tuple[tuple[str, int, int], ...]:
    """The linear modules of a family that are not q, k, v, o, gate, up and down."""
    row, config = family.row, family.config
    h, f, q, kv = shape.hidden, shape.intermediate, shape.q_size, shape.kv_size
    up, down = (h, f), (f, h)
    sizes = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "gate_up_proj": (h, 2 * f)}
    sizes |= dict.fromkeys(("qkv_proj", "query_key_value"), (h, q + 2 * kv))
    sizes |= dict.fromkeys(("o_proj", "dense", "out_proj", "self_attn.out_proj"), (q, h))
    sizes |= dict.fromkeys(("gate_proj", "up_proj", "fc1", "c_fc", "w1", "w3", "dense_h_to_4h"), up)
    sizes |= dict.fromkeys(("down_proj", "fc2", "c_proj", "w2", "dense_4h_to_h"), down)
    if row["gate"] and "q_proj" in row["attention"]:
        sizes["q_proj"] = (h, 2 * q)
    sizes |= _latent(config, h)
    names = [*row["attention"], *row["dense"]]
    if names == [*families.default("attention"), *families.default("dense")] and not row["gate"]:
        return ()
    if "q_a_proj" in names and "q_a_proj" in sizes:
        names = [n for n in names if n != "q_proj"]
    return tuple((n, *sizes[n]) for n in names if n in sizes)


def _latent(config: dict[str, Any], h: int) -> dict[str, tuple[int, int]]:
    """The projections of latent attention (MLA)."""
    latent = whole(config, "kv_lora_rank")
    if not latent:
        return {}
    heads = _need(config, "num_attention_heads")
    rope = whole(config, "qk_rope_head_dim") or 64
    nope, v = whole(config, "qk_nope_head_dim") or 128, whole(config, "v_head_dim") or 128
    q = heads * (nope + rope)
    rank = whole(config, "q_lora_rank")
    queries = {"q_a_proj": (h, rank), "q_b_proj": (rank, q)} if rank else {"q_proj": (h, q)}
    return {
        **queries,
        "kv_a_proj_with_mqa": (h, latent + rope),
        "kv_b_proj": (latent, heads * (nope + v)),
        "o_proj": (heads * v, h),
    }


def _state_bytes(config: dict[str, Any]) -> int:
    """What a gated delta net keeps of a token in transformers' own code, in fp32: q, k, v for every
    head some six times over, and matrices of a chunk of 64 tokens. Reckoned, not measured."""
    heads = whole(config, "linear_num_value_heads") or 0
    keys, values = (whole(config, n) or 0 for n in _HEAD_DIMS)
    return 24 * heads * (2 * keys + values) + 24 * 64 * heads


_HEAD_DIMS = ("linear_key_head_dim", "linear_value_head_dim")


def _trained(
    shape: Shape, method: str, r: int, targets: Targets, trainable_layers: int
) -> tuple[int, int]:
    """How many values are trained, and how many of them are an adapter's own copy beside the
    weights."""
    if method.removesuffix(DROPOUT) in ("lora", "dora"):
        adapter = adapter_parameters(shape, r, targets)
        return adapter, adapter
    if method == "full":
        return parameters(shape), 0
    if method == "freeze":
        return min(trainable_layers, shape.layers) * linear_parameters(shape) // shape.layers, 0
    raise ValueError(f"method {method!r} is none of lora, dora, full, freeze")


def _weight_bytes(
    shape: Shape, precision: str, element: int, fused: bool, keep_transpose: bool
) -> float:
    linear = _outside_experts(shape)  # experts stay as they were loaded
    each = (
        float(element)
        if precision in ("fp32", "bf16")
        else _LINEAR_BYTES[precision] + (precision == "fp8" and keep_transpose)
    )
    scales = (
        4 * shape.layers * sum(o for _, o in shape.linears().values())
        if precision in ("fp8", "int8")
        else 0
    )
    # one buffer, never given back
    scratch = _unpacked(shape, precision, joined=True) if precision == "nf4" and fused else 0
    return linear * each + (parameters(shape) - linear) * element + scales + scratch


def _padded_copies(shape: Shape, r: int, targets: Targets, element: int) -> int:
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
    if shape.mixture is not None and shape.mixture.lean:
        kept = _sparse(shape) * shape.mixture.adapter(shape.hidden, _EXPERT_RANKS)
        return shape.layers * sum(sizes) * rank * element + kept * element
    return shape.layers * sum(sizes) * rank * element


_JOINED = {
    "qkv": {"q_proj", "k_proj", "v_proj", "qkv_proj"},
    "o": {"o_proj"},
    "gate_up": {"gate_proj", "up_proj", "gate_up_proj"},
    "down": {"down_proj"},
}


def _padded_rank(r: int) -> int:
    return max(16, 1 << (r - 1).bit_length())


def _kept_fused(shape: Shape, r: int, element: int) -> float:
    """What a layer keeps of one token: its input, q k v, attention's output, the middle of the
    stream, gate and up, seven inner products with A, the branches where these have norms;
    attention's log-sum for each head and the norms' in fp32."""
    h, f, q, kv = shape.hidden, shape.intermediate, shape.q_size, shape.kv_size
    if shape.mixture is not None:
        return (
            element * (2 * h + 2 * q + 2 * kv + 4 * _padded_rank(r))
            + 4 * (shape.heads + 1)
            + (shape.mixture.kept_lean(h) if shape.mixture.lean else 0)
        )
    streams = shape.norms * h
    inner = 2 * q + 2 * kv + 2 * f + 7 * _padded_rank(r)
    return element * (streams + inner) + 4 * (shape.heads + shape.norms)


def _kept_plain(shape: Shape, method: str, precision: str, r: int) -> float:
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


def _mixed_copies(shape: Shape, method: str, precision: str, trained: int) -> float:
    """The bf16 copies of linears that train, which mixed precision holds from forward to
    backward."""
    if precision == "fp32" or method not in ("full", "freeze"):
        return 0.0
    # freeze: as measured
    return (3.0 if method == "freeze" else 2.0) * min(trained, linear_parameters(shape))


def _loss_fused(shape: Shape, tokens: int, targets: int, element: int) -> float:
    """The final norm's input and output, the targets' states and their gradient; then logits: the
    next chunk's beside the last one's and its gradient."""
    rows = max(16, _LOGITS_PER_CHUNK // shape.vocab)
    logits = min(targets, rows) * (4 + element) + min(max(targets - rows, 0), rows) * 4
    return 2 * (tokens + targets) * element * shape.hidden + logits * shape.vocab


def _passing_fused(
    shape: Shape, precision: str, tokens: int, documents: int, element: int, keep_transpose: bool
) -> float:
    """The most that one layer's backward holds beside what was kept: in attention's own backward,
    in the rotation after it, or around gate and up. FP8 adds casts of a byte, and the transposed
    weight where it is made on the fly."""
    h, f, q, kv = shape.hidden, shape.intermediate, shape.q_size, shape.kv_size
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
    mlp = tokens * (element * (h + f) + cast * (h + 2 * f))
    if (m := shape.mixture) is not None:
        cast = 0  # experts stay as they were loaded
        mlp = tokens * (element * m.active * (3 * h + 4 * m.width) if m.lean else 2 * m.kept(h))
    on_the_fly = cast and not keep_transpose
    return max(flash, rotate + on_the_fly * h * (q + 2 * kv), mlp + on_the_fly * 2 * h * f)


def _unpacked(shape: Shape, precision: str, joined: bool) -> float:
    """The largest weight unpacked to two bytes for its product, where it is held quantised."""
    sizes = shape.groups() if joined and shape.gated else shape.linears()
    return (
        2.0 * max(i * o for i, o in sizes.values()) if precision in ("fp8", "nf4", "int8") else 0.0
    )


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

    if fits(0):
        return 0
    if not fits(shape.layers):
        return None
    # low does not fit, high does; one checkpointed layer may cost more than it saves, never two
    low, high = 0, shape.layers
    while high - low > 1:
        middle = math.ceil((low + high) / 2)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
