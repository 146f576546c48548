"""The offers: a table of cards, a table of machines, and how the two become rows such as vast.ai's search returns.

Prices, links and disks are those of an ordinary week in 2026, invented but plausible, and always the same. Among them are the
traps that a buyer meets: see `_MACHINES`.
"""


from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# name: (memory MB, compute capability x100, fp32 TFLOPS, memory GB/s, DLPerf, watts)
CARDS: dict[str, tuple[int, int, float, float, float, int]] = {
    "RTX 3060": (12288, 860, 12.7, 360.0, 13.6, 170),
    "RTX 3090": (24576, 860, 35.6, 936.0, 33.4, 350),
    "RTX 4060 Ti": (16380, 890, 22.1, 288.0, 22.8, 165),
    "RTX 4080S": (16376, 890, 52.2, 736.0, 55.1, 320),
    "RTX 4090": (24564, 890, 82.6, 1008.0, 87.9, 450),
    "RTX 5090": (32607, 1200, 104.8, 1792.0, 152.4, 575),
    "RTX A4000": (16376, 860, 19.2, 448.0, 18.2, 140),
    "RTX A5000": (24564, 860, 27.8, 768.0, 28.8, 230),
    "RTX A6000": (49140, 860, 38.7, 768.0, 39.9, 300),
    "RTX 6000Ada": (49140, 890, 91.1, 960.0, 92.5, 300),
    "Tesla V100": (32768, 700, 14.1, 897.0, 23.6, 300),
    "L40S": (46068, 890, 91.6, 864.0, 94.1, 350),
    "A100 PCIE": (40960, 800, 19.5, 1555.0, 61.0, 250),
    "A100 SXM4": (81920, 800, 19.5, 2039.0, 77.0, 400),
    "H100 PCIE": (81559, 900, 51.2, 2039.0, 176.0, 350),
    "H100 SXM": (81559, 900, 66.9, 3350.0, 248.0, 700),
    "H200": (143771, 900, 66.9, 4800.0, 286.0, 700),
    "B200": (183359, 1000, 80.0, 8000.0, 520.0, 1000),
}

_COLUMNS = (  # noqa: SIM905
    "machine_id host_id gpu_name gpus slices usd_per_gpu_hour geolocation reliability inet_down inet_up inet_down_cost inet_up_cost "
    "disk_space storage_cost cuda_max_good days verification datacenter"
).split()

