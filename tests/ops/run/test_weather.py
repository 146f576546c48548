"""Bad days of a machine and of vast.ai that cost no box and no training; each was found by
tests/weather.py."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from machine import needs

import rig
from ops.box import scripts
from ops.errors import NoAnswer
from ops.fakevast import FakeVast, weather
from ops.fakevast.cloud.catalogue import machine, offer_row
from ops.market.client import Vast
from ops.market.models import parse_offer
from ops.market.provider import Provider
from ops.run.journal import Journal
from ops.run.rent_and_train import rent_and_train
from ops.run.session import Detached
from ops.wait import RealClock
from trainer.wire.events import Event, Step


def forecast(fake: FakeVast, *events: dict[str, Any]) -> None:
    fake.forecast(weather.parse(json.dumps(events)))


@pytest.fixture
def each_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes whose watchdog looks each second in place of each fifteenth."""
    real = scripts.environment
    watch = {"MILKTEA_WATCH_S": "1"}
    monkeypatch.setattr(scripts, "environment", lambda *words: real(*words) | watch)


def test_a_null_list_is_asked_again_before_a_run_is_given_up(own: rig.Rig, fake: FakeVast) -> None:
    body = {"instances": None}
    vast = Vast(Provider(fake.url, fake.api_key), RealClock(0.02))
    fake.faults.add(where="list", what="reply", status=200, body=body, times=2)
    assert vast.instances() == []


def test_a_wall_that_forbids_in_its_own_words_is_no_answer_of_vast_ai(
    own: rig.Rig, fake: FakeVast
) -> None:
    vast = Vast(Provider(fake.url, fake.api_key), RealClock(0.02))
    assert vast.credit_usd() > 0
    body = {"message": "Forbidden"}
    fake.faults.add(where="user", what="reply", status=403, body=body, times=2)
    assert vast.credit_usd() > 0


def test_an_owner_that_gets_no_answer_sends_nobody_to_destroy_the_box_that_trains(
    own: rig.Rig, fake: FakeVast
) -> None:
    plan = own.plan()
    offer = asdict(parse_offer(offer_row(machine(), 1, 7, 0.0, 1e6)))
    with Journal(own.runs / plan.run_id) as held:
        session = rig.client(plan, held, fake.url, fake.api_key)
        session.remember_place()
        held.append("renting", offer=offer, bid_usd_per_hour=None, disk_gib=16, max_s=600)
        held.append("rented", instance_id=1)
        fake.faults.add(where="*", what="502_before", times=None)
        again = rig.client(plan, held, fake.url, fake.api_key)
        with pytest.raises(NoAnswer, match="still stands") as silent:
            rent_and_train(again)
        assert f"milktea resume {plan.run_id}" in silent.value.hint
        assert "reap" not in silent.value.hint
        assert held.last("destroying") is None


class Leaving(rig.Silent):
    """A client that goes with the first step of the training."""

    def event(self, event: Event, *rest: Any) -> None:
        if isinstance(event, Step):
            raise Detached


def test_a_box_that_trains_is_kept_although_its_price_rose_and_its_disk_filled_meanwhile(
    own: rig.Rig, fake: FakeVast
) -> None:
    (own.image / "pause").touch()
    plan = own.plan()
    with Journal(own.runs / plan.run_id) as held, pytest.raises(Detached):
        rent_and_train(rig.client(plan, held, fake.url, fake.api_key, screen=Leaving()))
    [box] = fake.emulator.boxes.live.values()
    fake.do(lambda: fake.cloud.raise_price(fake.cloud.ask_more(box.instance.id, 3)))
    fake.do(lambda: box.fill_disk(5_000_000_000))  # free, of sixteen that were rented
    fake.do(box.move_ports)
    (own.image / "pause").unlink()
    with Journal(own.runs / plan.run_id) as held:
        assert rent_and_train(rig.client(plan, held, fake.url, fake.api_key)).sha256
        assert [line.kind for line in held.lines].count("rented") == 1


@pytest.mark.usefixtures("each_second")
def test_an_api_that_is_silent_while_a_box_boots_costs_no_box(own: rig.Rig, fake: FakeVast) -> None:
    forecast(fake, {"kind": "api_pause", "where": "boot", "for_s": 0.5})
    outcome, _, screen = rig.whole_run(own, fake)
    assert outcome.sha256 and screen.told.count("rented") == 1
    assert any("asked again" in str(told) for told in screen.told)


UNANSWERED = """#!/bin/sh
echo x >>"$HOME/asked"
[ "$(wc -l <"$HOME/asked")" -gt 5 ] || { echo 000; exit 7; }
PATH=/usr/bin:/bin exec curl "$@"
"""


@pytest.mark.slow
@pytest.mark.usefixtures("each_second")
def test_a_watchdog_that_gets_no_answer_of_vast_ai_is_asked_again_before_its_machine_is_blamed(
    own: rig.Rig, fake: FakeVast
) -> None:
    needs("curl")
    (own.image / "bin/curl").write_text(UNANSWERED)
    (own.image / "bin/curl").chmod(0o755)
    outcome, _, screen = rig.whole_run(own, fake)
    assert outcome.sha256 and screen.told.count("rented") == 1
    assert any("HTTP 000; asked again" in str(told) for told in screen.told)


@pytest.mark.parametrize("on_call", [2, 6])
def test_a_link_that_breaks_in_a_command_costs_no_machine(
    own: rig.Rig, fake: FakeVast, on_call: int
) -> None:
    fake.faults.add(where="exec", what="cut", on_call=on_call)
    outcome, lines, screen = rig.whole_run(own, fake)
    assert outcome.sha256 and screen.told.count("rented") == 1
    assert [line for line in lines if line.kind in ("bad_machine", "missed")] == []


def test_a_box_whose_disk_takes_no_files_is_the_machines_fault(
    own: rig.Rig, fake: FakeVast
) -> None:
    fake.faults.add(where="boot", what="disk_full", free_bytes=40)
    outcome, lines, _ = rig.whole_run(own, fake)
    assert outcome.sha256
    assert [line.kind for line in lines if line.kind in ("bad_machine", "missed")] == [
        "bad_machine"
    ]


def test_a_box_whose_only_tunnel_is_stuck_is_restarted_once_and_carries_the_run(
    own: rig.Rig,
) -> None:
    proxied = [machine(machine_id=n, direct_port_count=0) for n in (1, 2)]
    plan = own.plan()
    with own.emulator(market=proxied) as fake, Journal(own.runs / plan.run_id) as held:
        fake.faults.add(where="boot", what="tunnel_stuck")
        session = rig.client(plan, held, fake.url, fake.api_key, pace=0.02)
        assert rent_and_train(session).sha256
        kinds = [line.kind for line in held.lines]
    assert kinds.count("rebooted") == 1 and kinds.count("rented") == 1
