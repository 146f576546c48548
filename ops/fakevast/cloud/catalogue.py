"""The offers: a table of cards, a table of machines, and how the two become rows of a search.

Prices, links and disks (machines.csv) are those of an ordinary week in 2026, invented but
plausible, and always the same. Among them are traps that a buyer meets; column `trap` says which.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_DRIVERS = {
    11.8: "520.61.05",
    12.4: "550.90.07",
    12.6: "560.35.03",
    12.8: "570.153.02",
    12.9: "575.57.08",
    13.0: "580.65.06",
}
_ORDINARY = "RTX 4090"  # its card stands in for one that cards.csv does not know


def _table(name: str) -> list[dict[str, Any]]:
    """The rows of a CSV file beside this one; numbers as such, empty cells left out."""
    with open(_HERE / name, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{key: _value(text) for key, text in row.items() if text} for row in rows]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# By name: gpu_ram (MB), compute_cap (x100), flops_per_gpu (fp32 TFLOPS), gpu_mem_bw (GB/s),
# dlperf_per_gpu, gpu_max_power (W)
CARDS: dict[str, dict[str, Any]] = {row.pop("gpu_name"): row for row in _table("cards.csv")}


def machine(**known: Any) -> dict[str, Any]:
    """A machine's whole record from the few fields that matter.

    `gpus` is how many it has, `slices` in which sizes they are let. The rest is filled in from
    the card's table. Any field of a search row may be given and wins.
    """
    card = known.setdefault("gpu_name", _ORDINARY)
    record: dict[str, Any] = {
        "machine_id": 19000,
        "host_id": 900,
        "gpus": 1,
        "usd_per_gpu_hour": 0.3,
        "geolocation": "Texas, US",
        "reliability": 0.995,
        "inet_down": 800.0,
        "inet_up": 600.0,
        "inet_down_cost": 0.003,
        "inet_up_cost": 0.004,
        "disk_space": 500.0,
        "storage_cost": 0.15,
        "cuda_max_good": 12.8,
        "days": 40,
        "verification": "verified",
        "datacenter": 0,
        **CARDS.get(card, CARDS[_ORDINARY]),
        "gpu_max_temp": 92.0,
        "cpu_name": "AMD EPYC 7543 32-Core Processor",
        "cpu_ghz": 3.7,
        "cpu_arch": "amd64",
        "disk_bw": 2900.0,
        "disk_name": "nvme",
        "pcie_bw": 22.8,
        "pci_gen": 4.0,
        "gpu_lanes": 16,
        "mobo_name": "ROMED8-2T",
        "has_avx": 1,
        "gpu_arch": "nvidia",
        "ubuntu_version": "22.04",
        "os_version": "22.04",
        "bw_nvlink": 0.0,
        "direct_port_count": 64,
        "external": False,
        "vms_enabled": False,
        "gpu_display_active": False,
        "cluster_id": None,
        "credit_discount_max": 0.4,
        "min_bid_share": 0.5,
        "broken": None,
    }
    record.update(known)
    record.setdefault("static_ip", record["datacenter"] == 1)
    record.setdefault("slices", (record["gpus"],))
    record.setdefault("driver_version", _DRIVERS.get(record["cuda_max_good"], "570.153.02"))
    record.setdefault("cpu_cores", 16 * record["gpus"] + 16)
    record.setdefault("cpu_ram", 64_000 * record["gpus"] + 64_000)
    return record


def default_market() -> list[dict[str, Any]]:
    """The built-in machines, a fresh copy each time: change it as you like."""
    rows = _table("machines.csv")
    for row in rows:
        row.pop("trap", None)
        row["slices"] = tuple(int(size) for size in str(row["slices"]).split())
    return [machine(**row) for row in rows]


def load_market(path: Path) -> list[dict[str, Any]]:
    """A JSON list of machines; each needs only the fields in which it differs from `machine()`."""
    return [machine(**row) for row in json.loads(path.read_text())]


def driver_number(version: str) -> int:
    """ "570.153.02" -> 570153002, the form in which vast.ai compares drivers."""
    parts = (version.split(".") + ["0", "0"])[:3]
    return int("".join(part.zfill(3) for part in parts))


def offer_row(
    host: dict[str, Any], size: int, ask_id: int, now: float, end_date: float
) -> dict[str, Any]:
    """One search row: `size` of the machine's GPUs. Prices exclude storage until a search says how
    much of it."""
    share = size / host["gpus"]
    base = round(host["usd_per_gpu_hour"] * size, 6)
    dlperf = round(host["dlperf_per_gpu"] * size, 3)
    flops = round(host["flops_per_gpu"] * size, 3)
    hidden = {
        "gpus",
        "slices",
        "usd_per_gpu_hour",
        "days",
        "datacenter",
        "flops_per_gpu",
        "dlperf_per_gpu",
        "min_bid_share",
        "broken",
    }
    row = {key: value for key, value in host.items() if key not in hidden}
    row |= {
        "id": ask_id,
        "ask_contract_id": ask_id,
        "bundle_id": ask_id - 1,
        "num_gpus": size,
        "gpu_frac": share,
        "gpu_total_ram": host["gpu_ram"] * size,
        "cpu_cores_effective": round(host["cpu_cores"] * share, 1),
        "dph_base": base,
        "min_bid": round(base * host["min_bid_share"], 6),
        "dlperf": dlperf,
        "total_flops": flops,
        "reliability2": host["reliability"],
        "rentable": True,
        "rented": False,
        "is_bid": False,
        "hosting_type": host["datacenter"],
        "vericode": 1 if host["verification"] == "verified" else 0,
        "end_date": end_date,
        "duration": end_date - now,
        "time_remaining": "",
        "time_remaining_isbid": "",
        "start_date": now,
        "public_ipaddr": "127.0.0.1",
        "logo": "/static/logos/vastai_small2.png",
        "internet_down_cost_per_tb": host["inet_down_cost"] * 1024,
        "internet_up_cost_per_tb": host["inet_up_cost"] * 1024,
        "driver_vers": driver_number(host["driver_version"]),
        "gpu_ids": list(range(size)),
        "hostname": None,
        "webpage": None,
        "score": round(dlperf / base * host["reliability"] ** 4, 4) if base else 0.0,
        "rn": 1,
        "discount_rate": None,
    }
    return row
