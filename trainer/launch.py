"""What `milktea-train job.json` runs: checks and tokenises without torch, then starts trainer.train on every process.

One process needs no rendezvous: this process becomes trainer.train, with the environment that `accelerate launch` would set (importing
accelerate's launcher would cost a second import of torch). Several are started by `accelerate launch`, one configuration for adapters on
every process (DDP) and for a model in parts (FSDP2, trainer/sharded.py). On several machines this runs once on each, in one shared run
folder; trainer/machines.py reads from the environment who is first, and torchrun's rendezvous starts and restarts them together.
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
from trainer.machines import Machines, read_machines
from trainer.prepare import model_folder, prepare

EXIT_VARIABLE = "MILKTEA_EXIT_FILE"  # its name, one for each machine
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
        machines = read_machines(os.environ)
    except (OSError, ValueError) as error:
        return refuse(run, error)
    environment = os.environ | {"MILKTEA_STARTED": repr(time.time())}
    command = build(job, path, environment, machines)
    if job.processes == 1 and machines is None:
        os.execvpe(command[0], command, environment)
    environment[EXIT_VARIABLE] = exit_file(machines)
    return supervise(command, environment, run / environment[EXIT_VARIABLE])


def refuse(run: Path, error: Exception) -> int:
    """Tells why, on stderr and in events.jsonl; returns the exit code of a refusal."""
    hint, samples = getattr(error, "hint", ""), getattr(error, "samples", [])
    writer = Writer(run / "events.jsonl")
    writer.write(Failed, reason=str(error), samples=samples, hint=hint)
    writer.close()
    print(f"stopped: {error}", *samples, hint, sep="\n", file=sys.stderr)
    return 3


def exit_file(machines: Machines | None) -> str:
    """Machines share the run folder: each has its own."""
    return EXIT_FILE if machines is None else f"{EXIT_FILE}.{os.uname().nodename}.{os.getpid()}"


def build(job: Job, path: Path, environment: dict[str, str], machines: Machines | None) -> list[str]:
    """The command for the hardware at hand; sets what it needs in `environment`."""
    train = ["-m", "trainer.train", str(path)]
    for name in [n for n in environment if n.startswith("PET_")]:
        del environment[name]  # torchrun would read them again, as defaults of options that are given here
    gpus = visible_gpus()
    if not gpus:
        environment["ACCELERATE_USE_CPU"] = "true"
        environment.setdefault("OMP_NUM_THREADS", str(cpu_threads(job, path.resolve().parent)))
    if machines is None and job.processes == 1:
        return [sys.executable, *train]
    if machines is not None:
        # torch 2.13 shares one store among all rounds of a rendezvous: after a restart a process may read where its peer was, not where it is
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if machines is not None and machines.elastic:  # accelerate launch takes a number of machines, torchrun under it a range
        return [sys.executable, "-m", "torch.distributed.run", *machines.torchrun_options(job.processes), *train]
    count = machines.most if machines else 1
    options = ["--multi_gpu", "--num_processes", str(job.processes * count), "--num_machines", str(count)]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    options += machines.accelerate_options() if machines else ["--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, *train]


SMALL_BYTES = 100 << 20


def cpu_threads(job: Job, run: Path) -> int:
    """Threads of a process on the CPU. A small model gets one: its matrices are not worth sharing, and threads that wait for each other on a
    busy machine made the practice job 20 times slower."""
    weights = sum(p.stat().st_size for p in (run / (job.model.path or "")).glob("*.safetensors")) if job.model.path else SMALL_BYTES
    return 1 if weights < SMALL_BYTES else max(1, (os.cpu_count() or 1) // job.processes)


def visible_gpus() -> int:
    """GPUs that CUDA would show, counted without torch."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return len([x for x in listed.split(",") if x.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").is_dir() else 0


def supervise(command: list[str], environment: dict[str, str], said: Path) -> int:
    """Runs the launcher, hands signals on, and returns the trainer's own exit code where it left one, in the file `said`."""
    said.unlink(missing_ok=True)
    child = subprocess.Popen(command, env=environment)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: child.send_signal(n))
    code = child.wait()
    try:
        return int(json.loads(said.read_text()))
    except (OSError, ValueError):
        return code if code >= 0 else 128 - code
    finally:
        said.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
