"""A task for SkyPilot or dstack: one machine of theirs, the same image and run folder."""

from __future__ import annotations

import math
import re
import shlex
from typing import Any

import yaml

from ops.errors import ConfigError
from ops.export.common import GRACE_S, ROOT, command
from ops.hardware import gpus
from ops.job.job_file import JobFile
from ops.job.plan import Plan

HOLD_S = 3600  # for which a result waits to be fetched before its machine goes


def skypilot_files(job: JobFile, plan: Plan, nodes: int, queue: str | None) -> dict[str, str]:
    """name -> text of what `milktea export skypilot` adds to the run folder, the README first."""
    validate_one("skypilot", nodes, queue)
    return {"README.md": skypilot_readme(plan), "task.yaml": _yaml(skypilot_task(job, plan))}


def dstack_files(job: JobFile, plan: Plan, nodes: int, queue: str | None) -> dict[str, str]:
    """name -> text of what `milktea export dstack` adds to the run folder, the README first."""
    validate_one("dstack", nodes, queue)
    return {"README.md": dstack_readme(plan), "task.dstack.yml": _yaml(dstack_task(job, plan))}


def validate_one(kind: str, nodes: int, queue: str | None) -> None:
    """Raises ConfigError for more than one machine: theirs share no folder, and checkpoints are
    written to one."""
    if nodes > 1 or queue:
        raise ConfigError(
            f"{kind} gets a task for one machine, without --nodes and --queue: its machines share "
            "no folder",
            hint="raise offer.num_gpus, or export for slurm or kubeflow",
        )


def skypilot_task(job: JobFile, plan: Plan) -> dict[str, Any]:
    """SkyPilot's task. The folder is synced to ~/sky_workdir; the cluster goes HOLD_S after the
    task has ended."""
    resources: dict[str, Any] = {
        "image_id": f"docker:{plan.image}",
        "accelerators": _sky_cards(job, plan),
        "disk_size": math.ceil(plan.needs.disk_gib),
        "use_spot": plan.needs.interruptible,
        "autostop": {"idle_minutes": HOLD_S // 60, "down": True},
    }
    task: dict[str, Any] = {"name": task_name(plan), "workdir": ".", "resources": resources}
    if plan.env:
        task["secrets"] = dict.fromkeys(plan.env)  # `sky launch --secret NAME` reads it here
    return task | {"run": _timed(job, plan) + "\n"}


def dstack_task(job: JobFile, plan: Plan) -> dict[str, Any]:
    """dstack's task. Its container goes with the task, so that the task waits to be fetched for
    HOLD_S."""
    run = f"{ROOT}/{plan.run_id}"
    names = [_dstack_name(n) for wanted in job.offer.gpu_name for n in gpus.meant(wanted)]
    gpu: dict[str, Any] = {"name": list(dict.fromkeys(names))} if names else {}
    gpu |= {"memory": f"{_gib(plan)}GB..", "count": job.offer.num_gpus}
    wait = f"for n in $(seq {HOLD_S // 10}); do [ ! -e fetched ] || break; sleep 10; done"
    task: dict[str, Any] = {
        "type": "task",
        "name": task_name(plan),
        "image": plan.image,
        "files": [f".:{run}"],
        "commands": [f"cd {run}", f"{_timed(job, plan)}; code=$?", wait, 'exit "$code"'],
        "resources": {"gpu": gpu, "disk": f"{math.ceil(plan.needs.disk_gib)}GB.."},
        "max_duration": math.ceil(job.limits.max_hours * 3600) + GRACE_S + HOLD_S,
        "spot_policy": "spot" if plan.needs.interruptible else "on-demand",
    }
    if job.offer.max_usd_per_hour:
        task["max_price"] = job.offer.max_usd_per_hour
    return task | ({"env": plan.env} if plan.env else {})


def task_name(plan: Plan) -> str:
    """Letters, digits and dashes, of at most 41; it begins with a letter."""
    return f"milktea-{plan.run_id}"[:41].rstrip("-")


def _timed(job: JobFile, plan: Plan) -> str:
    """The command, told to save when limits.max_hours are over and ended GRACE_S later."""
    seconds = math.ceil(job.limits.max_hours * 3600)
    return f"timeout --kill-after={GRACE_S} {seconds} {shlex.join(command(plan))}"


def _gib(plan: Plan) -> int:
    return max(1, math.floor(plan.needs.min_gpu_memory_gib))


def _sky_cards(job: JobFile, plan: Plan) -> str | dict[str, int]:
    """By SkyPilot's names, which are those of vast.ai without blanks and sockets; or any card with
    as much memory."""
    count = job.offer.num_gpus
    if not job.offer.gpu_name:
        return f"{_gib(plan)}GB+:{count}"
    names: dict[str, int] = {}
    for name in (n for wanted in job.offer.gpu_name for n in gpus.meant(wanted)):
        short = re.sub("Ada", "-Ada", re.sub(r"\s", "", name))
        short = re.sub(r"(Ti|PCIE|SXM4|SXM|NVL)$", "", short)
        short = re.sub(r"(RTX\d0\d0)(S|D)$", r"\1", short)
        big = short == "A100" and plan.needs.min_gpu_memory_gib > 40
        names["A100-80GB" if big else short] = count
    return names


def _dstack_name(name: str) -> str:
    """dstack's name of a card: RTX4090, A5000, A100, L40S."""
    short = re.sub(r"\s|Tesla", "", name)
    short = re.sub(r"(PCIE|SXM\d?|NVL)$", "", short)
    return re.sub(r"^RTX(A\d+)$", r"\1", short)


def _yaml(value: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=4096)
    return text


def skypilot_readme(plan: Plan) -> str:
    name = task_name(plan)
    secrets = "".join(f" --secret {word}" for word in plan.env)
    return (
        f"1. In this folder: `sky launch -c {name}{secrets} task.yaml`\n"
        f"2. `sky logs {name}`; `rsync -a {name}:sky_workdir/result .` brings the result home\n"
        f"3. `sky down {name}`. The cluster goes {HOLD_S // 60} minutes after the task has ended, "
        "with whatever was not fetched.\n"
    )


def dstack_readme(plan: Plan) -> str:
    name, run = task_name(plan), f"{ROOT}/{plan.run_id}"
    return (
        "1. In this folder: `dstack apply -f task.dstack.yml`. A server takes 2 MB of files unless "
        "it was started with a larger DSTACK_SERVER_CODE_UPLOAD_LIMIT.\n"
        f"2. `dstack attach {name}`, and beside it `scp -r {name}:{run}/result .`\n"
        f"3. `ssh {name} touch {run}/fetched` ends the task, or `dstack stop {name}`. It ends by "
        f"itself {HOLD_S // 60} minutes after the training, with whatever was not fetched.\n"
    )
