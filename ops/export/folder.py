"""One job for a cluster of your own: the same image and the same job.json.

`export` writes a folder that is a run folder of the wire (job.json, data/, model/) with what Slurm,
Kubeflow Trainer, SkyPilot or dstack needs beside it. The engine's own variables say which machine
is first (trainer/machines.py).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from ops.errors import ConfigError
from ops.export.kubeflow import kubeflow_files
from ops.export.one_machine import dstack_files, skypilot_files
from ops.export.slurm import slurm_files
from ops.job import config, planner
from ops.job.job_file import JobFile

Kind = Literal["slurm", "kubeflow", "skypilot", "dstack"]
WRITERS = {
    "slurm": slurm_files,
    "kubeflow": kubeflow_files,
    "skypilot": skypilot_files,
    "dstack": dstack_files,
}


def export(
    kind: Kind, job_path: Path, out: Path, nodes: int = 1, queue: str | None = None
) -> list[Path]:
    """Check the job as a rental would, and write OUT/NAME-KIND/. Return the files, README first.

    `queue` is Slurm's partition or Kueue's local queue. Exporting again is idempotent; a folder in
    which a run has begun is refused. Raises ConfigError, PreflightError. Needs no account."""
    return export_job(kind, config.load(job_path), out, nodes, queue)


def export_job(
    kind: Kind, job: JobFile, out: Path, nodes: int = 1, queue: str | None = None
) -> list[Path]:
    """As `export`, of a job that was read already."""
    validate_nodes(job, nodes)
    if job.image.packages is not None:
        raise ConfigError(
            "image.packages are installed on a rented box only",
            hint="put them into an image of your own, and name it by image.ref",
        )
    folder = out / f"{job.name}-{kind}"
    if (folder / "events.jsonl").exists():
        raise ConfigError(
            f"{folder}: a run has begun here", hint="name another --out, or remove that folder"
        )
    with tempfile.TemporaryDirectory() as stage:
        plan = planner.make_plan(job, folder.name, Path(stage))
        folder.mkdir(parents=True, exist_ok=True)
        for push in plan.pushes:  # a table that was converted lies in `stage`
            target = folder / push.remote
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(push.local, target)
    texts = WRITERS[kind](job, plan, nodes, queue)
    texts["README.md"] += _left_out(job)
    texts["job.json"] = json.dumps(plan.wire_job, indent=1, ensure_ascii=False) + "\n"
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in (*texts, *(p.remote for p in plan.pushes))]


def _left_out(job: JobFile) -> str:
    """A paragraph of README.md on what only `rent-and-train` does of this job; "" for nothing."""
    asked = {
        "[evaluate]": job.evaluate is not None,
        "[notify]": job.notify is not None,
        "results.merged": job.results.merged,
        "results.then_chat_minutes": job.results.then_chat_minutes is not None,
    }
    names = ", ".join(name for name, is_asked in asked.items() if is_asked)
    return f"\nNot done here, only by `milktea rent-and-train`: {names}.\n" if names else ""


def validate_nodes(job: JobFile, nodes: int) -> None:
    """Raises ConfigError where a GPU would get no row of a batch."""
    gpus, rows = job.offer.num_gpus, min(part.training.batch_size for part in job.parts)
    if nodes < 1 or rows < nodes * gpus:
        raise ConfigError(
            f"training.batch_size = {rows} leaves some of {nodes} x {gpus} GPUs without a row",
            hint="raise training.batch_size, or export for fewer nodes",
        )
