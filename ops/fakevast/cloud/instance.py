"""One rented instance: its state, its bill, and the record that the API shows of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ops.fakevast.cloud.search import HOURS_PER_MONTH

GIGABYTE = 1e9
HOUR_S = 3600.0

# "Running or connected" costs the GPU. Whether a dead container or a silent host still does is
# nowhere documented: the dear answer is taken for the container, whose GPU stays reserved, and for
# a missing heartbeat; none for a host that is known to be offline.
_GPU_BILLED = {"running", "exited", "rebooting", "recycling", "frozen", "unknown"}


@dataclass
class Meter:
    """What the instance has cost so far: quantities and dollars by kind. Exact to the second and
    the byte."""

    gpu_s: float = 0.0
    disk_gb_s: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    gpu_usd: float = 0.0
    disk_usd: float = 0.0
    in_usd: float = 0.0
    out_usd: float = 0.0

    @property
    def usd(self) -> float:
        return self.gpu_usd + self.disk_usd + self.in_usd + self.out_usd


@dataclass
class Instance:
    """`offer` is the search row that was rented, priced; `agenda` what will happen to it by itself:
    (time, action, argument)."""

    id: int
    ask_id: int
    offer: dict[str, Any]
    image: str
    disk_gb: float
    created_at: float
    end_date: float
    key: str
    label: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    onstart: str | None = None
    args: list[str] = field(default_factory=list)
    runtype: str = "ssh"
    bid: float | None = None
    volume_info: Any = None
    template_hash_id: str | None = None
    ssh_keys: list[dict[str, Any]] = field(default_factory=list)
    actual_status: str | None = None
    intended_status: str = "running"
    cur_state: str = "running"
    next_state: str = "running"
    status_msg: str | None = None
    holds_gpus: bool = True
    queued: bool = False
    agenda: list[tuple[float, str, Any]] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)
    settled_at: float = 0.0
    running_since: float | None = None
    first_running_at: float | None = None
    destroyed_at: float | None = None
    boots: int = 0
    pulled: bool = False
    storage_factor: float = 1.0  # of the offer's storage price
    ssh_port: int = 0
    ports: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    shown_as: dict[str, Any] = field(default_factory=dict)
    hidden_reads: dict[str, int] = field(default_factory=dict)
    box_faults: dict[str, dict[str, Any]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    @property
    def num_gpus(self) -> int:
        return int(self.offer["num_gpus"])

    @property
    def machine_id(self) -> int:
        return int(self.offer["machine_id"])

    @property
    def gpu_usd_per_hour(self) -> float:
        return self.bid if self.bid is not None else float(self.offer["dph_base"])

    @property
    def gpu_is_billed(self) -> bool:
        return self.cur_state == "running" and self.actual_status in _GPU_BILLED

    @property
    def disk_usd_per_hour(self) -> float:
        return float(self.disk_gb * self.storage_cost / HOURS_PER_MONTH)

    @property
    def storage_cost(self) -> float:
        """$ a GB and month now."""
        return float(self.offer["storage_cost"] * self.storage_factor)

    def burn_usd_per_s(self) -> float:
        """What a second costs now, bandwidth aside."""
        if self.destroyed_at is not None:
            return 0.0
        disk = 0.0 if self.actual_status == "offline" else self.disk_usd_per_hour
        return ((self.gpu_usd_per_hour if self.gpu_is_billed else 0.0) + disk) / HOUR_S

    def settle(self, now: float) -> None:
        """Charges the time since the last settlement at the present rates. Call before any change
        of state."""
        seconds = now - self.settled_at
        self.settled_at = now
        if seconds <= 0 or self.destroyed_at is not None:
            return
        if self.gpu_is_billed:
            self.meter.gpu_s += seconds
            self.meter.gpu_usd += seconds / HOUR_S * self.gpu_usd_per_hour
        if self.actual_status != "offline":
            self.meter.disk_gb_s += seconds * self.disk_gb
            self.meter.disk_usd += seconds / HOUR_S * self.disk_usd_per_hour

    def carry(self, bytes_in: int = 0, bytes_out: int = 0) -> None:
        """Charges bandwidth, as the box sees it: in is what it received. What trails in after the
        end is nobody's."""
        if self.destroyed_at is not None:
            return
        self.meter.bytes_in += bytes_in
        self.meter.bytes_out += bytes_out
        self.meter.in_usd += bytes_in / GIGABYTE * self.offer["inet_down_cost"]
        self.meter.out_usd += bytes_out / GIGABYTE * self.offer["inet_up_cost"]
