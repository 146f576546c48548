"""Rows become offers, needs become a query, and a ranking says why each offer is or is not the
choice."""

from __future__ import annotations

import math
import random
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.hardware import gpus
from ops.market import models
from ops.market import ranking as offers
from ops.market.models import Offer
from ops.market.ranking import Needs
from ops.market.workload import Workload
from trainer.memory import Shape, min_gpu_memory_gib

# The shape of a live row (market of July 2025), with a verified machine's values where it had none.
ROW: dict[str, Any] = {
    "ask_contract_id": 21348645,
    "bundle_id": 1886969015,
    "compute_cap": 1200,
    "cpu_arch": "amd64",
    "cpu_cores": None,
    "cpu_ram": 63745,
    "cuda_max_good": 12.8,
    "direct_port_count": 499,
    "disk_bw": 6116.4,
    "disk_space": 2973.7,
    "dlperf": 141.77,
    "dph_base": 0.36,
    "dph_total": 0.3675,
    "driver_version": "570.124.04",
    "duration": 3149474.36,
    "geolocation": "Ontario, CA",
    "gpu_mem_bw": 1448.2,
    "gpu_name": "RTX 5090",
    "gpu_ram": 32607,
    "gpu_total_ram": 32607,
    "host_id": 98979,
    "id": 21348645,
    "inet_down": 2118,
    "inet_down_cost": 0.001953125,
    "inet_up": 2241.5,
    "inet_up_cost": 0.001953125,
    "is_bid": False,
    "machine_id": 37228,
    "min_bid": 0.2,
    "num_gpus": 1,
    "reliability": 0.9964528,
    "rentable": True,
    "score": 1376.6,
    "storage_cost": 0.15,
    "storage_total_cost": 0.0075,
    "total_flops": 107.58,
    "verification": "verified",
}

INSTANCE: dict[str, Any] = {
    "id": 33402296,
    "machine_id": 37228,
    "label": "run-1",
    "actual_status": "running",
    "intended_status": "running",
    "cur_state": "running",
    "next_state": "running",
    "status_msg": "success, running x\n",
    "ssh_host": "ssh5.vast.ai",
    "ssh_port": 12296,
    "public_ipaddr": "203.0.113.42 \n",
    "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": "30022"}]},
    "gpu_name": "RTX 5090",
    "num_gpus": 1,
    "dph_total": 0.3675,
    "disk_space": 36.0,
    "is_bid": False,
    "end_date": 1756666345,
    "storage_cost": 0.15,
    "inet_up_cost": 0.001,
    "inet_down_cost": 0.002,
    "start_date": 1753500000.0,
    "extra_env": [],
}

SEVEN_B = Shape(32_000, 4096, 32, 32, 32, 128, 11008)
WORK = Workload(
    tokens=6e6, model_parameters=6.6e9, image_bytes=4e9, model_download_bytes=13.5e9, disk_gib=60
)
NEEDS = Needs(disk_gib=60)


def offer(**changed: Any) -> Offer:
    return replace(models.parse_offer(ROW), **changed)


def test_a_live_row_is_read_in_our_units() -> None:
    got = models.parse_offer(ROW)
    assert (got.id, got.machine_id, got.gpu_name, got.num_gpus) == (21348645, 37228, "RTX 5090", 1)
    assert got.gpu_memory_gib == pytest.approx(31.84, abs=0.01)
    assert got.cpu_ram_gib == pytest.approx(62.25, abs=0.01)
    assert (got.compute_capability, got.cuda_max, got.country) == (12.0, 12.8, "CA")
    assert (got.usd_per_hour, got.min_bid_usd_per_hour, got.storage_usd_per_gib_month) == (
        0.36,
        0.2,
        0.15,
    )
    assert got.verified and got.rentable and got.direct_ports == 499
    assert (got.dlperf, got.gpu_memory_gb_s, got.score) == (141.77, 1448.2, 1376.6)


def test_numbers_that_arrive_as_strings_are_numbers() -> None:
    as_text = {
        k: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v
        for k, v in ROW.items()
    }
    assert models.parse_offer(as_text) == models.parse_offer(ROW)


def test_the_price_without_disk_is_found_when_only_the_total_is_there() -> None:
    assert models.parse_offer(ROW | {"dph_base": None}).usd_per_hour == pytest.approx(0.36)


