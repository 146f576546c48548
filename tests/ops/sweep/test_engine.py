"""A sweep over runs that take no time: their folders are written as owners write them, a step at
each look. What rents and trains for real is in test_sweep.py."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import milktea
import rig
from ops.errors import BoxLeaked, NoAnswer
from ops.job.job_file import JobFile
from ops.market.models import Offer
from ops.run import wishes
from ops.run.journal import Journal, Line
from ops.run.view import Run
from ops.sweep import begin, plan, state
from ops.sweep.state import Trial

OFFER = Offer(
    1, 1, 1, "RTX 4090", 1, 24.0, 8.9, 12.8, 64.0, 100.0, 36.0, 10.0, 0.1, 500.0, 500.0, 0.0, 0.0,
    0.99, "DE", 1e6, True, 4,
)  # fmt: skip
STEPS = 8
RATES = [1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4, 7e-4, 8e-4]


class World:
    """Acts on runs as `ops.api` does: a run is owned while its journal is open here. `dies` are the
    numbers of the runs begun (from 1) whose owner dies once, `fails` those whose training fails."""

    def __init__(self, own: rig.Rig, dies: Sequence[int] = (), fails: Sequence[int] = ()) -> None:
        self.own, self.dies, self.fails = own, list(dies), list(fails)
        self.open: dict[str, tuple[int, Journal]] = {}
        self.steps: dict[str, int] = {}
        self.boxes: set[str] = set()
        self.begun = 0
        self.leaks = self.deaf = False

    def plan(self, job: JobFile) -> Any:
        made = self.own.plan(max_usd=job.limits.max_usd, out=str(job.results.folder))
        training = job.training.model_dump(mode="json")
        wire = made.wire_job | {"training": training}
        made = self.own.plan(
            run_id=f"{job.name}-{made.run_id}", wire_job=wire, max_usd=made.max_usd
        )
        cost = SimpleNamespace(expected_usd=0.1, usd_per_hour=0.3)
        return SimpleNamespace(
            plan=made, ranking=SimpleNamespace(accepted=[SimpleNamespace(cost=cost)])
        )

    def begin(self, planned: Any) -> Run:
        run = Run(self.own.runs / planned.plan.run_id)
        held = Journal(run.folder).__enter__()
        held.append("planned", **planned.plan.to_line())
        held.append("owned", pid=1)
        held.append("renting", offer=asdict(OFFER), bid_usd_per_hour=None, disk_gib=16, max_s=9e3)
        for kind in ("rented", "booted", "launched"):
            held.append(kind, instance_id=1)
        self.begun += 1
        self.open[run.id], self.steps[run.id] = (self.begun, held), 0
        self.boxes.add(run.id)
        return run

    def resume(self, run: Run) -> None:
        number = 1 + list(self.steps).index(run.id)
        held = Journal(run.folder).__enter__()
        held.append("owned", pid=2)
        self.open[run.id] = (number, held)

    def destroy(self, run: Run) -> None:
        if self.deaf:
            raise NoAnswer("vast.ai says nothing")
        if self.leaks:
            raise BoxLeaked("still listed")
        with Journal(run.folder) as held:
            held.append("destroyed", instance_id=1, reads=[])
        self.boxes.discard(run.id)

    def advance(self) -> None:
        """Every owned run goes a step on, obeys its wish, dies, fails or ends."""
        for run_id, (number, held) in list(self.open.items()):
            step = self.steps[run_id] = self.steps[run_id] + 1
            if wishes.read(held.folder) == wishes.DESTROY:
                self._end(run_id, "failed", what="stopped by you", error="Failed")
            elif number in self.dies and step == 4:
                self.dies.remove(number)
                self.open.pop(run_id)[1].__exit__()
            elif number in self.fails and step == 5:
                self._end(run_id, "failed", what="loss is not finite", error="Failed")
            elif step < STEPS + 1:
                self._tell(held.folder, step, held.lines[0]["wire_job"]["training"])
            else:
                self._end(run_id, "pulled", adapter=str(held.folder / "adapter.zip"), sha256="0")

    def _tell(self, folder: Path, step: int, training: dict[str, Any]) -> None:
        rate = training["learning_rate"]
        planted = 1.6 if rate == 3e-4 else 2.0 + 100 * rate
        loss = planted + (STEPS - step) / 10
        rows: list[dict[str, Any]] = [
            {"event": "held_out", "step": step, "rows": 9, "loss": loss, "accuracy": 0.5}
        ]
        if step == 1:
            rows.insert(0, {"event": "started", "total_steps": STEPS})
        with open(folder / "events.jsonl", "a") as file:
            file.writelines(json.dumps({"t": 1.0, **row}) + "\n" for row in rows)

    def _end(self, run_id: str, kind: str, **facts: Any) -> None:
        _, held = self.open.pop(run_id)
        if kind == "failed":
            held.append("destroyed", instance_id=1, reads=[])
        held.append(kind, **facts)
        if kind == "pulled":
            held.append("destroyed", instance_id=1, reads=[])
        held.__exit__()
        self.boxes.discard(run_id)


class Watch(milktea.QuietSweep):
    """Lets the world go on after each look, and holds the sweep to its purse."""

    def __init__(self, world: World, max_usd: float, at_once: int, wish: str | None = None) -> None:
        self.world, self.max_usd, self.at_once, self.wish = world, max_usd, at_once, wish
        self.offered: Sequence[tuple[str, str]] = []
        self.lines: list[Line] = []

    def line(self, line: Line, trials: Sequence[Trial]) -> None:
        self.lines.append(line)

    def meter(self, trials: Sequence[Trial], spent_usd: float, max_usd: float) -> None:
        live = [t for t in trials if t.state == state.LIVE]
        ended = sum(t.spent_usd for t in trials if t.state != state.LIVE)
        assert len(live) <= self.at_once
        assert ended + sum(t.cap_usd for t in live) <= self.max_usd + 1e-9
        assert all(t.run and t.run.cost().max_usd == t.cap_usd for t in live), "the run's own limit"
        self.world.advance()

    def choose(self, choices: Sequence[tuple[str, str]]) -> str | None:
        self.offered = choices
        return self.wish


@pytest.fixture
def jobs(own: rig.Rig) -> list[JobFile]:
    job = {
        "name": "tea",
        "model": {"base": "stub"},
        "data": {"files": [str(own.data)]},
        "limits": {"max_usd": 0.5},
        "results": {"folder": str(own.folder / "out")},
    }
    return milktea.variations(job, {"training.learning_rate": RATES})


def sweep(
    world: World, watch: Watch, jobs: Sequence[JobFile], presses: Sequence[bool] = ()
) -> begin.Swept:
    planned = plan.plan_sweep(jobs, watch.max_usd, watch.at_once, world.own.runs, world.plan)
    pressed = iter(presses)
    return begin.run_sweep(
        planned, world.own.runs, world, watch, lambda: next(pressed, False), look_s=0
    )


@pytest.mark.parametrize("seed", range(2))
def test_of_eight_the_planted_one_is_found_though_an_owner_dies_and_a_training_fails(
    own: rig.Rig, jobs: list[JobFile], seed: int
) -> None:
    died, failed = random.Random(seed).sample([1, 2, 4, 5, 6, 7, 8], 2)
    world = World(own, dies=[died, 3], fails=[failed])
    watch = Watch(world, 1.5, 3)
    swept = sweep(world, watch, jobs)
    assert swept.best is not None and swept.best.settings == {"training.learning_rate": 3e-4}
    assert swept.best.held_out == 1.6 and world.boxes == set() and world.open == {}
    states = [t.state for t in swept.trials]
    assert states.count("stopped early") >= 3 and set(states) <= {"done", "stopped early", "failed"}
    assert [line["trial"] for line in watch.lines if line.kind == "resumed"].count(3) == 1
    assert swept.page is not None and b"learning_rate=0.0003" in swept.page.read_bytes()


def test_a_sweep_that_was_left_goes_on_from_its_journal_and_begins_nothing_twice(
    own: rig.Rig, jobs: list[JobFile]
) -> None:
    world, watch = World(own), Watch(World(own), 1.5, 2, wish=wishes.LEAVE)
    watch.world = world
    left = sweep(world, watch, jobs, [False] * 12 + [True])
    assert left.page is None and len(world.open) == 2 and 2 < world.begun < 8
    assert all("$" in text for _, text in watch.offered)
    again = Watch(world, 1.5, 2)
    swept = sweep(world, again, jobs)
    assert swept.id == left.id and world.begun == 8 and world.boxes == set()
    assert again.lines[0].kind == "goes_on"
    assert swept.best is not None and swept.best.number == 3
    assert sweep(world, Watch(world, 1.5, 2), jobs[:2]).id != left.id


def test_a_run_that_was_meant_and_never_begun_is_begun_by_the_next_call(
    own: rig.Rig, jobs: list[JobFile]
) -> None:
    world = World(own)

    class Killed(BaseException):
        pass

    def killed(planned: Any) -> Run:
        raise Killed

    world.begin = killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        sweep(world, Watch(world, 1.5, 1), jobs[:2])
    world = World(own)
    watch = Watch(world, 1.5, 1)
    swept = sweep(world, watch, jobs[:2])
    assert [line.kind for line in watch.lines][:2] == ["goes_on", "unbegun"]
    assert swept.trials[0].state == "done" and world.begun == 2


def test_ctrl_c_without_anybody_to_ask_ends_every_run(own: rig.Rig, jobs: list[JobFile]) -> None:
    world = World(own)
    watch = Watch(world, 1.5, 2)
    swept = sweep(world, watch, jobs, [False, False, True])
    assert world.boxes == set() and swept.best is None and world.begun == 2
    assert [t.state for t in swept.trials] == ["ended"] * 2 + ["skipped"] * 6


def test_a_purse_that_is_empty_skips_the_rest_and_says_so(
    own: rig.Rig, jobs: list[JobFile]
) -> None:
    world = World(own)
    swept = sweep(world, Watch(world, 0.15, 2), jobs[:3])
    assert [t.state for t in swept.trials] == ["skipped"] * 3 and world.begun == 0
    assert "0.1500 $ are left, and it needs about 0.1800 $" in swept.trials[0].why


def test_a_box_that_may_still_bill_keeps_its_dollars_and_ends_the_sweep_with_a_shout(
    own: rig.Rig, jobs: list[JobFile]
) -> None:
    world = World(own, dies=[1])
    world.leaks, watch = True, Watch(world, 1.5, 1)
    world.resume = lambda run: world.destroy(run)  # type: ignore[method-assign]
    with pytest.raises(BoxLeaked, match="still listed"):
        sweep(world, watch, jobs[:3])
    ended = [line for line in watch.lines if line.kind == "ended"]
    assert [line["state"] for line in ended] == ["failed", "skipped", "skipped"]
    assert ended[0]["spent_usd"] >= next(x["cap_usd"] for x in watch.lines if x.kind == "began")
    assert watch.lines[-1].kind != "over"


def test_two_processes_do_not_run_one_sweep(own: rig.Rig, jobs: list[JobFile]) -> None:
    world = World(own)
    left = sweep(world, Watch(world, 1.5, 1, wish=wishes.LEAVE), jobs[:2], [True])
    with (
        Journal(own.runs / state.FOLDER / left.id),
        pytest.raises(milktea.MilkteaError, match="is acting on this run"),
    ):
        sweep(world, Watch(world, 1.5, 1), jobs[:2])
    sweep(world, Watch(world, 1.5, 1), jobs[:2])
