"""The command that ops runs on a box, as ops runs it: one process and two, and what it exits
with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec, module_from_spec
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.utils import write_basic_config
from tiny import events_of, manifest_of, step_reached, wait_for

from trainer import launch
from trainer.data.errors import InvalidJob
from trainer.wire.job import WIRE, Job

Make = Callable[..., Path]
COMMAND = [sys.executable, "-m", "trainer.launch"]
ROOT = Path(launch.__file__).parent.parent


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_it_tells_its_wire_number() -> None:
    done = subprocess.run(
        [*COMMAND, "--wire"], capture_output=True, text=True, env=environment(), timeout=150
    )
    assert done.returncode == 0 and int(done.stdout) == WIRE


def test_it_wants_one_job_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main([]) == 2 and launch.main(["a", "b"]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_job_runs_from_its_folder_and_ends_with_zero(run_folder: Make, processes: int) -> None:
    job = run_folder(processes=processes, training={"max_steps": 4})
    done = subprocess.run(
        [*COMMAND, "job.json"],
        cwd=job.parent,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    started = next(e for e in events_of(job) if e["event"] == "started")
    assert started["event"] == "started" and started["processes"] == processes
    assert len(manifest_of(job)["curve"]) == 4


def test_bad_data_is_told_before_torch_is_imported(run_folder: Make, tmp_path: Path) -> None:
    """Here torch is a module whose import never ends."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import threading\nthreading.Event().wait()\n")
    job = run_folder(data=[{"instruction": "a"}])
    surroundings = environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [*COMMAND, str(job)], capture_output=True, text=True, timeout=150, env=surroundings
    )
    assert done.returncode == 3 and "train.jsonl:1" in done.stderr
    assert [e["event"] for e in events_of(job)] == ["failed"]


@pytest.mark.parametrize(
    "everybody",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["the command alone", "each of its processes"],
)
# test_resume.py stops two processes in the quick suite
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_training_asked_to_stop_leaves_a_checkpoint_and_exits_with_143(
    run_folder: Make, processes: int, everybody: bool
) -> None:
    """Kubernetes asks the command, Slurm each of its processes."""
    job = run_folder(processes=processes, training={"num_train_epochs": 400})
    child = subprocess.Popen(
        [*COMMAND, "job.json"], cwd=job.parent, env=environment(), stderr=subprocess.DEVNULL
    )
    below: list[psutil.Process] = []
    try:
        wait_for(lambda: step_reached(job) >= 2, 150)
        below = psutil.Process(child.pid).children(recursive=True)
        for process in (*below, child) if everybody else (child,):
            process.send_signal(signal.SIGTERM)
        assert child.wait(120) == 143
        assert psutil.wait_procs(below, timeout=150)[1] == [], "processes were left behind"
    finally:
        for process in (*below, child):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    assert events_of(job)[-1]["event"] == "checkpoint"


@pytest.mark.slow
def test_a_training_that_is_killed_is_no_success(run_folder: Make) -> None:
    """As by the kernel when the host's memory is full."""
    job = run_folder(training={"num_train_epochs": 400})
    child = subprocess.Popen(
        [*COMMAND, "job.json"], cwd=job.parent, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: step_reached(job) >= 2, 150)
        trainer = psutil.Process(child.pid).children(recursive=True)[-1]
        assert "trainer.train" in trainer.cmdline()
        trainer.kill()
        _, said = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode not in (0, 3, 4, 143) and "left no exit code" in said


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
    launch.set_environment(Job.model_validate_json(path.read_bytes()), path.parent, told)
    assert told.get("PYTORCH_CUDA_ALLOC_CONF") == found and "OMP_NUM_THREADS" not in told


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_follows_job_and_hardware(
    run_folder: Make, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    job = Job.model_validate_json(run_folder(processes=processes).read_bytes())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    told: dict[str, str] = {}
    command = launch.build(job, Path("job.json"), told, None)
    assert command[1:3] == ["-m", "accelerate.commands.launch"] and command[-3:] == [
        "-m",
        "trainer.train",
        "job.json",
    ]
    assert (
        command[command.index("--num_processes") + 1] == str(processes)
        and told["ACCELERATE_USE_CPU"] == "true"
    )
    assert ("--multi_gpu" in command, "--cpu" in command) == (processes == 2, processes == 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert launch.visible_gpus() == 2
    told = {}
    assert "--cpu" not in launch.build(job, Path("job.json"), told, None)
    assert "ACCELERATE_USE_CPU" not in told and (
        told.get("OMP_NUM_THREADS") == str(os.cpu_count())
    ) == (processes == 1)


def accelerate_config(home: Path, **keys: object) -> Path:
    """The file that `accelerate config` writes, by accelerate itself, with some keys changed."""
    path = home / "accelerate/default_config.yaml"
    write_basic_config(save_location=str(path))
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys))
    return path


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}},
            "distributed_type: FSDP",
        ),
        ({"distributed_type": "DEEPSPEED"}, "distributed_type: DEEPSPEED"),
        ({"use_cpu": True}, "use_cpu: True"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, "compute_environment: AMAZON_SAGEMAKER"),
    ],
)
def test_a_config_of_accelerate_that_means_another_training_is_refused_by_its_path(
    run_folder: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    keys: dict[str, object],
    said: str,
) -> None:
    path = accelerate_config(tmp_path / "hf", **keys)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    job = run_folder()
    assert launch.main([str(job)]) == 3
    told = capsys.readouterr().err
    assert str(path) in told and said in told and "move that file away" in told
    assert [e["event"] for e in events_of(job)] == ["failed"]