PLACES = [("Ontario, CA", "CA"), (", de", "DE"), ("US", "US"), ("Atlantis", ""), (None, "")]
PRICED_BY = [
    "machine_id",
    "gpu_name",
    "num_gpus",
    "gpu_ram",
    "storage_cost",
    "inet_down_cost",
    "inet_up_cost",
]
NULLABLE = [
    "compute_cap",
    "cuda_max_good",
    "disk_space",
    "reliability",
    "inet_down",
    "duration",
    "direct_port_count",
    "verification",
]


@pytest.mark.parametrize(("place", "country"), PLACES)
def test_a_place_becomes_its_country_code(place: str | None, country: str) -> None:
    assert models.parse_offer(ROW | {"geolocation": place}).country == country


@pytest.mark.parametrize("key", PRICED_BY)
def test_an_offer_without_what_its_price_or_size_rests_on_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        models.parse_offer(ROW | {key: None})


@pytest.mark.parametrize("value", ["soon", True, float("nan"), [], {}])
def test_a_number_that_is_none_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match="gpu_ram"):
        models.parse_offer(ROW | {"gpu_ram": value})


@pytest.mark.parametrize("key", NULLABLE)
def test_what_vast_leaves_null_never_looks_like_a_good_value(key: str) -> None:
    needs = replace(NEEDS, min_direct_ports=1)
    assert offers.rank([models.parse_offer(ROW)], needs, WORK).accepted
    assert not offers.rank([models.parse_offer(ROW | {key: None})], needs, WORK).accepted


def test_a_running_instance_gives_both_ways_to_reach_it() -> None:
    got = models.parse_instance(INSTANCE)
    assert (got.ssh_host, got.ssh_port, got.direct_host, got.direct_port) == (
        "ssh5.vast.ai",
        12296,
        "203.0.113.42",
        30022,
    )
    assert (got.label, got.status, got.usd_per_hour, got.end_unix_s) == (
        "run-1",
        "running",
        0.3675,
        1756666345,
    )


@pytest.mark.parametrize("ports", [None, {}, {"22/tcp": None}, {"22/tcp": []}, [22]])
def test_an_instance_without_a_port_map_has_no_direct_port(ports: object) -> None:
    assert models.parse_instance(INSTANCE | {"ports": ports}).direct_port is None


def test_an_instance_that_is_being_provisioned_is_read_although_nearly_all_is_null() -> None:
    got = models.parse_instance(dict.fromkeys(INSTANCE) | {"id": 7})
    assert (got.id, got.status, got.direct_port, got.end_unix_s, got.outbid) == (
        7,
        "",
        None,
        None,
        False,
    )


def test_an_instance_without_an_id_is_refused() -> None:
    with pytest.raises(ValueError, match="id"):
        models.parse_instance(INSTANCE | {"id": None})


def test_an_instance_that_was_outbid_says_so() -> None:
    stopped = dict.fromkeys(("cur_state", "intended_status", "next_state"), "stopped")
    assert models.parse_instance(INSTANCE | stopped | {"actual_status": "exited"}).outbid


def test_the_query_speaks_vasts_units_and_quotes_the_disk_that_will_be_rented() -> None:
    body = offers.query(
        Needs(("rtx_4090", "H100 SXM"), 24, 2, 1.5, countries=("US", "DE"), disk_gib=60, hours=2)
    )
    assert body["gpu_name"] == {"in": ["RTX 4090", "H100 SXM"]}
    assert (
        body["gpu_ram"]["gte"] < 24 * 1000
        and body["compute_cap"] == {"gte": 800}
        and body["duration"] == {"gte": 7200}
    )
    assert body["geolocation"] == {"in": ["US", "DE"]} and body["num_gpus"] == {"eq": 2}
    assert body["allocated_storage"] == 60 and body["type"] == "on-demand" and body["limit"] == 64


def test_a_query_for_bids_does_not_filter_by_the_on_demand_price() -> None:
    body = offers.query(Needs(interruptible=True, max_usd_per_hour=0.3))
    assert body["type"] == "bid" and "dph_total" not in body


