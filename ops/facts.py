"""Pure: what a box says of itself, and why that does not suit."""

from __future__ import annotations

from dataclasses import dataclass

from ops.market import Offer
from ops.offers import Needs

MARK = "=milktea-facts="
SCRIPT = f"""\
echo "{MARK} gpu"; nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv,noheader,nounits 2>&1
echo "{MARK} disk"; df -Pk . 2>&1 | tail -n 1
"""


@dataclass(frozen=True)
class Facts:
    gpu_names: tuple[str, ...]
    gpu_memory_gib: float
    driver: str
    compute_capability: float
    disk_free_gib: float
    complaint: str = ""


@dataclass(frozen=True)
class Expected:
    gpu_name: str
    num_gpus: int
    gpu_memory_gib: float
    disk_gib: float

    @classmethod
    def of(cls, offer: Offer, needs: Needs) -> Expected:
        return cls(offer.gpu_name, offer.num_gpus, offer.gpu_memory_gib, needs.disk_gib)


def parse(stdout: str) -> Facts:
    parts = {p.split("\n", 1)[0].strip(): p.split("\n", 1)[1] for p in stdout.split(MARK)[1:]}
    rows = [[c.strip() for c in line.split(",")] for line in parts.get("gpu", "").splitlines() if line.count(",") == 3]
    complaint = "" if rows else parts.get("gpu", "").strip()[:200]
    disk = parts.get("disk", "").split()
    free = float(disk[3]) / 2**20 if len(disk) >= 6 and disk[3].isdigit() else 0.0
    if not rows:
        return Facts((), 0.0, "", 0.0, free, complaint or "nvidia-smi says nothing")
    return Facts(tuple(r[0] for r in rows), min(float(r[1]) for r in rows) / 1024, rows[0][2], float(rows[0][3]), free)


def unsuitable(facts: Facts, expected: Expected) -> str | None:
    if facts.complaint:
        return f"nvidia-smi: {facts.complaint}"
    wanted = expected.gpu_name.replace(" ", "").lower()
    if any(wanted not in name.replace(" ", "").replace("GeForce", "").replace("NVIDIA", "").lower() for name in facts.gpu_names):
        return f"its GPUs are {', '.join(facts.gpu_names)}, offered {expected.gpu_name}"
    if len(facts.gpu_names) != expected.num_gpus:
        return f"it has {len(facts.gpu_names)} GPUs, offered {expected.num_gpus}"
    if facts.gpu_memory_gib < expected.gpu_memory_gib * 0.95:
        return f"its GPUs have {facts.gpu_memory_gib:.1f} GiB, offered {expected.gpu_memory_gib:.1f}"
    return None
