"""Renting, booting and destroying one machine, against the emulator over real HTTP; waiting costs
nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from rented import Client, client_of

import rig
from ops.box.connection import Endpoint
from ops.errors import (
    BoxLeaked,
    MilkteaError,
    NeverReady,
    NoAnswer,
    OfferGone,
    Preempted,
    RateLimited,
    Refused,
    Unsuitable,
)
from ops.fakevast.cloud.catalogue import machine, offer_row
from ops.market.models import Instance, parse_instance, parse_offer
from ops.run.absence import until_absent
from ops.run.boot import boot, difference
from ops.run.kept import finish_stop
from ops.run.meter import boot_timeout_s
from ops.run.rental import (
    box_left_alone,
    destroy,
    endpoints,
    existing_instance,
    raise_if_preempted,
    rented,
)
from ops.run.session import MARGIN_S

EMPTY_LIST = {
    "where": "list",
    "what": "reply",
    "status": 200,
    "body": {"success": True, "instances": [], "next_token": None},
}
GONE = {"where": "show", "what": "reply", "status": 200, "body": {"instances": None}}


@pytest.fixture
def client(own: rig.Rig) -> Iterator[Client]:
    with client_of(own, pace=0.5) as made:
        yield made


# -- renting ---------------------------------------------------------------------------------------


def test_a_machine_is_rented_once_and_destroyed_however_the_block_ends(client: Client) -> None:
    with rented(client.session, client.offer) as number:
        assert [row["id"] for row in client.fake.instances()] == [number]
        with rented(client.session, client.offer) as again:
            assert again == number, "the next client takes the same box"
    with pytest.raises(ZeroDivisionError), rented(client.session, client.other):
        raise ZeroDivisionError
    assert client.asked("create", "destroy") == ["create", "destroy", "create", "destroy"]
    assert client.fake.instances() == []
    last = client.session.journal.last("destroying")
    assert last is not None and last["why"] == "ZeroDivisionError"


def test_one_empty_list_does_not_end_the_box_that_a_run_goes_on_with(client: Client) -> None:
    number = client.rent()
    client.fake.faults.add(EMPTY_LIST)
    assert existing_instance(client.session) == number
    assert client.fake.faults.fired == [("list", "reply")]
    assert client.kinds().count("rented") == 1


def test_a_run_that_has_rented_nothing_asks_for_no_list_and_sends_no_delete(client: Client) -> None:
    assert existing_instance(client.session) is None
    destroy(client.session, why="asked for")
    assert client.asked() == []


def test_a_box_whose_rent_was_not_written_is_adopted_by_its_label(client: Client) -> None:
    number = client.rent()
    journal = client.session.journal
    journal.lines[:] = [line for line in journal.lines if line.kind != "rented"]
    assert existing_instance(client.session) == number
    line = journal.last("rented")
    assert line is not None and line["instance_id"] == number and line["adopted"] is True


def test_a_box_that_is_listed_no_more_is_written_down_as_gone(client: Client) -> None:
    number = client.rent()
    until_absent(client.session.vast, client.session.run_id, known=number)
    assert existing_instance(client.session) is None
    line = client.session.journal.last("destroyed")
    assert line is not None and line["instance_id"] == number


@pytest.mark.parametrize("error", [NoAnswer("cut"), RateLimited("too many")])
def test_without_an_answer_a_box_that_may_train_is_left_alone(
    client: Client, error: MilkteaError
) -> None:
    with pytest.raises(type(error), match=r"^(cut|too many)$"), box_left_alone(client.session):
        raise error
    client.rent()
    with (
        pytest.raises(NoAnswer, match="does not say whether the box") as caught,
        box_left_alone(client.session),
    ):
        raise error
    assert f"milktea resume {client.session.run_id}" in caught.value.hint


# -- an unclear create -----------------------------------------------------------------------------


def test_a_create_that_never_arrived_is_proven_by_three_reads_five_seconds_apart(
    client: Client,
) -> None:
    client.fake.faults.add(where="create", what="lost_request")
    with pytest.raises(OfferGone):
        client.rent()
    assert client.asked() == ["create", "list", "list", "list"]
    assert client.clock.slept_s == 2 * 5.0 * client.clock.pace
    line = client.session.journal.last("absent")
    assert line is not None and line["provisional"] is True and line["reads"] == 3


def test_an_offer_that_is_taken_is_gone_for_good(client: Client) -> None:
    client.fake.faults.add(where="create", what="no_such_ask", status=410)
    with pytest.raises(OfferGone):
        client.rent()
    line = client.session.journal.last("absent")
    assert line is not None and line["provisional"] is False


def test_a_create_that_vast_ai_refuses_is_not_another_offers_matter(client: Client) -> None:
    client.fake.faults.add(where="create", what="insufficient_credit")
    with pytest.raises(Refused):
        client.rent()


def test_a_create_whose_answer_was_lost_is_adopted(client: Client) -> None:
    client.fake.faults.add(where="create", what="lost_reply")
    number = client.rent()
    assert client.asked() == ["create", "list"]
    line = client.session.journal.last("rented")
    assert line is not None and line["instance_id"] == number and line["adopted"] is True


def test_a_box_that_was_created_and_stands_still_is_destroyed(client: Client) -> None:
    client.fake.faults.add(where="create", what="lost_reply")
    client.fake.faults.on_event.append(
        lambda where, _: (
            [
                one.shown_as.update(intended_status="stopped")
                for one in client.fake.cloud.instances.values()
            ]
            if where == "list"
            else None
        )
    )
    with pytest.raises(OfferGone):
        client.rent()
    assert client.fake.instances() == []


def test_of_two_boxes_with_the_runs_label_none_is_kept(client: Client) -> None:
    session = client.session
    session.vast.create(
        client.other.id,
        image=rig.IMAGE,
        disk_gib=16,
        label=session.run_id,
        env={},
        onstart="",
        bid_usd_per_hour=None,
    )
    client.fake.faults.add(where="create", what="lost_reply")
    with pytest.raises(OfferGone):
        client.rent()
    assert client.fake.instances() == []


# -- booting ---------------------------------------------------------------------------------------


def test_a_box_has_booted_when_it_runs_and_has_a_port(client: Client) -> None:
    number = client.rent()
    client.clock.slept_s, client.clock.slow_s = 100.0, 0.00123
    client.show(actual_status="loading")
    client.shows(101.5, actual_status="running", ssh_port=0, ports={})
    client.shows(103.5, ssh_port=4321)
    found = boot(client.session, number, client.offer)
    assert (found.ssh_port, found.direct_port) == (4321, None)
    line = client.session.journal.last("booted")
    assert line is not None and (line["instance_id"], line["seconds"]) == (number, 4.0)
    assert len(client.asked("show")) == 5, "a look every two seconds"


@pytest.mark.parametrize(("look_s", "after_s"), [(25.0, 175.0), (25.05, 150.3)])
def test_a_box_may_be_unseen_for_five_minutes_and_no_longer(
    client: Client, look_s: float, after_s: float
) -> None:
    """At half the pace; a look at 150 s exactly is not the last one, one at 150.3 s is."""
    number = client.rent()
    client.fake.faults.add(GONE, times=None)
    client.clock.slept_s, client.clock.slow_s = 40.0, look_s - 1.0
    with pytest.raises(NeverReady, match=f"is not to be seen {after_s:.0f} s after"):
        boot(client.session, number, client.offer)
    assert client.clock.slept_s == pytest.approx(40.0 + after_s)


def test_a_box_that_comes_to_be_seen_late_boots(client: Client) -> None:
    number = client.rent()
    client.fake.faults.add(GONE, times=20)
    assert boot(client.session, number, client.offer).id == number
    assert client.asked("show") == ["show"] * 21


def test_minutes_without_an_answer_do_not_count_against_a_box(client: Client) -> None:
    number = client.rent()
    client.clock.slow_s = 25.0
    client.fake.faults.add(where="show", what="502_before", times=12)
    client.fake.faults.add(GONE, on_call=13)
    assert boot(client.session, number, client.offer).id == number
    assert client.clock.slept_s > 300.0


def test_a_vast_ai_that_says_nothing_for_longer_than_a_boot_takes_costs_no_box(
    client: Client,
) -> None:
    """As where a run is taken up again whose box trains on: it is no fault of the box."""
    number, session = client.rent(), client.session
    timeout_s = boot_timeout_s(session.predicted(client.offer))
    client.clock.slow_s = 25.0
    client.fake.faults.add(where="show", what="502_before", times=int(timeout_s / 20))
    assert boot(session, number, client.offer).id == number
    assert client.clock.slept_s > timeout_s


def test_a_vast_ai_that_says_nothing_until_the_box_ends_itself_ends_the_wait(
    client: Client,
) -> None:
    number, session = client.rent(), client.session
    client.clock.slow_s = 30.0
    client.fake.faults.add(where="show", what="502_before", times=None)
    with pytest.raises(NeverReady, match=f"does not show instance {number}"):
        boot(session, number, client.offer)
    assert -600 < session.left_s() < MARGIN_S


def test_a_box_that_was_seen_and_is_gone_is_not_waited_for(client: Client) -> None:
    number = client.rent()
    client.show(actual_status="loading")
    client.clock.at[5.0] = lambda: client.fake.faults.add(GONE, times=None)
    with pytest.raises(Preempted, match=f"instance {number} is not there any more"):
        boot(client.session, number, client.offer)
    assert client.clock.slept_s <= 10.0


@pytest.mark.parametrize(("look_s", "after_s"), [(10.0, 70.0), (15.05, 60.2)])
@pytest.mark.parametrize("status", ["offline", "unknown"])
def test_a_box_may_be_offline_for_two_minutes_and_no_longer(
    client: Client, status: str, look_s: float, after_s: float
) -> None:
    number = client.rent()
    client.show(actual_status="loading")
    client.clock.slow_s = look_s - 1.0
    client.shows(0.0, actual_status=status)
    with pytest.raises(NeverReady, match=f"machine {client.offer.machine_id} is {status}"):
        boot(client.session, number, client.offer)
    assert client.clock.slept_s == pytest.approx(look_s + after_s)


def test_a_box_that_is_offline_now_and_again_boots(client: Client) -> None:
    number = client.rent()
    client.show(actual_status="offline")
    for n in range(3):
        client.shows(50.0 + 100 * n, actual_status="loading")
        client.shows(100.0 + 100 * n, actual_status="offline")
    client.shows(330.0, actual_status="running")
    client.clock.slow_s = 9.0
    boot(client.session, number, client.offer)


def test_a_box_that_never_boots_is_given_up_at_the_predicted_time(client: Client) -> None:
    number, session = client.rent(), client.session
    client.show(actual_status="loading")
    timeout_s = boot_timeout_s(session.predicted(client.offer))
    client.clock.slow_s = 30.0
    with pytest.raises(NeverReady, match=f"did not boot within {timeout_s:.0f} s"):
        boot(session, number, client.offer)
    assert timeout_s <= client.clock.slept_s < timeout_s + 31.0


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (NeverReady, {"actual_status": "exited"}),
        (NeverReady, {"actual_status": "loading", "status_msg": "No space left on device"}),
        (
            Preempted,
            dict.fromkeys(("intended_status", "cur_state", "next_state"), "stopped"),
        ),
    ],
)
def test_a_box_that_cannot_start_is_not_waited_for(
    client: Client, error: type[MilkteaError], fields: dict[str, Any]
) -> None:
    number = client.rent()
    client.show(**fields)
    with pytest.raises(error):
        boot(client.session, number, client.offer)
    assert client.clock.slept_s == 0


def test_a_box_is_compared_with_the_offer_at_its_first_boot_only(client: Client) -> None:
    number = client.rent()
    client.show(dph_total=9.0)
    with pytest.raises(Unsuitable, match=r"\$/h is 9.0, offered"):
        boot(client.session, number, client.offer)
    client.session.note("booted", instance_id=number)
    assert boot(client.session, number, client.offer).usd_per_hour == 9.0


def test_a_box_whose_contract_ends_before_the_run_does_is_refused(client: Client) -> None:
    number, needs_s = client.rent(), 3600 * client.session.predicted(client.offer).hours
    for left_s, refused in ((5.0, True), (needs_s - 0.001, True), (needs_s + 0.001, False)):
        client.clock.slept_s += 10.0  # the next call to vast.ai waits for nothing
        client.show(end_date=client.clock.now() + left_s)
        words = f"ends in {left_s / 60:.0f} minutes, and the run is to take {needs_s / 60:.0f}"
        with pytest.raises(Unsuitable, match=words) if refused else nullcontext():
            boot(client.session, number, client.offer)


def test_who_may_spend_more_than_the_contract_lasts_is_told_when_it_ends(client: Client) -> None:
    number = client.rent()
    client.show(end_date=client.session.dies_at() - 60.0)
    boot(client.session, number, client.offer)
    client.session.note("booted", instance_id=number)
    boot(client.session, number, client.offer)
    screen = client.session.screen
    assert isinstance(screen, rig.Silent)
    assert sum("its contract ends then" in str(told) for told in screen.told) == 1


def test_a_box_is_not_kept_beyond_its_contract(client: Client) -> None:
    number, now = client.rent(), client.clock.now()
    boot(client.session, number, client.offer)
    client.show(end_date=now + 7200.0)
    client.session.note("stopping", instance_id=number, usd_per_hour=9.0, until=now + 90_000)
    assert finish_stop(client.session)["until"] == now + 7200.0


@pytest.mark.parametrize(("status", "error"), [("exited", NeverReady), ("stopped", Preempted)])
def test_a_kept_box_may_be_shown_stopped_for_two_minutes_after_its_start(
    client: Client, status: str, error: type[MilkteaError]
) -> None:
    number, session = client.rent(), client.session
    for kind in ("booted", "stopping", "kept"):
        session.note(kind, instance_id=number, usd_per_hour=0.01, until=client.clock.now() + 9e4)
    states = dict.fromkeys(("intended_status", "cur_state", "next_state"), "stopped")
    client.show(actual_status=status, **(states if error is Preempted else {}))
    client.clock.slow_s = 19.0
    with pytest.raises(error):
        boot(session, number, client.offer)
    assert client.clock.slept_s == 60.0, "at half the pace"
    client.show(actual_status="running", **dict.fromkeys(states, "running"))
    assert boot(session, number, client.offer).id == number


# -- what was offered ------------------------------------------------------------------------------

OFFER = replace(
    parse_offer(offer_row(machine(), 1, 7, 0.0, 1e6)),
    usd_per_hour=0.4,
    storage_usd_per_gib_month=0.72,
)
PRICE = 0.4 + 16 * 0.72 / 720


def shown(**fields: Any) -> Instance:
    row = {
        "id": 1,
        "machine_id": OFFER.machine_id,
        "gpu_name": OFFER.gpu_name,
        "num_gpus": OFFER.num_gpus,
        "disk_space": 16.0,
        "dph_total": PRICE,
    }
    return parse_instance(row | fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, ""),
        ({"dph_total": PRICE * 1.02 + 1e-4}, ""),
        ({"dph_total": PRICE * 1.02 + 1.2e-4}, "$/h is 0.4244, offered 0.416"),
        ({"dph_total": 0.01}, ""),
        ({"disk_space": 15.5}, ""),
        ({"disk_space": 15.49}, "disk GiB is 15.49, offered 16"),
        ({"disk_space": 1e4}, ""),
        ({"num_gpus": 9}, f"num_gpus is 9, offered {OFFER.num_gpus}"),
        ({"gpu_name": "GTX 1080"}, f"gpu_name is GTX 1080, offered {OFFER.gpu_name}"),
        ({"machine_id": 3}, f"machine_id is 3, offered {OFFER.machine_id}"),
    ],
)
def test_a_box_differs_from_its_offer_by_more_than_rounding(
    fields: dict[str, Any], said: str
) -> None:
    assert difference(shown(**fields), OFFER, 16, None) == said


def test_a_bid_is_compared_with_what_was_bid() -> None:
    bid = PRICE - 0.4 + 0.25
    assert difference(shown(dph_total=bid), OFFER, 16, 0.25) == ""
    said = "$/h is 0.2763, offered 0.266"
    assert difference(shown(dph_total=bid + 0.01034), OFFER, 16, 0.25) == said
    said = "num_gpus is 5, offered 1; $/h is 1.2346, offered 0.266"
    assert difference(shown(dph_total=1.234567, num_gpus=5), OFFER, 16, 0.25) == said


def test_prices_that_differ_are_said_to_the_hundredth_of_a_cent() -> None:
    dear = replace(OFFER, usd_per_hour=0.41234567)
    assert difference(shown(dph_total=9.87654321), dear, 16, None) == (
        "$/h is 9.8765, offered 0.4283"
    )


def test_ssh_is_tried_at_the_direct_port_first() -> None:
    ports = {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": "40022"}]}
    proxy = {"ssh_host": "ssh5.vast.ai", "ssh_port": 12345}
    direct = {"public_ipaddr": "1.2.3.4", "ports": ports}
    assert endpoints(shown(**proxy, **direct)) == [
        Endpoint("1.2.3.4", 40022, "direct"),
        Endpoint("ssh5.vast.ai", 12345, "proxy"),
    ]
    assert endpoints(shown(**proxy)) == [Endpoint("ssh5.vast.ai", 12345, "proxy")]
    assert endpoints(shown()) == []


# -- a box that does not answer --------------------------------------------------------------------


def test_a_box_is_gone_after_three_looks_two_seconds_apart(client: Client) -> None:
    client.rent()
    client.fake.faults.add(GONE, times=2)
    assert raise_if_preempted(client.session, None) is True
    assert len(client.asked("show")) == 3
    assert client.clock.slept_s == 2 * 2.0 * client.clock.pace
    client.fake.faults.clear()
    client.fake.faults.add(GONE, times=3)
    with pytest.raises(Preempted, match="not there any more"):
        raise_if_preempted(client.session, None)
    assert client.kinds()[-1] == "preempted"


@pytest.mark.parametrize("status", ["exited", "stopped"])
def test_a_box_that_was_stopped_is_said_to_be_so(client: Client, status: str) -> None:
    client.rent()
    client.show(actual_status=status, status_msg="by its owner")
    with pytest.raises(Preempted, match=f"is {status} by its owner"):
        raise_if_preempted(client.session, None)


def test_a_box_that_was_outbid_is_said_to_be_so(client: Client) -> None:
    client.rent()
    client.show(**dict.fromkeys(("intended_status", "cur_state", "next_state"), "stopped"))
    with pytest.raises(Preempted):
        raise_if_preempted(client.session, None)


def test_a_run_without_a_box_has_lost_it(client: Client) -> None:
    with pytest.raises(Preempted, match="instance None is not there any more"):
        raise_if_preempted(client.session, None)
    assert client.asked("show") == []


def test_a_box_is_given_the_ports_of_its_record(client: Client) -> None:
    client.rent()
    client.show(ssh_host="10.0.0.9", ssh_port=7, ports={})
    before = [Endpoint("127.0.0.1", 1, "direct")]
    box = client.box()
    box.endpoints = before
    assert raise_if_preempted(client.session, box) is True
    assert box.endpoints == [Endpoint("10.0.0.9", 7, "proxy")]
    client.show(ssh_port=0)
    raise_if_preempted(client.session, box)
    assert box.endpoints == [Endpoint("10.0.0.9", 7, "proxy")], "no port is no news"


def test_only_an_answer_of_vast_ai_counts(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.rent()
    monkeypatch.setattr("ops.market.client.PATIENCE_S", 0.0)
    monkeypatch.setattr("ops.market.client.TRIES", 1)
    client.fake.faults.add(where="show", what="502_before")
    assert raise_if_preempted(client.session, None) is False
    client.fake.faults.add(where="show", what="429_json")
    assert raise_if_preempted(client.session, None) is True


# -- destroying ------------------------------------------------------------------------------------


def test_a_box_whose_rent_met_a_full_disk_is_destroyed_before_the_first_list(
    client: Client,
) -> None:
    client.session.created = client.rent()
    journal = client.session.journal
    journal.lines[:] = [line for line in journal.lines if line.kind != "rented"]
    destroy(client.session, why="full")
    assert client.asked() == ["create", "destroy", "list", "list", "list"]
    assert client.session.created is None
    line = client.session.journal.last("destroyed")
    assert line is not None and len(line["reads"]) == 3


def test_the_log_of_the_container_is_kept_where_something_went_wrong(client: Client) -> None:
    kept = client.session.journal.folder / "container.log"
    client.rent()
    destroy(client.session, why="done")
    assert client.asked("logs") == [] and not kept.exists()
    client.offer = client.other
    client.rent()
    fetching: list[bool] = []
    client.fake.faults.on_event.append(
        lambda where, _: fetching.extend(
            thread.daemon
            for thread in threading.enumerate()
            if where == "logs" and thread.name == "container-log"
        )
    )
    destroy(client.session, why="Failed", log=True)
    assert client.asked("logs") == ["logs"]
    assert fetching == [True], "no process waits for it at its end"


def test_the_bill_of_the_box_is_written_to_the_millionth_of_a_dollar(client: Client) -> None:
    number = client.rent()
    client.fake.clock.advance(1234.5)
    destroy(client.session, why="done")
    line = client.session.journal.last("bill")
    assert line is not None and line["instance_id"] == number
    whole = sum(item["usd"] for item in line["items"])
    assert whole > 0.001 and line["usd"] == round(whole, 6)


def test_a_bill_that_vast_ai_has_not_written_yet_is_no_bill_of_nothing(client: Client) -> None:
    client.rent()
    empty = {"success": True, "count": 0, "total": 0, "results": [], "next_token": "more"}
    client.fake.faults.add(where="charges", what="reply", status=200, body=empty)
    destroy(client.session, why="done")
    line = client.session.journal.last("bill")
    assert line is not None and "usd" not in line.data and "nothing yet" in line["error"]
    assert client.asked("charges") == ["charges"], "a page without rows is the last"


@pytest.mark.parametrize(
    ("when_silent", "launched", "said"),
    [
        ("finish", True, "its own watchdog ends it at "),
        ("finish", False, "within 10 minutes of silence"),
        ("destroy", True, "within 10 minutes of silence"),
        ("destroy", False, "within 10 minutes of silence"),
    ],
)
def test_a_leak_says_at_what_price_and_until_when(
    client: Client, when_silent: Any, launched: bool, said: str
) -> None:
    session = client.session
    session.plan = replace(session.plan, when_silent=when_silent)
    client.rent()
    if launched:
        session.note("launched")
    account = client.fake.cloud.account
    key, account.key = account.key, "revoked"
    with pytest.raises(BoxLeaked, match="does not accept the key") as caught:
        destroy(session, why="done")
    account.key = key
    assert f"it may be billing {session.usd_per_hour():.3f} $/h" in caught.value.money
    assert said in caught.value.money
    assert client.kinds()[-1] == "leaked"
