"""What a job computes and transfers, and what an offer must have for it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from ops.box.transfer import PushFile
from ops.errors import PreflightError
from ops.hardware import gpus
from ops.job import old_cards
from ops.job.job_file import JobFile
from ops.market.ranking import Needs
from ops.market.workload import Workload
from trainer import memory
from trainer.wire.stages import STAGES, work_of
from trainer.wire.tables import StageTable

DRIVER_SHARE = 0.98  # torch can use this share of the memory that a GPU's driver reports
HOST_GIB, PROCESS_GIB = 3.0, 4.0  # host memory of the system; of each process (torch, CUDA, data)
SYSTEM_GIB = 4  # disk for logs, pip's cache and the container itself
SHARD_GIB = 10.0  # a file of 5 GB of a base in bf16, in fp32 while an adapter is merged into it
# of a merged model's bytes: the model in fp32, and what it says of the texts of one round
CERTIFY_SHARE = 2.5
INSTALL_BYTES = 148e6  # of the wheels in ops/box/bootstrap/trainer-requirements.txt
IMAGE_UNPACKED = 2.5  # unpacked bytes for each compressed byte


def workload_of(
    job: JobFile,
    lengths: list[int],
    shape: memory.Shape | None,
    pushes: list[PushFile],
    table: StageTable | None = None,
    shared: int = 0,
) -> Workload:
    """Of a job, or of one stage of several, which `table` is. A learned prompt's places count among
    the tokens of each row; `shared` tokens are of prompts that are computed for one answer and not
    again for others."""
    learned = memory.Learned.of(job.training.method, job.prompt_learning)
    parameters = _parameters(shape)
    adapter = 4.0 * (_trained(job, shape, learned) if shape else parameters)
    image_bytes = job.image.size_gib * 2**30
    pushed = float(sum(p.local.stat().st_size for p in pushes))
    download = 0.0 if Path(job.model.base).is_dir() else parameters * 2
    merges = _merges(job, table)
    merged = merges * parameters * (4 if job.model.precision == "fp32" else 2)
    kept = 1.1 * (download + pushed) + 6 * adapter + merged + 1.5 * _comes_merged(job, parameters)
    written_gib = (image_bytes * IMAGE_UNPACKED + kept) / 2**30
    disk = job.offer.disk_gib or max(10, math.ceil(written_gib + SYSTEM_GIB))
    load = Workload(
        **_counted(job, [n + (learned.tokens if learned else 0) for n in lengths], shared),
        stage=job.stage,
        work=work_of(job),
        model_parameters=parameters,
        active_parameters=_active(shape),
        precision=job.model.precision,
        num_gpus=job.offer.num_gpus,
        image_bytes=image_bytes,
        model_download_bytes=download,
        push_bytes=pushed,
        pull_bytes=adapter,
        disk_gib=float(disk),
        cpu_practice=is_practice(shape),
        shape=shape,
        method=memory.method_of(job.training.method, job.lora.use_dora, job.lora.lora_dropout),
        trainable_layers=job.training.freeze_trainable_layers,
        r=job.lora.largest_rank,
        target_modules=job.lora.counted_modules,
        saved=tuple(job.lora.modules_to_save or ()),
        learned=learned,
        checkpoint_bytes=3 * adapter,
        save_every_s=job.training.save_every_s,
        talk_s=job.results.talk_s,
        evaluate_s=job.evaluate.minutes * 60 if job.evaluate else 0.0,
        merged_bytes=_comes_merged(job, parameters),
        merges=merges,
        install_bytes=INSTALL_BYTES if job.image.trainer == "push" else 0.0,
    )
    return replace(load, in_parts=_keeps_parts(job, load))


def _counted(job: JobFile, lengths: list[int], shared: int) -> dict[str, Any]:
    """What a Workload says of tokens; answers are at their longest."""
    steps = math.ceil(len(lengths) * job.training.num_train_epochs / job.training.batch_size)
    share = min(1.0, job.training.max_steps / steps) if job.training.max_steps else 1.0
    passes = job.training.num_train_epochs * share
    answer, answers, once = 0, 1, shared
    if job.rollouts:
        answer, answers, once = job.rollouts.max_completion_length, job.rollouts.num_generations, 0
    lengths = [n + answer for n in lengths]
    return {
        "tokens": (answers * sum(lengths) - once) * passes,
        "answers": answers,
        "answer_tokens": answer,
        "shared": shared * (answers - 1) * passes,
        "least_tokens": max(lengths),
        "row_tokens": sum(n * n for n in lengths) / sum(lengths),
    }


def _parameters(shape: memory.Shape | None) -> float:
    return float(memory.parameters(shape)) if shape else 7e9


def is_practice(shape: memory.Shape | None) -> bool:
    """Whether a model is so small that this computer's CPU trains it."""
    return _parameters(shape) < 2e7


