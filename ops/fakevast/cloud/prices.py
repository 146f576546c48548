"""A higher price that a host asks of a contract that runs. Pure.

vast.ai tells of it before it holds. Whether it is charged before the renter agrees is written
nowhere: here it is, from a moment on, unless it was rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ops.fakevast.cloud.instance import HOUR_S


@dataclass
class PriceIncrease:
    """`status` is pending, accepted, rejected or in force."""

    number: int
    instance_id: int
    old_usd_per_hour: float
    new_usd_per_hour: float
    asked_at: float
    status: str = "pending"

    def row(self) -> dict[str, Any]:
        """As `GET /instances/pending-price-increases/` shows it."""
        others = ("disk_ram_costpersec", "bwu_cost", "bwd_cost", "platform_fee")
        return {
            "pending_price_increase_id": self.number,
            "contract_id": self.instance_id,
            "host_id": None,
            "new_gpu_costpersec": self.new_usd_per_hour / HOUR_S,
            "old_gpu_costpersec": self.old_usd_per_hour / HOUR_S,
            **{f"{age}_{name}": None for age in ("new", "old") for name in others},
            "contract_end_date": None,
            "ask_end_date": None,
            "created_at": self.asked_at,
        }