_COLUMNS = {
    "geolocation": lambda r: r["geolocation"][-2:],
    "rented": lambda r: False,
    "external": lambda r: False,
    "verified": lambda r: r["verification"] == "verified",
    "dph_total": lambda r: r["dph_base"] + 60 * r["storage_cost"] / 720,
}
_OPERATORS = {
    "eq": lambda a, b: a == b,
    "gte": lambda a, b: a >= b,
    "lte": lambda a, b: a <= b,
    "in": lambda a, b: a in b,
}
_ROWS = st.fixed_dictionaries(
    {
        "gpu_name": st.sampled_from(["RTX 4090", "H100 SXM", "RTX 3090"]),
        "gpu_ram": st.sampled_from([24564, 24268, 81559, 46068]),
        "num_gpus": st.sampled_from([1, 2]),
        "reliability": st.floats(0.9, 1),
        "inet_down": st.floats(80, 500),
        "dph_base": st.floats(0.1, 3),
        "disk_space": st.floats(30, 90),
        "geolocation": st.sampled_from(["Ontario, CA", "Texas, US", ", DE"]),
    }
)


@settings(deadline=None)
@given(_ROWS)
def test_the_server_never_filters_out_what_we_would_take(changed: dict[str, Any]) -> None:
    row = ROW | changed
    needs = Needs(("RTX 4090", "H100 SXM"), 24, 1, 1.5, 0.95, ("US", "DE"), disk_gib=60)
    kept = all(
        _OPERATORS[op](_COLUMNS[key](row) if key in _COLUMNS else row[key], value)
        for key, test in offers.query(needs).items()
        if isinstance(test, dict)
        for op, value in test.items()
    )
    if offers.rank([models.parse_offer(row)], needs, WORK).accepted:
        assert kept


@pytest.mark.parametrize(
    ("changed", "needs", "name"),
    [
        ({"rentable": False}, {}, "rentable"),
        ({}, {"gpu_names": ("RTX 4090",)}, "gpu_name"),
        ({"num_gpus": 2}, {}, "num_gpus"),
        ({"gpu_memory_gib": 23.0}, {"min_gpu_memory_gib": 24.0}, "min_gpu_memory_gib"),
        ({"compute_capability": 8.6}, {"min_compute_capability": 8.9}, "compute_capability"),
        ({"cuda_max": 12.4}, {}, "min_cuda"),
        ({"disk_gib": 59.0}, {}, "disk_gib"),
        ({"usd_per_hour": 0.61}, {"max_usd_per_hour": 0.6}, "max_usd_per_hour"),
        (
            {"min_bid_usd_per_hour": 0.5},
            {"interruptible": True, "bid_usd_per_hour": 0.4},
            "bid_usd_per_hour",
        ),
        ({"reliability": 0.94}, {}, "min_reliability"),
        ({"verified": False}, {}, "verified"),
        ({"country": "CN"}, {"countries": ("US",)}, "countries"),
        ({"inet_down_mbps": 99.0}, {}, "min_inet_down_mbps"),
        ({"duration_s": 3600.0}, {}, "duration"),
        ({"direct_ports": 0}, {"min_direct_ports": 1}, "direct_ports"),
        ({"cpu_ram_gib": 4.0}, {"min_cpu_ram_gib": 9.0}, "min_cpu_ram_gib"),
        ({"cpu_cores": 0.5}, {"min_cpu_cores": 1.0}, "cpu_cores"),
        ({"gpu_name": "RTX 9999", "dlperf": 0.0}, {}, "gpu_name"),
        ({"gpu_name": "RTX A6000"}, {"hours": 0.5}, "limits.max_hours"),
        ({"inet_down_usd_per_gb": 0.05}, {"max_usd": 0.5}, "limits.max_usd"),
    ],
)
def test_each_need_is_checked_again_and_the_rejection_names_it(
    changed: dict[str, Any], needs: dict[str, Any], name: str
) -> None:
    assert offers.rank([offer()], NEEDS, WORK).accepted, "the unchanged offer passes"
    ranking = offers.rank([offer(**changed)], replace(NEEDS, **needs), WORK)
    assert not ranking.accepted
    assert name in {reason[0] for reason in ranking.obstacles[0][1]}
    assert ranking.strictest_filter()[1] == 1
    assert ranking.rejected[0][1] and ranking.rejected[0][2]


