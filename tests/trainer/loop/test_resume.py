"""Killed anywhere, a run goes on to the very same bytes; asked to stop, it saves at once; another
number of processes may go on."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import (
    adapter_sha256,
    events_of,
    finish,
    manifest_of,
    rows,
    start,
    step_reached,
    wait_for,
)

from trainer.loop import checkpoint
from trainer.loop.progress import Launched, Progress
from trainer.wire.job import Job, Training

pytestmark = pytest.mark.timeout(600)
Make = Callable[..., Path]
# 40 steps
SETTINGS = {
    "lora": {"lora_dropout": 0.1},
    "training": {
        "num_train_epochs": 10,
        "save_every_s": 0.01,
        "eval_steps": 7,
        "load_best_model_at_end": True,
    },
    "held_out": rows(2),
}


def settings(packing: bool) -> dict[str, Any]:
    """With dropout; in packs, or in padded batches of rows of like length."""
    return {**SETTINGS, "training": SETTINGS["training"] | {"packing": packing}}


def straight(run_folder: Make, world: int = 1, packing: bool = True) -> str:
    job = run_folder(**settings(packing))
    assert finish(start(job, world)) == [0] * world
    return adapter_sha256(job)


def killed(run_folder: Make, world: int, steps: list[int], packing: bool = True) -> tuple[str, int]:
    """Kills every rank of one job when it has told of each of `steps`; returns the result's hash
    and how often it went on from a checkpoint."""
    job = run_folder(**settings(packing))
    for step in steps:
        ranks = start(job, world)
        wait_for(lambda: step_reached(job) >= step)  # noqa: B023 - called in this turn of the loop
        for rank in ranks:
            os.kill(rank.pid, signal.SIGKILL)
        finish(ranks)
    assert finish(start(job, world)) == [0] * world
    return adapter_sha256(job), sum(
        e["event"] == "started" and e["step"] > 0 for e in events_of(job)
    )


@pytest.fixture(autouse=True)
def every_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a kill can be aimed at a step; the ranks are forked and inherit it."""
    monkeypatch.setattr("trainer.loop.progress.EVENT_EVERY_S", 0.0)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_killed_again_and_again_ends_in_the_same_bytes(run_folder: Make, world: int) -> None:
    expected = straight(run_folder, world)
    found, resumed = killed(run_folder, world, [1, 9, 23])
    assert found == expected and resumed >= 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world", "rounds"), [(1, 3), (2, 2)])
def test_a_hundred_kills_at_random_steps_end_in_the_same_bytes(
    run_folder: Make, world: int, rounds: int, packing: bool
) -> None:
    expected, dice = straight(run_folder, world, packing), random.Random(world)
    for _ in range(rounds):
        found, resumed = killed(run_folder, world, sorted(dice.sample(range(1, 39), 10)), packing)
        assert found == expected and resumed >= 3


def started_slow(job: Path, world: int) -> list[Any]:
    """Ranks that take a fifth of a second for a step: none is done before it is asked to stop."""
    real = Progress.launched

    def launched(self: Progress, step: Launched) -> None:
        time.sleep(0.2)
        real(self, step)

    with pytest.MonkeyPatch.context() as patched:  # the ranks are forked and inherit it
        patched.setattr(Progress, "launched", launched)
        return start(job, world)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_sigterm_saves_at_once_on_all_ranks_and_the_run_goes_on(
    run_folder: Make, world: int
) -> None:
    expected = straight(run_folder, world)
    job = run_folder(**{**SETTINGS, "training": SETTINGS["training"] | {"save_every_s": 1000}})
    ranks = started_slow(job, world)
    wait_for(lambda: step_reached(job) >= 2)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGTERM)
    assert finish(ranks) == [143] * world
    saved = checkpoint.newest(job.parent / "checkpoints")
    assert saved is not None and 2 <= int(saved.name) < 40
    assert finish(start(job, world)) == [0] * world
    assert adapter_sha256(job) == expected


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_with_one(run_folder: Make) -> None:
    whole = run_folder(**SETTINGS)
    assert finish(start(whole)) == [0]
    job = run_folder(**{**SETTINGS, "training": SETTINGS["training"] | {"save_every_s": 1000}})
    ranks = started_slow(job, 2)
    wait_for(lambda: step_reached(job) >= 3)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGTERM)
    assert finish(ranks) == [143, 143]
    assert finish(start(job, 1)) == [0]
    assert [s for s, _ in manifest_of(job)["curve"]] == list(range(1, 41))
    assert [x for _, x in manifest_of(job)["curve"]] == pytest.approx(
        [x for _, x in manifest_of(whole)["curve"]], abs=1e-5
    )


def test_two_processes_give_the_curve_of_one(run_folder: Make) -> None:
    one, two = run_folder(**SETTINGS), run_folder(**SETTINGS)
    assert finish(start(one, 1)) == [0] and finish(start(two, 2)) == [0, 0]
    assert [x for _, x in manifest_of(two)["curve"]] == pytest.approx(
        [x for _, x in manifest_of(one)["curve"]], abs=1e-5
    )


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(run_folder: Make) -> None:
    job = run_folder(**SETTINGS)
    ranks = start(job)
    wait_for(lambda: len(list((job.parent / "checkpoints").glob("[0-9]*"))) >= 2)
    finish([r for r in ranks if r.kill() is None])
    whole = sorted(
        (p for p in (job.parent / "checkpoints").glob("[0-9]*")), key=lambda p: int(p.name)
    )
    data = bytearray((whole[-1] / "state.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (whole[-1] / "state.safetensors").write_bytes(data)
    assert checkpoint.newest(job.parent / "checkpoints") == whole[-2]


def test_a_checkpoint_of_another_job_is_refused_with_what_to_do(run_folder: Make) -> None:
    job = run_folder(**SETTINGS)
    ranks = start(job)
    wait_for(lambda: checkpoint.newest(job.parent / "checkpoints") is not None)
    finish([r for r in ranks if r.kill() is None])
    settings = json.loads(job.read_text())
    settings["training"]["learning_rate"] *= 2
    job.write_text(json.dumps(settings))
    assert finish(start(job)) == [3]
    failed = events_of(job)[-1]
    assert (
        failed["event"] == "failed"
        and "another job" in failed["reason"]
        and "remove the checkpoints folder" in failed["reason"]
    )


def test_checkpoints_come_while_training_goes_on_and_only_the_newest_stay(run_folder: Make) -> None:
    job = run_folder(data=rows(60), training={"num_train_epochs": 20, "save_every_s": 0.05})
    assert finish(start(job)) == [0]
    told = [e["step"] for e in events_of(job) if e["event"] == "checkpoint"]
    assert len(told) >= 3 and told == sorted(told)
    assert len(list((job.parent / "checkpoints").glob("[0-9]*"))) <= checkpoint.KEEP + 1
    assert not list((job.parent / "checkpoints").glob(".*"))


def test_a_trainer_that_knows_one_setting_more_goes_on_from_a_checkpoint(run_folder: Make) -> None:
    class Later(Training):
        a_new_setting: int = 0

    class LaterJob(Job):
        training: Later = Later()

    text = (run_folder(**SETTINGS)).read_text()
    now, later = Job.model_validate_json(text), LaterJob.model_validate_json(text)
    assert checkpoint.fingerprint_of(later) == checkpoint.fingerprint_of(now)
    training = later.training.model_copy(update={"a_new_setting": 1})
    other = later.model_copy(update={"training": training})
    assert checkpoint.fingerprint_of(other) != checkpoint.fingerprint_of(now)
