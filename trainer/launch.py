"""What `milktea-train job.json` runs: checks and tokenises without torch, then starts trainer.train
on every process. `milktea-train serve`, `chat`, `evaluate` and `merge` become the modules of
WORDS.

`accelerate launch` starts one process or several, with one configuration for adapters on every
process (DDP) and for a model in parts (FSDP2, trainer/loop/sharded.py). On several machines this
runs once on each, in one shared run folder; trainer/machines.py reads from the environment who is
first, and torchrun's rendezvous starts and restarts them together.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import psutil
import yaml
from pydantic import ValidationError

from trainer import loading
from trainer.data.errors import InvalidJob
from trainer.data.prepare import model_folder
from trainer.data.stage_rows import prepare
from trainer.data.weights import validate_weights
from trainer.loading import cache_of
from trainer.machines import Machines, read_machines
from trainer.outcome import EXIT_FILE, EXIT_VARIABLE, report_refusal
from trainer.wire.chain import weights_sha256
from trainer.wire.job import WIRE, Job

# key of accelerate's config file -> values that leave the training as the job says; the first is
# the default
ACCELERATE_CONFIG = {
    "compute_environment": ("LOCAL_MACHINE",),
    "distributed_type": ("NO", False, "MULTI_CPU", "MULTI_GPU"),  # YAML reads a bare NO as false
    "use_cpu": (False,),
}
WORDS = {
    "serve": "trainer.serve.server",
    "chat": "trainer.serve.chat",
    "evaluate": "trainer.eval.score",
    "merge": "trainer.result.merge",
}
MOVE_CONFIG = "move that file away: job.json says how to train, and [offer] on how many GPUs"


def main(arguments: list[str]) -> int:
    if arguments == ["--wire"]:
        print(WIRE)
        return 0
    if arguments and arguments[0] in WORDS:
        words = [sys.executable, "-m", WORDS[arguments[0]], *arguments[1:]]
        os.execv(sys.executable, words)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        usage = f"milktea-train job.json | milktea-train {'|'.join(WORDS)} ... | --wire"
        print(f"usage: {usage}", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    run = path.resolve().parent
    try:
        job = read_job(path)
        machines = read_machines(os.environ)
        if visible_gpus():
            validate_accelerate_config(os.environ)
        if job.model.path or machines is not None:
            prepare_inputs(job, run)
        else:
            with loading.told(run, f"downloading {job.model.base}", cache_of(job.model.base)):
                prepare_inputs(job, run)
    except (OSError, ValueError) as error:
        return report_refusal(run, error)
    environment = dict(os.environ) | {"MILKTEA_STARTED": repr(time.time())}
    command = build(job, path, environment, machines)
    environment[EXIT_VARIABLE] = exit_file(machines)
    return supervise(command, environment, run / environment[EXIT_VARIABLE])


def read_job(path: Path) -> Job:
    """Raises InvalidJob, with every fault and its place, for a file that is no job of this wire."""
    try:
        return Job.model_validate_json(path.read_bytes())
    except ValidationError as error:
        faults = [
            f"{path.name}: {'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}"
            for e in error.errors(include_url=False)
        ]
        many = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise InvalidJob(
            f"{many} in {path.name}",
            faults,
            "correct these, or make the job anew: `milktea plan JOB.toml`",
        ) from error


def prepare_inputs(job: Job, run: Path) -> None:
    """Raises ValueError or OSError for what can be refused without torch; leaves the rows tokenised
    and the model's files at hand."""
    absent = [name for name in job.environment if not os.environ.get(name)]
    if absent:
        raise InvalidJob(
            f"{', '.join(absent)} of the job's env did not come with the launch",
            hint="set it where milktea runs, or take it out of env in the job file",
        )
    validate_beside(job, run)
    for part, folder in job.parts():
        (run / folder).mkdir(parents=True, exist_ok=True)
        prepare(part, run / folder)
    validate_weights(model_folder(job, run, weights=True))


def validate_beside(job: Job, run: Path) -> None:
    """Raises InvalidJob where an adapter or a function that came with the job is not the one that
    it names."""
    beside = [*job.merged, *(t for t in (job.start, job.judge) if t is not None)]
    held = {t.path: weights_sha256(run / t.path) for t in beside}
    if job.reward_function is not None:
        text = (run / job.reward_function.path).read_bytes()
        held[job.reward_function.path] = hashlib.sha256(text).hexdigest()
    for told in (*beside, job.reward_function):
        if told is not None and held[told.path] != told.sha256:
            raise InvalidJob(
                f"{told.path} does not hold {told.name} as the job names it",
                hint="make the job anew: `milktea plan JOB.toml`",
            )


