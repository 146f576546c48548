"""What it costs when nobody is heard, as the plan says it before anything is rented."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import rig
from ops.cli.history import _status_line
from ops.fakevast import Cloud, VirtualClock
from ops.job.plan import Plan
from ops.market import cost
from ops.market.models import parse_offer
from ops.market.ranking import Priced
from ops.run import explain
from ops.run.journal import Line
from ops.run.meter import dearest_silence, ends_itself_at
from ops.run.wishes import choices


@pytest.fixture
def own(tmp_path: Path) -> rig.Rig:
    return rig.Rig(tmp_path)


def priced(plan: Plan) -> Priced:
    offer = parse_offer(Cloud(VirtualClock()).search({"limit": 1})[0])
    return Priced(offer, cost.predict(offer, plan.workload, None), "")


def test_with_finish_the_dearest_silence_is_the_cap_of_dollars_or_hours(own: rig.Rig) -> None:
    capped = own.plan(max_usd=0.05)
    dollars = dearest_silence(capped, priced(capped))
    assert 0.045 < dollars.usd <= 0.05 and dollars.lost_after_s < capped.max_s
    short = own.plan(max_usd=100.0, max_s=3600.0)
    hours = dearest_silence(short, priced(short))
    assert hours.usd < 10 and 3000 < hours.lost_after_s <= 3600 + 600


def test_minutes_to_hold_bring_the_hour_nearer_at_which_a_result_is_lost(own: rig.Rig) -> None:
    plan, held = own.plan(max_usd=5.0), own.plan(max_usd=5.0, hold_s=1800.0)
    offer = priced(plan)
    ends_s = dearest_silence(held, offer).lost_after_s
    assert ends_s < dearest_silence(plan, offer).lost_after_s
    trains_s = offer.cost.train_s + offer.cost.start_s + offer.cost.transfer_s
    before_s = offer.cost.boot_s + offer.cost.pull_s
    assert ends_s == pytest.approx(before_s + trains_s + 1800)


def test_with_destroy_it_is_ten_minutes_price(own: rig.Rig) -> None:
    plan = own.plan(max_usd=5.0, when_silent="destroy")
    offer = priced(plan)
    hour = offer.offer.usd_per_hour
    assert hour * 600 / 3600 <= dearest_silence(plan, offer).usd < hour * 660 / 3600 + 0.01


def lines_of(own: rig.Rig, *kinds: str, **more: Any) -> list[Line]:
    """A journal that came so far, a minute between two lines; the last one was written now."""
    plan = own.plan(**more)
    rent = {"offer": vars(priced(plan).offer), "bid_usd_per_hour": None, "disk_gib": 16}
    facts: dict[str, dict[str, Any]] = {
        "planned": plan.to_line(),
        "renting": {**rent, "max_s": 3600},
        "rented": {"instance_id": 7},
        "ended": {"exit_code": 0},
    }
    began = time.time() - 60 * (len(kinds) - 1)
    return [Line(n, began + 60 * n, kind, facts.get(kind, {})) for n, kind in enumerate(kinds)]


TO_LAUNCH = ("planned", "renting", "rented", "booted", "connected", "pushed", "launched")


def test_a_box_ends_itself_counted_from_its_first_boot_however_often_it_is_taken_up(
    own: rig.Rig,
) -> None:
    lines = lines_of(own, *TO_LAUNCH, "booted", "connected")
    assert ends_itself_at(lines) == lines[3].t + 3600


@pytest.mark.parametrize(
    ("kinds", "when_silent", "attached", "offered"),
    [
        (("planned",), "finish", True, ["leave", "destroy"]),
        (TO_LAUNCH[:4], "finish", True, ["leave", "destroy"]),
        (TO_LAUNCH, "finish", True, ["leave", "fetch", "destroy"]),
        (TO_LAUNCH, "finish", False, ["go on", "leave", "fetch", "destroy"]),
        (TO_LAUNCH, "destroy", False, ["go on", "fetch", "destroy"]),
        ((*TO_LAUNCH, "ended"), "finish", True, ["leave", "destroy"]),
        ((*TO_LAUNCH, "ended"), "destroy", False, ["go on", "destroy"]),
    ],
)
def test_what_can_be_chosen_at_each_stage_has_its_price_and_begins_with_the_kindest(
    own: rig.Rig, kinds: tuple[str, ...], when_silent: str, attached: bool, offered: list[str]
) -> None:
    lines = lines_of(own, *kinds, when_silent=when_silent)
    found = choices(lines, Plan.from_line(lines[0]), time.time(), attached=attached)
    assert [choice.wish for choice in found] == offered
    assert all("$" in choice.text for choice in found)


def test_status_says_who_looks_after_a_run_for_how_long_at_what_price_and_to_when(
    own: rig.Rig,
) -> None:
    lines = lines_of(own, *TO_LAUNCH)
    line = _status_line(explain.status("r", lines, time.time(), "alone"), time.time())
    for words in ("alone 6 min", "training", "box 7", " of 1.00 $", "$/h", "ends itself "):
        assert words in line
