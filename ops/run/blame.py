"""Pure: whose fault it was. The words by which a machine or an image gives itself away are data;
the same word from two machines is not the machines'."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ops.errors import MilkteaError, NeverReady, Unsuitable

# Words in status_msg that no waiting heals (vast-api.md section 5, numbers 5 to 7): the image's,
# where two machines say them.
CANNOT_START = (
    "manifest unknown",
    "manifest for",
    "unauthorized",
    "no space left on device",
    "toomanyrequests",
    "pull access denied",
    "oci runtime create failed",
    "unsatisfied condition",
    "failed to start containers",
    "invalid reference format",
)
# Of a GPU or its driver that died, in the trainer's words: no program of ours makes them.
GPU_DIED = (
    "uncorrectable ecc",
    "fallen off the bus",
    "no cuda-capable device",
    "cuda-capable device(s) is/are busy or unavailable",
    "unable to determine the device handle",
    "gpu is lost",
    "cuda error: unknown error",
    "system not yet initialized",
    "nvidia-smi has failed",
    "hardware stack error",
)
NO_STEP = "no first step within"  # of what the plan foresaw
# GeForce, which cannot reach each other's memory: where a driver says that they can, NCCL hangs.
_CONSUMER = re.compile(r"(GTX \d{4}|RTX [2345]0[5-9]0)")
PEERS = ("NCCL_P2P_DISABLE", "1")  # the way round it


def start_word(text: str) -> str | None:
    """The first of CANNOT_START in `text`."""
    return _first(CANNOT_START, text)


def gpu_word(text: str) -> str | None:
    """The first of GPU_DIED in `text`."""
    return _first(GPU_DIED, text)


def word(error: MilkteaError) -> str | None:
    """What a failure of a machine has in common with the same failure of another."""
    if isinstance(error, NeverReady):
        return start_word(str(error))
    return _own_word(str(error)) if isinstance(error, Unsuitable) else None


def _own_word(text: str) -> str | None:
    return gpu_word(text) or _first((NO_STEP,), text)


def machines_that_said(said: str, lines: Iterable[Mapping[str, Any]]) -> set[int]:
    """machine_id of each "bad_machine" line, by its data, with the same word."""
    return {
        line["machine_id"]
        for line in lines
        if said in (start_word(line["why"]), _own_word(line["why"]))
    }


def may_lack_peers(gpu_name: str, num_gpus: int) -> bool:
    """Whether a hang before the first step may be NCCL's, between cards that say that they reach
    each other."""
    return num_gpus > 1 and _CONSUMER.match(gpu_name) is not None


def _first(words: Iterable[str], text: str) -> str | None:
    return next((w for w in words if w in text.lower()), None)
