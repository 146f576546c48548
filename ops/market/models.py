"""Pure: a row of vast.ai's replies as one of our data classes.

Units are in the names; vast.ai's units are converted here and nowhere else. Two stay as they are: a
disk's GB (what create takes and storage is priced by) is our gib, and reliability is the host's
record between 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
ROWS = 64  # maximum of one search, whatever limit is asked for


@dataclass(frozen=True)
class Offer:
    """One ask on the market. `id` is what create takes; it is gone once rented, and comes back
    under a new id."""

    id: int
    machine_id: int
    host_id: int  # who owns the machine; 0: vast.ai does not say
    gpu_name: str
    num_gpus: int
    gpu_memory_gib: float  # of one GPU
    compute_capability: float  # 8.9
    cuda_max: float
    cpu_ram_gib: float  # our share of the host's, by GPUs
    disk_gib: float  # the maximum that can be rented
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
    rentable: bool = True
    dlperf: float = 0.0  # vast.ai's benchmark, all GPUs together
    gpu_memory_gb_s: float = 0.0
    disk_mb_s: float = 0.0
    cpu_cores: float = 0.0  # our share; 0: vast.ai does not say


@dataclass(frozen=True)
class Instance:
    """One rented machine as vast.ai lists it. `usd_per_hour` is GPUs (or bid) and disk together."""

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
    ssh_host: str
    ssh_port: int
    direct_host: str
    direct_port: int | None
    end_unix_s: float | None = None  # of the contract: vast.ai stops the box then
    storage_usd_per_gib_month: float = 0.0
    inet_up_usd_per_gb: float = 0.0
    inet_down_usd_per_gb: float = 0.0

    @property
    def outbid(self) -> bool:
        return (
            self.status != ""
            and self.cur_state == self.intended_status == self.next_state == "stopped"
        )


def parse_offer(row: Row) -> Offer:
    """A row of a search (POST /bundles/). Strings that hold numbers are converted; a null gets a
    default that no filter takes for a good value. Raises ValueError naming the key that is missing
    or malformed."""
    return Offer(
        id=int(number(row, "ask_contract_id", "id")),
        machine_id=int(number(row, "machine_id")),
        host_id=int(number(row, "host_id", default=0)),
        gpu_name=_required_text(row, "gpu_name"),
        num_gpus=int(number(row, "num_gpus")),
        gpu_memory_gib=number(row, "gpu_ram") / 1024,
        compute_capability=number(row, "compute_cap", default=0) / 100,
        cuda_max=number(row, "cuda_max_good", default=0),
        cpu_ram_gib=number(row, "cpu_ram", default=0) / 1024 * _share(row),
        disk_gib=number(row, "disk_space", default=0),
        usd_per_hour=_gpu_price(row),
        min_bid_usd_per_hour=number(row, "min_bid", default=0),
        storage_usd_per_gib_month=number(row, "storage_cost"),
        inet_up_mbps=number(row, "inet_up", default=0),
        inet_down_mbps=number(row, "inet_down", default=0),
        inet_up_usd_per_gb=number(row, "inet_up_cost"),
        inet_down_usd_per_gb=number(row, "inet_down_cost"),
        reliability=number(row, "reliability", "reliability2", default=0),
        country=_country(row),
        duration_s=number(row, "duration", default=0),
        verified=_text(row, "verification") == "verified"
        or row.get("verified") is True
        or row.get("vericode") == 1,
        direct_ports=int(number(row, "direct_port_count", default=0)),
        score=number(row, "score", default=0),
        rentable=row.get("rentable") is not False and row.get("rented") is not True,
        dlperf=number(row, "dlperf", default=0),
        gpu_memory_gb_s=number(row, "gpu_mem_bw", default=0),
        disk_mb_s=number(row, "disk_bw", default=0),
        cpu_cores=number(row, "cpu_cores_effective", default=0),
    )


def parse_instance(row: Row) -> Instance:
    """A row of the instance list, or the object of show. Everything but the id may be null while it
    is provisioned. Raises ValueError naming the malformed key."""
    port = _port(row.get("ports"), "22/tcp")
    return Instance(
        id=int(number(row, "id")),
        label=_text(row, "label"),
        machine_id=int(number(row, "machine_id", default=0)),
        status=_text(row, "actual_status"),
        intended_status=_text(row, "intended_status"),
        cur_state=_text(row, "cur_state"),
        next_state=_text(row, "next_state"),
        status_msg=_text(row, "status_msg"),
        gpu_name=_text(row, "gpu_name"),
        num_gpus=int(number(row, "num_gpus", default=0)),
        usd_per_hour=number(row, "dph_total", default=0),
        disk_gib=number(row, "disk_space", default=0),
        ssh_host=_text(row, "ssh_host"),
        ssh_port=int(number(row, "ssh_port", default=0)),
        direct_host=_text(row, "public_ipaddr"),
        direct_port=port,
        end_unix_s=number(row, "end_date") if row.get("end_date") is not None else None,
        storage_usd_per_gib_month=number(row, "storage_cost", default=0),
        inet_up_usd_per_gb=number(row, "inet_up_cost", default=0),
        inet_down_usd_per_gb=number(row, "inet_down_cost", default=0),
    )


def number(row: Row, *names: str, default: float | None = None) -> float:
    """The value of the first of `names` that is not null, as a finite number; `default` when all
    are null. Raises ValueError naming the key for any other value, and for null without a
    default."""
    for name in names:
        value = row.get(name)
        if value is None or value == "":
            continue
        try:
            if isinstance(value, bool) or not math.isfinite(parsed := float(value)):
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(f"{name} is {value!r}, not a number") from None
        return parsed
    if default is None:
        raise ValueError(f"no number under {' or '.join(names)}")
    return default


def _share(row: Row) -> float:
    """The offer's share of the machine's GPUs (0 to 1); memory and cores are shared likewise."""
    share = number(row, "gpu_frac", default=1)
    return share if 0 < share <= 1 else 1.0


def _gpu_price(row: Row) -> float:
    if row.get("dph_base") is not None:
        return number(row, "dph_base")
    return number(row, "dph_total") - number(row, "storage_total_cost", default=0)


def _text(row: Row, name: str) -> str:
    """The value as stripped text (vast.ai sends addresses with a newline at the end); "" for
    null."""
    value = row.get(name)
    return "" if value is None else str(value).strip()


def _required_text(row: Row, name: str) -> str:
    text = _text(row, name)
    if not text:
        raise ValueError(f"no text under {name}")
    return text


def _country(row: Row) -> str:
    """The two-letter code: CA for "Ontario, CA" and ", CA"; "" for a place without a code."""
    code = _text(row, "geolocation").rpartition(",")[2].strip().upper()
    return code if len(code) == 2 and code.isalpha() else ""


def _port(ports: Any, name: str) -> int | None:
    """The host's port in docker's map, {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": "30022"}]};
    None until the instance runs."""
    bound = ports.get(name) if isinstance(ports, Mapping) else None
    if not bound or not isinstance(bound, list) or not isinstance(bound[0], Mapping):
        return None
    return int(number(bound[0], "HostPort"))
