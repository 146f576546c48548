"""A decoder's dimensions as its config.json tells them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from trainer import families
from trainer.families import Family, FamilyError, whole

PADDED_EXPERT_RANK = 8  # of an expert's adapter in products: padded to whole 16 bytes
MLP_NAMES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "w1", "w2", "w3")
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
# that adapters may take although they are no linear of the layers' order; what is not an embedding
# is too small to count
BESIDE = (*EMBEDDINGS, "gate", "router", "per_layer_input_gate", "per_layer_projection")
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
    held: bool = False  # whether FP8 and NF4 hold the experts too

    @classmethod
    def of(cls, family: Family) -> Mixture:
        """The mixture of a family. Raises ValueError naming what config.json lacks."""
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
            family.holds_experts,
        )

    def weights(self, hidden: int) -> int:
        """Parameters of one layer's experts."""
        return self.experts * self.width * hidden * (3 if self.gated else 2)

    def widest(self, hidden: int) -> int:
        """Parameters of all experts in the larger of a layer's two products."""
        return self.experts * self.width * hidden * (2 if self.gated else 1)

    def outputs(self, hidden: int) -> int:
        """Rows of all experts' weights in a layer, each with a scale in FP8."""
        return self.experts * ((2 if self.gated else 1) * self.width + hidden)

    def adapter(self, hidden: int, r: int) -> int:
        """Parameters of the adapters of rank r on one layer's experts."""
        up = (2 if self.gated else 1) * self.width
        return self.experts * r * (hidden + up + self.width + hidden)

    def kept_lean(self, hidden: int) -> int:
        """Bytes that a layer keeps of a token where its experts keep gate and up alone: those, what
        orders the pairs and chooses the experts, and the states that go in."""
        pairs = self.active * (2 * (2 * self.width + 2 * PADDED_EXPERT_RANK) + 40)
        return pairs + 2 * hidden + 4 + 10 * self.experts

    def kept(self, hidden: int) -> int:
        """Bytes that a layer keeps of a token: for each expert that it meets what goes in, what
        comes out of both products, and the activation's parts, in bf16."""
        return self.active * (2 * (2 * hidden + 5 * self.width) + 24)


@dataclass(frozen=True)
class DeltaNets:
    """The layers with a gated delta net in attention's place."""

    layers: int
    keys: int  # heads of q and k
    values: int  # heads of v
    key_dim: int
    value_dim: int
    taps: int  # of the convolution

    @classmethod
    def of(cls, family: Family) -> DeltaNets:
        config = family.config
        kinds = config.get("layer_types")
        every = whole(config, "full_attention_interval") or 4
        layers = family.layers - family.layers // every
        if isinstance(kinds, list):
            layers = kinds.count("linear_attention")
        return cls(
            layers,
            whole(config, "linear_num_key_heads") or 16,
            whole(config, "linear_num_value_heads") or 32,
            whole(config, "linear_key_head_dim") or 128,
            whole(config, "linear_value_head_dim") or 128,
            whole(config, "linear_conv_kernel_dim") or 4,
        )

    @property
    def mixed(self) -> int:
        """Columns of q, k and v, which the convolution mixes."""
        return 2 * self.keys * self.key_dim + self.wide

    @property
    def wide(self) -> int:
        """Columns of v."""
        return self.values * self.value_dim

    @property
    def joined(self) -> int:
        """Columns of all projections of its input."""
        return self.mixed + self.wide + 2 * self.values

    def linears(self, hidden: int) -> dict[str, tuple[int, int]]:
        """Of one layer: (inputs, outputs)."""
        outputs = {"qkv": self.mixed, "z": self.wide, "b": self.values, "a": self.values}
        given = {f"in_proj_{name}": (hidden, n) for name, n in outputs.items()}
        return {**given, "linear_attn.out_proj": (self.wide, hidden)}

    @property
    def others(self) -> int:
        """Parameters of one layer beside its linears."""
        return self.mixed * self.taps + 2 * self.values + self.value_dim