def test_a_config_of_accelerate_is_looked_for_where_accelerate_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n, name in enumerate(("HOME", "XDG_CACHE_HOME", "HF_HOME")):  # each before the one above
        monkeypatch.setenv(name, str(tmp_path / name))
        for later in ("XDG_CACHE_HOME", "HF_HOME")[n:]:
            monkeypatch.delenv(later, raising=False)
        spec = find_spec("accelerate.commands.config.config_args")
        assert spec is not None and spec.loader is not None
        fresh = module_from_spec(spec)  # it reads the environment when it is imported
        spec.loader.exec_module(fresh)
        path = Path(fresh.default_config_file)
        path.parent.mkdir(parents=True)
        path.write_text("distributed_type: MEGATRON_LM\n")
        with pytest.raises(
            InvalidJob, match=f"{re.escape(str(path))} says distributed_type: MEGATRON_LM"
        ):
            launch.validate_accelerate_config(os.environ)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_options_of_the_job_win_over_any_other_config_of_accelerate(
    run_folder: Make, tmp_path: Path, processes: int
) -> None:
    """Asked of accelerate itself, for a machine with GPUs: what would reach the trainer."""
    keys = {
        "mixed_precision": "fp16",
        "num_processes": 8,
        "dynamo_config": {"dynamo_backend": "INDUCTOR"},
        "debug": True,
    }
    accelerate_config(tmp_path, distributed_type="MULTI_GPU", use_cpu=False, **keys)
    launch.validate_accelerate_config({"HF_HOME": str(tmp_path)})
    job = Job.model_validate_json(run_folder(processes=processes).read_bytes())
    told = environment() | {"HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0,1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        command = launch.build(job, Path("job.json"), told, None)
    script = tmp_path / "tell.py"
    script.write_text(
        "import json, os\nif os.environ.get('RANK', '0') == '0': "
        "print(json.dumps(dict(os.environ)))\n"
    )
    done = subprocess.run(
        [*command[:-3], str(script)], env=told, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.get("WORLD_SIZE", "1") == str(processes)
    assert (found["ACCELERATE_MIXED_PRECISION"], found["ACCELERATE_DYNAMO_BACKEND"]) == ("no", "NO")
    assert found["ACCELERATE_DEBUG_MODE"] == "true"  # the rest of the file is honoured


@pytest.mark.slow
def test_an_error_of_the_training_itself_is_no_refusal(run_folder: Make) -> None:
    """Here the result's folder cannot be made, for a file is in its place: an OSError, as any disk
    may give."""
    job = run_folder(training={"max_steps": 3})
    (job.parent / "checkpoints").write_text("")
    settings = job.read_text().replace('"save_every_s": 1000', '"save_every_s": 0.001')
    job.write_text(settings)
    done = subprocess.run(
        [*COMMAND, "job.json"],
        cwd=job.parent,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=150,
    )
    assert done.returncode == 1 and "Traceback" in done.stderr
