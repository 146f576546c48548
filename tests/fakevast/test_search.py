"""Search, as the live service answers it."""

from __future__ import annotations

from typing import Any

import pytest

from ops.fakevast import Cloud, VirtualClock
from ops.fakevast.cloud.catalogue import CARDS, default_market
from ops.fakevast.cloud.errors import ApiError


@pytest.fixture(scope="module")
def cloud() -> Cloud:
    return Cloud(VirtualClock())


def find(cloud: Cloud, **query: Any) -> list[dict[str, Any]]:
    return cloud.search(query)


def test_the_market_has_dozens_of_offers_and_every_kind_of_trap(cloud: Cloud) -> None:
    rows = cloud.offers()
    assert len(rows) >= 40
    assert {row["num_gpus"] for row in rows} == {1, 2, 4, 8}
    assert {
        "RTX 3090",
        "RTX 4090",
        "RTX 5090",
        "RTX A6000",
        "L40S",
        "A100 SXM4",
        "H100 SXM",
        "H200",
    } <= {row["gpu_name"] for row in rows}
    assert min(row["disk_space"] for row in rows) < 30
    assert max(row["inet_down_cost"] for row in rows) > 0.04
    assert min(row["cuda_max_good"] for row in rows) < 12
    assert min(row["reliability"] for row in rows) < 0.9
    assert min(row["inet_down"] for row in rows) < 50
    assert min(row["duration"] for row in rows) < 6 * 3600
    assert {row["verification"] for row in rows} == {"verified", "unverified", "deverified"}


def test_the_market_is_the_same_each_time() -> None:
    assert Cloud(VirtualClock()).offers() == Cloud(VirtualClock()).offers()


@pytest.fixture(scope="module")
def few() -> Cloud:
    """Fewer offers than one search may return."""
    return Cloud(VirtualClock(), market=default_market()[::2])


@pytest.mark.parametrize(
    ("column", "test", "holds"),
    [
        ("num_gpus", {"eq": "2"}, lambda row: row["num_gpus"] == 2),
        ("num_gpus", {"neq": 1}, lambda row: row["num_gpus"] != 1),
        ("gpu_ram", {"gte": 40000}, lambda row: row["gpu_ram"] >= 40000),
        ("gpu_ram", {"gt": "24564", "lt": 81559}, lambda row: 24564 < row["gpu_ram"] < 81559),
        ("reliability", {"lte": "0.95"}, lambda row: row["reliability"] <= 0.95),
        (
            "gpu_name",
            {"in": ["RTX 4090", "RTX 5090"]},
            lambda row: row["gpu_name"] in ("RTX 4090", "RTX 5090"),
        ),
        ("gpu_name", {"notin": ["RTX 4090"]}, lambda row: row["gpu_name"] != "RTX 4090"),
        ("geolocation", {"in": ["US", "CA"]}, lambda row: row["geolocation"][-2:] in ("US", "CA")),
        ("geolocation", {"eq": "IS"}, lambda row: row["geolocation"] == "Iceland, IS"),
        ("verified", {"eq": "true"}, lambda row: row["verification"] == "verified"),
        ("verified", {"eq": False}, lambda row: row["verification"] != "verified"),
        ("datacenter", {"eq": True}, lambda row: row["hosting_type"] == 1),
        ("duration", {"gte": "2592000"}, lambda row: row["duration"] >= 2592000),
        ("cuda_vers", {"gte": 12.8}, lambda row: row["cuda_max_good"] >= 12.8),
        ("driver_version", {"gte": 570000000}, lambda row: row["driver_version"] >= "570"),
        ("static_ip", {"eq": "true"}, lambda row: row["static_ip"] is True),
    ],
)
def test_a_filter_keeps_exactly_the_rows_for_which_it_holds(
    few: Cloud, column: str, test: dict[str, Any], holds: Any
) -> None:
    found = {row["id"] for row in find(few, **{column: test})}
    assert 0 < len(found) < len(few.offers()) <= 64 and found == {
        row["id"] for row in few.offers() if holds(row)
    }


def test_order_limit_and_cap(cloud: Cloud) -> None:
    prices = [row["dph_total"] for row in find(cloud, order=[["dph_total", "asc"]], limit=10)]
    assert prices == sorted(prices) and len(prices) == 10
    assert len(find(cloud, limit=3000)) == 64 < len(cloud.offers())
    twice = [
        (row["num_gpus"], -row["dph_total"])
        for row in find(cloud, order=[["num_gpus", "asc"], ["dph_total", "desc"]])
    ]
    assert twice == sorted(twice)


def test_the_quoted_price_contains_the_storage_that_was_asked_for(cloud: Cloud) -> None:
    small, large = (
        find(cloud, machine_id={"eq": 11007}, allocated_storage=gb)[0] for gb in (10, 400)
    )
    assert large["dph_total"] - small["dph_total"] == pytest.approx(390 * 0.15 / 720)
    assert small["dph_total"] == pytest.approx(small["dph_base"] + small["storage_total_cost"])
    assert find(cloud, machine_id={"eq": 11007}, allocated_storage=600) == []  # its disk has 520


def test_bids_are_quoted_at_the_minimum_bid(cloud: Cloud) -> None:
    row = find(cloud, machine_id={"eq": 11007}, type="bid", allocated_storage=20)[0]
    assert row["is_bid"] and row["dph_total"] == pytest.approx(row["min_bid"] + 20 * 0.15 / 720)


def test_an_offer_is_found_by_ask_contract_id_and_not_by_id(cloud: Cloud) -> None:
    one = cloud.offers()[0]
    assert find(cloud, id={"eq": one["id"]}) == []
    assert [row["id"] for row in find(cloud, ask_contract_id={"eq": one["id"]})] == [one["id"]]


@pytest.mark.parametrize(
    "query",
    [
        {"gpu_nmae": {"eq": "H100"}},
        {"num_gpus": {"about": 1}},
        {"gpu_name": {"lt": {}}},
        {"allocated_storage": "lots"},
    ],
)
def test_a_query_that_makes_no_sense_is_refused_with_400(
    cloud: Cloud, query: dict[str, Any]
) -> None:
    with pytest.raises(ApiError) as refusal:
        find(cloud, **query)
    assert refusal.value.status == 400 and refusal.value.error == "invalid_request"


def test_every_machine_of_the_market_has_a_card_that_is_known() -> None:
    assert {m["gpu_name"] for m in default_market()} <= set(CARDS)
