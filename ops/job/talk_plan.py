"""Pure but for the sizes of files: the plan of a box that is rented to talk to the result of a run.
Image, base model and provider's demands are the run's; memory, disk and money are its own."""

from __future__ import annotations

import math
import secrets
import time
from dataclasses import replace
from pathlib import Path

from ops.box.transfer import PushFile, sha256_of
from ops.errors import PreflightError
from ops.job import sent
from ops.job.label import this_user
from ops.job.needs import DRIVER_SHARE, IMAGE_UNPACKED, SYSTEM_GIB
from ops.job.plan import Plan
from ops.job.pushes import trainer_files
from ops.market.workload import Workload
from trainer import memory

RESULT = "result/adapter.zip"  # in the run's folder on the box
WIDTH, CONTEXT = 4, 4096  # answers side by side, and tokens of each at most
START_S = 45.0  # to import and load, beside reading the weights
BEFORE_S = 3600.0  # within which the box boots, pulls and loads, or the run ends
CUDA_GIB, HOST_GIB = 1.5, 8.0  # what CUDA keeps for itself; host memory to load with
WEIGHT_BYTES = {"nf4": 0.65, "int8": 1.15, "fp8": 1.15}  # of a parameter; 2 in bf16
READ_TOKENS = 8192  # of prompts that are read in one pack


def talk_plan(run: Plan, adapter: Path, now: float, minutes: float, max_usd: float) -> Plan:
    """The plan of a new run that serves `adapter`, the archive of `run`, for `minutes` and at most
    `max_usd`. `now` is in unix seconds. Raises PreflightError for files that are gone."""
    name = run.run_id.rsplit("-", 3)[0][:34]
    at = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    pushes = [
        *(p for p in run.pushes if p.remote.startswith("model/")),
        PushFile(adapter, RESULT, sha256_of(adapter)),
        *(trainer_files() if run.trainer == "push" else []),
    ]
    if gone := [str(p.local) for p in pushes if not p.local.is_file()]:
        raise PreflightError(
            f"the base model of {run.run_id} is not where it was: {', '.join(gone[:3])}",
            hint="put it back, or talk to the result on this machine: --base FOLDER",
        )
    workload = _workload(run, pushes, minutes)
    return Plan(
        run_id=f"{name}-chat-{at}-{secrets.token_hex(2)}",
        image=run.image,
        trainer=run.trainer,
        wire_job=run.wire_job,
        pushes=pushes,
        needs=replace(
            run.needs,
            gpu_names=(),
            min_gpu_memory_gib=_memory_gib(run, adapter),
            num_gpus=1,
            max_usd_per_hour=None,
            interruptible=False,
            bid_usd_per_hour=None,
            disk_gib=workload.disk_gib,
            hours=minutes / 60 + 1,
            max_usd=max_usd,
            min_cpu_ram_gib=_host_gib(run.workload),
        ),
        workload=workload,
        max_usd=max_usd,
        max_s=minutes * 60 + BEFORE_S,
        stall_s=run.stall_s,
        out=run.out,
        notes=[
            f"the result of {run.run_id}, for {minutes:g} minutes once it is loaded",
            *sent.describe(pushes),
        ],
        image_login=run.image_login,
        when_silent="destroy",
        talk_s=minutes * 60,
        trains=False,
        user=this_user(),
    )


def _workload(run: Plan, pushes: list[PushFile], minutes: float) -> Workload:
    """What is moved and how long people talk; nothing is trained."""
    pushed = float(sum(p.local.stat().st_size for p in pushes))
    before = run.workload
    disk = before.image_bytes * IMAGE_UNPACKED + 1.1 * (before.model_download_bytes + pushed)
    return replace(
        before,
        tokens=0.0,
        stage="sft",
        precision="bf16",
        num_gpus=1,
        push_bytes=pushed,
        pull_bytes=0.0,
        checkpoint_bytes=0.0,
        disk_gib=float(max(10, math.ceil(disk / 2**30 + SYSTEM_GIB))),
        shape=None,
        method="lora",
        start_s=START_S,
        before=(),
        evaluate_s=0.0,
        merged_bytes=0.0,
        talk_s=minutes * 60,
    )


def _memory_gib(run: Plan, adapter: Path) -> float:
    """GPU memory to talk in: weights, adapter, keys and values of WIDTH answers of CONTEXT tokens.
    0 for the practice model; what the run asked for where its shape is not known."""
    workload = run.workload
    if workload.cpu_practice:
        return 0.0
    shape: memory.Shape | None = workload.shape
    if shape is None:
        return run.needs.min_gpu_memory_gib
    kept = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim * WIDTH * CONTEXT
    total = kept + _held_bytes(shape, workload, adapter.stat().st_size)
    return (total / 2**30 + CUDA_GIB) / DRIVER_SHARE


def _held_bytes(shape: memory.Shape, workload: Workload, adapter: int) -> float:
    """Of the weights, and of an adapter whose file has `adapter` bytes; of a mixture in FP8 or NF4
    also what reading prompts takes."""
    m = shape.mixture
    if m is None or not memory.holds_experts(shape, workload.precision):
        experts = memory.expert_parameters(shape)  # in bf16
        each = WEIGHT_BYTES.get(workload.precision, 2.0)
        return each * (workload.model_parameters - experts) + 2 * experts + 2 * adapter
    weights = memory.weight_bytes(shape, workload.precision, 2, fused=True, keep_transpose=False)
    # adapters of experts are held in bf16, the others in fp32 and copied
    reading = 2 * READ_TOKENS * m.active * (3 * shape.hidden + 4 * m.width)
    return weights + adapter + reading


def _host_gib(workload: Workload) -> float:
    """Host memory to load with: experts, which lie one by one in the files, are joined there."""
    if workload.cpu_practice:
        return 0.0
    shape: memory.Shape | None = workload.shape
    if shape is None or shape.mixture is None:
        return HOST_GIB
    return math.ceil(HOST_GIB + 2 * workload.model_parameters / 2**30)
