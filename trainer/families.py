"""Pure: what training must know of each architecture, read from a config.json.

The table is `families.toml` beside this file. `read` finds the row of a configuration (for a model
with pictures that of its text tower) and returns a `Family`: what attention needs and in which
layers, what adapters may take, whether rows may be packed, or why the model is refused before
anything is rented. `Family.words` says it for the plan. No torch, no transformers: ops reads it on
the laptop.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from trainer.config_faults import fault_of, lora_fault
from trainer.wire.job import Lora

TABLE = Path(__file__).with_name("families.toml")
EXPERT_RANK = 8  # default of adapters on experts, which are many
TEXT_KEYS = ("text_config", "llm_config", "language_config")
# their files on the hub have the text tower's keys beside the others, as transformers knows
FLAT = ("qwen2_vl", "qwen2_5_vl", "paddleocr_vl")
# common names of an expert's linear layers
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "experts")
# quantised checkpoints that are dequantised, exactly or nearly, and then trained
RESTORED = {
    "mxfp4": "restored to bf16 when it is loaded",
    "fp8": "restored to bf16 when it is loaded",
}

Config = dict[str, Any]
LARGEST = 1 << 40  # of any size in a config.json
MOST_LAYERS = 10_000
_AGAIN = "the file is damaged, or no model's: fetch it again, or name another model in model.base"


class FamilyError(ValueError):
    """A model that cannot be trained. ``hint`` is the next thing to type or to edit."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True)
class Adapted:
    """What adapters are put on: names of Linear modules, and parameters that hold experts."""

    modules: tuple[str, ...]
    experts: tuple[str, ...]
    router: str


