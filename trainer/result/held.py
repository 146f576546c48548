"""What a frozen base computes with where a training held it in fewer bits: its weights rounded to
FP8, NF4 or int8, written back as they are read in a product.

Activations, which FP8 and int8 round as well, are not: a model in fp32 says what the weights alone
make of it.
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trainer.kernels.frozen import freeze_weight
from trainer.kernels.nf4 import BLOCK

FEWER_BITS = ("fp8", "nf4", "int8")


@torch.no_grad()
def round_base(model: nn.Module, precision: str) -> int:
    """Round the weights of the base that a training in `precision` (FEWER_BITS) holds so: those of
    linear layers and of experts, never the output head, a router or an adapter. Returns how many
    there are; a weight that the precision does not take stays as it is."""
    rounded = 0
    for name, module in model.named_modules():
        if ".lora_" in name or "modules_to_save" in name or "lm_head" in name:
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            across = isinstance(module, Conv1D)  # (inputs, outputs)
            rounded += _round(module.weight.data.t() if across else module.weight.data, precision)
        elif isinstance(module, ParamWrapper) or "down_proj" not in module._parameters:
            continue
        else:
            for own in ("gate_up_proj", "up_proj", "down_proj"):
                held = module._parameters.get(own)
                for expert in () if held is None else held.data:
                    across = bool(getattr(module, "is_transposed", False))
                    rounded += _round(expert.t() if across else expert, precision)
    return rounded


def _round(weight: Tensor, precision: str) -> int:
    """`weight` (outputs, inputs), in place."""
    if precision == "int8":
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        weight.copy_((weight / scale).round() * scale)
        return 1
    if precision == "nf4" and weight.shape[1] % BLOCK:
        return 0
    weight.copy_(freeze_weight(weight.contiguous(), precision).unpack())
    return 1
