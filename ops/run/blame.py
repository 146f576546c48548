"""Pure: whether a failure is the machine's fault. The words by which we recognise a bad machine or
a bad image are data; when two machines fail with the same word, the machines are not at fault."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ops.errors import MilkteaError, NeverReady, Unsuitable

# Words in vast.ai's status_msg after which waiting does not help.
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
# Words in the trainer's log when a GPU or its driver died; our own programs never print them.
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
DISK_FULL = ("no space left on device",)  # of the disk that was rented, or of /dev/shm
NO_STEP = "no first step within"  # begins the error of a machine that did not reach step 1
# GeForce cards have no peer-to-peer transfers; where a driver says that they do, NCCL hangs.
_CONSUMER = re.compile(r"(GTX \d{4}|RTX [2345]0[5-9]0)")
NO_P2P = ("NCCL_P2P_DISABLE", "1")  # makes NCCL do without


def start_word(text: str) -> str | None:
    """The first of CANNOT_START in `text`."""
    return _first(CANNOT_START, text)


def gpu_word(text: str) -> str | None:
    """The first of GPU_DIED in `text`."""
    return _first(GPU_DIED, text)


def disk_word(text: str) -> str | None:
    """The first of DISK_FULL in `text`."""
    return _first(DISK_FULL, text)


def fatal_word(error: MilkteaError) -> str | None:
    """The word by which two machines' failures are recognised as the same; None without one."""
    if isinstance(error, NeverReady):
        return start_word(str(error))
    return _machine_word(str(error)) if isinstance(error, Unsuitable) else None


def _machine_word(text: str) -> str | None:
    return gpu_word(text) or disk_word(text) or _first((NO_STEP,), text)


def owner_of(machine_id: int, host_id: int) -> int:
    """What two machines of one owner share; a machine stands for itself where vast.ai names no
    owner."""
    return host_id or -machine_id


def owners_with_word(word: str, lines: Iterable[Mapping[str, Any]]) -> set[int]:
    """`owner_of` each "bad_machine" line (given by its data) whose reason has this word. Lines of
    milktea 0.2 name no owner."""
    return {
        owner_of(line["machine_id"], line.get("host_id", 0))
        for line in lines
        if word in (start_word(line["why"]), _machine_word(line["why"]))
    }


def p2p_may_hang(gpu_name: str, num_gpus: int) -> bool:
    """Whether NCCL may hang before step 1 because these cards have no peer-to-peer transfers."""
    return num_gpus > 1 and _CONSUMER.match(gpu_name) is not None


def _first(words: Iterable[str], text: str) -> str | None:
    return next((w for w in words if w in text.lower()), None)