def _merges(job: JobFile, table: StageTable | None) -> int:
    """How often an adapter is merged into the base before the training."""
    ways = [job.how if job.start is not None else "", table.how if table is not None else ""]
    return ways.count("merge")


def _comes_merged(job: JobFile, parameters: float) -> float:
    """Bytes of the merged model that comes home."""
    return 2.0 * parameters if job.results.merged else 0.0


def _trained(job: JobFile, shape: memory.Shape, learned: memory.Learned | None) -> float:
    """Values that a job trains; of a method that trains the base, all that it has."""
    lora = job.lora
    if learned is not None:
        return learned.parameters(shape)
    if job.training.trains_base:
        return float(memory.parameters(shape))
    saved = memory.saved_parameters(shape, tuple(lora.modules_to_save or ()))
    return saved + memory.adapter_parameters(shape, lora.largest_rank, lora.counted_modules)


def of_stages(loads: list[Workload]) -> Workload:
    """The workload of stages that follow each other on one machine: the last one's, with the
    others before it."""
    last = loads[-1]
    if len(loads) == 1:
        return last
    return replace(
        last,
        before=tuple(loads[:-1]),
        pull_bytes=sum(w.pull_bytes for w in loads),
        checkpoint_bytes=max(w.checkpoint_bytes for w in loads),
        disk_gib=max(w.disk_gib for w in loads)
        + math.ceil(sum(2 * w.model_parameters * w.merges for w in loads[:-1]) / 2**30)
        + math.ceil(sum(4 * w.pull_bytes for w in loads[:-1]) / 2**30),
    )


def largest(needs: list[Needs], workload: Workload) -> Needs:
    """What a machine must have that carries every stage."""
    return replace(
        needs[-1],
        min_gpu_memory_gib=max(n.min_gpu_memory_gib for n in needs),
        min_cpu_ram_gib=max(n.min_cpu_ram_gib for n in needs),
        min_compute_capability=max(n.min_compute_capability for n in needs),
        disk_gib=workload.disk_gib,
    )


def _active(shape: memory.Shape | None) -> float | None:
    """The parameters that one token uses in a mixture of experts, the output head included; None
    for a model without experts."""
    if shape is None or shape.mixture is None:
        return None
    return float(memory.active_parameters(shape) + shape.vocab * shape.hidden)


def _least_gib(job: JobFile, load: Workload, shape: memory.Shape, in_parts: bool) -> float:
    """GiB that a card must have, as its driver reports them."""
    least = memory.min_gpu_memory_gib(
        shape,
        load.precision,
        load.r,
        load.target_modules,
        load.method,
        load.least_tokens,
        processes=load.num_gpus,
        trainable_layers=load.trainable_layers,
        saved=load.saved,
        learned=load.learned,
        in_parts=in_parts,
        **STAGES[load.stage].memory,
        **old_cards.on_cards(job),
    )
    return least / DRIVER_SHARE


def _keeps_parts(job: JobFile, load: Workload) -> bool:
    """Whether the GPUs are to keep the frozen base in parts: no card that the job accepts holds the
    whole of it. trainer/loop/budget.py decides so of the card that was rented."""
    possible = memory.base_splits(load.stage, load.method, load.precision)
    if load.shape is None or load.num_gpus == 1 or not possible or job.stages:
        return False
    if job.lora.init_lora_weights == "pissa":
        return False
    whole = _least_gib(job, load, load.shape, in_parts=False)
    known = [gpus.find(name) for name in gpus.all_meant(job.offer.gpu_name)]
    if known:
        return not any(gpu is None or gpu.memory_gib >= whole for gpu in known)
    return not gpus.that_hold(whole, load.precision)


