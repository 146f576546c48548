"""The state machine on a virtual clock: no socket, no process, no waiting."""

from __future__ import annotations

from typing import Any

import pytest

from ops.fakevast import Cloud, VirtualClock
from ops.fakevast.cloud.errors import ApiError
from ops.fakevast.cloud.instance import Instance
from ops.fakevast.cloud.record import record
from ops.fakevast.cloud.settings import Settings


def cloud_of(**settings: Any) -> Cloud:
    return Cloud(VirtualClock(), settings=Settings(**{"boot_s": 100.0} | settings))


def rent(cloud: Cloud, machine_id: int = 11007, **body: Any) -> Instance:
    ask = next(
        row["id"]
        for row in cloud.offers()
        if row["machine_id"] == machine_id and row["num_gpus"] == 1
    )
    return cloud.instances[
        cloud.create(ask, {"image": "a/b:1", "disk": 20, **body})["new_contract"]
    ]


def after(cloud: Cloud, seconds: float) -> None:
    cloud.clock.advance(seconds)
    cloud.tick()


def test_a_box_goes_from_null_by_created_and_loading_to_running() -> None:
    cloud = cloud_of()
    one = rent(cloud, label="mine")
    seen: list[tuple[Any, Any]] = []
    for _ in range(110):
        if not seen or seen[-1] != (one.actual_status, one.status_msg):
            seen.append((one.actual_status, one.status_msg))
        after(cloud, 1)
    assert [status for status, _ in seen if status != "loading"] == [None, "created", "running"]
    assert sum(status == "loading" for status, _ in seen) >= 3, "loading tells of its progress"
    assert seen[-1][1] == "success, running a/b:1/ssh"
    row = record(one, cloud.clock.now())
    assert (
        row["ports"] == {}
        and isinstance(row["start_date"], float)
        and row["label"] == "mine"
        and row["public_ipaddr"].endswith("\n")
    )


def test_an_offer_is_gone_once_rented_and_comes_back_under_a_new_number() -> None:
    cloud = cloud_of()
    one = rent(cloud)
    assert all(row["machine_id"] != 11007 for row in cloud.offers())
    for cancel, status in ((True, 410), (True, 410)):
        with pytest.raises(ApiError, match="no_such_ask") as refusal:
            cloud.create(one.ask_id, {"image": "a", "cancel_unavail": cancel})
        assert refusal.value.status == status
    with pytest.raises(ApiError) as refusal:
        cloud.create(1, {"image": "a"})
    assert refusal.value.status == 404
    cloud.destroy(one.id)
    back = [row["id"] for row in cloud.offers() if row["machine_id"] == 11007]
    assert len(back) == 1 and back[0] != one.ask_id


def test_slices_of_one_machine_compete_for_its_cards() -> None:
    cloud = cloud_of()

    def sizes() -> set[int]:
        return {row["num_gpus"] for row in cloud.offers() if row["machine_id"] == 11003}

    assert sizes() == {1, 2, 4}
    first = rent(cloud, 11003)
    assert sizes() == {1, 2}
    for _ in range(2):
        rent(cloud, 11003)
    assert sizes() == {1}
    rent(cloud, 11003)
    assert sizes() == set()
    cloud.destroy(first.id)
    assert sizes() == {1}


def test_without_cancel_unavail_a_taken_offer_gives_a_stopped_instance_billed_for_its_disk() -> (
    None
):
    cloud = cloud_of()
    winner = rent(cloud)
    late = cloud.instances[cloud.create(winner.ask_id, {"image": "a", "disk": 100})["new_contract"]]
    after(cloud, 3600)
    assert (late.cur_state, late.intended_status, late.next_state) == ("stopped",) * 3
    assert late.meter.disk_usd == pytest.approx(100 * 0.15 / 720) and late.meter.gpu_usd == 0
    cloud.destroy(winner.id)
    after(cloud, 200)
    assert late.actual_status == "running", "it was waiting for the card"


@pytest.mark.parametrize(
    "wrong",
    [
        {"image": ""},
        {"image": None},
        {"image": "x" * 1025},
        {"disk": 7},
        {"disk": "much"},
        {"disk": 5000},
        {"env": "-e A=B"},
        {"env": ["A=B"]},
        {"env": {"A": "b" * 32768}},
        {"onstart": "x" * 4097},
        {"onstart": "x" * 3000, "args": ["y" * 1200]},
        {"label": "l" * 257},
        {"price": 0.0},
        {"price": 129},
        {"price": "cheap"},
        {"runtype": "telnet"},
        {"target_state": "flying"},
    ],
)
def test_a_malformed_order_is_refused_with_400_and_rents_nothing(wrong: dict[str, Any]) -> None:
    cloud = cloud_of()
    with pytest.raises(ApiError) as refusal:
        rent(cloud, **wrong)
    assert refusal.value.status == 400 and refusal.value.body["ask_id"] > 0
    assert cloud.instances == {}


def test_too_low_a_bid_answers_an_error_that_carries_a_stopped_instance() -> None:
    cloud = cloud_of()
    with pytest.raises(ApiError) as refusal:
        rent(cloud, price=0.001)
    one = cloud.instances[refusal.value.body["new_contract"]]
    after(cloud, 1000)
    assert one.cur_state == "stopped" and one.meter.disk_usd > 0 == one.meter.gpu_usd


