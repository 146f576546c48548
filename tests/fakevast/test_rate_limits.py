"""vast.ai's least intervals, on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fakevast.renter import call

from ops.fakevast import FakeVast, VirtualClock


@pytest.fixture
def slow(make: Callable[..., FakeVast]) -> FakeVast:
    return make(clock=VirtualClock(), rate_limits=True)


@pytest.mark.parametrize(
    ("method", "path", "seconds"),
    [
        ("GET", "/v0/instances/1/", 2.0),
        ("DELETE", "/v0/instances/1/", 3.0),
        ("GET", "/v1/instances/", 1.0),
        ("PUT", "/v0/instances/bid_price/1/", 5.5),
    ],
)
def test_a_call_that_comes_before_its_interval_is_over_gets_429(
    slow: FakeVast, method: str, path: str, seconds: float
) -> None:
    def ask() -> int:
        return call(slow, method, path, {}).status_code

    assert ask() != 429
    slow.clock.advance(seconds - 0.01)
    assert ask() == 429
    slow.clock.advance(0.02)
    assert ask() != 429


def test_a_429_is_bare_text_from_most_and_json_from_create_and_destroy(slow: FakeVast) -> None:
    shapes = {}
    for name, method, path in (
        ("list", "GET", "/v1/instances/"),
        ("create", "PUT", "/v0/asks/1/"),
        ("destroy", "DELETE", "/v0/instances/1/"),
    ):
        call(slow, method, path, {})
        shapes[name] = call(slow, method, path, {})
    assert shapes["list"].text == "API requests too frequent: endpoint threshold=1.0"
    assert shapes["create"].json() == {"detail": "API requests too frequent endpoint threshold=4.5"}
    assert shapes["destroy"].json()["error"] == "rate_limit_exceeded"


def test_a_create_that_comes_too_soon_makes_the_next_one_wait_longer(slow: FakeVast) -> None:
    def create() -> int:
        return call(slow, "PUT", "/v0/asks/1/", {}).status_code

    assert create() == 404 and create() == 429
    slow.clock.advance(11)
    assert create() == 429
    slow.clock.advance(1.1)
    assert create() == 404


def test_ten_searches_a_minute(slow: FakeVast) -> None:
    codes = [call(slow, "POST", "/v0/bundles/", {}).status_code for _ in range(11)]
    assert codes == [200] * 10 + [429]
    slow.clock.advance(61)
    assert call(slow, "POST", "/v0/bundles/", {}).status_code == 200


def test_the_daily_quota_of_searches_ends_at_midnight(slow: FakeVast) -> None:
    slow.emulator.rate_limits.searches_per_day = 2
    codes = [call(slow, "POST", "/v0/bundles/", {}) for _ in range(3)]
    assert codes[2].status_code == 429 and codes[2].json()["error"] == "search_quota_exceeded"
    slow.clock.advance(86400)
    assert call(slow, "POST", "/v0/bundles/", {}).status_code == 200


def test_two_callers_do_not_slow_each_other_down(slow: FakeVast) -> None:
    own = call(slow, "POST", "/v0/auth/apikeys/", {"name": "second"}).json()["key"]
    assert [
        call(slow, "GET", "/v1/instances/", key=key).status_code for key in ("account", own)
    ] == [200, 200]
