"""The boxes of an account as vast.ai lists them, with whose they are by their label."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ops.job import label
from ops.market.client import Vast
from ops.market.cost import disk_usd_per_hour
from ops.market.models import Instance

_STOPPED = ("exited", "stopped")


@dataclass(frozen=True)
class Rented:
    """One instance of the account."""

    instance_id: int
    label: str
    run_id: str  # "" for one that milktea did not rent
    user: str  # "" where its label does not say
    is_here: bool  # whether its run has a folder here
    status: str  # vast.ai's word
    gpu: str  # 2 x RTX 4090
    usd_per_hour: float  # GPUs and disk; of one that is stopped, its disk

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def rented(vast: Vast, root: Path) -> list[Rented]:
    """Every instance of the account, ours or not. Raises MarketError where the list cannot be
    read."""
    return [_rented(one, root) for one in vast.instances()]


def _rented(one: Instance, root: Path) -> Rented:
    named = label.parse(one.label) or label.Label("")
    stopped = one.status in _STOPPED
    return Rented(
        one.id,
        one.label,
        named.run_id,
        named.user,
        bool(named.run_id) and (root / named.run_id).is_dir(),
        one.status or "not started yet",
        f"{one.num_gpus} x {one.gpu_name}",
        round(disk_usd_per_hour(one, one.disk_gib) if stopped else one.usd_per_hour, 4),
    )
