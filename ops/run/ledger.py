"""Pure: what runs have cost, by day or by month of this machine's clock."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ops.run.journal import Line
from ops.run.meter import may_have_box, spent_usd

Period = Literal["day", "month"]
_FORMATS: dict[Period, str] = {"day": "%Y-%m-%d", "month": "%Y-%m"}
MAX_DAYS = 3700  # of one run, that are told apart


@dataclass
class Total:
    """Dollars of one day or month. `billed_usd` is vast.ai's bill of the runs whose boxes are all
    billed, spread as our meter spreads them, beside our meter for the others."""

    period: str  # 2026-11-27, or 2026-11
    metered_usd: float = 0.0
    billed_usd: float = 0.0
    runs: int = 0  # that cost something in it


def by_day(lines: list[Line], now: float) -> dict[str, float]:
    """Dollars of one run by our meter, by day (2026-11-27), up to `now` in unix seconds."""
    if not lines:
        return {}
    until = now if may_have_box(lines) else min(now, lines[-1].t)
    found: dict[str, float] = {}
    before, at = 0.0, lines[0].t
    for _ in range(MAX_DAYS):
        ends = min(until, _next_day(at))
        spent = spent_usd([line for line in lines if line.t <= ends], ends)
        if spent > before:
            found[time.strftime(_FORMATS["day"], time.localtime(at))] = spent - before
        before, at = max(before, spent), ends
        if ends >= until:
            break
    return found


def totals(journals: Iterable[list[Line]], now: float, by: Period) -> list[Total]:
    """What these runs cost together in each day or month that cost something, oldest first."""
    found: dict[str, Total] = {}
    for lines in journals:
        days = by_day(lines, now)
        whole, bill = sum(days.values()), _bill(lines)
        factor = bill / whole if bill is not None and whole > 0 else 1.0
        counted: set[str] = set()
        for day, usd in days.items():
            period = day[: len(day) - 3] if by == "month" else day
            total = found.setdefault(period, Total(period))
            total.metered_usd += usd
            total.billed_usd += usd * factor
            total.runs += period not in counted
            counted.add(period)
    return [found[period] for period in sorted(found)]


def _bill(lines: list[Line]) -> float | None:
    """vast.ai's bills of a run whose boxes all have one; None for another run."""
    bills = [line.get("usd") for line in lines if line.kind == "bill"]
    boxes = sum(line.kind == "destroyed" for line in lines)
    if may_have_box(lines) or not bills or len(bills) < boxes or None in bills:
        return None
    return float(sum(b for b in bills if b is not None))


def _next_day(t: float) -> float:
    """The next midnight here after unix second `t`; days of 23 and 25 hours are ones too."""
    now = time.localtime(t)
    return time.mktime((now.tm_year, now.tm_mon, now.tm_mday + 1, 0, 0, 0, 0, 0, -1))
