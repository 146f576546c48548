"""Reads `models.toml`: shapes, size, licence and gating of the open models that are used most.

`lookup` finds a model by the name that a job gives it; `Entry.config` is its configuration as a
config.json would have it, for `trainer.families.read` and `trainer.memory.Shape.from_config`. Each
value has a source and a date (`Entry.source_of`); what was not found is None.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("models.toml")

# our names of values -> those of a config.json
_KEYS = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate": "intermediate_size",
    "moe_intermediate": "moe_intermediate_size",
    "experts_per_token": "num_experts_per_tok",
    "vocabulary": "vocab_size",
    "context": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}
_AS_THEY_ARE = (
    *("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"),
    *("linear_value_head_dim", "shared_expert_intermediate_size"),
)
_EXPERTS = {"gpt_oss": "num_local_experts", "mixtral": "num_local_experts"}
_ROUTED = ("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "nemotron_h")
_LOCAL = ("granitemoe", "granitemoehybrid", "llama4_text", "minimax_m2")


@dataclass(frozen=True)
class Provenance:
    """Where a value comes from: what it is, the date of its data ("" unknown), when it was read."""

    what: str
    of: str
    read: str


@dataclass(frozen=True)
class Entry:
    """One model. Values that were not found are None; weights_gb is in 10^9 bytes."""

    values: dict[str, Any]

    @property
    def id(self) -> str:
        return str(self.values["id"])

    @property
    def model_type(self) -> str:
        return str(self.values["model_type"])

    @property
    def licence(self) -> str | None:
        return self.values.get("licence")

    @property
    def gated(self) -> bool | None:
        """Whether the hub requires a token of an account that accepted the licence."""
        return self.values.get("gated")

    @property
    def parameters(self) -> int | None:
        """Number of all parameters, including the image towers of a wrapper."""
        return self.values.get("parameters")

    @property
    def active(self) -> int | None:
        """Number of parameters that one token uses, in a mixture of experts."""
        return self.values.get("active")

    @property
    def weights_gb(self) -> float | None:
        return self.values.get("weights_gb")

    def source_of(self, value: str) -> Provenance:
        """Where the value named `value` comes from. Raises KeyError where there is none."""
        self.values[value]
        by_value = {v: name for name, vs in self.values.get("sources", {}).items() for v in vs}
        source = _file()["source"][by_value.get(value, self.values["source"])]
        return Provenance(source["what"], source.get("of", ""), source["read"])

    def config(self) -> dict[str, Any]:
        """The contents of its config.json, as far as they are known; in a wrapper the text tower is
        under `text_config`."""
        kind = str(self.values.get("text_type") or self.model_type)
        known = {_KEYS[k]: v for k, v in self.values.items() if k in _KEYS}
        known |= {k: self.values[k] for k in _AS_THEY_ARE if k in self.values}
        if "experts" in self.values:
            known[_experts_key(kind)] = self.values["experts"]
            if kind in _LOCAL or kind in _EXPERTS:  # these name an expert's width as a dense one's
                known.setdefault("intermediate_size", known.get("moe_intermediate_size"))
        text = {"model_type": kind, **known}
        if kind == self.model_type:
            return text
        tied = {k: v for k, v in known.items() if k == "tie_word_embeddings"}
        return {"model_type": self.model_type, **tied, "text_config": text}


def lookup(name: str) -> Entry | None:
    """The entry of a hub name, `owner/model` with or without `@revision`, or None."""
    return _entries().get(name.partition("@")[0].lower())


def did_you_mean(name: str) -> str:
    """ "; did you mean ID?" of an unknown name that is nearly one of ours, else nothing."""
    asked = name.partition("@")[0].lower()
    near = difflib.get_close_matches(asked, _entries(), 1, 0.85) if lookup(name) is None else []
    return f"; did you mean {_entries()[near[0]].id}?" if near else ""


def entries() -> list[Entry]:
    """All entries, most downloaded first."""
    return list(_entries().values())


def _experts_key(kind: str) -> str:
    if kind in _ROUTED:
        return "n_routed_experts"
    return "num_local_experts" if kind in _LOCAL or kind in _EXPERTS else "num_experts"


@cache
def _entries() -> dict[str, Entry]:
    return {row["id"].lower(): Entry(row) for row in _file()["model"]}


@cache
def _file() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text("utf-8"))
