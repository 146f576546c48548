"""A box that is stopped and kept: what it costs, until when, who starts it, and who ends it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from owners import Forked, creates, planned, stop_in_time, told

import milktea
import rig
from ops.box import scripts
from ops.errors import PreflightError
from ops.fakevast import FakeVast
from ops.job.plan import Plan
from ops.market.client import Vast
from ops.market.models import Offer
from ops.market.provider import Provider
from ops.run import journal, kept, wishes
from ops.run.journal import Line
from ops.run.meter import age_s, box_age_s, ends_itself_at, spent_usd
from ops.run.reap import finish_destroys, reap
from ops.wait import RealClock

LARGE = rig.Workload(
    1e5, 1e6, cpu_practice=True, disk_gib=16, image_bytes=4e8, model_download_bytes=3e11
)  # a model that takes long to be downloaded again
LIMITS: dict[str, Any] = {"workload": LARGE, "max_usd": 50.0, "max_s": 360_000.0}


class Later(RealClock):
    """The same clock, some seconds later."""

    def __init__(self, later_s: float) -> None:
        super().__init__(rig.PACE)
        self.later_s = later_s

    def now(self) -> float:
        return super().now() + self.later_s


def vast_of(fake: FakeVast, later_s: float = 0.0) -> Vast:
    return Vast(Provider(fake.url, fake.api_key), Later(later_s))


@pytest.fixture
def run(own: rig.Rig, fake: FakeVast) -> Iterator[milktea.Run]:
    """A run whose box is stopped and kept in the middle of its training."""
    stop_in_time(own)
    fake.cloud.settings.stopped_storage_factor = 1.5
    found = planned(own, **LIMITS)
    owner = Forked(found, vast_of(fake))
    told(found, "event")
    assert milktea.stop(found, "keep", vast=vast_of(fake)) == found
    assert owner.ended() == 0
    yield found
    reaped = reap(own.runs, vast_of(fake, 1e8), rig.Silent())
    assert reaped.leaked == []


def test_a_kept_box_is_stopped_priced_dated_and_resume_goes_on_with_it(
    own: rig.Rig, fake: FakeVast, run: milktea.Run
) -> None:
    kinds = [line.kind for line in run.journal]
    assert kinds.index("checkpoint") < kinds.index("stopping") < kinds.index("kept")
    [box] = fake.instances()
    assert box["cur_state"] == "stopped" and not run.is_owned
    status = run.status()
    assert (status.stage, status.owner) == ("stopped, disk kept", "kept")
    assert status.ends_itself_at is None and status.kept_until == run.journal[-1]["until"]
    begun, line = told(run, "stopping"), told(run, "kept")
    assert line["usd_per_hour"] == pytest.approx(1.5 * begun["usd_per_hour"], rel=1e-3)
    left_s, dearer_s = begun["until"] - line.t, line["until"] - line.t
    assert dearer_s == pytest.approx(left_s / 1.5, rel=0.01), "a stopped disk may be dearer"
    assert status.usd_per_hour == pytest.approx(box["storage_total_cost"], abs=1e-6)
    assert "$ a day until" in run.kept and "destroys it" in run.kept
    with pytest.raises(PreflightError, match="a day until"):
        milktea.stop(run, "fetch", vast=vast_of(fake))
    (own.image / "pause").unlink()
    assert milktea.resume(run, vast=vast_of(fake), root=own.runs).adapter is not None
    assert creates(fake) == 1 and told(run, "destroyed")["instance_id"] == box["id"]
    kinds = [line.kind for line in run.journal]
    assert kinds.count("pushed") == 1, "what was pushed is on the kept disk"
    assert kinds.count("booted") == 2 and kinds.index("starting") > kinds.index("kept")


def test_reap_leaves_a_kept_box_until_its_date_and_destroys_it_then(
    own: rig.Rig, fake: FakeVast, run: milktea.Run
) -> None:
    reaped = reap(own.runs, vast_of(fake), rig.Silent())
    assert reaped.destroyed == [] and len(fake.instances()) == 1
    [said] = reaped.left
    assert said.startswith(run.id) and "$ a day" in said and f"milktea destroy {run.id}" in said
    until = float(run.journal[-1]["until"]) - run.journal[-1].t
    assert finish_destroys(own.runs, vast_of(fake, until - 60), rig.Silent()).destroyed == []
    assert finish_destroys(own.runs, vast_of(fake, until + 60), rig.Silent()).destroyed == [run.id]
    assert fake.instances() == []


def test_a_kept_box_is_destroyed_when_it_is_asked_for(
    own: rig.Rig, fake: FakeVast, run: milktea.Run
) -> None:
    assert milktea.stop(run, "destroy", vast=vast_of(fake), root=own.runs) == run
    assert fake.instances() == [] and run.kept == "" and run.owner == ""


def test_where_somebody_else_has_the_gpus_another_machine_is_rented(
    own: rig.Rig, fake: FakeVast, run: milktea.Run
) -> None:
    [box] = fake.instances()
    said = {"success": False, "error": "resources_unavailable", "msg": "state change queued."}
    fake.faults.add(where="set_instance", what="reply", status=200, body=said)
    (own.image / "pause").unlink()
    assert milktea.resume(run, vast=vast_of(fake), root=own.runs).adapter is not None
    assert ("set_instance", "reply") in fake.faults.fired
    assert creates(fake) == 2 and fake.cloud.destroyed[box["id"]]
    assert "somebody else has the GPUs" in told(run, "missed")["why"]


def test_what_is_not_worth_keeping_is_refused_and_the_run_goes_on(
    own: rig.Rig, fake: FakeVast
) -> None:
    (own.image / "pause").touch()
    run = planned(own)
    owner = Forked(run, vast_of(fake))
    told(run, "launched")
    assert "keep" not in [c.wish for c in run.choices()]
    with pytest.raises(PreflightError, match="a start on another machine") as refused:
        milktea.stop(run, "keep", vast=vast_of(fake))
    assert "--fetch" in refused.value.hint and run.is_owned
    (own.image / "pause").unlink()
    assert owner.ended() == 0 and run.adapter is not None


# -- the arithmetic --------------------------------------------------------------------------------

OFFER = asdict(
    Offer(
        id=1,
        machine_id=2,
        host_id=3,
        gpu_name="RTX 4090",
        num_gpus=1,
        gpu_memory_gib=24.0,
        compute_capability=8.9,
        cuda_max=13.0,
        cpu_ram_gib=64.0,
        disk_gib=500.0,
        usd_per_hour=0.36,
        min_bid_usd_per_hour=0.1,
        storage_usd_per_gib_month=0.15,
        inet_up_mbps=500.0,
        inet_down_mbps=500.0,
        inet_up_usd_per_gb=0.0,
        inet_down_usd_per_gb=0.002,
        reliability=0.99,
        country="SE",
        duration_s=5e6,
        verified=True,
        direct_ports=4,
    )
)
DISK_USD_PER_HOUR = 16 * 0.15 / 720


def lines_of(plan: Plan, *told: tuple[float, str, dict[str, Any]]) -> list[Line]:
    """A journal: the plan at second 0, a machine rented at 10 and booted at 100, then `told`."""
    first = plan.to_line() | {"workload": {}}
    rent = {"offer": OFFER, "bid_usd_per_hour": None, "disk_gib": 16, "max_s": 7000}
    rows = [
        (0.0, "planned", first),
        (0.0, "owned", {}),
        (10.0, "renting", rent),
        (10.0, "rented", {"instance_id": 9}),
        (100.0, "booted", {}),
        (160.0, "launched", {}),
    ]
    return [Line(n, t, kind, data) for n, (t, kind, data) in enumerate([*rows, *told])]


KEPT = {"instance_id": 9, "usd_per_hour": 0.01, "until": 90_000}


def test_a_stopped_box_costs_its_disk_alone_and_its_stop_is_no_time_of_the_run(
    own: rig.Rig,
) -> None:
    plan = own.plan(**LIMITS)
    stopped = [(1900.0, "stopping", KEPT), (1900.0, "kept", KEPT)]
    lines = lines_of(plan, *stopped)
    ran = (1800 * 0.36 + 1890 * DISK_USD_PER_HOUR) / 3600
    assert spent_usd(lines, 1900) == pytest.approx(ran)
    assert spent_usd(lines, 1900 + 86400) == pytest.approx(ran + 24 * 0.01)
    assert ends_itself_at(lines) is None, "a stopped box has no watchdog"
    again = [(50_000.0, "owned", {}), (50_000.0, "starting", {"ends_at": 53_000})]
    lines = lines_of(plan, *stopped, *again, (50_030.0, "booted", {}))
    kept_usd = (50_000 - 1900) * 0.01 / 3600
    later = (1000 * 0.36 + 1030 * DISK_USD_PER_HOUR) / 3600
    assert spent_usd(lines, 51_030) == pytest.approx(ran + kept_usd + later)
    assert ends_itself_at(lines) == 53_000
    assert box_age_s(lines, 51_030) == pytest.approx(1800 + 1000)
    assert age_s(lines, 51_030) == pytest.approx(1900 + 1030)


def test_a_price_that_rose_before_the_stop_is_charged_again_after_it(own: rig.Rig) -> None:
    risen = {"usd_per_hour": 0.36 + DISK_USD_PER_HOUR + 0.1, "ends_at": 4000}
    told_ = [(1000.0, "price", risen), (1900.0, "stopping", KEPT), (1900.0, "kept", KEPT)]
    told_ += [(5500.0, "owned", {}), (5500.0, "starting", {"ends_at": 9000})]
    lines = lines_of(own.plan(**LIMITS), *told_, (5500.0, "booted", {}))
    before = (1800 * 0.36 + 1890 * DISK_USD_PER_HOUR + 900 * 0.1) / 3600
    after = 1000 * (0.36 + 0.1 + DISK_USD_PER_HOUR) / 3600
    assert spent_usd(lines, 6500) == pytest.approx(before + 0.01 + after)
    assert ends_itself_at(lines) == 9000, "the start has counted with the price"


def test_a_disk_is_kept_for_as_long_as_it_is_cheaper_than_a_start_elsewhere(own: rig.Rig) -> None:
    plan = own.plan(**LIMITS)
    lines = lines_of(plan)
    agreed = kept.terms(lines, plan, 1900.0)
    assert agreed.usd_per_day == pytest.approx(24 * DISK_USD_PER_HOUR)
    assert agreed.worth(1900.0) and agreed.saved_usd > 0.6, "300 GB at 0.002 $, and their time"
    kept_s = agreed.until - 1900
    assert kept_s * DISK_USD_PER_HOUR / 3600 == pytest.approx(agreed.saved_usd)
    offered = {c.wish: c.text for c in wishes.choices(lines, plan, 1900.0, attached=True)}
    assert [*offered] == ["leave", "fetch", "keep", "destroy"]
    assert "0.080 $ a day, until" in offered["keep"]
    poor = replace(plan, max_usd=spent_usd(lines, 1900.0) + 0.05)
    assert not kept.terms(lines, poor, 1900.0).worth(1900.0), "nothing is left to go on with"
    ending = lines_of(plan)
    ending[2].data["offer"] = OFFER | {"duration_s": 4000.0}
    assert kept.terms(ending, plan, 1900.0).until == 4010.0, "the contract ends"


def test_the_watchdog_of_a_box_that_was_kept_does_not_count_the_stop(tmp_path: Path) -> None:
    home = tmp_path / "milktea"
    (home / "run").mkdir(parents=True)
    assert rig.sh(scripts.halt("run"), tmp_path).stdout == "halted\n"
    (home / "launched").write_text("run\n")
    (home / "lease").write_text("1800\n")
    (home / "age").write_text("1800 5000\n")
    (home / "uptime").write_text("99000.5 0\n")
    once = "sleep() { exit 0; }\n" + scripts.WATCHDOG
    more = {"MILKTEA_UPTIME": "uptime", "MILKTEA_MAX_S": "7000", "MILKTEA_LEASE_S": "600"}
    more |= {"MILKTEA_WATCH_S": "15", "MILKTEA_WHEN_SILENT": "finish", "MILKTEA_HOLD_S": ""}
    assert rig.sh(once, tmp_path, **more).returncode == 0
    assert (home / "age").read_text().split() == ["1800", "99000"]
    assert not (home / "launched").exists() and not (home / "halt").exists()
    assert rig.sh(once, tmp_path, **more).returncode == 0
    assert (home / "lease").read_text().split() == ["1800"], (
        "ten minutes for its client, from now on"
    )


def test_a_training_that_ended_well_is_not_stopped(tmp_path: Path) -> None:
    run = tmp_path / "milktea/run"
    run.mkdir(parents=True)
    (run / "exit_code").write_text("0\n")
    assert rig.sh(scripts.halt("run"), tmp_path).stdout == "ended\n"
    assert not (run.parent / "halt").exists() and (run / "exit_code").exists()
    (run / "exit_code").write_text("143\n")
    assert rig.sh(scripts.halt("run"), tmp_path).stdout == "halted\n"
    assert not (run / "exit_code").exists(), "`launch` starts it again"


# -- deaths ----------------------------------------------------------------------------------------


def die(*told: object, **more: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before the stop", "after the stop", "before the journal's line"])
def test_whoever_dies_while_it_stops_a_box_the_next_command_finishes_that(
    own: rig.Rig, fake: FakeVast, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    stop_in_time(own)
    run, real = planned(own, **LIMITS), Vast.set_running
    with monkeypatch.context() as patched:
        if when == "before the stop":
            patched.setattr(Vast, "set_running", die)
        elif when == "after the stop":
            patched.setattr(Vast, "set_running", lambda *told: (real(*told), die()))
        else:
            patched.setattr(kept.cost, "disk_usd_per_hour", _dies_once_stopped(run))
        owner = Forked(run, vast_of(fake))
        told(run, "event")
        wishes.send(run.folder, wishes.KEEP)
        os.waitpid(owner.pid, 0)
    assert run.journal[-1].kind == "stopping" and run.status().stage == "stopping"
    assert finish_destroys(own.runs, vast_of(fake), rig.Silent()).destroyed == []
    assert run.journal[-1].kind == "kept" and fake.instances()[0]["cur_state"] == "stopped"
    (own.image / "pause").unlink()
    assert milktea.resume(run, vast=vast_of(fake), root=own.runs).adapter is not None
    assert creates(fake) == 1


def _dies_once_stopped(run: milktea.Run) -> Any:
    real = kept.cost.disk_usd_per_hour

    def priced(*told: Any) -> float:
        if journal.last(run.journal, "stopping"):
            die()
        return real(*told)

    return priced