def test_a_card_that_vast_writes_otherwise_than_the_user_is_the_same_card() -> None:
    for name in ("rtx_5090", "NVIDIA GeForce RTX 5090", "RTX5090"):
        assert offers.rank([offer()], replace(NEEDS, gpu_names=(name,)), WORK).accepted, name


@pytest.mark.parametrize(("asked", "reported_mb"), [(24, 24564), (80, 81559), (16, 16376)])
def test_a_card_passes_for_the_size_on_its_box(asked: int, reported_mb: int) -> None:
    got = models.parse_offer(ROW | {"gpu_ram": reported_mb})
    assert offers.rank([got], replace(NEEDS, min_gpu_memory_gib=asked), WORK).accepted


def test_a_model_that_does_not_fit_is_never_accepted_whatever_the_user_asks() -> None:
    work = replace(WORK, shape=SEVEN_B)
    ranking = offers.rank([offer(gpu_name="RTX 4070 Ti", gpu_memory_gib=11.99)], NEEDS, work)
    least = math.ceil(min_gpu_memory_gib(SEVEN_B) / 0.98 * 10) / 10
    assert ranking.rejected[0][1:] == (
        f"needs {least:.1f} GiB in bf16, a RTX 4070 Ti has 12.0 GiB",
        "gpu_memory",
    )


def test_fp8_is_refused_on_a_card_without_it() -> None:
    ampere = offer(gpu_name="RTX A6000", gpu_memory_gib=48.0, compute_capability=8.6)
    ranking = offers.rank([ampere], NEEDS, replace(WORK, precision="fp8"))
    assert ranking.rejected[0][2] == "model.precision"


def test_the_cheapest_finished_run_comes_first_and_not_the_cheapest_hour() -> None:
    cheap_hour = offer(id=1, gpu_name="RTX 3090", usd_per_hour=0.2, inet_down_usd_per_gb=0.03)
    ranking = offers.rank([cheap_hour, offer(id=2)], NEEDS, WORK)
    assert [p.offer.id for p in ranking.accepted] == [2, 1]
    why = ranking.accepted[1].why
    assert (
        why.startswith("+$")
        and "download at $0.030/GB" in why
        and "more GPU time on RTX 3090" in why
    )


def test_expected_dollars_rise_along_the_ranking() -> None:
    several = [offer(id=i, usd_per_hour=0.3 + i / 50, reliability=1 - i / 500) for i in range(20)]
    spent = [p.cost.expected_usd for p in offers.rank(several, NEEDS, WORK).accepted]
    assert len(spent) == 20 and spent == sorted(spent)


def test_the_advice_names_the_filter_that_alone_keeps_most_out() -> None:
    hopeless = [offer(id=10 + i, disk_gib=5.0, cuda_max=11.0) for i in range(4)]
    ranking = offers.rank([offer(id=i, reliability=0.9) for i in range(3)] + hopeless, NEEDS, WORK)
    assert ranking.strictest_filter()[1] == 4 and ranking.strictest_filter()[0] in (
        "disk_gib",
        "min_cuda",
    )
    assert (
        ranking.advice()
        == "min_reliability alone keeps 3 of 7 offers out; the first: has reliability 0.900, "
        "under 0.950"
    )
    assert "each of which fails another filter too" in offers.rank(hopeless, NEEDS, WORK).advice()


def test_without_a_rejection_there_is_nothing_to_advise() -> None:
    ranking = offers.rank([offer()], NEEDS, WORK)
    assert ranking.strictest_filter() == ("", 0) and ranking.advice() == ""


def test_a_row_that_came_twice_counts_once() -> None:
    assert len(offers.rank([offer(), offer()], NEEDS, WORK).accepted) == 1


def test_a_machine_that_failed_today_is_refused_and_after_a_week_only_costs_more() -> None:
    day = 86400.0
    machine = offer().machine_id
    refused = offers.rank([offer()], NEEDS, WORK, {machine: offers.penalty([0.0])})
    assert refused.rejected[0][2] == "bad_machine"
    later = offers.rank([offer()], NEEDS, WORK, {machine: offers.penalty([8 * day])})
    clean = offers.rank([offer()], NEEDS, WORK)
    assert later.accepted[0].cost.expected_usd > clean.accepted[0].cost.expected_usd
    assert (
        offers.penalty([]) == 0
        and offers.penalty([0.0, 0.0]) > offers.penalty([0.0])
        and offers.penalty([90 * day]) < 0.001
    )