@dataclass(frozen=True)
class WideLayers:
    """Layers whose heads are wider than the others': Gemma 4's that see everything."""

    layers: int
    head_dim: int
    kv_heads: int
    values: bool  # whether they have a v_proj; else values are keys

    @classmethod
    def of(cls, family: Family, kv_heads: int) -> WideLayers | None:
        """None where all heads are as wide. Defaults are those of transformers' own config."""
        config = family.config
        if not str(config.get("model_type", "")).startswith("gemma4"):
            return None
        alike = bool(config.get("attention_k_eq_v"))
        if (own := config.get("per_layer_config")) is not None:  # as transformers 5 writes it
            if not own:
                return None
            first = next(iter(own.values()))
            head_dim, keys = whole(first, "head_dim"), whole(first, "num_key_value_heads")
            return cls(len(own), head_dim or 512, keys or kv_heads, not alike)
        kinds = config.get("layer_types") or []
        full = sum(kind == "full_attention" for kind in kinds) or family.layers // 6
        keys = whole(config, "num_global_key_value_heads") if alike else None
        return cls(full, whole(config, "global_head_dim") or 512, keys or kv_heads, not alike)

    def more_parameters(self, hidden: int, q: int, kv: int, heads: int) -> int:
        """Parameters of their linears beyond those of layers with `q` and `kv` wide projections."""
        keys = self.kv_heads * self.head_dim
        own = 2 * heads * self.head_dim + (2 if self.values else 1) * keys
        return self.layers * hidden * (own - 2 * q - 2 * kv)


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
    delta: DeltaNets | None = None
    gate: bool = False  # attention's output has a gate, beside each head of q_proj
    wide: WideLayers | None = None
    state_bytes: int = 0  # bytes a token that a layer with a state keeps beside its linears
    general: bool = False  # no row tells its linear modules' names
    other_parameters: int = 0  # parameters that the sizes above miss; negative: they count too many

    def __post_init__(self) -> None:
        """From JSON too: a mixture, delta nets and wide layers as dicts, modules as lists."""
        if isinstance(self.mixture, dict):
            object.__setattr__(self, "mixture", Mixture(**self.mixture))
        if isinstance(self.delta, dict):
            object.__setattr__(self, "delta", DeltaNets(**self.delta))
        if isinstance(self.wide, dict):
            object.__setattr__(self, "wide", WideLayers(**self.wide))
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
            layers=(family.layers if family else 0)
            or _need(config, "num_hidden_layers", "num_layers"),
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
            general=bool(family and family.general),
        )
        if family is None:
            return plain
        mixture = Mixture.of(family) if family.mixture else None
        state = _state_bytes(config) if family.row["state"] else 0
        delta = DeltaNets.of(family) if family.row["delta"] else None
        gate = bool(family.row["gate"]) and "q_proj" in family.row["attention"]
        wide = WideLayers.of(family, plain.kv_heads)
        made = replace(plain, mixture=mixture, delta=delta, gate=gate, wide=wide, state_bytes=state)
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

    def attention_sizes(self) -> list[tuple[int, int, int]]:
        """Of each kind of attention: layers, columns of q, columns of k."""
        if (w := self.wide) is None:
            return [(self.attending, self.q_size, self.kv_size)]
        narrow = (self.attending - w.layers, self.q_size, self.kv_size)
        return [narrow, (w.layers, self.heads * w.head_dim, w.kv_heads * w.head_dim)]

    def linears(self) -> dict[str, tuple[int, int]]:
        """A layer's linear modules by the name that PEFT matches: (inputs, outputs). Where layers
        are of two kinds the modules of both; ``count`` says in how many layers one is."""
        h, f, q, kv = self.hidden, self.intermediate, self.q_size, self.kv_size
        if self.modules:
            mixers = {} if self.delta is None else self.delta.linears(h)
            return {**{name: (i, o) for name, i, o in self.modules}, **mixers}
        if not self.gated:
            return {
                "attn.c_attn": (h, q + 2 * kv),
                "attn.c_proj": (q, h),
                "mlp.c_fc": (h, f),
                "mlp.c_proj": (f, h),
            }
        attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
        return attention | {"gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}

    @property
    def attending(self) -> int:
        """Layers with attention."""
        return self.layers - (0 if self.delta is None else self.delta.layers)

    def count(self, name: str) -> int:
        """The layers that have a linear module of this name."""
        if self.delta is None or name in MLP_NAMES:
            return self.layers
        return self.delta.layers if name in self.delta.linears(self.hidden) else self.attending

    def groups(self) -> dict[str, tuple[int, int]]:
        """A gated layer's linears as the fused path joins those of one input: (inputs, outputs)."""
        h, f, q, kv = self.hidden, self.intermediate, self.q_size, self.kv_size
        joined = (2 * q if self.gate else q) + 2 * kv
        return {"qkv": (h, joined), "o": (q, h), "gate_up": (h, 2 * f), "down": (f, h)}

    def targeted(self, target_modules: Targets) -> dict[str, tuple[int, int]]:
        """The linear modules of one layer that get an adapter. Raises ValueError when a name
        matches none, the embedding, the head or a router."""
        linears = self.linears()
        if target_modules == "all-linear":
            return linears
        chosen = {n: s for n, s in linears.items() if any(_means(t, n) for t in target_modules)}
        unknown = [
            t
            for t in target_modules
            if not any(_means(t, n) for n in linears) and t.split(".")[-1] not in BESIDE
        ]
        if unknown and self.general:
            return linears  # all of them, at most
        if unknown:
            raise ValueError(
                f"target_modules: {', '.join(unknown)} is not among {', '.join(linears)}"
            )
        return chosen


def _means(target: str, name: str) -> bool:
    """Whether a target of PEFT's, the end of a module's name or all of it, means linears of this
    name."""
    return target == name or target.endswith("." + name) or name.endswith("." + target)


def _need(config: dict[str, Any], *names: str) -> int:
    value = whole(config, *names)
    if not value:
        raise ValueError(
            f"config.json (model_type {config.get('model_type', 'unknown')!r}) has no "
            f"{' or '.join(names)}"
        )
    return value


def _width(config: dict[str, Any]) -> int:
    """The width of the MLP: the widest where layers differ, an expert's where there are only
    experts."""
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
