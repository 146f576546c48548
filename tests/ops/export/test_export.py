"""What is written for Slurm and Kubeflow: by their own schemas, by golden files, and by running
it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ops.errors import ConfigError
from ops.export.folder import export
from ops.export.slurm import enroot, slurm_time
from ops.job import config
from trainer.wire.job import Job

HERE = Path(__file__).parent
JOBS = HERE.parents[2] / "jobs"
GOLDEN = HERE / "exported"

# Every long option that the batch file may use, with its values, by sbatch(1):
# https://slurm.schedmd.com/sbatch.html
SBATCH = {
    "job-name": r"[\w.-]+",
    "nodes": r"[1-9]\d*",
    "ntasks-per-node": r"[1-9]\d*",
    "gpus-per-node": r"[1-9]\d*",
    "cpus-per-task": r"[1-9]\d*",
    "time": r"\d+-\d\d:[0-5]\d:[0-5]\d",
    "output": r"[\w.%-]+",
    "open-mode": r"append|truncate",
    "requeue": None,
    "signal": r"([BR]{1,2}:)?[A-Z]+[12]?(@\d{1,5})?",
    "partition": r"[\w,.-]+",
}
# and of srun(1) and pyxis: https://github.com/NVIDIA/pyxis
SRUN = {
    "nodes",
    "ntasks-per-node",
    "cpus-per-task",
    "mpi",
    "container-image",
    "container-mounts",
    "container-workdir",
}


def options(text: str) -> dict[str, str | None]:
    """The options of a batch file. Raises AssertionError for what sbatch would refuse or pass over
    in silence."""
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    marked = [n for n, line in enumerate(lines) if line.startswith("#SBATCH")]
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert marked and max(marked) < first_command, "sbatch reads no option after the first command"
    found: dict[str, str | None] = {}
    for n in marked:
        match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", lines[n])
        assert match, lines[n]
        name, value = match.groups()
        assert name in SBATCH and name not in found, lines[n]
        wanted = SBATCH[name]
        assert value is None if wanted is None else value and re.fullmatch(wanted, value), lines[n]
        found[name] = value
    return found


def job_file(folder: Path, name: str = "practice", **changes: str) -> Path:
    """The practice job, changed, in a folder of its own."""
    text = (
        (JOBS / "practice.toml")
        .read_text()
        .replace("../trainer", str(JOBS.parent / "trainer"))
        .replace('"practice/', f'"{JOBS}/practice/')
    )
    for old, new in changes.items():
        assert text.count(f"{old} = ") == 1
        text = re.sub(rf"(?m)^{old} = .*$", f"{old} = {new}", text)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


@pytest.fixture
def practice(tmp_path: Path) -> Callable[..., Path]:
    """practice("slurm", nodes=2, ...) -> the folder that export wrote."""

    def make(kind: Any, nodes: int = 2, queue: str | None = "gpu", **changes: str) -> Path:
        written = export(kind, job_file(tmp_path, **changes), tmp_path / "out", nodes, queue)
        assert all(p.is_file() for p in written)
        assert {p for p in written[0].parent.rglob("*") if p.is_file()} - set(written) == set()
        return written[0].parent

    return make


# -- both ------------------------------------------------------------------------------------------


def test_both_carry_the_same_job_json_and_data_which_the_trainer_takes(
    practice: Callable[..., Path],
) -> None:
    folders = [practice(kind) for kind in ("slurm", "kubeflow")]
    jobs = [Job.model_validate_json((f / "job.json").read_bytes()) for f in folders]
    assert jobs[0].model_dump(exclude={"run_id"}) == jobs[1].model_dump(exclude={"run_id"})
    assert jobs[0].processes == config.load(JOBS / "practice.toml").offer.num_gpus
    from trainer.data.prepare import prepare

    assert len(prepare(jobs[0], folders[0]).rows) == len(prepare(jobs[1], folders[1]).rows) > 100


@pytest.mark.parametrize(
    "name",
    [
        "practice-slurm/train.sbatch",
        "practice-kubeflow/trainjob.json",
        "practice-kubeflow/files.json",
    ],
)
def test_what_is_written_is_what_was_reviewed(practice: Callable[..., Path], name: str) -> None:
    folder = practice(name.split("/")[0].removeprefix("practice-"))
    assert (folder / name.split("/")[1]).read_text() == (GOLDEN / name).read_text(), (
        "if it should: copy it over the golden file"
    )


def test_exporting_twice_is_exporting_once_and_a_begun_run_is_left_alone(
    practice: Callable[..., Path],
) -> None:
    folder = practice("slurm")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert {p: p.read_bytes() for p in practice("slurm").rglob("*") if p.is_file()} == before
    (folder / "events.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="a run has begun"):
        practice("slurm")


def test_what_only_a_rented_box_does_is_named_in_the_readme(tmp_path: Path) -> None:
    job = job_file(tmp_path)
    plain = export("skypilot", job, tmp_path / "plain", 1, None)[0].read_text()
    job.write_text(job.read_text() + '\n[results]\nmerged = true\n\n[notify]\ncommand = "true"\n')
    told = export("skypilot", job, tmp_path / "more", 1, None)[0].read_text()
    only = "Not done here, only by `milktea rent-and-train`: [notify], results.merged."
    assert only in told and "Not done here" not in plain


def test_more_gpus_than_rows_of_a_step_are_refused(practice: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="leaves some of 33 x 1 GPUs without a row"):
        practice("slurm", nodes=33)


# -- Slurm -----------------------------------------------------------------------------------------


def test_sbatch_would_take_every_option(practice: Callable[..., Path]) -> None:
    found = options((practice("slurm", nodes=4) / "train.sbatch").read_text())
    assert (found["nodes"], found["gpus-per-node"], found["partition"], found["time"]) == (
        "4",
        "1",
        "gpu",
        "0-00:30:00",
    )
    assert "partition" not in options((practice("slurm", queue=None) / "train.sbatch").read_text())


def test_what_a_pushed_trainer_needs_goes_where_nobody_else_of_the_node_can_write(
    practice: Callable[..., Path], tmp_path: Path
) -> None:
    """Run with a python3 that writes down where it was to make the venv."""
    text = (practice("slurm", trainer='"push"') / "train.sbatch").read_text()
    [line] = re.findall(r"^command=\((.*)\)$", text, re.MULTILINE)
    assert "/tmp/" not in line
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text('#!/bin/sh\nfor x; do :; done\nstat -c "%a %u %n" "$x" >>"$ASKED"\nexit 1\n')
    python.chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
        "ASKED": str(tmp_path / "asked"),
    }
    for _ in range(2):
        subprocess.run(["bash", "-c", f'command=({line}); "${{command[@]}}"'], env=env)
    found = [row.split() for row in (tmp_path / "asked").read_text().splitlines()]
    assert [row[:2] for row in found] == [["700", str(os.getuid())]] * 2
    assert found[0][2] != found[1][2]


@pytest.mark.parametrize("trainer", ["image", "push"])
def test_bash_parses_the_batch_file_and_srun_knows_its_options(
    practice: Callable[..., Path], trainer: str
) -> None:
    text = (practice("slurm", trainer=f'"{trainer}"') / "train.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    [line] = [line for line in text.splitlines() if line.startswith("srun ")]
    assert (
        set(
            re.findall(
                r"--([a-z-]+)=", line + text[text.index("pyxis)") : text.index("apptainer)")]
            )
        )
        == SRUN
    )


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.01, "0-00:10:00"), (0.5, "0-00:30:00"), (6, "0-06:00:00"), (49.5, "2-01:30:00")],
)
def test_hours_are_told_as_slurm_reads_them(hours: float, text: str) -> None:
    assert slurm_time(hours) == text


@pytest.mark.parametrize(
    ("ref", "told"),
    [
        ("milktea/practice:3", "milktea/practice:3"),
        ("ghcr.io/a/b:1", "ghcr.io#a/b:1"),
        ("localhost:5000/a", "localhost:5000#a"),
        ("a", "a"),
    ],
)
def test_a_registry_is_named_as_pyxis_wants_it(ref: str, told: str) -> None:
    assert enroot(ref) == told


STAND_IN = {
    # srun: the step's tasks, one a node, in the environment that srun(1) documents; the worst exit
    # code
    "srun": """\
