"""Finds the parts of a loaded model: under PEFT's wrappers, by family, by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from trainer import families
from trainer.families import Family


class ModelError(ValueError):
    """A model, or a setting for it, that is refused before the first step. The text ends with what
    to do."""


def family_of(model: nn.Module) -> Family:
    """The family of a loaded model, with or without PEFT's wrappers."""
    inner = causal(model)
    if not hasattr(inner, "family"):
        inner.family = families.read(inner.config.to_dict())
    family: Family = inner.family
    return family


def ends_in(name: str, wanted: str) -> bool:
    """Whether the dotted `name` is `wanted` or ends with it."""
    return name == wanted or name.endswith("." + wanted)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a Linear, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or "Conv1D" in type(module).__name__


def is_tied(model: nn.Module) -> bool:
    """Whether the output layer shares the input embedding's weight."""
    config: Any = causal(model).config
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's longest ModuleList: its decoder layers."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len)


def causal(model: nn.Module) -> Any:
    """The transformers model inside PEFT's wrappers."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else model


def ends(model: nn.Module) -> list[nn.Module]:
    """The input embedding and the output layer, where the model has them."""
    inner: Any = causal(model)
    found = (inner.get_input_embeddings(), inner.get_output_embeddings())
    return [layer for layer in found if layer is not None]


def name_of_cache(model: nn.Module) -> str:
    """The name of the KV cache as argument and output in the installed transformers: "cache" from
    5.24 on, "past_key_values" before."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"