# One machine a line; slices are the sizes in which its GPUs are let. The last ten are traps, each with its reason.
_MACHINES: tuple[tuple[Any, ...], ...] = (
    (11001, 501, "RTX 3060", 1, (1,), 0.062, "Quebec, CA", 0.991, 480.0, 210.0, 0.004, 0.006, 180.0, 0.15, 12.8, 40, "verified", 0),
    (11002, 502, "RTX 3090", 1, (1,), 0.148, "Bulgaria, BG", 0.987, 720.0, 510.0, 0.003, 0.005, 410.0, 0.15, 12.8, 22, "verified", 0),
    (11003, 503, "RTX 3090", 4, (1, 2, 4), 0.162, "Washington, US", 0.996, 910.0, 870.0, 0.002, 0.003, 1800.0, 0.12, 12.9, 61, "verified", 0),
    (11004, 504, "RTX 3090", 8, (1, 2, 4, 8), 0.175, "Hesse, DE", 0.998, 4200.0, 3900.0, 0.004, 0.004, 3600.0, 0.14, 13.0, 88, "verified", 1),
    (11005, 505, "RTX 4060 Ti", 2, (1, 2), 0.091, "Poland, PL", 0.984, 610.0, 320.0, 0.002, 0.004, 300.0, 0.17, 12.8, 15, "verified", 0),
    (11006, 506, "RTX 4080S", 1, (1,), 0.179, "Vietnam, VN", 0.979, 520.0, 480.0, 0.001, 0.002, 260.0, 0.2, 12.8, 30, "verified", 0),
    (11007, 507, "RTX 4090", 1, (1,), 0.289, "Texas, US", 0.994, 860.0, 640.0, 0.003, 0.005, 520.0, 0.15, 12.8, 33, "verified", 0),
    (11008, 508, "RTX 4090", 1, (1,), 0.312, "Sweden, SE", 0.997, 940.0, 910.0, 0.002, 0.002, 700.0, 0.13, 13.0, 71, "verified", 0),
    (11009, 509, "RTX 4090", 2, (1, 2), 0.301, "Ontario, CA", 0.993, 780.0, 450.0, 0.005, 0.008, 900.0, 0.16, 12.9, 27, "verified", 0),
    (11010, 510, "RTX 4090", 4, (1, 2, 4), 0.334, "Czechia, CZ", 0.998, 2300.0, 2100.0, 0.003, 0.003, 2400.0, 0.15, 13.0, 55, "verified", 1),
    (11011, 511, "RTX 4090", 8, (1, 2, 4, 8), 0.352, "California, US", 0.999, 7600.0, 7100.0, 0.004, 0.004, 6800.0, 0.15, 13.0, 120, "verified", 1),
    (11012, 512, "RTX 5090", 1, (1,), 0.449, "Norway, NO", 0.992, 930.0, 920.0, 0.002, 0.003, 900.0, 0.16, 13.0, 48, "verified", 0),
    (11013, 513, "RTX 5090", 4, (1, 2, 4), 0.498, "Utah, US", 0.997, 3100.0, 2800.0, 0.004, 0.005, 3800.0, 0.15, 13.0, 90, "verified", 1),
    (11014, 514, "RTX A4000", 1, (1,), 0.089, "Estonia, EE", 0.986, 540.0, 500.0, 0.002, 0.003, 240.0, 0.14, 12.8, 18, "verified", 0),
    (11015, 515, "RTX A5000", 4, (1, 2, 4), 0.191, "Iceland, IS", 0.995, 1000.0, 980.0, 0.005, 0.005, 1500.0, 0.15, 12.8, 80, "verified", 1),
    (11016, 516, "RTX A6000", 2, (1, 2), 0.399, "New York, US", 0.996, 1400.0, 1100.0, 0.004, 0.006, 1900.0, 0.15, 12.9, 66, "verified", 1),
    (11017, 517, "RTX 6000Ada", 2, (1, 2), 0.662, "Japan, JP", 0.995, 1900.0, 1800.0, 0.006, 0.006, 1600.0, 0.18, 13.0, 45, "verified", 1),
    (11018, 518, "L40S", 4, (1, 2, 4), 0.618, "Finland, FI", 0.998, 5200.0, 5000.0, 0.003, 0.003, 3200.0, 0.15, 13.0, 75, "verified", 1),
    (11019, 519, "Tesla V100", 8, (1, 2, 8), 0.139, "Kansas, US", 0.991, 1100.0, 900.0, 0.003, 0.003, 2500.0, 0.1, 12.6, 35, "verified", 1),
    (11020, 520, "A100 PCIE", 2, (1, 2), 0.571, "Taiwan, TW", 0.994, 1700.0, 1500.0, 0.005, 0.006, 1800.0, 0.15, 12.8, 50, "verified", 1),
    (11021, 521, "A100 SXM4", 8, (1, 2, 4, 8), 0.789, "Netherlands, NL", 0.998, 6400.0, 6100.0, 0.004, 0.004, 9000.0, 0.15, 13.0, 110, "verified", 1),
    (11022, 522, "H100 PCIE", 2, (1, 2), 1.689, "France, FR", 0.997, 4800.0, 4600.0, 0.005, 0.005, 4200.0, 0.16, 13.0, 60, "verified", 1),
    (11023, 523, "H100 SXM", 8, (1, 2, 4, 8), 1.949, "Virginia, US", 0.999, 8900.0, 8600.0, 0.003, 0.003, 14000.0, 0.15, 13.0, 150, "verified", 1),
    (11024, 524, "H200", 8, (1, 2, 8), 2.479, "India, IN", 0.998, 8200.0, 7900.0, 0.004, 0.004, 16000.0, 0.15, 13.0, 140, "verified", 1),
    (11025, 525, "B200", 8, (1, 8), 3.649, "Oregon, US", 0.997, 9400.0, 9100.0, 0.003, 0.003, 20000.0, 0.15, 13.0, 100, "verified", 1),
    # cheapest 4090 by the hour, but a gigabyte in costs as much as ten minutes of it
    (12001, 601, "RTX 4090", 1, (1,), 0.199, "Hungary, HU", 0.993, 800.0, 500.0, 0.045, 0.061, 400.0, 0.15, 12.8, 40, "verified", 0),
    # the disk holds no image with a model in it
    (12002, 602, "RTX 4090", 1, (1,), 0.221, "Spain, ES", 0.992, 600.0, 400.0, 0.002, 0.003, 24.0, 0.15, 12.8, 30, "verified", 0),
    # driver too old for today's PyTorch
    (12003, 603, "RTX 3090", 2, (1, 2), 0.109, "Ukraine, UA", 0.985, 700.0, 600.0, 0.001, 0.001, 600.0, 0.1, 11.8, 40, "verified", 0),
    # falls over twice a day
    (12004, 604, "RTX 4090", 1, (1,), 0.209, "Brazil, BR", 0.871, 500.0, 300.0, 0.003, 0.004, 500.0, 0.15, 12.8, 40, "verified", 0),
    # twenty minutes to pull a small image
    (12005, 605, "RTX A5000", 1, (1,), 0.119, "Australia, AU", 0.988, 38.0, 9.0, 0.002, 0.002, 500.0, 0.15, 12.8, 40, "verified", 0),
    # the contract ends in five hours
    (12006, 606, "RTX 4090", 1, (1,), 0.218, "Italy, IT", 0.995, 900.0, 800.0, 0.002, 0.002, 600.0, 0.15, 13.0, 0.2, "verified", 0),
    # nobody has verified it
    (12007, 607, "RTX 5090", 1, (1,), 0.271, "China, CN", 0.962, 700.0, 200.0, 0.001, 0.002, 800.0, 0.12, 13.0, 40, "unverified", 0),
    # verification was taken away
    (12008, 608, "RTX 3090", 1, (1,), 0.094, "Romania, RO", 0.942, 300.0, 90.0, 0.001, 0.001, 300.0, 0.1, 12.4, 12, "deverified", 0),
    # storage dear enough to beat the GPU on a long life
    (12009, 609, "RTX A6000", 1, (1,), 0.289, "Singapore, SG", 0.994, 900.0, 700.0, 0.003, 0.003, 900.0, 2.4, 12.9, 40, "verified", 0),
    # looks perfect and never starts a container: see `broken` below
    (12010, 610, "RTX 4090", 1, (1,), 0.229, "Nevada, US", 0.995, 900.0, 850.0, 0.002, 0.002, 800.0, 0.13, 13.0, 60, "verified", 0),
)  # fmt: skip
_BROKEN = {12010: "oci_error"}
_DIRECT_PORTS = {11014: 0}  # only its proxy can be reached
_DRIVERS = {11.8: "520.61.05", 12.4: "550.90.07", 12.6: "560.35.03", 12.8: "570.153.02", 12.9: "575.57.08", 13.0: "580.65.06"}


