"""What the machine costs, on a machine that was rented: its renter tells it in a file."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

KEYS = ("usd", "usd_per_hour", "max_usd", "ends_in_s")
_MAX_BYTES = 4096


def read_meter(file: Path) -> dict[str, float] | None:
    """Dollars so far, dollars an hour, the most dollars, and the seconds until the machine ends:
    as `file` told them when it was written, and what has passed since. None without them."""
    try:
        since_s = max(0.0, time.time() - file.stat().st_mtime)
        with file.open("rb") as text:
            told = json.loads(text.read(_MAX_BYTES))
        found = {key: float(told[key]) for key in KEYS}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not all(math.isfinite(value) for value in found.values()):
        return None
    found["usd"] += found["usd_per_hour"] * since_s / 3600
    found["ends_in_s"] = max(0.0, found["ends_in_s"] - since_s)
    return found
