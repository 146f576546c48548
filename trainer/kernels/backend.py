"""Selects the implementation of the kernels in this process: Triton or plain torch."""

from __future__ import annotations

import logging
from types import ModuleType

import torch

from trainer.kernels import reference

log = logging.getLogger(__name__)
_without_triton: list[str] = []  # the reason, once it is known


def operations(device: torch.device) -> ModuleType:
    """``trainer.kernels.triton_ops`` where it can run, else its twin
    ``trainer.kernels.reference``: on CPUs, without Triton, or after ``distrust``."""
    if device.type != "cuda" or _without_triton:
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