def machine(**known: Any) -> dict[str, Any]:
    """A machine's whole record from the few fields that matter; the rest is filled in from the card's table.

    `gpus` is how many it has, `slices` in which sizes they are let. Any field of a search row may be given and wins.
    """
    card = known.setdefault("gpu_name", "RTX 4090")
    memory, capability, tflops, bandwidth, dlperf, watts = CARDS.get(card, CARDS["RTX 4090"])
    record: dict[str, Any] = {
        "machine_id": 19000, "host_id": 900, "gpus": 1, "usd_per_gpu_hour": 0.3, "geolocation": "Texas, US", "reliability": 0.995,
        "inet_down": 800.0, "inet_up": 600.0, "inet_down_cost": 0.003, "inet_up_cost": 0.004, "disk_space": 500.0, "storage_cost": 0.15,
        "cuda_max_good": 12.8, "days": 40, "verification": "verified", "datacenter": 0, "gpu_ram": memory, "compute_cap": capability,
        "flops_per_gpu": tflops, "gpu_mem_bw": bandwidth, "dlperf_per_gpu": dlperf, "gpu_max_power": watts, "gpu_max_temp": 92.0,
        "cpu_name": "AMD EPYC 7543 32-Core Processor", "cpu_ghz": 3.7, "cpu_arch": "amd64", "disk_bw": 2900.0, "disk_name": "nvme",
        "pcie_bw": 22.8, "pci_gen": 4.0, "gpu_lanes": 16, "mobo_name": "ROMED8-2T", "has_avx": 1, "gpu_arch": "nvidia",
        "ubuntu_version": "22.04", "os_version": "22.04", "bw_nvlink": 0.0, "direct_port_count": 64, "external": False, "vms_enabled": False,
        "gpu_display_active": False, "cluster_id": None, "credit_discount_max": 0.4, "min_bid_share": 0.5, "broken": None,
    }  # fmt: skip
    record.update(known)
    record.setdefault("static_ip", record["datacenter"] == 1)
    record.setdefault("slices", (record["gpus"],))
    record.setdefault("driver_version", _DRIVERS.get(record["cuda_max_good"], "570.153.02"))
    record.setdefault("cpu_cores", 16 * record["gpus"] + 16)
    record.setdefault("cpu_ram", 64_000 * record["gpus"] + 64_000)
    return record


