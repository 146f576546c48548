"""A model's folder as transformers reads it, its errors as sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from trainer.model.parts import ModelError


def read_config(folder: Path) -> Any:
    """transformers' configuration of a model's folder. Raises ModelError."""
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as why:  # each class of configuration has errors of its own
        raise ModelError(_unreadable(f"{folder.name}/config.json", why)) from why


def read_model(auto: Any, folder: Path, **settings: Any) -> Any:
    """The model of a folder by `auto`, every weight from its files: transformers makes up those
    that it does not find. Raises ModelError."""
    try:
        model, told = auto.from_pretrained(folder, output_loading_info=True, **settings)
    except torch.OutOfMemoryError:
        raise
    except Exception as why:  # each class of models has errors of its own
        raise ModelError(_unreadable(f"{folder.name}/", why)) from why
    if missing := sorted(told["missing_keys"]):
        raise ModelError(
            f"the weights of {folder.name}/ lack {len(missing)} of the tensors that config.json "
            f"asks for: {', '.join(missing[:3])}: take both from the same release of the model"
        )
    return model


def _unreadable(name: str, why: Exception) -> str:
    said = " ".join(str(why).split())[:400]
    return (
        f"transformers cannot load {name} ({type(why).__name__}: {said}): fetch the model again, "
        "or name another in model.base"
    )