def validate_accelerate_config(environment: Mapping[str, str]) -> None:
    """Raises InvalidJob, with its path, for a file of `accelerate config` that would make
    `accelerate launch` train otherwise than the job says: by DeepSpeed, FSDP or Megatron, on TPUs,
    in SageMaker, on the CPU. Of any other file the options given by `build` win, and the rest (GPU
    ids, CPU affinity, debug) is honoured."""
    cache = Path(
        environment.get("HF_HOME")
        or Path(environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    ).expanduser()
    path = cache / "accelerate" / "default_config.yaml"
    if not path.is_file():
        return
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InvalidJob(f"{path} is no YAML: {error}", hint=MOVE_CONFIG) from error
    told = config if isinstance(config, dict) else {}
    other = [
        f"{key}: {told[key]}"
        for key, ours in ACCELERATE_CONFIG.items()
        if told.get(key, ours[0]) not in ours
    ]
    if other:
        raise InvalidJob(
            f"{path} says {', '.join(other)}: another training than the job's", hint=MOVE_CONFIG
        )


def exit_file(machines: Machines | None) -> str:
    """The file of this machine's exit code: machines share the run folder."""
    return EXIT_FILE if machines is None else f"{EXIT_FILE}.{os.uname().nodename}.{os.getpid()}"


def set_environment(job: Job, run: Path, environment: MutableMapping[str, str]) -> None:
    """Sets in `environment` what the training processes need on this hardware."""
    if visible_gpus():
        # packs differ in length: segments that can grow keep torch's cache of GPU memory from
        # splitting into pieces too small for the next one
        if "PYTORCH_ALLOC_CONF" not in environment:  # its newer name, which wins
            environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    else:
        environment["ACCELERATE_USE_CPU"] = "true"
        environment.setdefault("OMP_NUM_THREADS", str(cpu_threads(job, run)))


def build(
    job: Job, path: Path, environment: dict[str, str], machines: Machines | None
) -> list[str]:
    """The command that starts the processes; sets what it needs in `environment`."""
    train = ["-m", "trainer.train", str(path)]
    for name in [n for n in environment if n.startswith("PET_")]:
        # torchrun would read them again, as defaults of options that are given here
        del environment[name]
    set_environment(job, path.resolve().parent, environment)
    if machines is not None:
        # torch 2.13 shares one store among all rounds of a rendezvous: after a restart a process
        # may read where its peer was, not where it is
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # accelerate launch takes a number of machines, torchrun under it a range
    if machines is not None and machines.elastic:
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *machines.torchrun_options(job.processes),
            *train,
        ]
    count = machines.max_nodes if machines else 1
    processes = job.processes * count
    options = [
        "--num_processes",
        str(processes),
        "--num_machines",
        str(count),
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    if machines is not None:
        options += machines.accelerate_options()
    elif processes > 1:
        options += ["--main_process_port", "0"]
    if processes > 1:
        options.append("--multi_gpu")
    else:
        options.append("--quiet")  # the trainer has reported why it ended
        if not visible_gpus():
            options.append("--cpu")
        # accelerate would give it one thread
        environment.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    return [sys.executable, "-m", "accelerate.commands.launch", *options, *train]


SMALL_BYTES = 100 << 20


def cpu_threads(job: Job, run: Path) -> int:
    """Threads of a process on the CPU. A small model gets one: its matrices are not worth sharing,
    and threads that wait for each other on a busy machine made the practice job 20 times slower."""
    weights = (
        sum(p.stat().st_size for p in (run / (job.model.path or "")).glob("*.safetensors"))
        if job.model.path
        else SMALL_BYTES
    )
    return 1 if weights < SMALL_BYTES else max(1, (os.cpu_count() or 1) // job.processes)


def visible_gpus() -> int:
    """GPUs that CUDA would show, counted without torch."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return len([x for x in listed.split(",") if x.strip() not in ("", "-1")])
    return (
        len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
        if Path("/proc/driver/nvidia/gpus").is_dir()
        else 0
    )


def supervise(command: list[str], environment: dict[str, str], said: Path) -> int:
    """Runs the launcher in a process group of its own, hands signals on to the group, and returns
    the trainer's own exit code where it left one, in the file `said`."""
    said.unlink(missing_ok=True)
    launcher = subprocess.Popen(command, env=environment, start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: signal_group(launcher.pid, n))
    code = launcher.wait()
    # accelerate's launcher of one process dies of a signal after which its trainer saves
    while group_lives(launcher.pid):
        time.sleep(0.1)
    try:
        return int(json.loads(said.read_text()))
    except (OSError, ValueError):
        print(
            f"the trainer left no exit code; its launcher ended with {code}",
            file=sys.stderr,
            flush=True,
        )
        return code if code >= 0 else 128 - code
    finally:
        said.unlink(missing_ok=True)


def signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass


def group_lives(group: int) -> bool:
    """Whether a process of this group still runs. One that nobody has buried does not: the first
    process of a container may bury none."""
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except ProcessLookupError:
            continue
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
