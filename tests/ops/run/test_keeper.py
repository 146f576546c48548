"""The keeper acts whatever the story is doing: against the emulator, with a story that stands
still inside one of its own steps."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import rig
from ops.box import scripts
from ops.box.transfer import sha256_of
from ops.errors import NoOffer, OverBudget, Stalled
from ops.fakevast import FakeVast, weather
from ops.fakevast.cloud.catalogue import machine, offer_row
from ops.market.models import parse_offer
from ops.run import sandbox
from ops.run.journal import Journal, Line
from ops.run.meter import ends_itself_at, spent_usd
from ops.run.rent_and_train import rent_and_train
from ops.run.session import Session
from ops.wait import RealClock, until
from trainer.wire import events


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.run.keeper.LOOK_S", 0.05)


class Standing(rig.Silent):
    """Keeps the story inside its first step event until `done` says so."""

    def __init__(self, done: Callable[[], Any], before: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.done, self.before, self.stood = done, before, False

    def event(self, event: events.Event, *rest: Any) -> None:
        if isinstance(event, events.Step) and not self.stood:
            self.stood = True
            self.before()
            assert until(lambda: self.done() or None, every_s=0.05, timeout_s=40), "nothing came"


def story(own: rig.Rig, fake: FakeVast, screen: Standing, **more: Any) -> tuple[Session, Any]:
    plan = own.plan(**more)
    with Journal(own.runs / plan.run_id) as j:
        session = rig.client(plan, j, fake.url, fake.api_key, screen=screen)
        screen.session = session  # type: ignore[attr-defined]
        return session, rent_and_train(session)


def test_the_lease_is_renewed_while_the_story_is_busy_with_something_else(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.run.keeper.RENEW_S", 0.1)
    seen: set[int] = set()

    def renewed() -> bool:
        lease = fake.home(fake.instances()[0]["id"]) / "milktea/lease"
        seen.add(lease.stat().st_mtime_ns)
        return len(seen) > 3

    _, outcome = story(own, fake, Standing(renewed))
    assert outcome.sha256


def test_a_limit_that_falls_destroys_although_the_story_stands_still(
    own: rig.Rig, fake: FakeVast
) -> None:
    screen = Standing(lambda: not fake.instances())
    screen.before = lambda: screen.session.shorten(0.0)  # type: ignore[attr-defined]
    with pytest.raises(OverBudget, match=r"limits\.max_usd"):
        story(own, fake, screen)
    assert sum(r["route"] == "create" for r in fake.requests) == 1, "nothing is rented again"


def test_a_story_that_moves_nothing_for_too_long_is_ended(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.run.keeper.STALL_GRACE_S", 0.0)
    with pytest.raises(Stalled, match="nothing moved"):
        story(own, fake, Standing(lambda: not fake.instances()), stall_s=2.0)


def test_a_result_whose_verification_takes_longer_than_a_stall_comes_home(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.run.keeper.STALL_GRACE_S", 0.0)
    real, plan, stands = sandbox.verify, own.plan(stall_s=600.0), []

    def slowly(*words: Any) -> Any:
        session.moved_t -= 1200.0  # a large result on a slow disk says nothing meanwhile
        time.sleep(0.5)  # ten looks of the keeper
        stands.append(bool(fake.instances()))
        return real(*words)

    monkeypatch.setattr(sandbox, "verify", slowly)
    with Journal(own.runs / plan.run_id) as j:
        session = rig.client(plan, j, fake.url, fake.api_key)
        assert rent_and_train(session).sha256
        assert stands == [True] and [line.kind for line in j.lines].count("rented") == 1


def test_a_price_that_rises_brings_the_deadline_nearer(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.run.keeper.RENEW_S", 0.1)
    monkeypatch.setattr("ops.run.keeper.PRICE_S", 0.0)
    left: list[float] = []

    def dearer() -> None:
        left.append(screen.session.left_s())  # type: ignore[attr-defined]
        instance = fake.instances()[0]
        body = {"instances": instance | {"dph_total": instance["dph_total"] * 10}}
        fake.faults.add(where="show", what="reply", status=200, body=body, times=None)

    def nearer() -> bool:
        return bool(screen.session.left_s() < left[0] / 9)  # type: ignore[attr-defined]

    screen = Standing(nearer, dearer)
    session, _ = story(own, fake, screen)
    assert any("the price rose" in str(told) for told in screen.told)
    [risen] = [line for line in session.journal.lines if line.kind == "price"]
    assert risen["ends_at"] < session.clock.now() + 800


class Corrected(RealClock):
    """A laptop whose date NTP moves by three hours."""

    off_s = 0.0

    def now(self) -> float:
        return super().now() + self.off_s


@pytest.mark.parametrize("off_s", [3 * 3600.0, -3 * 3600.0])
def test_a_date_that_jumps_by_hours_ends_no_training(
    own: rig.Rig, fake: FakeVast, off_s: float
) -> None:
    clock, plan = Corrected(rig.PACE), own.plan()
    screen = Standing(lambda: True, lambda: setattr(clock, "off_s", off_s))
    with Journal(own.runs / plan.run_id) as j:
        session = rig.client(plan, j, fake.url, fake.api_key, screen=screen, clock=clock)
        assert rent_and_train(session).sha256


class Offline(rig.Silent):
    """This machine has no network for longer than a box is waited for: neither SSH nor vast.ai."""

    def __init__(self, fake: FakeVast) -> None:
        super().__init__()
        self.fake, self.began = fake, 0.0

    def event(self, event: events.Event, *rest: Any) -> None:
        if isinstance(event, events.Step) and not self.began:
            self.began = time.monotonic()
            faults = {"exec": "cut", "ssh": "reset", "show": "lost_request", "list": "lost_request"}
            for where, what in faults.items():
                self.fake.faults.add(where=where, what=what, times=None)
            threading.Timer(3 * scripts.LEASE_S * rig.PACE, self.fake.faults.clear).start()


def test_a_network_that_is_gone_for_longer_than_the_lease_costs_no_box(
    own: rig.Rig, fake: FakeVast
) -> None:
    (own.image / "pause").touch()
    screen, plan = Offline(fake), own.plan()
    threading.Timer(2.0, lambda: (own.image / "pause").unlink()).start()
    with Journal(own.runs / plan.run_id) as j:
        session = rig.client(plan, j, fake.url, fake.api_key, screen=screen)
        assert rent_and_train(session).sha256
    assert time.monotonic() - screen.began > 3 * scripts.LEASE_S * rig.PACE
    assert any("no connection" in str(told) for told in screen.told)
    assert sum(r["route"] == "create" for r in fake.requests) == 1


def test_the_clock_of_intervals_runs_on_in_sleep_where_linux_has_one() -> None:
    clock = RealClock()
    assert abs(clock.steady() - time.clock_gettime(time.CLOCK_BOOTTIME)) < 1


@pytest.mark.parametrize(
    ("setsid", "said"),
    [
        ("exit 1", "it never started"),
        ('exec env -u CONTAINER_API_KEY /usr/bin/setsid "$@"', "CONTAINER_API_KEY is empty"),
        ('CONTAINER_API_KEY=another exec /usr/bin/setsid "$@"', "HTTP 404"),
        ("echo 999999 >watchdog.pid", "its process is gone"),
    ],
)
def test_a_machine_whose_watchdog_is_not_armed_gets_no_byte(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch, setsid: str, said: str
) -> None:
    monkeypatch.setattr("ops.run.on_rented_box.MAX_MACHINES", 1)
    tool = own.image / "bin/setsid"
    tool.write_text(f"#!/bin/sh\n{setsid}\n")
    tool.chmod(0o755)
    plan = own.plan()
    with Journal(own.runs / plan.run_id) as j:
        session = rig.client(plan, j, fake.url, fake.api_key)
        with pytest.raises(NoOffer):
            rent_and_train(session)
        kinds = [line.kind for line in j.lines]
        assert "pushed" not in kinds and "destroyed" in kinds
        assert said in j.last("bad_machine")["why"]


def test_a_box_whose_ports_move_is_found_at_its_new_ones(own: rig.Rig, fake: FakeVast) -> None:
    """The sshd is gone from where it was; the record on vast.ai has the new ports."""

    def move() -> None:
        box = fake.emulator.boxes.live[fake.cloud.rows()[0]["id"]]
        box.move_ports()

    screen = Standing(lambda: True, lambda: fake.do(move))
    _, outcome = story(own, fake, screen)
    assert outcome.sha256
    assert sum(r["route"] == "create" for r in fake.requests) == 1


def test_a_price_that_rose_is_in_what_was_spent_and_in_the_next_owners_deadline() -> None:
    offer = parse_offer(offer_row(machine(), 1, 7, 0.0, 1e6))
    plan, t = {"offer": asdict(offer), "bid_usd_per_hour": None, "disk_gib": 16}, 1000.0
    lines = [
        Line(0, t, "planned", {}),
        Line(1, t, "renting", plan | {"max_s": 3600}),
        Line(2, t, "rented", {"instance_id": 1}),
        Line(3, t, "booted", {"instance_id": 1}),
    ]
    before = spent_usd(lines, t + 600)
    rate = before / 600 * 3600
    lines.append(Line(4, t + 300, "price", {"usd_per_hour": 3 * rate, "ends_at": t + 900}))
    assert spent_usd(lines, t + 600) == pytest.approx(before * 2)
    assert ends_itself_at(lines) == t + 900
    again = [*lines, Line(5, t + 700, "renting", plan | {"max_s": 3600})]
    assert ends_itself_at(again) == t + 700 + 3600


def test_a_price_that_a_host_asks_is_told_once_and_not_accepted(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.run.keeper.RENEW_S", 0.1)
    monkeypatch.setattr("ops.run.keeper.PRICE_S", 0.0)

    def asks() -> None:
        fake.do(lambda: fake.cloud.ask_more(fake.cloud.rows()[0]["id"], 4.0))

    def asked() -> bool:
        return sum(r["route"] == "price_increases" for r in fake.requests) > 2

    screen = Standing(asked, asks)
    story(own, fake, screen)
    told = [said for said in screen.told if "the host asks" in str(said)]
    assert len(told) == 1 and "does not accept it" in told[0]
    assert fake.cloud.price_increases[1].status == "pending"


def test_a_watchdog_ends_its_box_sooner_where_it_is_told_so(tmp_path: Path) -> None:
    limits = {"max_s": 1000, "lease_s": 600, "renew_every_s": 60, "when_silent": "finish"}
    assert rig.watched(tmp_path, kill_at=10**6, **limits) >= 1000
    told = rig.watched(tmp_path, kill_at=10**6, max_age=300, **limits)
    assert 300 <= told <= 300 + scripts.WATCH_S


LEASE_S, LINK, LONG = 8, 400_000, 4_000_000  # seconds, bytes a second, bytes


def long_rig(folder: Path) -> rig.Rig:
    """A rig whose data, checkpoint and result each take longer than LEASE_S over LINK."""
    folder.mkdir()
    row = {"instruction": "q", "input": "", "output": "a" * 200}
    (folder / "rows.json").write_text(json.dumps([row] * (LONG // 240)))
    own = rig.Rig(folder)
    checkpoint, result = own.image / "checkpoint", own.image / "result"
    before = sha256_of(checkpoint / "manifest.json")
    (checkpoint / "state.bin").write_bytes(bytes(LONG))
    state = {"sha256": sha256_of(checkpoint / "state.bin"), "bytes": LONG}
    (checkpoint / "manifest.json").write_text(
        json.dumps({"step": 1, "files": {"state.bin": state}})
    )
    trainer = own.image / "bin/milktea-train"
    after = sha256_of(checkpoint / "manifest.json")
    trainer.write_text(trainer.read_text().replace(before, after))
    (result / "loss.png").write_bytes(rig.PNG + bytes(LONG))
    manifest = json.loads((result / "manifest.json").read_text())
    manifest["files"]["loss.png"] = {
        "sha256": sha256_of(result / "loss.png"),
        "bytes": len(rig.PNG) + LONG,
    }
    (result / "manifest.json").write_text(json.dumps(manifest))
    return own


@pytest.mark.slow
def test_a_push_a_checkpoint_and_a_result_that_outlast_the_lease_keep_their_box(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = scripts.environment
    short = {"MILKTEA_LEASE_S": str(LEASE_S), "MILKTEA_WATCH_S": "1"}
    monkeypatch.setattr(scripts, "environment", lambda *words: real(*words) | short)
    monkeypatch.setattr("ops.run.keeper.RENEW_S", LEASE_S / 10)
    own = long_rig(tmp_path / "long")
    slow = {"kind": "slow_link", "bytes_per_s": LINK, "for_s": 600}
    with own.emulator() as fake:
        fake.forecast(weather.parse(json.dumps([slow])))
        outcome, lines, _ = rig.whole_run(own, fake, when_silent="destroy")
    assert outcome.sha256
    assert [line.kind for line in lines].count("rented") == 1
    at = {line.kind: line.t for line in lines}
    assert at["pushed"] - at["connected"] > LEASE_S
    assert at["checkpoint"] - at["launched"] > LEASE_S
    assert at["pulled"] - at["ended"] > LEASE_S