def default_market() -> list[dict[str, Any]]:
    """The built-in machines, a fresh copy each time: change it as you like."""
    rows = [machine(**dict(zip(_COLUMNS, line, strict=True))) for line in _MACHINES]
    for row in rows:
        row["broken"] = _BROKEN.get(row["machine_id"])
        row["direct_port_count"] = _DIRECT_PORTS.get(row["machine_id"], row["direct_port_count"])
    return rows


def load_market(path: Path) -> list[dict[str, Any]]:
    """A JSON list of machines; each needs only the fields in which it differs from `machine()`."""
    return [machine(**row) for row in json.loads(path.read_text())]


def driver_number(version: str) -> int:
    """"570.153.02" -> 570153002, the form in which vast.ai compares drivers."""
    parts = (version.split(".") + ["0", "0"])[:3]
    return int("".join(part.zfill(3) for part in parts))


def offer_row(host: dict[str, Any], size: int, ask_id: int, now: float, end_date: float) -> dict[str, Any]:
    """One search row: `size` of the machine's GPUs. Prices exclude storage until a search says how much of it."""
    share = size / host["gpus"]
    base = round(host["usd_per_gpu_hour"] * size, 6)
    dlperf = round(host["dlperf_per_gpu"] * size, 3)
    flops = round(host["flops_per_gpu"] * size, 3)
    hidden = {
        "gpus", "slices", "usd_per_gpu_hour", "days", "datacenter", "flops_per_gpu", "dlperf_per_gpu", "min_bid_share", "broken",
    }  # fmt: skip
    row = {key: value for key, value in host.items() if key not in hidden}
    row |= {
        "id": ask_id, "ask_contract_id": ask_id, "bundle_id": ask_id - 1, "num_gpus": size, "gpu_frac": share,
        "gpu_total_ram": host["gpu_ram"] * size, "cpu_cores_effective": round(host["cpu_cores"] * share, 1),
        "dph_base": base, "min_bid": round(base * host["min_bid_share"], 6), "dlperf": dlperf, "total_flops": flops,
        "reliability2": host["reliability"], "rentable": True, "rented": False, "is_bid": False, "hosting_type": host["datacenter"],
        "vericode": 1 if host["verification"] == "verified" else 0, "end_date": end_date, "duration": end_date - now,
        "time_remaining": "", "time_remaining_isbid": "", "start_date": now, "public_ipaddr": "127.0.0.1", "logo": "/static/logos/vastai_small2.png",
        "internet_down_cost_per_tb": host["inet_down_cost"] * 1024, "internet_up_cost_per_tb": host["inet_up_cost"] * 1024,
        "driver_vers": driver_number(host["driver_version"]), "gpu_ids": list(range(size)), "hostname": None, "webpage": None,
        "score": round(dlperf / base * host["reliability"] ** 4, 4) if base else 0.0, "rn": 1, "discount_rate": None,
    }  # fmt: skip
    return row
