"""An sbatch file that requeues itself when its time ends before the training does."""

from __future__ import annotations

import shlex
from pathlib import Path

from ops.export.common import CPUS_PER_GPU, GRACE_S, ROOT, command
from ops.job.job_file import JobFile
from ops.job.plan import Plan

TEMPLATE = Path(__file__).parent / "train.sbatch.in"


def slurm_files(job: JobFile, plan: Plan, nodes: int, queue: str | None) -> dict[str, str]:
    """name -> text of what `milktea export slurm` adds to the run folder, the README first."""
    return {"README.md": readme(plan), "train.sbatch": batch_file(job, plan, nodes, queue)}


def batch_file(job: JobFile, plan: Plan, nodes: int, queue: str | None) -> str:
    gpus = job.offer.num_gpus
    cpus = CPUS_PER_GPU * gpus
    options = {
        "job-name": plan.run_id,
        "nodes": nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": gpus,
        "cpus-per-task": cpus,
        "time": slurm_time(job.limits.max_hours),
        "output": "log.txt",
        "open-mode": "append",
        "requeue": None,
        "signal": f"B:USR1@{GRACE_S}",
    }
    if queue:
        options["partition"] = queue
    words = {
        "OPTIONS": "\n".join(
            f"#SBATCH --{k}" + ("" if v is None else f"={v}") for k, v in options.items()
        ),
        "RUN_ID": plan.run_id,
        "NODES": nodes,
        "GPUS": gpus,
        "CPUS": cpus,
        "ROOT": ROOT,
        "COMMAND": shlex.join(command(plan)),
        "ENROOT_IMAGE": enroot(plan.image),
        "IMAGE": plan.image,
    }
    text = TEMPLATE.read_text("utf-8")
    for word, value in words.items():
        text = text.replace(f"@{word}@", str(value))
    return text


def slurm_time(hours: float) -> str:
    """D-HH:MM:SS, at least ten minutes."""
    minutes = max(10, round(hours * 60))
    return f"{minutes // 1440}-{minutes // 60 % 24:02d}:{minutes % 60:02d}:00"


def enroot(ref: str) -> str:
    """An image reference as pyxis wants it: the registry's host is followed by #."""
    host, slash, rest = ref.partition("/")
    has_host = slash and ("." in host or ":" in host or host == "localhost")
    return f"{host}#{rest}" if has_host else ref


def readme(plan: Plan) -> str:
    return (
        "1. Put this folder where all nodes see it (NFS, Lustre), and in it: `sbatch "
        "train.sbatch`\n"
        f"2. `tail -f log.txt`; the image is {plan.image}, `MILKTEA_CONTAINER=apptainer sbatch"
        " train.sbatch` says how to run it.\n"
        "3. result/adapter.zip is the result. A job that ends early goes on from checkpoints/ when"
        " it is submitted again.\n"
    )
