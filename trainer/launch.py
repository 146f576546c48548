"""What `milktea-train job.json` runs: checks and tokenises without torch, then starts trainer.train on every process.

One process needs no rendezvous: this process trains, with the environment that `accelerate launch` would set, and imports torch while a fork
of it checks the data (accelerate's launcher would import torch a second time). A box that waits for its data imports it meanwhile
(`--stand-by`). Several are started by `accelerate launch`, one configuration
for adapters on every process (DDP) and for a model in parts (FSDP2, trainer/sharded.py). On several machines this runs once on each, in one
shared run folder; trainer/machines.py reads from the environment who is first, and torchrun's rendezvous starts and restarts them together.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from trainer import imports
from trainer.events import Failed, Writer
from trainer.job import WIRE, Job
from trainer.machines import Machines, read_machines
from trainer.prepare import Refused, model_folder, prepare
from trainer.weights import check_weights

EXIT_VARIABLE = "MILKTEA_EXIT_FILE"  # its name, one for each machine
LAUNCHED = "launched"  # written by ops (ops/commands.py) when everything that the job needs is there
REFUSED, NOT_LAUNCHED = 3, 75
SHOWN = 40  # samples on a terminal
QUANTISED = ("nf4", "int8")  # by bitsandbytes
PR_SET_PDEATHSIG = 1  # linux/prctl.h
EXIT_FILE = ".trainer_exit"  # the trainer's own exit code, which a launcher of several processes does not hand on


def main(arguments: list[str]) -> int:
    if arguments == ["--wire"]:
        print(WIRE)
        return 0
    if arguments[:1] == ["--stand-by"] and len(arguments) == 2:
        return stand_by(Path(arguments[1]))
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: milktea-train [--stand-by] job.json | milktea-train --wire", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    run = path.resolve().parent
    try:
        job = read_job(path)
        machines = read_machines(os.environ)
        alone = job.processes == 1 and machines is None
        if not alone:
            check(job, run)
    except (OSError, ValueError) as error:
        return refuse(run, error)
    os.environ["MILKTEA_STARTED"] = repr(time.time())
    if alone:
        return train_here(job, path)
    environment = dict(os.environ)
    command = build(job, path, environment, machines)
    environment[EXIT_VARIABLE] = exit_file(machines)
    return supervise(command, environment, run / environment[EXIT_VARIABLE])


def stand_by(path: Path) -> int:
    """Imports what most jobs need, and trains once `launched` lies beside the job file, as `milktea-train job.json` would. Ends when who started
    it is gone."""
    started_by, given, run = os.getppid(), dict(os.environ), path.resolve().parent
    on_cpu = not visible_gpus()
    if on_cpu:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as for a small model: torch reads it when it is imported
    checker = Checker(partial(check_launched, path, os.getpid()), run)
    with imports.without_collection():
        imports.begin(quantised=False, whole=False)
        from trainer import train

        imports.lean(quantised=False, whole=False)
        if not on_cpu:
            importlib.import_module("trainer.fast")
    if not wait_for_launch(path, started_by):
        return NOT_LAUNCHED
    checker.wait()
    try:
        job = read_job(path)
        alone = job.processes == 1 and read_machines(os.environ) is None
    except (OSError, ValueError) as error:
        return refuse(run, error)
    if not alone or job.model.precision in QUANTISED or (on_cpu and cpu_threads(job, run) > 1):
        os.execve(sys.executable, [sys.executable, "-m", "trainer.launch", str(path)], given)  # imports in other processes, or other imports
    os.environ["MILKTEA_STARTED"] = repr(time.time())
    surround(job, run, os.environ)
    return train.to_end(path)


def wait_for_launch(path: Path, started_by: int) -> bool:
    """Whether the job was launched before the process `started_by` was gone."""
    while not path.with_name(LAUNCHED).exists():
        if os.getppid() != started_by:
            return False
        time.sleep(0.01)
    return True


def check_launched(path: Path, parent: int) -> None:
    """`check`, when the job is launched."""
    if wait_for_launch(path, parent):
        check(read_job(path), path.resolve().parent)


def read_job(path: Path) -> Job:
    """Raises Refused, with every fault and its place, for a file that is no job of this wire."""
    try:
        return Job.model_validate_json(path.read_bytes())
    except ValidationError as error:
        faults = [f"{path.name}: {'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors(include_url=False)]
        many = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise Refused(f"{many} in {path.name}", faults, "correct these, or make the job anew: `milktea plan JOB.toml`") from error


def check(job: Job, run: Path) -> None:
    """Raises ValueError or OSError for what can be refused without torch; leaves the rows tokenised and the model's files at hand."""
    prepare(job, run)
    check_weights(model_folder(job, run, weights=True))


