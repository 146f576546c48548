"""What runs cost by day and by month."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

import pytest

from ops.market.models import Offer
from ops.run import ledger
from ops.run.journal import Line
from ops.run.meter import spent_usd

NIGHT = time.mktime((2026, 10, 31, 22, 0, 0, 0, 0, -1))  # two hours before a month ends


def journal(hours: float, ended: bool = True, bill: float | None = None) -> list[Line]:
    """A box of a dollar an hour from 22:00 on the last of October."""
    zero: dict[str, Any] = {f.name: 0.0 for f in fields(Offer)} | {"gpu_name": "", "country": ""}
    rent = {"offer": zero | {"usd_per_hour": 1.0}, "bid_usd_per_hour": None, "disk_gib": 0}
    rows: list[tuple[float, str, dict[str, Any]]] = [
        (0, "planned", {"max_usd": 99.0}),
        (0, "renting", rent),
        (0, "rented", {"instance_id": 1}),
        (0, "booted", {}),
    ]
    rows += [(hours, "destroyed", {})] if ended else []
    rows += [(hours, "bill", {"usd": bill})] if bill is not None else []
    return [Line(n, NIGHT + 3600 * h, kind, data) for n, (h, kind, data) in enumerate(rows)]


def test_a_night_is_shared_by_its_days_and_months_and_sums_up_to_the_meter() -> None:
    lines, now = journal(27.5), NIGHT + 400 * 86400
    assert ledger.by_day(lines, now) == pytest.approx(
        {"2026-10-31": 2.0, "2026-11-01": 24.0, "2026-11-02": 1.5}
    )
    assert sum(ledger.by_day(lines, now).values()) == pytest.approx(spent_usd(lines, now))
    billed = journal(4, bill=8.0)
    october, november = ledger.totals([lines, billed], now, "month")
    assert (october.period, november.period) == ("2026-10", "2026-11")
    assert (october.metered_usd, november.metered_usd) == pytest.approx((4.0, 27.5))
    assert (october.billed_usd, november.billed_usd) == pytest.approx((6.0, 29.5))
    assert (october.runs, november.runs) == (2, 2)


def test_a_box_that_stands_costs_until_now_and_a_run_without_one_nothing() -> None:
    assert ledger.by_day(journal(0, ended=False), NIGHT + 3600) == {"2026-10-31": 1.0}
    assert ledger.by_day(journal(0)[:1], NIGHT + 3600) == {} == ledger.by_day([], NIGHT)