@dataclass(frozen=True)
class Family:
    """One architecture with the numbers of one config.json."""

    model_type: str  # of the text tower
    wrapper: str  # the model type around it, or ""
    tower: str  # where the text tower stands in the wrapper, or "" where it is loaded alone
    config: Config = field(repr=False)  # the text tower's own
    row: Config = field(repr=False)
    general: bool  # known to transformers, without a row of its own

    # -- attention -------------------------------------------------------------------------------

    @property
    def layers(self) -> int:
        found = whole(self.config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
        # Nemotron-H tells the kind of each, not how many there are
        lists = (self.config.get(name) for name in ("layers_block_type", "hybrid_override_pattern"))
        found = found or next((len(told) for told in lists if isinstance(told, list | str)), 0)
        if found > MOST_LAYERS:
            raise FamilyError(f"config.json tells of {found:,} layers", _AGAIN)
        return found

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer the number of tokens that a query sees, itself included; None: all before
        it."""
        size = whole(self.config, "sliding_window")
        if not size or not ("window" in self.row["asks"] or self.row["masks"]):
            return (None,) * self.layers
        if self.config.get("use_sliding_window") is False:
            return (None,) * self.layers
        kinds = self._kinds("layer_types")
        if kinds:
            return tuple(size if "sliding" in kind else None for kind in kinds)
        return tuple(size if self._windowed(i) else None for i in range(self.layers))

    def _kinds(self, *names: str) -> list[str]:
        """The kind of each layer, where the configuration lists them."""
        told: Any = next((k for n in names if (k := self.config.get(n))), [])
        if not isinstance(told, list) or not all(isinstance(kind, str) for kind in told):
            raise FamilyError(
                f"config.json has {names[0]} = {told!r:.60}, no list of words", _AGAIN
            )
        return told

    def _windowed(self, layer: int) -> bool:
        rule = self.row["windows"]
        if rule == "all":
            return True
        if rule == "even":
            return layer % 2 == 0
        if rule == "from":
            begin = whole(self.config, "max_window_layers") or 0
            return bool(self.config.get("use_sliding_window")) and layer >= begin
        every = whole(self.config, "sliding_window_pattern") or int(rule.removeprefix("every "))
        return (layer + 1) % every != 0

    @property
    def window(self) -> int | None:
        """The smallest window of any layer."""
        return min((w for w in self.windows if w is not None), default=None)

    @property
    def softcap(self) -> float | None:
        """The soft cap of attention's scores, or None."""
        cap = self.config.get("attn_logit_softcapping") if "cap" in self.row["asks"] else None
        return None if cap is None else _real(cap, "attn_logit_softcapping")

    @property
    def sinks(self) -> bool:
        return "sinks" in self.row["asks"]

    @property
    def long_rope(self) -> bool:
        """Whether the angles of a row depend on its length: dynamic NTK, and LongRoPE unless long
        rows have the factors of short ones (a converted ChatGLM)."""
        rope = _object(self.config, "rope_parameters") or _object(self.config, "rope_scaling")
        kinds = [rope, *(v for v in rope.values() if isinstance(v, dict))]
        differing = [k for k in kinds if not _same_factors(k)]
        names = {str(k.get("rope_type") or k.get("type")) for k in differing}
        return bool(names & {"longrope", "su", "dynamic"})

    @property
    def positions(self) -> int | None:
        """The longest row that the configuration allows, in tokens, or None."""
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
        return whole(self.config, *names) or None

    def validate_longest(self, longest: int) -> None:
        """Raises FamilyError where a row has more tokens than there are learned positions."""
        if self.row["rotary"] == "learned" and self.positions and longest > self.positions:
            raise FamilyError(
                f"the longest row has {longest:,} tokens, {self.model_type} has learned "
                f"{self.positions:,} positions",
                f"set data.max_length to {self.positions}, and data.over_length",
            )

    @property
    def own_logits(self) -> bool:
        """Whether only the model's own forward makes its logits, since no row describes them."""
        return self.general or bool(self.row["own_logits"])

    @property
    def fused(self) -> bool:
        """Whether the fused layer of trainer/kernels supports the family. It turns heads as a
        whole; where only a part of a head turns, it needs reordered columns, as with a gate beside
        each head."""
        whole = self.turned == 1.0 or self.row["rotary"] == "pairs" or self.row["gate"]
        return bool(whole) and self.model_type in _file()["fused"]["types"]

    @property
    def turned(self) -> float:
        """The share of a head's columns that rotary embedding turns."""
        told = {**self.config, **_object(self.config, "rope_parameters")}
        factor = told.get("partial_rotary_factor")
        return 1.0 if factor is None else _real(factor, "partial_rotary_factor")

    # -- what is trained -------------------------------------------------------------------------

    @property
    def experts(self) -> int:
        """Number of experts in a layer; 0 for a dense model."""
        names = (
            *("num_local_experts", "num_experts", "n_routed_experts"),
            *("moe_num_experts", "num_moe_experts"),
        )
        return whole(self.config, *names) or 0

    @property
    def mixture(self) -> bool:
        return self.experts > 1 and bool(self.row["experts"])

    @property
    def holds_experts(self) -> bool:
        """Whether FP8 and NF4 hold the experts too (trainer/kernels/experts.py)."""
        return self.mixture and self.model_type not in _file()["experts"]["outside"]

    def all_linear(self, experts: bool = True, router: bool = False) -> Adapted:
        """What `target_modules = "all-linear"` trains: every linear layer of attention, of the
        dense and the shared parts, the experts unless left out; the router only where asked."""
        row, taken = self.row, self._taken()
        modules = [*row["attention"], *row["state"], *row["dense"], *row["shared"]]
        return Adapted(
            tuple(m for m in dict.fromkeys(modules) if m not in taken),
            tuple(row["experts"]) if experts and self.mixture else (),
            str(row["router"]) if router and self.mixture else "",
        )

    def named(self, wanted: list[str]) -> tuple[list[str], list[str]]:
        """Split the modules that a job names into (names that are modules here, parameters of the
        experts that the rest means). The parts of an expert are not modules of their own."""
        if not self.mixture:
            return wanted, []
        kept = [n for n in self.all_linear().modules]
        parts = [n for n in wanted if n in EXPERT_PARTS and n not in kept]
        modules = [n for n in wanted if n not in parts]
        return modules, list(self.row["experts"]) if parts else []

    def lora_fault(self, lora: Lora) -> str:
        """Why the model cannot have this adapter, with what to do; "" where it can."""
        wanted, experts = lora.target_modules, list(self.all_linear().experts)
        if wanted != "all-linear":
            experts = [] if isinstance(wanted, str) else self.named(list(wanted))[1]
        return lora_fault(lora, self.layers, bool(experts))

    def _taken(self) -> tuple[str, ...]:
        """Modules that PEFT would mistake for the experts, so that they cannot have adapters."""
        peft, row = _file()["peft"], self.row
        if not self.mixture or self.model_type not in peft["types"]:
            return ()
        every = [*row["attention"], *row["dense"], *row["shared"]]
        return tuple(m for m in every if m.split(".")[-1] in peft["names"])

    # -- packing ---------------------------------------------------------------------------------

    def why_unpacked(self, longest: int | None = None) -> str:
        """Why rows are computed one by one, or "" where they may be packed. ``longest``: the tokens
        of the longest row."""
        if not self.row["packs"] and not self._stateless():
            return str(self.row["why"])
        window = self.window
        if self.row["masks"] and window is not None and (longest is None or longest >= window):
            return (
                f"its window of {window:,} tokens stands in a mask of the whole batch, "
                "and rows reach it"
            )
        return ""

    def packs(self, longest: int | None = None) -> bool:
        return not self.why_unpacked(longest)

    def why_unshared(self, longest: int | None = None) -> str:
        """Why rows of a pack cannot read the keys of a beginning that they have in common, or ""
        where they may. ``longest``: the tokens of the longest row."""
        if why := self.why_unpacked(longest):
            return f"rows are not packed: {why}"
        if self.row["delta"]:
            return "it has a state between tokens"
        return "the angles of a row depend on its length" if self.long_rope else ""

    def why_no_fp16(self) -> str:
        """Why fp16 does not serve this family, or ""."""
        if self.model_type in _file()["no_fp16"]["types"]:
            return "its hidden states pass 65,504, the largest number of fp16"
        return ""

    def why_no_prompt(self) -> str:
        """Why rows of this family cannot have learned places in front of them, or "" where they
        may."""
        held = {
            "its attention is transformers' own": bool(self.why_unpacked()) or self.own_logits,
            "it has experts": self.mixture,
            "it has a state between tokens": bool(self.row["delta"] or self.row["state"]),
            "it is one tower of several": bool(self.tower),
            "some layers have a window": any(w is not None for w in self.windows),
            "attention has sinks or a soft cap": self.sinks or self.softcap is not None,
            "the angles of a row depend on its length": self.long_rope,
            "it is not among those that are proven": self.model_type
            not in _file()["prompts"]["types"],
        }
        return next((why for why, so in held.items() if so), "")

    def _stateless(self) -> bool:
        """Whether this is a hybrid without any layer that has a state (granite-4.0-micro)."""
        kinds = self._kinds("layer_types", "layers_block_type")
        return self.model_type == "granitemoehybrid" and set(kinds) == {"attention"}

    # -- for the plan ----------------------------------------------------------------------------

    def words(self, longest: int | None = None) -> list[str]:
        """Sentences about the family for the plan, one a line."""
        return [*self._attention_words(longest), *self._training_words(), *self._tower_words()]

    def _attention_words(self, longest: int | None) -> list[str]:
        said = []
        if self.general:
            said.append(f"model_type {self.model_type}: transformers' own attention computes it")
        why = self.why_unpacked(longest)
        if why:
            said.append(f"rows are not packed, which is slower: {why}")
        if self.row["delta"]:
            said.append(
                "its gated delta nets are packed by fla-core; where a GPU's machine lacks it, rows "
                "are computed one by one, which is slower"
            )
        counted = {w: self.windows.count(w) for w in self.windows if w is not None}
        for window, layers in counted.items():
            said.append(f"a window of {window:,} tokens in {layers} of {self.layers} layers")
        if self.softcap is not None:
            said.append(f"attention's scores are capped at {self.softcap:g}")
        if self.sinks:
            said.append("attention has sinks")
        if self.long_rope:
            said.append("the angles of a row depend on its own length")
        if self.positions and longest and longest > self.positions:
            said.append(
                f"the longest row has {longest:,} tokens, the model knows {self.positions:,} "
                "positions: it learns what it cannot do"
            )
        return said

    def _training_words(self) -> list[str]:
        adapted = self.all_linear()
        if not adapted.modules:
            return ["all-linear takes every Linear module of the model but its head"]
        said = [f"all-linear takes {', '.join(adapted.modules)}"]
        parts = [*self.row["dense"], *self.row["shared"]] if self._taken() else []
        if parts and self.row["shared"]:
            said.append(f"{', '.join(parts)} stay as they are: PEFT has no name for them here")
        if adapted.experts:
            said.append(
                f"and all {self.experts} experts of a layer ({', '.join(adapted.experts)}) at rank "
                f"{EXPERT_RANK}; the router ({self.row['router']}) stays as it is"
            )
        return said

    def _tower_words(self) -> list[str]:
        if not self.wrapper:
            return []
        return [
            f"{self.wrapper}: text rows only, its towers for pictures and sound stay as they are"
        ]


def read(config: Config) -> Family:
    """The family of a parsed config.json. Raises FamilyError, with what to do, for a model that
    cannot be trained: an unknown type, one that is not causal, a checkpoint quantised for good."""
    outer = str(config.get("model_type") or "")
    if not outer:
        raise FamilyError(
            "config.json names no model_type",
            "name a folder or a hub model that transformers reads",
        )
    refusal = _table().get(outer, {})
    if refusal.get("refuse") and not config.get("is_decoder"):
        raise FamilyError(f"model_type {outer}: {refusal['refuse']}", refusal["hint"])
    _validate_quantised(config)
    tower = _towers().get(outer)
    text = config if tower is None else _text_config(config)
    kind = str(text.get("model_type") or outer)
    row = _table().get(kind)
    general = row is None
    if row is None:
        row = _general_row(kind)
    if row["refuse"] and not text.get("is_decoder"):
        raise FamilyError(f"model_type {kind}: {row['refuse']}", row["hint"])
    _validate_quantised(text)
    if why := fault_of(text, "window" in row["asks"] or bool(row["masks"])):
        raise FamilyError(why, "correct config.json, or name another model in model.base")
    return Family(kind, "" if text is config else outer, tower or "", text, row, general)


def default(key: str) -> Any:
    """The default of `key`, for rows that leave it out."""
    return _file()["default"][key]


def known_types() -> frozenset[str]:
    """Every model type in the table, with those under the general rule."""
    return frozenset(_table()) | frozenset(_file()["general"]["types"]) | frozenset(_towers())


def _text_config(config: Config) -> Config:
    """The text tower's part of a wrapper's configuration, or all of a flat one. Keys that only the
    whole has (``tie_word_embeddings``) are taken from the whole."""
    part = next((config[k] for k in TEXT_KEYS if isinstance(config.get(k), dict)), None)
    if part is None:
        outer = config["model_type"]
        if outer not in FLAT:
            raise FamilyError(f"config.json of {outer} tells nothing of its text tower", _AGAIN)
        return {**config, "model_type": f"{outer}_text"}
    kept = {k: config[k] for k in ("tie_word_embeddings", "vocab_size") if k in config}
    return {**kept, **part}


def _general_row(kind: str) -> Config:
    general = _file()["general"]
    if kind not in general["types"]:
        raise FamilyError(
            f"model_type {kind} is not among transformers' causal language models: code that comes "
            "with a model's files is not run here",
            "convert the model to a type that transformers has, or name another in model.base",
        )
    empty: Config = {"attention": [], "dense": [], "packs": general["packs"], "why": general["why"]}
    return {**_file()["default"], **empty}


def _validate_quantised(config: Config) -> None:
    told = config.get("quantization_config") or config.get("compression_config")
    if not told:
        return
    if not isinstance(told, dict):
        raise FamilyError(f"config.json has quantization_config = {told!r:.60}", _AGAIN)
    method = str(told.get("quant_method") or "unknown")
    if method not in RESTORED:
        raise FamilyError(
            f"the checkpoint is quantised with {method}, which cannot be trained on",
            'name the model that it was made from in model.base, and set model.precision = "nf4"',
        )


def whole(config: Config, *names: str) -> int | None:
    """The first of `names` that the configuration has, as an integer; of a list, where layers
    differ, the largest. Raises FamilyError for a value that is not a size."""
    for name in names:
        told = config.get(name)
        if told is None or told is False:
            continue
        sizes = told if isinstance(told, list) else [told]
        if not sizes or not all(map(_is_size, sizes)):
            raise FamilyError(f"config.json has {name} = {told!r:.60}, which is no size", _AGAIN)
        return int(max(sizes))
    return None


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < LARGEST and value == int(value)


def _real(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not abs(value) < LARGEST:
        raise FamilyError(f"config.json has {name} = {value!r:.60}, which is no number", _AGAIN)
    return float(value)


def _object(config: Config, name: str) -> Config:
    told = config.get(name) or {}
    if not isinstance(told, dict):
        raise FamilyError(f"config.json has {name} = {told!r:.60}, which is no object", _AGAIN)
    return told


@cache
def _file() -> Config:
    return tomllib.loads(TABLE.read_text("utf-8"))


@cache
def _table() -> dict[str, Config]:
    """model type -> its row, with defaults filled in."""
    default = _file()["default"]
    return {kind: {**default, **row} for row in _file()["row"] for kind in row["types"]}


@cache
def _towers() -> dict[str, str]:
    return {kind: row["tower"] for row in _file()["wrapper"] for kind in row["types"]}


def _same_factors(rope: Config) -> bool:
    """Whether LongRoPE divides the angles of short and of long rows by the same."""
    short = rope.get("short_factor")
    return short is not None and short == rope.get("long_factor")