def test_remembering_bad_machines_makes_nearly_all_first_choices_work() -> None:
    """A fifth of 60 machines never boots; half are free at a time; a run every six hours; 10
    markets of 60 runs each."""
    early, late = [], []
    for seed in range(10):
        dice = random.Random(seed)
        models = [
            offer(id=i, machine_id=i, usd_per_hour=0.36 * dice.lognormvariate(0, 0.3))
            for i in range(60)
        ]
        broken = set(dice.sample(range(60), 12))
        failures: dict[int, list[float]] = {}
        for run in range(60):
            bad = {
                m: offers.penalty(run * 6 * 3600 - t for t in times)
                for m, times in failures.items()
            }
            free = dice.sample(models, 30)
            order = [p.offer.id for p in offers.rank(free, NEEDS, WORK, bad).accepted]
            (late if run >= 30 else early if run < 3 else []).append(order[0] not in broken)
            for tried in order:
                if tried not in broken:
                    break
                failures.setdefault(tried, []).append(run * 6 * 3600.0)
    print(
        f"\nfirst choices that boot: {sum(early) / len(early):.1%} in runs 1-3, "
        f"{sum(late) / len(late):.1%} in runs 31-60"
    )
    assert sum(late) / len(late) >= 0.97


def test_every_card_of_the_table_is_plausible() -> None:
    assert len(gpus.GPUS) >= 40
    for gpu in gpus.GPUS:
        assert 8 <= gpu.memory_gib <= 300 and 0.4 <= gpu.gemm <= 0.95, gpu.name
        assert (gpu.fp8_tflops > 0) == (gpu.compute_capability >= 8.9), gpu.name
        assert gpus.find(gpu.name, gpu.memory_gib) == gpu, gpu.name


def test_a_misspelt_card_finds_those_like_it() -> None:
    assert gpus.find("H100") is None
    assert "H100 SXM" in gpus.like("H100") and "RTX 4090" in gpus.like("RTX 4099")


def test_the_nearest_card_that_holds_a_model_is_named() -> None:
    assert gpus.that_hold(17.0)[0].memory_gib == 20.0
    assert all(g.compute_capability >= 8.9 for g in gpus.that_hold(20.0, "fp8"))
    assert gpus.that_hold(1000.0) == []


def test_a_card_missing_in_the_table_is_judged_by_vasts_benchmark() -> None:
    unknown = offer(gpu_name="RTX 6090", dlperf=200.0, gpu_memory_gb_s=2000.0)
    ranking = offers.rank([unknown, offer(id=2)], NEEDS, WORK)
    assert len(ranking.accepted) == 2
    assert ranking.accepted[0].cost.tokens_per_s > ranking.accepted[1].cost.tokens_per_s


def test_offers_and_needs_survive_a_journal() -> None:
    made = offer()
    assert Offer(**{f.name: getattr(made, f.name) for f in fields(made)}) == made


# -- to the number ---------------------------------------------------------------------------------

EXACT = {  # filter: (needs, an offer that just passes, one that just does not)
    "min_gpu_memory_gib": ({"min_gpu_memory_gib": 24.0}, {"gpu_memory_gib": 23.76}, 23.75),
    "compute_capability": ({"min_compute_capability": 8.9}, {"compute_capability": 8.9}, 8.8),
    "min_cuda": ({"min_cuda": 12.8}, {"cuda_max": 12.8}, 12.7),
    "disk_gib": ({"disk_gib": 60.0}, {"disk_gib": 60.0}, 59.0),
    "min_reliability": ({"min_reliability": 0.95}, {"reliability": 0.95}, 0.9499),
    "min_cpu_ram_gib": ({"min_cpu_ram_gib": 100.0}, {"cpu_ram_gib": 95.0}, 94.9),
    "cpu_cores": ({"min_cpu_cores": 8.0}, {"cpu_cores": 8.0}, 7.9),
    "min_inet_down_mbps": ({"min_inet_down_mbps": 100.0}, {"inet_down_mbps": 100.0}, 99.9),
    "duration": ({"hours": 6.0}, {"duration_s": 21600.0}, 21599.0),
    "direct_ports": ({"min_direct_ports": 2}, {"direct_ports": 2}, 1),
    "num_gpus": ({"num_gpus": 1}, {"num_gpus": 1}, 2),
    "max_usd_per_hour": ({"max_usd_per_hour": 0.36}, {"usd_per_hour": 0.36}, 0.3601),
}