def told_of_parts(load: Workload) -> list[str]:
    """What the user is told of a base in parts. Raises PreflightError where its result is also to
    be served by the box."""
    if not load.in_parts:
        return []
    if load.talk_s or load.evaluate_s:
        raise PreflightError(
            f"the base is kept in parts over {load.num_gpus} GPUs, and none of them holds all of "
            "it to answer at the end",
            hint="leave results.then_chat_minutes and [evaluate] out, or set "
            'model.precision = "nf4"',
        )
    return [
        f"base in parts over {load.num_gpus} GPUs: each holds 1/{load.num_gpus} of the frozen "
        "layers, and recomputes all layers; held-out questions are not answered"
    ]


def needs_of(job: JobFile, workload: Workload, shape: memory.Shape | None) -> Needs:
    old_cards.validate(job)
    min_gib = 0.0
    if shape:
        min_gib = _least_gib(job, workload, shape, workload.in_parts)
        _validate_cards(job, min_gib)
    o = job.offer
    return Needs(
        gpu_names=tuple(gpus.all_meant(job.offer.gpu_name)),
        min_gpu_memory_gib=max(min_gib, o.min_gpu_memory_gib or 0.0),
        num_gpus=o.num_gpus,
        max_usd_per_hour=o.max_usd_per_hour,
        min_reliability=o.min_reliability,
        countries=tuple(o.countries),
        min_inet_down_mbps=o.min_inet_down_mbps,
        min_cuda=o.min_cuda,
        interruptible=o.type == "interruptible",
        bid_usd_per_hour=o.bid_usd_per_hour,
        disk_gib=workload.disk_gib,
        hours=job.limits.max_hours,
        min_compute_capability=old_cards.least_capability(job),
        max_usd=job.limits.max_usd,
        min_cpu_ram_gib=o.min_cpu_ram_gib or _host_memory_gib(workload),
        min_cpu_cores=0.0 if workload.cpu_practice else float(o.num_gpus),
    )


def _host_memory_gib(workload: Workload) -> float:
    """Host memory for training: of the system, of each process, and for the copy of parameters and
    optimizer state from which a checkpoint is written; where the result is merged, for the
    certificate."""
    if workload.cpu_practice:
        return 0.0
    copied = workload.checkpoint_bytes / 2**30
    shard = min(SHARD_GIB, workload.model_parameters * 4 / 2**30) if workload.merges else 0.0
    train_gib = HOST_GIB + PROCESS_GIB * workload.num_gpus + copied + shard
    shape = workload.shape
    # process 0 reads all of a base in parts; experts, which lie one by one in the files, are joined
    # in host memory before a card gets them quantised. Other weights are mapped from the disk
    joined = shape is not None and memory.holds_experts(shape, workload.precision)
    if workload.in_parts or joined:
        train_gib += workload.model_parameters * (4 if workload.precision == "fp32" else 2) / 2**30
    certify_gib = HOST_GIB + PROCESS_GIB + CERTIFY_SHARE * workload.merged_bytes / 2**30
    return math.ceil(max(train_gib, certify_gib if workload.merged_bytes else 0.0))


def _validate_cards(job: JobFile, min_gib: float) -> None:
    """Raises PreflightError, naming the smallest GPU that fits, when every GPU that the job accepts
    is too small."""
    if not job.offer.gpu_name and not gpus.that_hold(min_gib, job.model.precision):
        largest = max(gpus.GPUS, key=lambda g: g.memory_gib)
        less = "a smaller model" if job.model.precision == "nf4" else 'model.precision = "nf4"'
        raise PreflightError(
            f"{job.model.base} in {job.model.precision} with max_length {job.data.max_length} "
            f"needs {min_gib:.1f} GiB on one GPU; the largest, {largest.name}, has "
            f"{largest.memory_gib:.0f} GiB",
            hint=f"set {less}, or a smaller lora.r",
        )
    names = gpus.all_meant(job.offer.gpu_name)
    named = [g for n in names if (g := gpus.find(n))]
    if not named or len(named) < len(names) or any(g.memory_gib >= min_gib for g in named):
        return
    fits = gpus.that_hold(min_gib, job.model.precision)
    nearest = (
        f"the nearest that fits is {fits[0].name} ({fits[0].memory_gib:.0f} GiB)"
        if fits
        else "no card fits"
    )
    have = ", ".join(f"{g.name} {g.memory_gib:.0f} GiB" for g in named)
    raise PreflightError(
        f"{job.model.base} in {job.model.precision} with max_length {job.data.max_length} "
        f"needs {min_gib:.1f} GiB on one GPU ({have}); {nearest}",
        hint='add it to offer.gpu_name, or set model.precision = "nf4" (now '
        f"{job.model.precision})",
    )
