"""Destroying waits for nothing, and nobody destroys what was rented elsewhere: against the
emulator, over real HTTP."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest

import rig
from ops.errors import (
    BoxLeaked,
    DiskError,
    Elsewhere,
    MilkteaError,
    NoAnswer,
    PreflightError,
    disk_error,
)
from ops.fakevast import FakeVast
from ops.fakevast.cloud.cloud import Cloud
from ops.market.client import Vast
from ops.market.provider import Provider, provider_from
from ops.run import journal, place
from ops.run.absence import until_absent
from ops.run.choose import search
from ops.run.journal import Journal
from ops.run.reap import finish_destroys, reap
from ops.run.rent_and_train import rent_and_train
from ops.run.rental import destroy, rent
from ops.wait import RealClock

PAGE = "<html><body>Access to this site is blocked</body></html>"


def destroys(fake: FakeVast) -> int:
    return sum(r["route"] == "destroy" for r in fake.requests)


def vast_of(fake: FakeVast) -> Vast:
    return Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))


class Once(rig.Silent):
    """Does something when the training starts."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def line(self, line: Any) -> None:
        super().line(line)
        if line.kind == "launched":
            self.act()


def test_a_full_disk_at_home_does_not_keep_the_box_alive(own: rig.Rig, fake: FakeVast) -> None:
    plan = own.plan()
    child = os.fork()
    if child == 0:
        with Journal(own.runs / plan.run_id) as j:

            def fill() -> None:
                size = (j.folder / journal.FILE).stat().st_size + 10
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

            try:
                rent_and_train(rig.client(plan, j, fake.url, fake.api_key, screen=Once(fill)))
            except DiskError as e:
                os._exit(28 if "File too large" in str(e) and "spent" in e.money else 1)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 28
    assert destroys(fake) == 1 and fake.instances() == []
    lines = journal.read(own.runs / plan.run_id)
    assert lines[-1].kind == "launched", "what was half written is cut off again"


def test_an_error_on_the_way_out_never_stands_before_the_delete(
    own: rig.Rig, fake: FakeVast
) -> None:
    """Each odd thing that a stranger's machine can make of our last lines."""

    class Broken(rig.Silent):
        def destroying(self, why: str) -> None:
            raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")

    (own.image / "fail").touch()
    plan = own.plan()
    with Journal(own.runs / plan.run_id) as j:
        session = rig.client(plan, j, fake.url, fake.api_key, screen=Broken())
        (j.folder / "container.log").mkdir()  # no file can be written there
        with pytest.raises(MilkteaError, match="planted"):
            rent_and_train(session)
    assert [line.kind for line in j.lines][-3:] == ["destroying", "destroyed", "bill"]


@pytest.mark.parametrize("row", [None, 7, {}, {"id": 1e400}, {"id": [], "label": 5}])
def test_an_odd_row_of_somebody_elses_instance_does_not_end_the_destroying(
    own: rig.Rig, fake: FakeVast, row: Any
) -> None:
    """The DELETE is answered and not done, and the list then has an odd row."""
    fake.faults.add(where="destroy", what="ignored")
    body = {"success": True, "instances": [row], "next_token": None}
    fake.faults.add(where="list", what="reply", status=200, body=body)
    plan = own.plan()
    with Journal(own.runs / plan.run_id) as j:
        rent_and_train(rig.client(plan, j, fake.url, fake.api_key))
    assert destroys(fake) == 2
    assert {("destroy", "ignored"), ("list", "reply")} <= set(fake.faults.fired)


@pytest.mark.parametrize(
    ("status", "body"), [(403, PAGE), (200, PAGE), (403, {"success": False, "error": "forbidden"})]
)
def test_a_firewalls_page_at_the_delete_is_asked_again(
    own: rig.Rig, fake: FakeVast, status: int, body: Any
) -> None:
    fake.faults.add(where="destroy", what="reply", status=status, body=body, times=2)
    screen, plan = rig.Silent(), own.plan()
    with Journal(own.runs / plan.run_id) as j:
        rent_and_train(rig.client(plan, j, fake.url, fake.api_key, screen=screen))
    assert destroys(fake) == 3
    assert any("not destroyed yet" in str(told) for told in screen.told)