def test_an_outbid_box_is_stopped_in_all_its_states_and_resumes_when_its_bid_is_raised() -> None:
    cloud = cloud_of()
    stopped: list[int] = []
    cloud.on_stop.append(lambda instance: stopped.append(instance.id))
    one = rent(cloud, price=0.2)
    after(cloud, 101)
    cloud.outbid(one.id, 0.25)
    assert (one.cur_state, one.intended_status, one.next_state) == ("stopped",) * 3 and stopped == [
        one.id
    ]
    after(cloud, 3600)
    gpu = one.meter.gpu_usd
    assert gpu == pytest.approx(0.2 * 1 / 3600) and one.cur_state == "stopped"
    cloud.change_bid(one.id, 0.3)
    after(cloud, 101)
    assert one.actual_status == "running"
    after(cloud, 3600)
    assert one.meter.gpu_usd > gpu + 0.29, "it pays its own bid"


def test_stop_keeps_the_disk_billed_and_start_waits_when_the_card_was_taken() -> None:
    cloud = cloud_of()
    one = rent(cloud)
    after(cloud, 200)
    cloud.set_state(one.id, "stopped")
    other = rent(cloud)
    reply = cloud.set_state(one.id, "running")
    assert reply["success"] is False and "queued" in reply["msg"]
    cloud.destroy(other.id)
    after(cloud, 200)
    assert one.actual_status == "running" and one.boots == 2


def test_destroy_ends_it_and_the_second_destroy_says_no_such_instance() -> None:
    cloud = cloud_of()
    one = rent(cloud)
    assert cloud.destroy(one.id) == {"success": True}
    with pytest.raises(ApiError) as refusal:
        cloud.destroy(one.id)
    assert (refusal.value.status, refusal.value.error) == (404, "no_such_instance")
    spent = cloud.spent_usd()
    after(cloud, 1e6)
    assert cloud.spent_usd() == spent


def test_an_instances_key_may_destroy_itself_and_nothing_else() -> None:
    cloud = cloud_of()
    one, other = rent(cloud), rent(cloud, 11008)
    assert cloud.who(one.key) == one.id and cloud.who(cloud.account.key) is None
    for act in (
        lambda: cloud.destroy(other.id, one.key),
        lambda: cloud.create(next(iter(cloud.asks)), {"image": "a"}, one.key),
    ):
        with pytest.raises(ApiError) as refusal:
            act()
        assert refusal.value.status == 401
    with pytest.raises(ApiError, match="Invalid user key"):
        cloud.who("guess")
    cloud.destroy(one.id, one.key)
    assert [*cloud.instances] == [other.id]


def test_the_contract_stops_at_its_end_date_and_is_deleted_two_days_later() -> None:
    cloud = cloud_of()
    one = rent(cloud, 12006)  # five hours
    cloud.clock.advance(1e6)
    cloud.tick()
    assert one.destroyed_at == pytest.approx(one.end_date + 48 * 3600)
    assert one.meter.gpu_s == pytest.approx(0.2 * 86400 - 100)


def test_when_the_credit_is_used_up_every_box_stops_at_that_very_second() -> None:
    cloud = cloud_of(credit_usd=1.0, bill_image_pull=False)
    boxes = [rent(cloud, number) for number in (11007, 11008)]
    cloud.clock.advance(10 * 3600)
    cloud.tick()
    assert all(one.cur_state == "stopped" for one in boxes)
    disk = (20 * 0.15 + 20 * 0.13) / 720
    lasts_h = (1.0 + (0.289 + 0.312) * 100 / 3600) / (0.289 + 0.312 + disk)
    assert boxes[0].meter.gpu_s == pytest.approx(lasts_h * 3600 - 100, abs=0.01)
    with pytest.raises(ApiError, match="insufficient_credit"):
        rent(cloud, 11009)
    with pytest.raises(ApiError, match="missing_billing"):
        cloud.set_state(boxes[0].id, "running")


@pytest.mark.parametrize(
    ("fault", "status", "state", "text"),
    [
        ("stuck_loading", "loading", "running", "Downloading"),
        ("pull_error", "loading", "running", "manifest unknown"),
        ("no_space", "loading", "running", "no space left on device"),
        ("oci_error", "created", "stopped", "OCI runtime create failed"),
        ("cuda_mismatch", "created", "stopped", "unsatisfied condition: cuda>=12.8"),
        ("exited", "exited", "running", "exited"),
        ("offline", "offline", "running", "offline"),
        ("unknown", "unknown", "running", ""),
    ],
)
def test_a_planned_boot_fault_ends_in_the_states_seen_in_the_field(
    fault: str, status: str, state: str, text: str
) -> None:
    cloud = cloud_of()
    cloud.faults.add(where="boot", what=fault, label="spoiled-*")
    one, good = rent(cloud, label="spoiled-1"), rent(cloud, 11008, label="good")
    after(cloud, 5000)
    assert (one.actual_status, one.cur_state) == (status, state) and text in (one.status_msg or "")
    assert good.actual_status == "running"


def test_one_machine_of_the_market_never_starts_a_container() -> None:
    cloud = cloud_of()
    one = rent(cloud, 12010)
    after(cloud, 200)
    assert one.cur_state == "stopped" and "OCI runtime create failed" in (one.status_msg or "")


def test_without_a_fixed_boot_time_a_start_lasts_as_long_as_the_pull_over_the_machines_link() -> (
    None
):
    cloud = cloud_of(boot_s=None, image_bytes={"big/*": 10_000_000_000})
    one = rent(cloud, image="big/model:1")
    seconds = 15 + 10e9 * 8 / 860e6
    after(cloud, seconds - 0.5)
    assert one.actual_status == "loading"
    after(cloud, 1)
    assert one.actual_status == "running" and one.meter.bytes_in == 10_000_000_000
