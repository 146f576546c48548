"""Random models of the families that GGUF files are written for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
from tiny import write_tokenizer


def model_of(kind: str) -> Any:
    """A random model whose matrices are fp16 numbers."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    if kind == "gemma3":  # six layers: llama.cpp knows which of them have a window
        _, settings = architectures.ARCHITECTURES[kind]
        own = {"num_hidden_layers": 6, "sliding_window_pattern": 6, "layer_types": None}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Gemma3TextConfig(**settings | own))
    else:
        model = architectures.build(kind)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half().float()
    return model.eval()


def folder_of(folder: Path, kind: str) -> Path:
    model_of(kind).save_pretrained(folder)
    write_tokenizer(folder)
    return folder
