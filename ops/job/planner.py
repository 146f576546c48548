"""Make the plan of a job, and find every mistake in the job that can be found without vast.ai. The
rows go through the trainer's own preparation (trainer/data/prepare.py), so that an error here is
the error that the box would have raised an hour later."""

from __future__ import annotations

import json
import secrets
import shutil
import time
from pathlib import Path

from ops.catalogue.models import lookup
from ops.errors import PreflightError
from ops.hardware import gpus
from ops.job import notify, sent, tokens
from ops.job.adapters import Adapters, taken_up
from ops.job.job_file import JobFile
from ops.job.label import this_user
from ops.job.lengths import Counted, lengths_of_all
from ops.job.model_shape import family_of, model_config, shape_of
from ops.job.needs import (
    largest,
    needs_of,
    of_stages,
    told_of_parts,
    workload_of,
)
from ops.job.plan import Plan
from ops.job.pushes import files_of_parts, pushes_of
from ops.job.wire_job import make_wire_job
from ops.market.workload import Workload
from trainer.data import sharing
from trainer.families import Family
from trainer.wire.job import Job
from trainer.wire.stages import Rollouts
from trainer.wire.tables import StageTable, loras_of

CPU_FLOP_S = 1e11  # of a fast laptop


def new_plan(
    job: JobFile, root: Path, now: float, *, on_cpu: bool = False, or_estimate: bool = False
) -> Plan:
    """The plan of a new run, whose folder it makes in `root`. `now` is in unix seconds;
    `or_estimate`: see `make_plan`.

    Raises PreflightError or ConfigError, and removes the folder then: for defects in the data, for
    a model that fits none of the GPUs that the job accepts, and, with `on_cpu`, for one that this
    computer could not train within limits.max_hours."""
    run_id = (
        f"{job.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{secrets.token_hex(2)}"
    )
    folder = root / run_id
    folder.mkdir(0o700, parents=True)
    try:
        plan = make_plan(job, run_id, folder, or_estimate=or_estimate)
        if on_cpu:
            _validate_speed_here(plan)
        return plan
    except BaseException:
        shutil.rmtree(folder)  # a run that never began leaves nothing
        raise


def make_plan(job: JobFile, run_id: str, folder: Path, *, or_estimate: bool = False) -> Plan:
    """The plan of run `run_id`; `folder` is its folder and exists. With `or_estimate`, tokens are
    estimated from characters where the tokenizer cannot be loaded and the catalogue knows the
    model, and the plan is marked `estimated`. Raises PreflightError or ConfigError."""
    tokens.validate(job.env, job.image.login or "")
    tokens.validate_gated(job.model.base, job.env)
    parts, adapters = _taken_up(job, folder)
    files = files_of_parts(parts, folder)
    pushes = pushes_of(job, files, adapters)
    wire_job = make_wire_job(job, run_id, parts, files, adapters)
    notes: list[str] = []
    entry = lookup(job.model.base) if or_estimate else None
    counted, tokenised = lengths_of_all(wire_job, folder, pushes, entry, notes)
    config = model_config(job, notes)
    shape, loads = None, []
    tables: list[StageTable | None] = [*job.stages] or [None]
    stages = zip(parts, counted, wire_job.parts(), tables, strict=True)
    for part, of_part, (wire, _), table in stages:
        family = family_of(part, config, max(of_part.lengths), notes, chained=bool(job.stages))
        shape = shape_of(job, config, family, notes)
        once = _shared(wire, of_part, family, notes)
        loads.append(workload_of(part, of_part.lengths, shape, pushes, table, once))
    notes[:] = dict.fromkeys(notes)
    workload = of_stages(loads)
    needs = largest([needs_of(p, w, shape) for p, w in zip(parts, loads, strict=True)], workload)
    notes += _told_of_merges(job, loads) + told_of_parts(workload)
    templates = {Path(part.data.template) for part in parts}
    for name in job.offer.gpu_name:
        if (meant := gpus.meant(name)) != [name] and gpus.find(name) is None:
            notes.append(f"offer.gpu_name {name!r} is read as {', '.join(meant)}")
    notes += sent.describe(pushes, next((t for t in templates if t.is_absolute()), None))
    login, boards = job.image.login or "", job.training.report_to
    notes += tokens.describe(job.env, login, job.model.base, boards)
    notes += notify.describe(job.notify)
    return Plan(
        run_id=run_id,
        image=job.image.ref,
        trainer=job.image.trainer,
        wire_job=json.loads(wire_job.model_dump_json()),
        pushes=pushes,
        needs=needs,
        workload=workload,
        max_usd=job.limits.max_usd,
        max_s=job.limits.max_hours * 3600,
        stall_s=job.limits.stall_minutes * 60,
        out=str(job.results.folder),
        notes=notes,
        image_login=login,
        estimated=not tokenised,
        when_silent=job.limits.when_silent,
        hold_s=None if job.limits.hold_minutes is None else job.limits.hold_minutes * 60,
        talk_s=job.results.talk_s,
        evaluate=job.evaluate.asked() if job.evaluate else None,
        merged=job.results.merged,
        notify=job.notify.model_dump() if job.notify else None,
        user=this_user(),
    )


