"""Pure: what the market says (Offer, Instance), what we need (query), and which offer finishes this run for the fewest dollars.

Units are in the names; vast.ai's own units are turned into ours in `parse` and nowhere else (reference: docs of POST /bundles/).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Offer:
    """One ask on the market. `id` is what create takes; it is gone once rented, and comes back under a new id."""

    id: int
    machine_id: int
    host_id: int
    gpu_name: str
    num_gpus: int
    gpu_memory_gib: float  # of one GPU
    compute_capability: float  # 8.9
    cuda_max: float
    cpu_ram_gib: float
    disk_gib: float  # the most that can be rented
    usd_per_hour: float  # all GPUs together, without disk
    min_bid_usd_per_hour: float
    storage_usd_per_gib_month: float
    inet_up_mbps: float
    inet_down_mbps: float
    inet_up_usd_per_gb: float
    inet_down_usd_per_gb: float
    reliability: float
    country: str
    duration_s: float  # how long it can still be rented
    verified: bool
    direct_ports: int
    score: float = 0.0  # vast.ai's own ranking, for comparison only


@dataclass(frozen=True)
class Instance:
    """One rented machine as vast.ai lists it. `usd_per_hour` is the whole bill of an hour: GPUs (or bid) and disk."""

    id: int
    label: str
    machine_id: int
    status: str  # actual_status, "" while it is being provisioned
    intended_status: str
    cur_state: str
    next_state: str
    status_msg: str
    gpu_name: str
    num_gpus: int
    usd_per_hour: float
    disk_gib: float
    is_bid: bool
    ssh_host: str
    ssh_port: int
    direct_host: str
    direct_port: int | None
    end_unix_s: float | None = None

    @property
    def outbid(self) -> bool:
        return self.status != "" and self.cur_state == self.intended_status == self.next_state == "stopped"


def number(row: dict[str, Any], *names: str, default: float | None = None) -> float:
    """The first of `names` that holds a number. Raises ValueError naming them when none does and there is no default."""
    for name in names:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str) and value.replace(".", "", 1).lstrip("-").isdigit():
            return float(value)
    if default is None:
        raise ValueError(f"no number under {' or '.join(names)}")
    return default
