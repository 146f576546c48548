"""vast.ai's rate limits.

A minimum interval between two calls of one kind by one caller, and a daily quota of searches.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ops.fakevast.cloud.errors import ApiError

# route name: seconds between two calls (api-reference/rate-limits-and-errors and x-rate-limit of
# each OpenAPI file)
THRESHOLD_S: dict[str, float] = {
    "create": 4.5,
    "show": 2.0,
    "destroy": 3.0,
    "change_bid": 5.5,
    "add_ssh_key": 1.0,
    "update_ssh_key": 1.0,
    "launch": 5.0,
    "list": 1.0,
    "set_instance": 1.0,
    "reboot": 1.0,
    "recycle": 1.0,
    "command": 1.5,
    "detach_ssh": 2.0,
    "charges": 1.0,
    "invoices_v1": 3.0,
    "volumes": 5.5,
    "secrets": 5.0,
    "add_secret": 5.0,
    "update_secret": 5.0,
    "delete_secret": 5.0,
}
CREATE_PENALTY_S = 12.0  # after a create that came too soon
SEARCHES_PER_MINUTE = 10
MINUTE_S, DAY_S = 60.0, 86400.0


class TooSoon(Exception):
    """`threshold_s` is the interval that was not kept."""

    def __init__(self, threshold_s: float) -> None:
        super().__init__(threshold_s)
        self.threshold_s = threshold_s


@dataclass
class RateLimits:
    """Counts calls per route and caller. Off: lets all pass but the daily quota, if one is set."""

    on: bool = True
    searches_per_day: int | None = None
    _last: dict[tuple[str, str], float] = field(default_factory=dict)
    _penalty: dict[tuple[str, str], float] = field(default_factory=dict)
    _searches: dict[str, list[float]] = field(default_factory=dict)
    _day: dict[str, tuple[int, int]] = field(default_factory=dict)

    def check(self, route: str, caller: str, now: float) -> None:
        """Lets the call pass and notes it, or raises TooSoon (ApiError for the daily quota)."""
        if route in ("search", "search_asks"):
            self._search(caller, now)
        elif self.on and route in THRESHOLD_S:
            self._interval(route, caller, now)

    def _interval(self, route: str, caller: str, now: float) -> None:
        slot = (route, caller)
        threshold = max(THRESHOLD_S[route], self._penalty.get(slot, 0.0))
        if now - self._last.get(slot, float("-inf")) < threshold:
            if route == "create":
                self._penalty[slot] = CREATE_PENALTY_S
            raise TooSoon(threshold)
        self._penalty.pop(slot, None)
        self._last[slot] = now

    def _search(self, caller: str, now: float) -> None:
        day, used = self._day.get(caller, (0, 0))
        used = used if day == int(now // DAY_S) else 0
        if self.searches_per_day is not None and used >= self.searches_per_day:
            raise ApiError(
                429,
                "search_quota_exceeded",
                "Daily search quota exceeded; it resets at UTC midnight.",
            )
        recent = [when for when in self._searches.get(caller, []) if now - when < MINUTE_S]
        if self.on and len(recent) >= SEARCHES_PER_MINUTE:
            raise TooSoon(MINUTE_S / SEARCHES_PER_MINUTE)
        self._searches[caller] = [*recent, now]
        self._day[caller] = (int(now // DAY_S), used + 1)
