"""Runs that milktea 0.1 began, as its users have them on their disks:
tests/ops/run/runs_of_0_1/README.md says what is in there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import rig
from ops.errors import OfferGone
from ops.fakevast import FakeVast
from ops.job.plan import Plan
from ops.market.client import Vast
from ops.market.provider import Provider
from ops.run import explain, journal
from ops.run.boot import boot
from ops.run.journal import Journal
from ops.run.on_rented_box import connect, offers, push
from ops.run.reap import reap
from ops.run.rent_and_train import launch, rent_and_train
from ops.run.rental import rented
from ops.run.session import Detached
from ops.wait import RealClock

HERE = Path(__file__).parent / "runs_of_0_1"
FINISHED, INTERRUPTED = "stub-20261126-141035-f0e0", "stub-20261126-141037-6b74"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folders under the working directory, where their relative paths lead."""
    for run_id in (FINISHED, INTERRUPTED):
        shutil.copytree(HERE / run_id, tmp_path / "runs" / run_id)
    shutil.copy(HERE / "rows.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    return Path("runs")


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeVast]:
    with rig.Rig(tmp_path / "rig", wire=1).emulator() as cloud:
        yield cloud
        assert cloud.instances() == [], "a box survived the test"


class Then(RealClock):
    """Stands a minute after the run's last line: a run is resumed on its day, within its hours."""

    def __init__(self, folder: Path) -> None:
        super().__init__(rig.PACE)
        self._back_s = time.time() - journal.read(folder)[-1].t - 60

    def now(self) -> float:
        return super().now() - self._back_s


def test_their_journals_are_read_line_by_line(runs: Path) -> None:
    finished, interrupted = journal.read(runs / FINISHED), journal.read(runs / INTERRUPTED)
    assert [line.n for line in finished] == list(range(16)) and finished[-1].kind == "bill"
    assert [line.n for line in interrupted] == list(range(10)) and interrupted[
        -1
    ].kind == "checkpoint"
    assert Plan.from_line(interrupted[0]).run_id == INTERRUPTED
    told = "\n".join(explain.explain(finished, time.time()))
    assert "destroy   absent in 3 spaced reads" in told and "verified: 2 tensors" in told


def test_status_tells_where_they_stand(runs: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("VAST")}
    env |= {"MILKTEA_RUNS": str(runs), "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-m", "ops.cli", "status", "--json"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    finished, interrupted = map(json.loads, done.stdout.splitlines())
    assert (finished["run_id"], finished["stage"], finished["box"]) == (FINISHED, "done", None)
    assert (interrupted["run_id"], interrupted["stage"], interrupted["step"]) == (
        INTERRUPTED,
        "training",
        1,
    )
    assert interrupted["box"] == 33400002


def test_resume_goes_on_from_the_checkpoint_that_is_at_home(runs: Path, fake: FakeVast) -> None:
    folder = runs / INTERRUPTED
    clock = Then(folder)
    before = (folder / journal.FILE).read_bytes()
    with Journal(folder, clock.now) as j:
        session = rig.client(Plan.from_line(j.lines[0]), j, fake.url, fake.api_key, clock=clock)
        outcome = rent_and_train(session)
    assert outcome.adapter_zip.is_file()
    assert (folder / journal.FILE).read_bytes().startswith(before)
    kinds = [line.kind for line in journal.read(folder)][10:]
    assert kinds[:2] == ["destroying", "destroyed"], "the box of then is not there any more"
    assert kinds.count("rented") == 1 and kinds[-3:] == ["destroying", "destroyed", "bill"]
    pushed = next(line for line in journal.read(folder)[10:] if line.kind == "pushed")
    assert pushed["files"] == 4, "data, job, and the two files of the checkpoint"


def test_resume_brings_home_the_result_of_a_box_that_0_1_started(
    runs: Path, fake: FakeVast
) -> None:
    """The training of wire 1 has ended meanwhile; the trainer's own files have changed here, as an
    update of milktea changes them, and the report that the box made is not opened here."""
    folder = runs / INTERRUPTED
    clock = Then(folder)
    with Journal(folder, clock.now) as j:
        session = rig.client(Plan.from_line(j.lines[0]), j, fake.url, fake.api_key, clock=clock)
        for offer in offers(session, None):  # the first is the box of then, which is gone
            with suppress(Detached, OfferGone), rented(session, offer) as instance_id:
                box = connect(session, boot(session, instance_id, offer), offer)
                push(session, box)
                launch(session, box)
                raise Detached
            if session.may_have_box():
                break
    Path("rows.json").write_text("[]")
    with Journal(folder, clock.now) as j:
        session = rig.client(Plan.from_line(j.lines[0]), j, fake.url, fake.api_key, clock=clock)
        outcome = rent_and_train(session)
        rents = [line for line in j.lines if line.kind == "rented"]
    assert outcome.adapter_zip.is_file() and len(rents) == 2, "the one of then, and one"
    home = sorted(p.name for p in outcome.adapter_zip.parent.iterdir())
    assert home == ["adapter.zip", "report.html"]
    report = (outcome.adapter_zip.parent / "report.html").read_text()
    assert "<script" not in report and "0-rows" not in report and "rows.json" in report


def test_reap_destroys_what_the_interrupted_one_left_and_touches_no_other(
    runs: Path, fake: FakeVast
) -> None:
    vast = Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))
    found, _ = vast.search({}, interruptible=False, disk_gib=16)
    settings = {
        "image": rig.IMAGE,
        "disk_gib": 16,
        "env": {},
        "onstart": "",
        "bid_usd_per_hour": None,
    }
    vast.create(found[0].id, label=INTERRUPTED, **settings)
    before = (runs / FINISHED / journal.FILE).read_bytes()
    reaped = reap(runs, vast, rig.Silent())
    assert (reaped.destroyed, reaped.left, reaped.leaked) == ([INTERRUPTED], [], [])
    assert fake.instances() == []
    assert (runs / FINISHED / journal.FILE).read_bytes() == before
    assert journal.read(runs / INTERRUPTED)[-2].kind == "destroyed"
