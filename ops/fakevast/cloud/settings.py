"""How the emulated cloud behaves."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Settings:
    """`boot_s` None models the boot: 15 s plus the pull of the image over the machine's link.

    `v0_list`: `GET /api/v0/instances/` lists as it used to; where it is False it answers 410.
    `stopped_storage_factor`: a stopped disk costs so many times what it costs while it runs.
    """

    boot_s: float | None = 2.0
    credit_usd: float = 25.0
    bill_image_pull: bool = True
    image_bytes: dict[str, int] = field(default_factory=dict)
    default_image_bytes: int = 3_500_000_000
    key_delay_s: float = 0.0
    v0_list: bool = False
    stopped_storage_factor: float = 1.0
