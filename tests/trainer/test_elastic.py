"""Several machines, played by several torchrun agents on 127.0.0.1 in one run folder: a lost
process costs a restart, never the result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from machine import free_port
from tiny import events_of, manifest_of

from trainer.launch import build
from trainer.machines import Machines, read_machines
from trainer.train import run_job
from trainer.wire.job import Job

Make = Callable[..., Path]
Agent = subprocess.Popen[bytes]
PATIENCE_S = 240


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[list[Agent]]:
    """Launchers that a test starts; none outlives it, nor does a worker of theirs."""
    started: list[Agent] = []
    yield started
    left = naming(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    for agent in started:
        agent.wait(60)
    assert not left, f"{len(left)} processes were left behind"


def start(agents: list[Agent], job: Path, **environment: str) -> Agent:
    """One machine's `milktea-train job.json`."""
    log = open(job.parent / f"agent{len(agents)}.log", "wb")  # noqa: SIM115 - the process holds it
    told = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("PET_", "SLURM_", "NNODES", "NODE_RANK", "MASTER_"))
    }
    command = [sys.executable, "-m", "trainer.launch", str(job)]
    agent = subprocess.Popen(
        command,
        env=told | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    log.close()
    agents.append(agent)
    return agent


def naming(folder: Path) -> list[int]:
    """Every living process with a path below `folder` on its command line, whoever its parent
    is."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(folder) in line.read_bytes():
                found.append(int(line.parent.name))
        except OSError:
            continue
    return found


def family(pid: int) -> list[int]:
    """A process and all below it that live."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = (
        [pid]
        if Path(f"/proc/{pid}").exists() and any(pid in children for children in parents.values())
        else []
    )
    for child in parents.get(pid, []):
        found += family(child)
    return found


def worker(agent: Agent) -> int:
    """The process of this machine that trains, below launcher and torchrun."""
    lines = {
        pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in family(agent.pid)
    }
    [found] = [pid for pid, line in lines.items() if line[1:4] == [b"-u", b"-m", b"trainer.train"]]
    return found


def until(job: Path, agents: list[Agent], seen: Callable[[list[dict[str, Any]]], bool]) -> None:
    """Reads the run's events until `seen` is content with them."""
    deadline = time.monotonic() + PATIENCE_S
    while not ((job.parent / "events.jsonl").is_file() and seen(events_of(job))):
        assert time.monotonic() < deadline and any(a.poll() is None for a in agents), logs(job)
        time.sleep(0.02)


def ended(job: Path, agent: Agent) -> int:
    try:
        return agent.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise AssertionError(logs(job)) from None


def logs(job: Path) -> str:
    return "\n".join(
        p.read_text(errors="replace")[-3000:] for p in sorted(job.parent.glob("agent*.log"))
    )


# 120 steps: a kill falls into the middle
LONG = {"num_train_epochs": 30, "save_every_s": 0.05, "learning_rate": 1e-3}


def undisturbed(run_folder: Make, **changes: Any) -> float:
    job = run_folder(training=LONG, **changes)
    assert run_job(job) == 0
    return manifest_of(job)["final_loss"]


def meeting(**more: str) -> dict[str, str]:
    return {
        "PET_NNODES": "1:2",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(free_port()),
        "MILKTEA_LAST_CALL_S": "5",
    } | more


def saved(events: list[dict[str, Any]]) -> bool:
    return any(e["event"] == "checkpoint" for e in events)