import os, subprocess, sys
if "--help" in sys.argv: sys.exit(0)
command = sys.argv[next(n for n, a in enumerate(sys.argv) if n and not a.startswith("--")):]
nodes = int(next(a for a in sys.argv if a.startswith("--nodes=")).split("=")[1])
told = os.environ | {"SLURM_STEP_NUM_NODES": str(nodes)}
tasks = [subprocess.Popen(command, env=told | {"SLURM_NODEID": str(n)}) for n in range(nodes)]
open("tasks", "w").write(" ".join(str(t.pid) for t in tasks))
sys.exit(max(t.wait() for t in tasks))
""",
    "scontrol": """\
import sys
if sys.argv[1:3] == ["show", "hostnames"]: print("127.0.0.1\\n127.0.0.1")
elif sys.argv[1] == "requeue": open("requeued", "a").write(sys.argv[2])
else: sys.exit(1)
""",
    "scancel": """\
import os, signal, sys
assert sys.argv[1] == "--signal=TERM"
for pid in open("tasks").read().split(): os.kill(int(pid), signal.SIGTERM)
""",
    "milktea-train": "import sys\nfrom trainer.launch import main\nsys.exit(main(sys.argv[1:]))\n",
}


@pytest.fixture
def slurm_environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Stand-ins for Slurm's commands on PATH, and the variables that a batch file finds."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in STAND_IN.items():
        (tools / name).write_text(f"#!{sys.executable}\n{text}")
        (tools / name).chmod(0o755)
    yield os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(JOBS.parent),
        "MILKTEA_CONTAINER": "none",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": "2",
        "ACCELERATE_USE_CPU": "true",
    }


@contextmanager
def submitted(folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The batch file as Slurm starts it; whatever is left of it is ended."""
    with open(folder / "log.txt", "ab") as log:
        told = environment | {"SLURM_SUBMIT_DIR": str(folder)}
        job = subprocess.Popen(
            ["bash", str(folder / "train.sbatch")],
            env=told,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield job
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait(60)


def said(folder: Path) -> str:
    return (folder / "log.txt").read_text(errors="replace")[-3000:]


def wait_for_a_step(folder: Path, job: subprocess.Popen[bytes]) -> None:
    events, deadline = folder / "events.jsonl", time.monotonic() + 240
    while not (events.is_file() and '"event": "step"' in events.read_text()):
        assert job.poll() is None and time.monotonic() < deadline, said(folder)
        time.sleep(0.1)


@pytest.mark.slow
def test_the_batch_file_trains_on_two_nodes_and_goes_on_after_its_time_was_up(
    practice: Callable[..., Path], slurm_environment: dict[str, str]
) -> None:
    folder = practice("slurm", num_train_epochs="4", save_every_s="600")
    with submitted(folder, slurm_environment) as job:
        wait_for_a_step(folder, job)
        os.kill(job.pid, signal.SIGUSR1)  # what --signal=B:USR1@120 sends
        assert job.wait(120) == 143, said(folder)
    assert (folder / "requeued").read_text() == slurm_environment["SLURM_JOB_ID"]
    [kept] = list((folder / "checkpoints").iterdir())
    with submitted(folder, slurm_environment) as job:
        assert job.wait(300) == 0, said(folder)
    started = [
        json.loads(line)
        for line in (folder / "events.jsonl").read_text().splitlines()
        if '"started"' in line
    ]
    assert f"step {started[0]['total_steps']} of " in (folder / "log.txt").read_text()
    assert [s["processes"] for s in started] == [2, 2] and started[1]["step"] == int(kept.name)
    manifest = json.loads((folder / "result" / "manifest.json").read_text())
    assert (
        len(manifest["curve"]) == manifest["steps"] == started[0]["total_steps"]
        and manifest["final_loss"] < 0.5
    )


# -- Kubeflow --------------------------------------------------------------------------------------


def schema_errors(train_job: dict[str, Any]) -> list[str]:
    schema = json.loads((HERE / "trainjob.schema.json").read_text())
    return [
        f"{'.'.join(map(str, e.absolute_path))}: {e.message}"
        for e in jsonschema.Draft202012Validator(schema).iter_errors(train_job)
    ]


@pytest.mark.parametrize("trainer", ["image", "push"])
@pytest.mark.parametrize("queue", [None, "team-a"])
def test_the_train_job_is_valid_by_kubeflows_own_schema(
    practice: Callable[..., Path], trainer: str, queue: str | None
) -> None:
    train_job = json.loads(
        (practice("kubeflow", queue=queue, trainer=f'"{trainer}"') / "trainjob.json").read_text()
    )
    assert schema_errors(train_job) == []
    assert (train_job["apiVersion"], train_job["kind"]) == (
        "trainer.kubeflow.org/v1alpha1",
        "TrainJob",
    )
    assert train_job["metadata"].get("labels") == (
        {"kueue.x-k8s.io/queue-name": queue} if queue else None
    )
    command = train_job["spec"]["trainer"]["command"]
    assert (
        command[:2] == ["sh", "-c"]
        and subprocess.run(["sh", "-n", "-c", command[2]], capture_output=True).returncode == 0
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "trainer", "numNodes"), "two"),
        (("spec", "trainer", "num_nodes"), 2),
        (("spec", "runtimeRef"), {}),
        (("metadata", "name"), "2-nodes"),
        (("spec", "runtimePatches", 0, "manager"), ""),
        (("spec", "podTemplateOverrides"), []),
    ],
)
def test_the_schema_refuses_what_the_cluster_would(
    practice: Callable[..., Path], path: tuple[Any, ...], value: Any
) -> None:
    train_job = json.loads((practice("kubeflow") / "trainjob.json").read_text())
    inner = train_job
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert schema_errors(train_job)


