"""What `milktea-train job.json` runs: checks and tokenises without torch, then starts trainer.train on every process.

One process needs no rendezvous: this process becomes trainer.train, with the environment that `accelerate launch` would set (importing
accelerate's launcher would cost a second import of torch). Several are started by `accelerate launch`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from trainer.events import Failed, Writer
from trainer.job import WIRE, Job
from trainer.prepare import model_folder, prepare

EXIT_FILE = ".trainer_exit"  # the trainer's own exit code, which a launcher of several processes does not hand on


def main(arguments: list[str]) -> int:
    if arguments == ["--wire"]:
        print(WIRE)
        return 0
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: milktea-train job.json | milktea-train --wire", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    run = path.resolve().parent
    try:
        job = Job.model_validate_json(path.read_bytes())
        prepare(job, run)
        model_folder(job, run, weights=True)
    except (OSError, ValueError) as error:
        return refuse(run, error)
    environment = os.environ | {"MILKTEA_STARTED": repr(time.time())}
    command = build(job, path, environment)
    if job.processes == 1:
        os.execvpe(command[0], command, environment)
    return supervise(command, environment, run)


def refuse(run: Path, error: Exception) -> int:
    """Tells why, on stderr and in events.jsonl; returns the exit code of a refusal."""
    hint, samples = getattr(error, "hint", ""), getattr(error, "samples", [])
    writer = Writer(run / "events.jsonl")
    writer.write(Failed, reason=str(error), samples=samples, hint=hint)
    writer.close()
    print(f"stopped: {error}", *samples, hint, sep="\n", file=sys.stderr)
    return 3


def build(job: Job, path: Path, environment: dict[str, str]) -> list[str]:
    """The command for the hardware at hand; sets what it needs in `environment`."""
    train = ["-m", "trainer.train", str(path)]
    gpus = visible_gpus()
    if not gpus:
        environment["ACCELERATE_USE_CPU"] = "true"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // job.processes)))
    if job.processes == 1:
        return [sys.executable, *train]
    options = [
        "--multi_gpu",
        "--num_processes",
        str(job.processes),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0", *train]


def visible_gpus() -> int:
    """GPUs that CUDA would show, counted without torch."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return len([x for x in listed.split(",") if x.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").is_dir() else 0


def supervise(command: list[str], environment: dict[str, str], run: Path) -> int:
    """Runs the launcher, hands signals on, and returns the trainer's own exit code where it left one."""
    (run / EXIT_FILE).unlink(missing_ok=True)
    child = subprocess.Popen(command, env=environment)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: child.send_signal(n))
    code = child.wait()
    try:
        return int(json.loads((run / EXIT_FILE).read_text()))
    except (OSError, ValueError):
        return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
