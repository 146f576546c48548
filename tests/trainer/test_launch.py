"""The command that ops runs on a box, as ops runs it: one process and two, and what it exits with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import events_of, manifest_of, step_reached, wait_for

from trainer import launch
from trainer.job import WIRE, Job

Make = Callable[..., Path]
COMMAND = [sys.executable, "-m", "trainer.launch"]
ROOT = Path(launch.__file__).parent.parent


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_it_tells_its_wire_number() -> None:
    done = subprocess.run([*COMMAND, "--wire"], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0 and int(done.stdout) == WIRE


def test_it_wants_one_job_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main([]) == 2 and launch.main(["a", "b"]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_runs_from_its_folder_and_ends_with_zero(run_folder: Make, processes: int) -> None:
    job = run_folder(processes=processes, training={"max_steps": 4})
    done = subprocess.run([*COMMAND, "job.json"], cwd=job.parent, capture_output=True, text=True, env=environment(), timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    started = events_of(job)[0]
    assert started["event"] == "started" and started["processes"] == processes
    assert len(manifest_of(job)["curve"]) == 4


@pytest.mark.slow  # test_resume.py stops two processes in the quick suite
def test_two_processes_asked_to_stop_leave_a_checkpoint_and_exit_with_143(run_folder: Make) -> None:
    job = run_folder(processes=2, training={"num_train_epochs": 400})
    child = subprocess.Popen([*COMMAND, "job.json"], cwd=job.parent, env=environment(), stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: step_reached(job) >= 2, 150)
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 143
    finally:
        child.kill()
    assert events_of(job)[-1]["event"] == "checkpoint"


def standing_by(job: Path, **more: str) -> subprocess.Popen[str]:
    line = [*COMMAND, "--stand-by", "job.json"]
    return subprocess.Popen(line, cwd=job.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment() | more)


def ended(child: subprocess.Popen[str], within_s: float = 120) -> tuple[int, str]:
    """Exit code and output."""
    try:
        output, _ = child.communicate(timeout=within_s)
        return child.returncode, output
    finally:
        child.kill()


@pytest.mark.parametrize(
    ("processes", "precision"), [(1, "fp32"), pytest.param(2, "fp32", marks=pytest.mark.slow), pytest.param(1, "nf4", marks=pytest.mark.slow)]
)
def test_a_trainer_that_stands_by_trains_what_it_finds_when_it_is_launched(run_folder: Make, processes: int, precision: str) -> None:
    """In its own process; anew where the job wants several, or other imports."""
    job = run_folder(training={"max_steps": 3}, processes=processes)
    text = job.read_text().replace('"precision": "fp32"', f'"precision": "{precision}"')
    job.unlink()  # it comes later, with the data
    child = standing_by(job)
    time.sleep(0.2)
    job.write_text(text)
    assert child.poll() is None and not (job.parent / "events.jsonl").exists()
    (job.parent / launch.LAUNCHED).touch()
    code, output = ended(child)
    assert code == 0, output
    assert manifest_of(job)["steps"] == 3 and events_of(job)[0]["processes"] == processes


def test_a_trainer_that_stands_by_refuses_as_any_other(run_folder: Make) -> None:
    job = run_folder(data=[{"instruction": "a"}])
    (job.parent / launch.LAUNCHED).touch()
    code, output = ended(standing_by(job))
    assert code == 3 and "train.jsonl:1" in output
    assert [e["event"] for e in events_of(job)] == ["failed"]


def test_a_trainer_stands_by_no_longer_than_who_started_it(run_folder: Make, tmp_path: Path) -> None:
    """Its pipe closes when it is gone."""
    job = run_folder()
    line = f"{sys.executable} -m trainer.launch --stand-by job.json & echo $!; exec sleep 100"
    parent = subprocess.Popen(["sh", "-c", line], cwd=job.parent, stdout=subprocess.PIPE, text=True, env=environment())
    assert parent.stdout is not None
    maps = Path(f"/proc/{int(parent.stdout.readline())}/maps")
    wait_for(lambda: "libtorch" in maps.read_text(), 60)
    parent.kill()
    rest = threading.Thread(target=parent.stdout.read, daemon=True)
    rest.start()
    rest.join(60)
    assert not rest.is_alive()
    parent.wait()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_gpu_memory_grows_in_segments_unless_the_user_says_otherwise(
    run_folder: Make, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], found: str | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    path = run_folder()
    told = dict(given)
    launch.surround(Job.model_validate_json(path.read_bytes()), path.parent, told)
    assert told.get("PYTORCH_CUDA_ALLOC_CONF") == found and "OMP_NUM_THREADS" not in told


def test_the_command_follows_job_and_hardware(run_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.model_validate_json(run_folder(processes=2).read_bytes())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    told: dict[str, str] = {}
    command = launch.build(job, Path("job.json"), told, None)
    assert command[1:3] == ["-m", "accelerate.commands.launch"] and command[-3:] == ["-m", "trainer.train", "job.json"]
    assert command[command.index("--num_processes") + 1] == "2" and told["ACCELERATE_USE_CPU"] == "true"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert launch.visible_gpus() == 2
    told = {}
    launch.build(job, Path("job.json"), told, None)
    assert "ACCELERATE_USE_CPU" not in told


def test_an_error_of_the_training_itself_is_no_refusal(run_folder: Make) -> None:
    """Here the result's folder cannot be made, for a file is in its place: an OSError, as any disk may give."""
    job = run_folder(training={"max_steps": 3})
    (job.parent / "checkpoints").write_text("")
    settings = job.read_text().replace('"save_every_s": 1000', '"save_every_s": 0.001')
    job.write_text(settings)
    done = subprocess.run([*COMMAND, "job.json"], cwd=job.parent, capture_output=True, text=True, env=environment(), timeout=150)
    assert done.returncode == 1 and "Traceback" in done.stderr