def _shared(job: Job, counted: Counted, family: Family | None, notes: list[str]) -> int:
    """The tokens of prompts that are computed once for several answers; notes it."""
    section = getattr(job, job.stage, None)
    group = section if isinstance(section, Rollouts) else None
    longest = max(counted.lengths) + (group.max_completion_length if group else 0)
    if family is None or sharing.why_apart(job, family, longest) or not counted.common:
        return 0
    if group is None:
        told = "prompts that both answers of a pair have: they are computed, and paid, once"
    else:
        told = "prompts that a micro-batch has once, for as many answers as it holds: priced so"
    notes.append(f"{counted.common:,} of these tokens are {told}")
    return counted.common


def _told_of_merges(job: JobFile, loads: list[Workload]) -> list[str]:
    """What the user is told of merges before a training and of results.merged. Raises
    PreflightError where results.folder's disk has no room for the model."""
    notes, workload = [], loads[-1]
    if merges := sum(one.merges for one in loads):
        notes.append(
            f"{merges} times an adapter is merged into the base on the machine, written to disk "
            "and read again: the result needs that base (`milktea merge`) to be used"
        )
    if not workload.merged_bytes:
        return notes
    folder = job.results.folder
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    size_gb = workload.merged_bytes / 1e9
    if workload.shape is not None and free < workload.merged_bytes:
        raise PreflightError(
            f"results.merged brings a model of {size_gb:.1f} GB home, and {folder} has "
            f"{free / 1e9:.1f} GB left",
            hint="make room, name another results.folder, or leave results.merged out",
        )
    told = f"the merged model, about {size_gb:.1f} GB, comes to {folder}/RUN/merged-bf16"
    return [*notes, told]


def _validate_speed_here(plan: Plan) -> None:
    """Raises PreflightError for a job that this computer's CPU, which the emulator's boxes use,
    cannot train within limits.max_hours."""
    tokens_of_all = sum(w.tokens for w in plan.workload.each)
    seconds = 6 * plan.workload.computed_parameters * tokens_of_all / CPU_FLOP_S
    if seconds > plan.max_s:
        raise PreflightError(
            "without VAST_API_KEY the training runs on this computer's CPU, where "
            f"{plan.workload.model_parameters / 1e9:.1f} billion parameters "
            f"and {tokens_of_all:,.0f} tokens take about {seconds / 3600:,.0f} hours; "
            f"limits.max_hours is {plan.max_s / 3600:.1f}",
            hint="export VAST_API_KEY=... for the real run, or `make plan JOB=...` to see the "
            "emulated market",
        )


def _taken_up(job: JobFile, folder: Path) -> tuple[list[JobFile], list[Adapters]]:
    """The file of each stage, with the LoRA that it trains, and the adapters that come with it."""
    found = [taken_up(part, folder) for part in job.parts]
    parts = [part for part, _ in found]
    if job.stages:
        loras = loras_of(job.stages, [part.lora for part in parts])
        parts = [
            part.model_copy(update={"lora": lora}) for part, lora in zip(parts, loras, strict=True)
        ]
    return parts, [adapters for _, adapters in found]
