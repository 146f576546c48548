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


_OF_THE_OFFER = """
    machine_id host_id bundle_id num_gpus gpu_name gpu_ram gpu_frac gpu_lanes gpu_mem_bw pcie_bw
    pci_gen bw_nvlink compute_cap total_flops dlperf score cpu_name cpu_cores cpu_cores_effective
    cpu_ram cpu_arch inet_up inet_down inet_up_cost inet_down_cost internet_up_cost_per_tb
    internet_down_cost_per_tb storage_cost disk_bw disk_name min_bid reliability2 geolocation
    verification hosting_type driver_version cuda_max_good mobo_name os_version static_ip
    direct_port_count external webpage logo has_avx vericode rentable dlperf_per_dphtotal
    flops_per_dphtotal credit_discount_max
""".split()  # noqa: SIM905


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
    stopped_by_market: bool = False
    agenda: list[tuple[float, str, Any]] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)
    settled_at: float = 0.0
    running_since: float | None = None
    first_running_at: float | None = None
    destroyed_at: float | None = None
    _last_charge: dict[str, Any] | None = None
    boots: int = 0
    pulled: bool = False
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

    def burn_usd_per_s(self) -> float:
        """What a second costs now, bandwidth aside."""
        if self.destroyed_at is not None:
            return 0.0
        disk = (
            0.0
            if self.actual_status == "offline"
            else self.disk_gb * self.offer["storage_cost"] / HOURS_PER_MONTH
        )
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
            self.meter.disk_usd += (
                seconds / HOUR_S * self.disk_gb * self.offer["storage_cost"] / HOURS_PER_MONTH
            )

    def carry(self, bytes_in: int = 0, bytes_out: int = 0) -> None:
        """Charges bandwidth, as the box sees it: in is what it received. What trails in after the
        end is nobody's."""
        if self.destroyed_at is not None:
            return
        self.meter.bytes_in += bytes_in
        self.meter.bytes_out += bytes_out
        self.meter.in_usd += bytes_in / GIGABYTE * self.offer["inet_down_cost"]
        self.meter.out_usd += bytes_out / GIGABYTE * self.offer["inet_up_cost"]

    def row(self, now: float) -> dict[str, Any]:
        """The record as `GET /instances/` shows it, with the oddities of the live one (numbers from
        the first moment, a stray newline in the address, no ports before it runs)."""
        running = self.actual_status == "running"
        disk_hour = self.disk_gb * self.offer["storage_cost"] / HOURS_PER_MONTH
        total = self.gpu_usd_per_hour + disk_hour
        quote = {
            "gpuCostPerHour": self.gpu_usd_per_hour,
            "diskHour": disk_hour,
            "totalHour": total,
            "discountTotalHour": 0,
            "discountedTotalPerHour": total,
        }
        row = {name: self.offer.get(name) for name in _OF_THE_OFFER}
        row |= {
            "id": self.id,
            "label": self.label,
            "actual_status": self.actual_status,
            "intended_status": self.intended_status,
            "cur_state": self.cur_state,
            "next_state": self.next_state,
            "status_msg": self.status_msg,
            "ssh_host": "127.0.0.1",
            "ssh_port": self.ssh_port,
            "ssh_idx": "4",
            "public_ipaddr": "127.0.0.1\n",
            "local_ipaddrs": "127.0.0.1 \n",
            "ports": self.ports if running else {},
            "machine_dir_ssh_port": self.ssh_port,
            "start_date": self.created_at,
            "end_date": self.end_date,
            "duration": self.end_date - now,
            "time_remaining": "",
            "time_remaining_isbid": "",
            "extra_env": [[key, value] for key, value in self.env.items()],
            "image_uuid": self.image,
            "image_runtype": self.runtype,
            "image_args": self.args,
            "onstart": self.onstart,
            "jupyter_token": self.key[:32],
            "gpu_totalram": self.offer["gpu_ram"] * self.num_gpus,
            "gpu_arch": "nvidia",
            "gpu_util": 0.0 if running else None,
            "gpu_temp": 41.0 if running else None,
            "cpu_util": 0.0,
            "mem_limit": self.offer["cpu_ram"] / 1000 * self.offer["gpu_frac"],
            "mem_usage": 0.5 if running else None,
            "vmem_usage": None,
            "disk_space": self.disk_gb,
            "disk_usage": 0.1 if running else None,
            "disk_util": 0.1 if running else -1.0,
            "inet_up_billed": self.meter.bytes_out / 1e6,
            "inet_down_billed": self.meter.bytes_in / 1e6,
            "dph_base": self.gpu_usd_per_hour,
            "dph_total": total,
            "storage_total_cost": disk_hour,
            "is_bid": self.bid is not None,
            "search": quote,
            "instance": quote,
            "uptime_mins": (now - self.running_since) / 60
            if running and self.running_since
            else None,
            "template_id": None,
            "template_hash_id": self.template_hash_id,
            "template_name": None,
            "volume_info": self.volume_info or [],
            "client_run_time": 1.1,
            "host_run_time": 5184000.0,
            "country_code": None,
            "rented": True,
            "discount_rate": 0.0,
            "bundled_results": 1,
        }
        return row | self.shown_as

    def charge(self, now: float) -> dict[str, Any]:
        """The bill of this instance, one row of `/charges/`. Once it is destroyed it stays as it
        is."""
        if self._last_charge is not None:
            return self._last_charge
        meter = self.meter
        items = [
            (
                "gpu",
                meter.gpu_usd,
                f"{meter.gpu_s / HOUR_S:.3f} hours at ${self.gpu_usd_per_hour:.3f}/hour",
            ),
            (
                "disk",
                meter.disk_usd,
                f"{meter.disk_gb_s / HOUR_S:.3f} GB-hours at "
                f"${self.offer['storage_cost']:.3f}/GB/month",
            ),
            (
                "bwd",
                meter.in_usd,
                f"{meter.bytes_in / GIGABYTE:.6f} GB at ${self.offer['inet_down_cost']:.4f}/GB",
            ),
            (
                "bwu",
                meter.out_usd,
                f"{meter.bytes_out / GIGABYTE:.6f} GB at ${self.offer['inet_up_cost']:.4f}/GB",
            ),
        ]
        start, end = self.created_at, self.destroyed_at or now
        row = {
            "start": start,
            "end": end,
            "type": "instance",
            "source": f"instance-{self.id}",
            "description": f"Instance {self.id}: {self.num_gpus}x {self.offer['gpu_name']}",
            "amount": round(meter.usd, 6),
            "metadata": {
                "label": self.label,
                "template_id": None,
                "instance_id": self.id,
                "machine_id": self.machine_id,
            },
            "items": [
                {
                    "start": start,
                    "end": end,
                    "type": kind,
                    "source": f"instance-{self.id}",
                    "description": text,
                    "amount": round(usd, 6),
                    "metadata": {},
                    "items": [],
                }
                for kind, usd, text in items
            ],
        }
        if self.destroyed_at is not None:
            self._last_charge = row
        return row
