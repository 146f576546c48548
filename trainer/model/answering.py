"""A loaded model that only answers, computing by trainer/kernels as in training."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from trainer.families import Family
from trainer.kernels import experts
from trainer.kernels.backend import is_old
from trainer.kernels.lora import MOST_RANK, adapter_of
from trainer.model.decode import packs
from trainer.model.parts import ModelError, decoder_layers, ends, family_of

log = logging.getLogger(__name__)


def answers_fast(device: torch.device, precision: str) -> bool:
    """Whether models that answer compute by trainer/kernels here, where they can."""
    return device.type == "cuda" and precision != "int8" and not is_old(device)


def held_by_kernels(family: Family, precision: str) -> bool:
    """Whether trainer/kernels alone hold a model of this family in this precision: bitsandbytes has
    no FP8, and leaves the experts of a mixture as they were loaded."""
    return precision == "fp8" or (precision == "nf4" and family.holds_experts)


def accelerate(model: nn.Module, precision: str, device: torch.device) -> bool:
    """Moves a model with all its adapters, loaded on the CPU in bf16 or fp32, to `device` in this
    precision, its layers computed by trainer/kernels. Returns False, with the reason in the log,
    where they do not compute this model so: it is then as it was, but for its device.

    The adapters are taken to be final: their dropout is removed. Raises ModelError for what the
    precision does not serve."""
    from trainer.kernels.patch import accelerate_model

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Identity()
    if why := why_not(model, precision):
        log.info("transformers' own layers answer: %s", why)
        return False
    try:
        names = accelerate_model(model.requires_grad_(False), precision, device)
    except ValueError as why_unserved:
        raise _unserved(precision, why_unserved) from why_unserved
    log.info("layers: %s", names["layer"])
    return True


def hold(model: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """Moves such a model to `device`, layer by layer, with its weights and its experts in FP8 or
    NF4, computed by transformers' layers. What an adapter trained whole stays as it is. Raises
    ModelError for what the precision does not serve."""
    from trainer.kernels.patch import hold_frozen

    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.requires_grad_(True)
    try:
        layers = hold_frozen(model, decoder_layers(model), precision, device)
    except ValueError as why:
        raise _unserved(precision, why) from why
    log.info("weights in %s, of %d layers the experts too", precision, layers)
    return model.requires_grad_(False)


def _unserved(precision: str, why: ValueError) -> ModelError:
    return ModelError(f"precision {precision} does not serve this model ({why}): --precision bf16")


def attach_experts(model: nn.Module) -> None:
    """Computes adapters of experts beside the weights, where PEFT would add them to the weights of
    all experts in each pass. They are held in the weights' dtype, in which they are computed."""
    if not family_of(model).mixture or not hasattr(model, "peft_config"):
        return
    experts.attach(model)
    for module in filter(_adapts_experts, model.modules()):
        wrapper: Any = module
        dtype = wrapper.get_param().dtype
        for name, scaling in wrapper.scaling.items():
            wrapper.lora_A[name].to(dtype)
            if math.frexp(scaling)[0] == 0.5:  # a power of two: it scales without rounding
                wrapper.lora_B[name].to(dtype)


def _adapts_experts(module: nn.Module) -> bool:
    """Whether trainer/kernels/experts.py computes this adapter of PEFT's."""
    if not isinstance(module, ParamWrapper) or module.num_experts < 2:
        return False
    return hasattr(module.get_base_layer(), "has_gate")


def why_not(model: nn.Module, precision: str) -> str:
    """Why the fused layers do not answer for this model with these adapters, or ""."""
    family = family_of(model)
    mixture = family.mixture and not held_by_kernels(family, precision)
    if not (family.fused and packs(model, 1)) or mixture:
        return "this family does not decode by them"
    outer = ends(model)
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not any(module is x for x in outer):
            return "an adapter trains a whole module of a layer"
        if _adapts_experts(module):
            continue
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
