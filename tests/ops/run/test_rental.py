"""Absence and its proof, against the emulator over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

import rig
from ops.errors import BoxLeaked
from ops.fakevast import FakeVast
from ops.market.client import Provider, Vast
from ops.run.absence import DESTROY_PATIENCE_S, PROOF_S, READS, until_absent
from ops.run.journal import Journal
from ops.run.rental import existing_instance
from ops.wait import RealClock

LABEL = "stub-20260101-000000-0000"
EMPTY_LIST = {
    "where": "list",
    "what": "reply",
    "status": 200,
    "body": {"success": True, "instances": [], "next_token": None},
}


class Jumping(RealClock):
    """Jumps over what it is told to sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.slept_s = 0.0

    def now(self) -> float:
        return super().now() + self.slept_s

    def steady(self) -> float:
        return self.now()

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds


@pytest.fixture
def fake(own: rig.Rig) -> Iterator[FakeVast]:
    with own.emulator() as cloud:
        yield cloud
        cloud.faults.clear()
        assert cloud.instances() == [], "a box survived the test"


@pytest.fixture
def vast(fake: FakeVast) -> Vast:
    return Vast(Provider(fake.url, fake.api_key), Jumping())


def rent(vast: Vast, label: str = LABEL) -> int:
    found, _ = vast.search({}, interruptible=False, disk_gib=16)
    settings: dict[str, Any] = {
        "image": rig.IMAGE,
        "disk_gib": 16,
        "env": {},
        "onstart": "",
        "bid_usd_per_hour": None,
    }
    return vast.create(found[0].id, label=label, **settings)


def asked(fake: FakeVast) -> list[str]:
    return [r["route"] for r in fake.requests if r["route"] in ("destroy", "list")]


def test_absence_is_three_reads_that_lie_apart(fake: FakeVast, vast: Vast) -> None:
    rent(vast)
    reads = until_absent(vast, LABEL)
    # the first read finds it, then it is destroyed
    assert asked(fake) == ["list", "destroy", "list", "list", "list"]
    assert len(reads) == READS and all(b - a >= PROOF_S for a, b in pairwise(reads))


def test_a_known_instance_is_destroyed_before_the_first_read(fake: FakeVast, vast: Vast) -> None:
    until_absent(vast, LABEL, known=rent(vast))
    assert asked(fake) == ["destroy", "list", "list", "list"]


def test_a_box_that_comes_back_starts_the_count_again(fake: FakeVast, vast: Vast) -> None:
    fake.faults.add(where="destroy", what="resurrect", reads=2)
    until_absent(vast, LABEL, known=rent(vast))
    assert asked(fake) == ["destroy", "list", "list", "list", "destroy", "list", "list", "list"]


def test_a_read_that_fails_proves_nothing_and_the_count_starts_again(
    fake: FakeVast, vast: Vast, monkeypatch: Any
) -> None:
    monkeypatch.setattr("ops.market.client.PATIENCE_S", 0.0)  # one attempt a call
    fake.faults.add(where="list", what="502_before", on_call=3)
    until_absent(vast, LABEL)
    assert asked(fake) == ["list"] * 6
    assert fake.faults.fired


def test_what_has_another_label_is_left_alone(fake: FakeVast, vast: Vast) -> None:
    other = rent(vast, "somebody-else")
    until_absent(vast, LABEL)
    assert [i["id"] for i in fake.instances()] == [other]
    until_absent(vast, "somebody-else")


def test_a_box_that_no_destroy_ends_is_a_leak_after_ten_minutes(fake: FakeVast, vast: Vast) -> None:
    number = rent(vast)
    fake.faults.add(where="destroy", what="ignored", times=None)
    began = vast.clock.now()
    with pytest.raises(
        BoxLeaked, match=rf"{LABEL} \(instance {number}\) is not proven destroyed: still listed"
    ):
        until_absent(vast, LABEL, known=number)
    assert vast.clock.now() - began >= DESTROY_PATIENCE_S
    fake.faults.clear()
    until_absent(vast, LABEL)


def test_a_key_that_is_refused_is_a_leak_at_once(fake: FakeVast) -> None:
    clock = Jumping()
    with pytest.raises(BoxLeaked, match="does not accept the key"):
        until_absent(Vast(Provider(fake.url, "wrong"), clock), LABEL)
    assert clock.slept_s == 0


def test_one_empty_list_does_not_end_the_box_that_a_run_goes_on_with(
    own: rig.Rig, fake: FakeVast
) -> None:
    plan = own.plan()
    with Journal(own.runs / plan.run_id) as journal:
        session = rig.client(plan, journal, fake.url, fake.api_key)
        number = rent(session.vast, plan.run_id)
        session.note("renting", label=plan.run_id)
        session.note("rented", instance_id=number)
        fake.faults.add(EMPTY_LIST)
        assert existing_instance(session) == number
        assert fake.faults.fired == [("list", "reply")]
        until_absent(session.vast, plan.run_id)