@pytest.mark.parametrize("name", EXACT)
def test_each_filter_is_kept_to_the_last_unit(name: str) -> None:
    needs, least, too_little = EXACT[name]
    check = offers._FILTERS[name]
    assert check(offer(**least), replace(NEEDS, **needs)) == ""
    assert check(offer(**dict.fromkeys(least, too_little)), replace(NEEDS, **needs))


def test_unknown_cores_and_a_country_that_was_not_asked_for_are_no_obstacle() -> None:
    assert offers._FILTERS["cpu_cores"](offer(cpu_cores=0), replace(NEEDS, min_cpu_cores=8)) == ""
    assert offers._FILTERS["countries"](offer(country=""), NEEDS) == ""
    said = offers._FILTERS["countries"](offer(country=""), replace(NEEDS, countries=("DE", "US")))
    assert said == "is in an unknown country, not in DE, US"
    assert offers._FILTERS["verified"](offer(verified=False), NEEDS)
    assert not offers._FILTERS["verified"](
        offer(verified=False), replace(NEEDS, verified_only=False)
    )
    assert offers._FILTERS["rentable"](offer(rentable=False), NEEDS)


def test_a_bid_is_never_under_the_minimum_and_its_price_is_the_one_that_is_limited() -> None:
    bids = replace(NEEDS, interruptible=True)
    bid = offers._FILTERS["bid_usd_per_hour"]
    assert bid(offer(), NEEDS) == "" and bid(offer(), bids) == ""
    assert bid(offer(), replace(bids, bid_usd_per_hour=0.2)) == ""
    assert (
        bid(offer(), replace(bids, bid_usd_per_hour=0.199))
        == "a bid of $0.199/h is under the minimum of $0.200/h"
    )
    assert bid(offer(min_bid_usd_per_hour=0), bids), "no bid at all"
    assert bid(offer(min_bid_usd_per_hour=0), replace(bids, bid_usd_per_hour=0.001)) == ""
    price = offers._FILTERS["max_usd_per_hour"]
    assert price(offer(), replace(bids, max_usd_per_hour=0.24)) == "", "20 % over the minimum"
    assert price(offer(), replace(bids, max_usd_per_hour=0.239))
    assert offers.bid_of(offer(), NEEDS) is None


def test_hours_and_dollars_of_the_whole_run_are_limits_too() -> None:
    predicted = offers.rank([offer()], NEEDS, WORK).accepted[0].cost
    exact = replace(NEEDS, hours=predicted.hours, max_usd=predicted.expected_usd)
    assert offers.rank([offer()], exact, WORK).accepted
    for name, less in (
        ("limits.max_hours", {"hours": predicted.hours * 0.999}),
        ("limits.max_usd", {"max_usd": predicted.expected_usd * 0.999}),
    ):
        [(_, _, filter_name)] = offers.rank([offer()], replace(exact, **less), WORK).rejected
        assert filter_name == name


def test_a_penalty_halves_in_a_week_and_several_count_more() -> None:
    week = 7 * 86400.0
    assert offers.penalty([]) == 0.0
    assert offers.penalty([0.0]) == pytest.approx(0.9)
    assert offers.penalty([-5.0]) == pytest.approx(0.9)
    assert offers.penalty([week]) == pytest.approx(0.45)
    assert offers.penalty([2 * week, 0.0]) == pytest.approx(1 - 0.775 * 0.1)


def test_a_penalty_over_a_half_refuses_and_one_of_a_half_only_costs() -> None:
    one = offer()
    kept = offers.rank([one], NEEDS, WORK, {one.machine_id: 0.5})
    assert kept.accepted and kept.accepted[0].cost.p_finish < 0.5
    [(_, why, name)] = offers.rank([one], NEEDS, WORK, {one.machine_id: 0.501}).rejected
    assert name == "bad_machine" and "50%" in why


