"""The processes of a bench: one, or those that `accelerate launch` started."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """`world` of them, of which this one is `rank`, with its `device`."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, on_cpu: bool) -> Processes:
        rank, world, local = (
            int(os.environ.get(k, d))
            for k, d in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
        device = torch.device("cpu") if on_cpu else torch.device("cuda", local)
        if not on_cpu:
            torch.cuda.set_device(device)
        if world > 1:
            more: dict[str, Any] = {} if on_cpu else {"device_id": device}
            dist.init_process_group("gloo" if on_cpu else "nccl", **more)
        return cls(rank, world, device)

    def wait(self) -> None:
        """Returns when all have done what was asked of their devices."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.world > 1:
            dist.barrier()

    def summed(self, value: float) -> float:
        return self._together(value, dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        return self._together(value, dist.ReduceOp.MAX)

    def _together(self, value: float, how: Any) -> float:
        if self.world == 1:
            return value
        there = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(there, how)
        return float(there)

    def say(self, what: str) -> None:
        if self.rank == 0:
            print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)