def test_a_delete_that_is_refused_for_ten_minutes_is_a_leak_with_exit_70(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.run.absence.DESTROY_PATIENCE_S", 100.0)
    fake.faults.add(where="destroy", what="reply", status=403, body=PAGE, times=None)
    plan = own.plan()
    with (
        Journal(own.runs / plan.run_id) as j,
        pytest.raises(BoxLeaked, match="blocked") as caught,
    ):
        rent_and_train(rig.client(plan, j, fake.url, fake.api_key))
    assert caught.value.exit_code == 70 and destroys(fake) > 1
    fake.faults.clear()
    finish_destroys(own.runs, vast_of(fake), rig.Silent())


def test_a_list_that_never_ends_is_read_no_further(own: rig.Rig, fake: FakeVast) -> None:
    body = {"success": True, "instances": [], "next_token": "again"}
    fake.faults.add(where="list", what="reply", status=200, body=body, times=None)
    with pytest.raises(NoAnswer, match="does not end"):
        vast_of(fake).instances()
    assert len(fake.requests) == 2


def test_a_box_that_appears_minutes_after_an_unclear_create_is_found_by_the_next_command(
    own: rig.Rig, fake: FakeVast
) -> None:
    plan = own.plan()
    empty = {"success": True, "instances": [], "next_token": None}
    with Journal(own.runs / plan.run_id) as j:
        session = rig.client(plan, j, fake.url, fake.api_key)
        seen = search(session)
        fake.faults.add(where="create", what="lost_reply")
        fake.faults.add(where="list", what="reply", status=200, body=empty, times=3)
        nothing = {"success": True, "offers": []}
        fake.faults.add(where="search", what="reply", status=200, body=nothing, times=None)
        with pytest.raises(MilkteaError) as caught:
            rent_and_train(session, seen)
    assert "may appear" in caught.value.money
    assert len(fake.instances()) == 1
    reaped = finish_destroys(own.runs, vast_of(fake), rig.Silent())
    assert reaped.destroyed == [plan.run_id]


def test_a_run_is_not_touched_from_another_account_and_both_are_named(
    own: rig.Rig, fake: FakeVast, tmp_path: Path
) -> None:
    plan = own.plan()
    with Journal(own.runs / plan.run_id) as j:
        session = rig.client(plan, j, fake.url, fake.api_key)
        session.remember_place()
        found, _ = session.vast.search({}, interruptible=False, disk_gib=16)
        rent(session, found[0])
    written = (own.runs / plan.run_id / journal.FILE).read_bytes()
    with FakeVast(tmp_path / "other") as other:
        other.do(lambda: _another_account(other.cloud))
        theirs = vast_of(other)
        before = len(other.requests)
        both = rf"(?s)account {fake.cloud.account.id}.*account {other.cloud.account.id}"
        with Journal(own.runs / plan.run_id) as j:
            for act in (rent_and_train, lambda s: destroy(s, why="asked for")):
                with pytest.raises(Elsewhere, match=both):
                    act(rig.client(plan, j, other.url, other.api_key))
        reaped = reap(own.runs, theirs, rig.Silent(), foreign=True)
        assert reaped.destroyed == [] and both.split(".*")[1] in reaped.left[0]
        damaged = own.runs / plan.run_id / journal.FILE
        damaged.write_bytes(written.replace(b'"rented"', b'"rented', 1))
        assert reap(own.runs, theirs, rig.Silent()).destroyed == []
        damaged.write_bytes(written)
        asked = {r["method"] for r in other.requests[before:]}
        assert asked == {"GET"}, "nothing that changes anything"
    assert (own.runs / plan.run_id / journal.FILE).read_bytes() == written
    assert len(fake.instances()) == 1
    until_absent(vast_of(fake), plan.run_id)


def _another_account(cloud: Cloud) -> None:
    cloud.account.id += 1


def test_an_emulator_that_is_started_again_is_the_same_place() -> None:
    here, again = place.Place("http://127.0.0.1:1", "7"), place.Place("http://127.0.0.1:2", "7")
    assert here.same_as(again)
    assert not here.same_as(place.Place("http://127.0.0.1:1", "8"))
    assert not here.same_as(place.Place("https://console.vast.ai", "7"))


def test_a_key_is_not_sent_in_the_clear() -> None:
    with pytest.raises(PreflightError, match="in the clear"):
        provider_from({"VAST_API_KEY": "k", "VAST_URL": "http://vast.example"})
    assert provider_from({"VAST_API_KEY": "k", "VAST_URL": "http://127.0.0.1:80"})


@pytest.mark.parametrize("body", [{"instances": None}, {"success": True, "instances": None}])
def test_one_empty_answer_about_a_healthy_box_does_not_destroy_it(
    own: rig.Rig, fake: FakeVast, body: dict[str, Any]
) -> None:
    fake.faults.add(where="exec", what="cut", on_call=4)
    plan = own.plan()

    def plant() -> None:
        fake.faults.add(where="exec", what="cut")
        fake.faults.add(where="show", what="reply", status=200, body=body)

    with Journal(own.runs / plan.run_id) as j:
        rent_and_train(rig.client(plan, j, fake.url, fake.api_key, screen=Once(plant)))
    assert ("show", "reply") in fake.faults.fired
    assert sum(r["route"] == "create" for r in fake.requests) == 1


def test_a_key_that_is_attached_already_is_no_reason_to_destroy(
    own: rig.Rig, fake: FakeVast
) -> None:
    said = {"success": False, "error": "duplicate", "msg": "SSH key already attached"}
    fake.faults.add(where="attach_ssh", what="reply", status=400, body=said)
    plan = own.plan()
    with Journal(own.runs / plan.run_id) as j:
        assert rent_and_train(rig.client(plan, j, fake.url, fake.api_key)).sha256
    assert fake.faults.fired == [("attach_ssh", "reply")]


def test_an_image_that_two_machines_cannot_start_is_named_and_renting_stops(
    own: rig.Rig, fake: FakeVast
) -> None:
    fake.faults.add(where="boot", what="pull_error", times=None)
    plan = own.plan()
    with Journal(own.runs / plan.run_id) as j:
        with pytest.raises(PreflightError, match=f"image {rig.IMAGE} starts on no machine"):
            rent_and_train(rig.client(plan, j, fake.url, fake.api_key))
        kinds = [line.kind for line in j.lines]
    assert kinds.count("renting") == 2 and kinds.count("bad_machine") == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_an_error_of_this_disk_is_said_with_its_file_and_what_to_do(number: int) -> None:
    said = disk_error(OSError(number, os.strerror(number), "/runs/x"))
    assert said is not None and said.exit_code == 8
    assert os.strerror(number) in str(said) and "/runs/x" in str(said) and "resume" in said.hint
    assert disk_error(OSError(errno.ECONNRESET, "reset")) is None, "a network is no disk"
