"""A loaded model that only answers, computing by trainer/kernels as in training."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from trainer.kernels.backend import is_old
from trainer.kernels.lora import MOST_RANK, adapter_of
from trainer.model.decode import packs
from trainer.model.parts import ends, family_of

log = logging.getLogger(__name__)


def answers_fast(device: torch.device, precision: str) -> bool:
    """Whether models that answer compute by trainer/kernels here, where they can."""
    return device.type == "cuda" and precision != "int8" and not is_old(device)


def accelerate(model: nn.Module, precision: str, device: torch.device) -> bool:
    """Moves a model with all its adapters, loaded on the CPU in bf16 or fp32, to `device` in this
    precision, its layers computed by trainer/kernels. Returns False, with the reason in the log,
    where they do not compute this model so: it is then as it was, but for its device.

    The adapters are taken to be final: their dropout is removed."""
    from trainer.kernels.patch import accelerate_model

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Identity()
    if why := _why_not(model):
        log.info("transformers' own layers answer: %s", why)
        return False
    names = accelerate_model(model.requires_grad_(False), precision, device)
    log.info("layers: %s", names["layer"])
    return True


def _why_not(model: nn.Module) -> str:
    """Why the fused layers do not decode this model with these adapters, or ""."""
    family = family_of(model)
    if not (family.fused and packs(model, 1)) or family.mixture:
        return "this family does not decode by them"
    outer = ends(model)
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not any(module is x for x in outer):
            return "an adapter trains a whole module of a layer"
        if isinstance(module, LoraLayer) and (why := _why_not_adapted(module)):
            return why
    return ""


def _why_not_adapted(module: Any) -> str:
    for name in module.lora_A:
        try:
            found = adapter_of(module, name)
        except ValueError as why:
            return str(why)
        if found is not None and len(found[0]) > MOST_RANK:
            return f"rank {len(found[0])} is above {MOST_RANK}"
    return ""