def test_the_query_leaves_room_for_what_the_server_rounds() -> None:
    needs = replace(
        NEEDS,
        min_gpu_memory_gib=24,
        min_cpu_ram_gib=100,
        min_inet_down_mbps=100,
        hours=6,
        max_usd_per_hour=0.95,
        min_direct_ports=2,
        countries=("DE",),
        gpu_names=("rtx_4090", "made_up"),
    )
    body = offers.query(needs, "dph_total")
    assert body["gpu_ram"] == {"gte": 22800} and body["cpu_ram"] == {"gte": 95000}
    assert body["inet_down"] == {"gte": 95.0} and body["duration"] == {"gte": 21600}
    cents = offers.query(replace(NEEDS, max_usd_per_hour=0.37))
    assert cents["dph_total"] == {"lte": 0.4395}, "to the hundredth of a cent"
    assert body["dph_total"] == {"lte": 1.05} and body["direct_port_count"] == {"gte": 2}
    assert body["reliability"] == {"gte": 0.945} and body["compute_cap"] == {"gte": 800}
    assert body["gpu_name"] == {"in": ["RTX 4090", "made up"]}
    assert body["geolocation"] == {"in": ["DE"]} and body["verified"] == {"eq": True}
    assert body["rentable"] == {"eq": True} and body["rented"] == {"eq": False}
    assert body["external"] == {"eq": False} and body["num_gpus"] == {"eq": 1}
    assert body["order"] == [["dph_total", "asc"]] and body["allocated_storage"] == 60
    assert offers.query(needs)["order"][0][1] == "desc"
    bare = offers.query(replace(NEEDS, verified_only=False))
    assert not {"verified", "cpu_ram", "direct_port_count", "gpu_name", "dph_total"} & set(bare)


def test_needs_that_say_nothing_ask_for_a_sound_machine() -> None:
    asked = {
        "num_gpus": {"eq": 1},
        "gpu_ram": {"gte": 0},
        "compute_cap": {"gte": 800},
        "cuda_max_good": {"gte": 12.8},
        "disk_space": {"gte": 40},
        "reliability": {"gte": 0.945},
        "inet_down": {"gte": 95},
        "duration": {"gte": 6 * 3600},
        "verified": {"eq": True},
        "type": "on-demand",
    }
    body = offers.query(Needs())
    assert body | asked == body
    assert not {"cpu_ram", "direct_port_count", "dph_total"} & set(body)
    assert offers.query(Needs(min_reliability=0.9876))["reliability"] == {"gte": 0.983}
    small = offer(cpu_ram_gib=0.5, cpu_cores=0.5, direct_ports=0)
    assert offers.rank([small], Needs(), WORK).accepted


def test_the_difference_to_the_best_is_split_into_its_causes() -> None:
    best = offer()
    dear = offer(id=2, usd_per_hour=0.72, storage_usd_per_gib_month=1.5)
    ranking = offers.rank([dear, best], NEEDS, WORK)
    first, second = ranking.accepted
    assert first.offer is best and first.why.startswith("the cheapest finished run: $")
    assert f"in {first.cost.hours:.2f} h" in first.why
    more = second.cost.expected_usd - first.cost.expected_usd
    assert second.why.startswith(f"+${more:.3f}: ")
    price = (0.72 - 0.36) * second.cost.running_h
    assert f"$0.720/h against $0.360/h (+${price:.3f})" in second.why
    disk = second.cost.disk_usd - first.cost.disk_usd
    assert f"disk at $1.50/GB/month (+${disk:.3f})" in second.why
    parts = sum(usd for usd, _ in offers._differences(dear, second.cost, best, first.cost))
    assert parts == pytest.approx(more)
    worse = replace(
        dear, inet_down_usd_per_gb=0.2, inet_up_usd_per_gb=0.3, inet_down_mbps=300, reliability=0.96
    )
    first, second = offers.rank([best, worse], NEEDS, replace(WORK, pull_bytes=1e9)).accepted
    assert second.why.count("(+$") == 3, "the three dearest causes"
    parts = sum(usd for usd, _ in offers._differences(worse, second.cost, best, first.cost))
    assert parts == pytest.approx(second.cost.expected_usd - first.cost.expected_usd)
    twin = offers.rank([best, offer(id=21348646)], NEEDS, WORK).accepted[1]
    assert twin.why == "+$0.000: as good within a tenth of a cent"
    slow = offers.rank([best, offer(id=3, inet_down_mbps=300)], NEEDS, WORK).accepted[1]
    assert "more GPU time on RTX 5090" in slow.why