@pytest.mark.slow
def test_a_killed_rank_costs_a_restart_and_the_final_loss_stays(
    run_folder: Make, agents: list[Agent]
) -> None:
    expected, job, meet = undisturbed(run_folder), run_folder(training=LONG), meeting()
    first, second = start(agents, job, **meet), start(agents, job, **meet)
    until(job, agents, saved)
    os.kill(worker(second), signal.SIGKILL)
    assert (ended(job, first), ended(job, second)) == (0, 0), logs(job)
    starts = [e for e in events_of(job) if e["event"] == "started"]
    assert starts[0]["processes"] == 2 and len(starts) >= 2 and starts[-1]["step"] > 0
    manifest = manifest_of(job)
    assert [step for step, _ in manifest["curve"]] == list(range(1, 121))
    assert manifest["final_loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_lost_machine_leaves_the_rest_to_the_other(run_folder: Make, agents: list[Agent]) -> None:
    expected, job, meet = undisturbed(run_folder), run_folder(training=LONG), meeting()
    first = start(agents, job, **meet, PET_NODE_RANK="0")
    second = start(agents, job, **meet, PET_NODE_RANK="1")
    until(job, agents, saved)
    for pid in family(second.pid):
        os.kill(pid, signal.SIGKILL)
    assert ended(job, first) == 0, logs(job)
    starts = [e for e in events_of(job) if e["event"] == "started"]
    assert (starts[0]["processes"], starts[-1]["processes"]) == (2, 1) and starts[-1]["step"] > 0
    assert manifest_of(job)["final_loss"] == pytest.approx(expected, abs=1e-5)


def test_one_machine_is_what_it_was() -> None:
    assert read_machines({}) is None
    assert (
        read_machines({"PET_NNODES": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_NNODES": "2"}) is None
    )


@pytest.mark.parametrize(
    "environment",
    [
        {
            "PET_NNODES": "2",
            "PET_NODE_RANK": "1",
            "PET_MASTER_ADDR": "run-node-0-0.run",
            "PET_MASTER_PORT": "29400",
        },
        {
            "SLURM_STEP_NUM_NODES": "2",
            "SLURM_NODEID": "1",
            "MASTER_ADDR": "run-node-0-0.run",
            "MASTER_PORT": "29400",
        },
        {
            "NNODES": "2",
            "NODE_RANK": "1",
            "MASTER_ADDR": "run-node-0-0.run",
            "MASTER_PORT": "29400",
        },
    ],
    ids=["kubeflow", "slurm", "by hand"],
)
def test_each_scheduler_is_understood(environment: dict[str, str]) -> None:
    assert read_machines(environment) == Machines(2, 2, 1, "run-node-0-0.run", 29400)


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({"NNODES": "2", "NODE_RANK": "0"}, "set MASTER_ADDR"),
        ({"PET_NNODES": "2", "PET_MASTER_ADDR": "a"}, "set PET_NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "not one of 2"),
        ({"NNODES": "4:2", "MASTER_ADDR": "a"}, "neither a number"),
        ({"NNODES": "two", "MASTER_ADDR": "a"}, "neither a number"),
    ],
)
def test_half_a_description_of_the_machines_is_refused_with_what_to_set(
    environment: dict[str, str], what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        read_machines(environment)


def test_a_fixed_number_of_machines_goes_to_accelerate_and_a_range_to_torchrun(
    run_folder: Make,
) -> None:
    path = run_folder(processes=2)
    job, environment = Job.model_validate_json(path.read_bytes()), {"PET_NNODES": "4", "HOME": "/"}
    fixed = build(job, path, environment, Machines(4, 4, 1, "first", 29400))
    assert (
        fixed[1:3] == ["-m", "accelerate.commands.launch"] and environment.get("PET_NNODES") is None
    )
    given = dict(pairwise(fixed))
    assert (given["--num_processes"], given["--num_machines"], given["--machine_rank"]) == (
        "8",
        "4",
        "1",
    )
    assert (given["--rdzv_backend"], given["--rdzv_conf"], given["--main_process_ip"]) == (
        "c10d",
        "is_host=false",
        "first",
    )
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1", (
        "a shared store sends restarted ranks to where their peers were"
    )
    elastic = build(job, path, {}, Machines(1, 4, None, "first", 29400))
    given = dict(pairwise(elastic))
    assert elastic[1:3] == ["-m", "torch.distributed.run"] and (
        given["--nnodes"],
        given["--nproc-per-node"],
    ) == ("1:4", "2")
    assert fixed[-3:] == elastic[-3:] == ["-m", "trainer.train", str(path)]
