"""Selects the implementation of the kernels in this process: Triton or plain torch."""

from __future__ import annotations

import logging
from types import ModuleType

import torch

from trainer.kernels import reference

log = logging.getLogger(__name__)
_without_triton: list[str] = []  # the reason, once it is known


def is_old(device: torch.device) -> bool:
    """Whether ``device`` is a GPU below compute capability 8.0 (Turing, Volta): bf16, flash
    attention and the kernels of Triton are for newer ones."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def half(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of two bytes that a job's products have on ``device``, unless its precision is
    fp32: fp16 in precision fp16 and on an old GPU, else bf16."""
    return torch.float16 if precision == "fp16" or is_old(device) else torch.bfloat16


def operations(device: torch.device) -> ModuleType:
    """``trainer.kernels.triton_ops`` where it can run, else its twin
    ``trainer.kernels.reference``: on CPUs and old GPUs, without Triton, or after
    ``distrust``."""
    if device.type != "cuda" or _without_triton or is_old(device):
        return reference
    try:
        from trainer.kernels import triton_ops
    except ImportError as why:
        distrust(f"Triton is not usable: {why}")
        return reference
    return triton_ops


def distrust(why: str) -> None:
    """Use plain torch instead of Triton from now on in this process; logs ``why``."""
    _without_triton.append(why)
    log.warning("%s; plain torch does its work", why)