def train_here(job: Job, path: Path) -> int:
    """Imports torch and trains, in this process, while a fork of it checks. What the fork refuses ends this process, even in the middle of an
    import."""
    surround(job, path.resolve().parent, os.environ)
    checker = Checker(lambda: check(job, path.resolve().parent), path.resolve().parent)
    with imports.without_collection():
        imports.begin(job.model.precision in QUANTISED, whole=False)
        from trainer import train
    return train.to_end(path, checker.wait)


class Checker:
    """A fork of this process that runs `look`, and tells what it refuses."""

    def __init__(self, look: Callable[[], None], run: Path) -> None:
        self._done, parent = False, os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            die_with(parent)
            os._exit(self._check(look, run))
        signal.signal(signal.SIGCHLD, self._look)

    @staticmethod
    def _check(look: Callable[[], None], run: Path) -> int:
        try:
            look()
        except (OSError, ValueError) as error:
            return refuse(run, error)
        except BaseException:
            traceback.print_exc()  # the parent checks again, and ends as this would have
        return 0

    def wait(self) -> None:
        """Returns when the data is checked; does not return when it was refused."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._look(options=0)

    def _look(self, *_: object, options: int = os.WNOHANG) -> None:
        if self._done:
            return
        pid, status = os.waitpid(self._pid, options)
        self._done = pid == self._pid
        if self._done and os.WIFEXITED(status) and os.WEXITSTATUS(status) == REFUSED:
            os._exit(REFUSED)  # half of torch may be imported: there is nothing that could end in order


def die_with(parent: int) -> None:
    """The kernel kills this process when its parent is gone, so that none is left behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone before the kernel knew
        os._exit(REFUSED)


def refuse(run: Path, error: Exception) -> int:
    """Tells why, on stderr and in events.jsonl; returns the exit code of a refusal."""
    hint, samples = getattr(error, "hint", ""), getattr(error, "samples", [])
    writer = Writer(run / "events.jsonl")
    writer.write(Failed, reason=str(error), samples=samples, hint=hint)
    writer.close()
    shown = [*samples[:SHOWN], *([f"... and {len(samples) - SHOWN} more, all in events.jsonl"] if len(samples) > SHOWN else [])]
    print(*filter(None, [f"stopped: {error}", *shown, hint]), sep="\n", file=sys.stderr, flush=True)
    return REFUSED


def exit_file(machines: Machines | None) -> str:
    """Machines share the run folder: each has its own."""
    return EXIT_FILE if machines is None else f"{EXIT_FILE}.{os.uname().nodename}.{os.getpid()}"


def surround(job: Job, run: Path, environment: MutableMapping[str, str]) -> None:
    """Sets in `environment` what the training processes should find there for the hardware at hand."""
    if visible_gpus():
        # packs differ in length: segments that can grow keep torch's cache of GPU memory from splitting into pieces too small for the next one
        if "PYTORCH_ALLOC_CONF" not in environment:  # its newer name, which wins
            environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    else:
        environment["ACCELERATE_USE_CPU"] = "true"
        environment.setdefault("OMP_NUM_THREADS", str(cpu_threads(job, run)))


def build(job: Job, path: Path, environment: dict[str, str], machines: Machines | None) -> list[str]:
    """The command that starts several processes; sets what it needs in `environment`."""
    train = ["-m", "trainer.train", str(path)]
    for name in [n for n in environment if n.startswith("PET_")]:
        del environment[name]  # torchrun would read them again, as defaults of options that are given here
    surround(job, path.resolve().parent, environment)
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
