"""Absence and its proof, against the emulator over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import rig
from ops.errors import BoxLeaked
from ops.fakevast import FakeVast
from ops.market.client import Vast
from ops.market.provider import Provider
from ops.run.absence import instances_of_run, until_absent

LABEL = "stub-20260101-000000-0000"
PAGE = "<html><body>Access to this site is blocked</body></html>"


@pytest.fixture
def fake(own: rig.Rig) -> Iterator[FakeVast]:
    with own.emulator() as cloud:
        yield cloud
        cloud.faults.clear()
        assert cloud.instances() == [], "a box survived the test"


@pytest.fixture
def vast(fake: FakeVast) -> Vast:
    return Vast(Provider(fake.url, fake.api_key), rig.Jumping())


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
    began = vast.clock.now() - vast.clock.steady()
    assert reads == [began + 2.0, began + 4.0, began + 6.0]


def test_the_times_of_the_proof_are_kept_to_the_hundredth(fake: FakeVast) -> None:
    clock = rig.Jumping(slow_s=0.00123)
    reads = until_absent(Vast(Provider(fake.url, fake.api_key), clock), LABEL)
    assert [round(t - reads[0], 4) for t in reads] == [0.0, 2.0, 4.0]


def test_an_empty_list_is_believed_when_it_came_three_times(fake: FakeVast, vast: Vast) -> None:
    number = rent(vast)
    empty = {"success": True, "instances": [], "next_token": None}
    fake.faults.add(where="list", what="reply", status=200, body=empty, times=2)
    assert [i.id for i in instances_of_run(vast, LABEL)] == [number]
    assert vast.clock.steady() == 4.0
    assert instances_of_run(vast, "somebody-else", every_s=5.0) == []
    assert vast.clock.steady() == 15.0 and asked(fake) == ["list"] * 6
    until_absent(vast, LABEL)


def test_a_known_instance_is_destroyed_before_the_first_read(fake: FakeVast, vast: Vast) -> None:
    until_absent(vast, LABEL, known=rent(vast))
    assert asked(fake) == ["destroy", "list", "list", "list"]


@pytest.mark.parametrize("status", [403, 500])
def test_a_list_without_a_box_whose_destroy_was_refused_proves_nothing(
    fake: FakeVast, vast: Vast, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.market.client.PATIENCE_S", 0.0)
    monkeypatch.setattr("ops.market.client.TRIES", 1)
    number, refusal = rent(vast), {"message": "Forbidden"}
    late = {"success": True, "instances": [], "next_token": None}
    fake.faults.add(where="destroy", what="reply", status=status, body=refusal, times=1)
    fake.faults.add(where="list", what="reply", status=200, body=late, times=3)
    until_absent(vast, LABEL, known=number)
    assert asked(fake) == ["destroy", *["list"] * 3, "destroy", *["list"] * 3]


def test_a_box_that_comes_back_starts_the_count_again(fake: FakeVast, vast: Vast) -> None:
    fake.faults.add(where="destroy", what="resurrect", reads=2)
    until_absent(vast, LABEL, known=rent(vast))
    assert asked(fake) == ["destroy", "list", "list", "list", "destroy", "list", "list", "list"]


def test_a_read_that_fails_proves_nothing_and_the_count_starts_again(
    fake: FakeVast, vast: Vast, monkeypatch: Any
) -> None:
    monkeypatch.setattr("ops.market.client.PATIENCE_S", 0.0)
    monkeypatch.setattr("ops.market.client.TRIES", 1)
    fake.faults.add(where="list", what="502_before", on_call=3)
    until_absent(vast, LABEL)
    assert asked(fake) == ["list"] * 6
    assert fake.faults.fired


def test_what_has_another_label_is_left_alone(fake: FakeVast, vast: Vast) -> None:
    other = rent(vast, "somebody-else")
    until_absent(vast, LABEL)
    assert [i["id"] for i in fake.instances()] == [other]
    until_absent(vast, "somebody-else")


def test_a_box_that_no_destroy_ends_is_a_leak_after_ten_minutes(fake: FakeVast) -> None:
    vast = Vast(Provider(fake.url, fake.api_key), rig.Jumping(slow_s=48.0))
    number = rent(vast)
    fake.faults.add(where="destroy", what="ignored", times=None)
    with pytest.raises(
        BoxLeaked, match=rf"{LABEL} \(instance {number}\) is not proven destroyed: still listed"
    ):
        until_absent(vast, LABEL, known=number)
    assert vast.clock.steady() == 600.0
    fake.faults.clear()
    until_absent(vast, LABEL)


def test_a_key_that_is_refused_is_a_leak_at_once(fake: FakeVast) -> None:
    clock = rig.Jumping()
    with pytest.raises(BoxLeaked, match="does not accept the key"):
        until_absent(Vast(Provider(fake.url, "wrong"), clock), LABEL)
    assert clock.slept_s == 0


def test_what_goes_wrong_on_the_way_is_told_and_the_first_delete_is_told_once(
    fake: FakeVast, vast: Vast, monkeypatch: Any
) -> None:
    monkeypatch.setattr("ops.market.client.PATIENCE_S", 0.0)
    monkeypatch.setattr("ops.market.client.TRIES", 1)
    monkeypatch.setattr("ops.market.client.FIRST_PATIENCE_S", 0.0)
    number = rent(vast)
    fake.faults.add(where="destroy", what="reply", status=403, body=PAGE)
    fake.faults.add(where="destroy", what="ignored", on_call=2)
    fake.faults.add(where="list", what="502_before", on_call=3)
    told: list[str] = []
    begun: list[list[str]] = []
    until_absent(
        vast, LABEL, known=number, begun=lambda: begun.append(asked(fake)), tell=told.append
    )
    assert "blocked" in told[0] and told[1] == "still listed" and "502" in told[2]
    assert len(told) == 3 and begun == [["destroy"]]


def test_a_delete_that_is_refused_for_any_reason_but_the_key_is_sent_again(
    fake: FakeVast, vast: Vast
) -> None:
    no = {"success": False, "error": "invalid_args", "msg": "not now"}
    fake.faults.add(where="destroy", what="reply", status=400, body=no)
    until_absent(vast, LABEL, known=rent(vast))
    assert asked(fake)[:3] == ["destroy", "list", "destroy"]


def test_a_screen_that_fails_does_not_end_the_destroying(fake: FakeVast, vast: Vast) -> None:
    def broken(*words: object) -> None:
        raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")

    fake.faults.add(where="destroy", what="ignored")
    until_absent(vast, LABEL, known=rent(vast), begun=broken, tell=broken)
    assert fake.faults.fired == [("destroy", "ignored")]
