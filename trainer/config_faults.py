"""Pure: what in a config.json makes transformers raise, or compute something else than a decoder
does; and what of a job's adapter a model cannot have. Each check answers with a reason, "" where
there is none; trainer/families.py raises it."""

from __future__ import annotations

from typing import Any

from trainer.wire.job import Lora

Config = dict[str, Any]
# of transformers 5.23 and 5.24, with the older names that its configurations still read
ROPES = frozenset(
    ("default", "dynamic", "linear", "llama3", "longrope", "proportional", "yarn")
    + ("mrope", "su", "xdrope")
)
# their configurations take as many of the kinds of layers as there are layers
CUT = ("deepseek_v4", "step3p7")


def fault_of(config: Config, windowed: bool) -> str:
    """The first fault of a text tower's own configuration, in words. `windowed`: whether its
    architecture looks at sliding_window."""
    checks = (_reads_both_ways, _rope_fault, _heads_fault, _layers_fault)
    found = next((why for check in checks if (why := check(config))), "")
    return found or (_window_fault(config) if windowed else "")


def _reads_both_ways(config: Config) -> str:
    both = config.get("use_bidirectional_attention") in (True, "all")
    if both or config.get("is_causal") is False:
        return "its attention reads later tokens too: an embedding model, which does not write"
    return ""


def _rope_fault(config: Config) -> str:
    for name in ("rope_parameters", "rope_scaling"):
        told = config.get(name)
        if not isinstance(told, dict):
            continue
        for part in (told, *(v for v in told.values() if isinstance(v, dict))):
            kind = part.get("rope_type", part.get("type"))
            if kind is not None and kind not in ROPES:
                return f"config.json has {name} of the type {kind!r:.60}, which transformers lacks"
    return ""


def _heads_fault(config: Config) -> str:
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads == 0:
        return "config.json has num_attention_heads = 0"
    if type(heads) is not int or heads < 0:
        return ""  # by layer, or refused as no size
    if type(shared) is int and (shared < 1 or heads % shared):
        return (
            f"config.json has {heads} attention heads, which {shared} key-value heads do not divide"
        )
    return ""


def _layers_fault(config: Config) -> str:
    kinds, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        kinds = []
    cut = config.get("model_type") in CUT
    if kinds and type(layers) is int and len(kinds) != layers and not cut:
        return f"config.json tells of {layers} layers, and of {len(kinds)} in layer_types"
    return ""


def _window_fault(config: Config) -> str:
    size, kinds = config.get("sliding_window"), config.get("layer_types")
    used = config.get("use_sliding_window") is not False
    if size == 0 and type(size) is int and used:
        return "config.json has sliding_window = 0, in which a token sees nothing (none is null)"
    sliding = isinstance(kinds, list) and "sliding_attention" in kinds
    if sliding and "sliding_window" in config and (size is None or not used):
        return "config.json has layers of sliding_attention in layer_types, and no sliding_window"
    return ""


def lora_fault(lora: Lora, layers: int, experts: bool) -> str:
    """Why a model of so many layers cannot have this adapter, with what to do. `experts`: whether
    the adapter is put on the experts of a mixture."""
    chosen = lora.layers_to_transform
    listed = [chosen] if isinstance(chosen, int) else chosen or []
    if outside := [n for n in listed if n >= layers]:
        return (
            f"lora.layers_to_transform: there is no layer {outside[0]}, the model has {layers}: "
            f"name layers of 0 to {layers - 1}"
        )
    if not experts:
        return ""
    excluded = lora.exclude_modules or []
    odd = {
        "lora_dropout": bool(lora.lora_dropout),
        "use_dora": lora.use_dora,
        "init_lora_weights": lora.init_lora_weights == "pissa",
        "layers_to_transform": chosen is not None,
        "exclude_modules": "experts" in str(excluded),
    }
    if name := next((name for name, on in odd.items() if on), ""):
        return (
            f"lora.{name} does not work on the experts of a mixture: leave it out, or name only "
            "attention's modules in lora.target_modules"
        )
    return ""
