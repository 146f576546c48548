"""A sweep as a user's program calls it: real owners of runs, on the emulator."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Sequence
from typing import Any

import pytest

import milktea
import rig
from ops.fakevast import FakeVast
from ops.run.journal import read

RATES = [1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4, 7e-4, 8e-4]


class Counting(milktea.QuietSweep):
    """Keeps the lines of a sweep, and holds it to its purse and its number at once."""

    def __init__(self, max_usd: float, at_once: int) -> None:
        self.lines: list[milktea.Line] = []
        self.max_usd, self.at_once = max_usd, at_once

    def line(self, line: milktea.Line, trials: Sequence[milktea.Trial]) -> None:
        self.lines.append(line)

    def meter(self, trials: Sequence[milktea.Trial], spent_usd: float, max_usd: float) -> None:
        live = [t for t in trials if t.state == "live"]
        ended = sum(t.spent_usd for t in trials if t.state != "live")
        assert len(live) <= self.at_once
        assert ended + sum(t.cap_usd for t in live) <= self.max_usd + 1e-9

    def kinds(self, number: int) -> list[str]:
        return [line.kind for line in self.lines if line.get("trial") == number]


@pytest.mark.slow
def test_the_best_comes_home_and_the_worse_ends_early_under_one_purse(
    own: rig.Rig, vast: milktea.Vast, job: dict[str, Any]
) -> None:
    heard = Counting(0.6, 2)
    jobs = milktea.variations(job, {"training.learning_rate": [3e-4, 1e-4]})
    swept = milktea.map(jobs, max_usd=0.6, at_once=2, vast=vast, root=own.runs, watcher=heard)
    good, bad = swept.trials
    assert swept.best is good and good.held_out == 1.6 and good.adapter is not None
    assert (bad.state, bad.adapter) == ("stopped early", None), bad.why
    assert bad.settings == {"training.learning_rate": 1e-4} and bad.rungs[0.25] > good.rungs[0.25]
    assert 0 < swept.spent_usd < 0.6
    assert swept.spent_usd == pytest.approx(good.spent_usd + bad.spent_usd)
    assert swept.page is not None and b"<polyline" in swept.page.read_bytes()
    told = json.loads(swept.page.with_name("sweep.json").read_text())
    assert [t["state"] for t in told["trials"]] == ["done", "stopped early"]
    assert [line.kind for line in read(own.runs / "sweeps" / swept.id)][-1] == "over"
    compared = milktea.compare([t.run for t in swept.trials if t.run], root=own.runs)
    assert compared.differ == {"training.learning_rate": [3e-4, 1e-4]}
    assert compared.outcomes[0].gpu.startswith("1 x ") and compared.outcomes[0].spent_usd > 0


class Killer(Counting):
    """Kills the owner of two runs, each once it has told its first rung."""

    def __init__(self, max_usd: float, at_once: int, victims: Sequence[int]) -> None:
        super().__init__(max_usd, at_once)
        self.victims = list(victims)

    def line(self, line: milktea.Line, trials: Sequence[milktea.Trial]) -> None:
        super().line(line, trials)
        if line.kind == "rung" and line["trial"] in self.victims:
            self.victims.remove(line["trial"])
            run = trials[line["trial"] - 1].run
            assert run is not None
            os.kill(int((run.folder / "lock").read_text()), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_of_eight_the_planted_one_is_found_though_two_owners_die(
    own: rig.Rig, vast: milktea.Vast, looking: FakeVast, job: dict[str, Any], seed: int
) -> None:
    other = random.Random(seed).choice([1, 2, 4, 5, 6, 7, 8])
    heard = Killer(2.0, 3, [3, other])
    jobs = milktea.variations(job, {"training.learning_rate": RATES})
    swept = milktea.map(jobs, max_usd=2.0, at_once=3, vast=vast, root=own.runs, watcher=heard)
    assert swept.best is not None and swept.best.settings == {"training.learning_rate": 3e-4}
    assert heard.victims == [] and sum(line.kind == "resumed" for line in heard.lines) >= 1
    assert {t.state for t in swept.trials} <= {"done", "stopped early"}, swept.trials
    assert looking.instances() == [] and swept.spent_usd <= 2.0