def test_the_pods_meet_at_the_volume_that_the_files_went_to(practice: Callable[..., Path]) -> None:
    folder = practice("kubeflow", nodes=3)
    claim, pod = json.loads((folder / "files.json").read_text())["items"]
    spec = json.loads((folder / "trainjob.json").read_text())["spec"]
    patch = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][
        0
    ]["template"]["spec"]["template"]["spec"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    claims = [
        v["persistentVolumeClaim"]["claimName"]
        for v in (patch["volumes"][0], pod["spec"]["volumes"][0])
    ]
    mounts = [
        patch["containers"][0]["volumeMounts"][0],
        pod["spec"]["containers"][0]["volumeMounts"][0],
    ]
    assert claims == [claim["metadata"]["name"]] * 2 and mounts[0] == mounts[1]
    run = re.search(r"cd (\S+) && ", spec["trainer"]["command"][2])
    assert (
        run
        and run[1] == f"{mounts[0]['mountPath']}/practice-kubeflow"
        and f"{run[1]}/result" in (folder / "README.md").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slurm", "kubeflow"])
@pytest.mark.parametrize("name", ["pt", "rm", "dpo", "kto", "ppo", "grpo", "chain"])
def test_every_stage_and_a_chain_is_exported_whole(kind: Any, name: str, tmp_path: Path) -> None:
    path = JOBS / f"practice-{name}.toml"
    folder = export(kind, path, tmp_path)[0].parent
    job = Job.model_validate_json((folder / "job.json").read_bytes())
    assert [part.stage for part, _ in job.parts()] == [p.stage for p in config.load(path).parts]
    for part, place in job.parts():
        for file in part.data.files:
            assert Path(os.path.normpath(folder / place / file.path)).is_file()


def test_no_stage_of_a_chain_leaves_a_node_without_a_row(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size = 8 leaves some of 9 x 1"):
        export("slurm", JOBS / "practice-chain.toml", tmp_path, nodes=9)
