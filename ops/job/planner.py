"""Make the plan of a job, and find every mistake in the job that can be found without vast.ai. The
rows go through the trainer's own preparation (trainer/data/prepare.py), so that an error here is
the error that the box would have raised an hour later."""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ops.box.transfer import PushFile, sha256_of
from ops.catalogue.models import Entry, lookup
from ops.errors import ConfigError, PreflightError
from ops.hardware import gpus
from ops.job import sent, tokens
from ops.job.adapters import FUNCTION, JUDGE, Adapters, taken_up
from ops.job.config import JobFile
from ops.job.data_files import data_files
from ops.job.mistakes import grouped
from ops.job.needs import largest, needs_of, of_stages, workload_of
from ops.job.plan import Plan
from trainer import families, memory
from trainer.data import estimate, prepare, stage_rows
from trainer.data import template as prompt
from trainer.data.errors import InvalidJob, ModelMissing
from trainer.wire.job import Job
from trainer.wire.stages import STAGES
from trainer.wire.tables import loras_of, told_of_chain

CPU_FLOP_S = 1e11  # of a fast laptop
TRAINER_SUFFIXES = (".py", ".toml", ".html")
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


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
    folder.mkdir(parents=True)
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
    files = _data_files(parts, folder)
    pushes = _pushes(job, files, adapters)
    wire_job = _wire_job(job, run_id, parts, files, adapters)
    notes: list[str] = []
    entry = lookup(job.model.base) if or_estimate else None
    lengths, tokenised = _lengths_of_all(wire_job, folder, pushes, entry, notes)
    config = _model_config(job, notes)
    shape = None
    for part, of_part in zip(parts, lengths, strict=True):
        family = _family(part, config, max(of_part), notes, chained=bool(job.stages))
        shape = _shape(job, config, family, notes)
    notes[:] = dict.fromkeys(notes)
    loads = [
        workload_of(part, of_part, shape, pushes, job.stages[n] if job.stages else None)
        for n, (part, of_part) in enumerate(zip(parts, lengths, strict=True))
    ]
    workload = of_stages(loads)
    needs = largest([needs_of(p, w, shape) for p, w in zip(parts, loads, strict=True)], workload)
    if merges := sum(one.merges for one in loads):
        notes.append(
            f"{merges} times an adapter is merged into the base on the machine, written to disk "
            "and read again: the result needs that base (`milktea merge`) to be used"
        )
    templates = {Path(part.data.template) for part in parts}
    for name in job.offer.gpu_name:
        if (meant := gpus.meant(name)) != [name] and gpus.find(name) is None:
            notes.append(f"offer.gpu_name {name!r} is read as {', '.join(meant)}")
    notes += sent.describe(pushes, next((t for t in templates if t.is_absolute()), None))
    login, boards = job.image.login or "", job.training.report_to
    notes += tokens.describe(job.env, login, job.model.base, boards)
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
    )


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


# -- files -----------------------------------------------------------------------------------------


def _pushes(job: JobFile, files: list[list[PushFile]], adapters: list[Adapters]) -> list[PushFile]:
    """Whatever travels to the box: data, base, adapters, the trainer where the image has none."""
    return [
        *{p.remote: p for of_part in files for p in of_part}.values(),
        *_model_files(job),
        *(push for found in adapters for push in found.pushes),
        *(trainer_files() if job.image.trainer == "push" else []),
    ]


def _model_files(job: JobFile) -> list[PushFile]:
    folder = Path(job.model.base)
    if not folder.is_dir():
        return []
    files = [p for pattern in MODEL_FILES for p in sorted(folder.glob(pattern))]
    if not any(p.suffix == ".safetensors" for p in files):
        raise PreflightError(
            f"{folder} holds no .safetensors file (pickled weights are not taken)",
            hint="save the model with save_pretrained, or name a hub model",
        )
    sent.validate_links(folder, files)
    return [PushFile(p, f"model/{p.name}", sha256_of(p)) for p in files]


def trainer_files() -> list[PushFile]:
    """Our trainer, and what starts it in an image that does not hold it."""
    folder = Path(prepare.__file__).parents[1]
    files = [p for p in sorted(folder.rglob("*")) if p.suffix in TRAINER_SUFFIXES]
    start = Path(__file__).parents[1] / "box" / "bootstrap"
    return [
        *(PushFile(p, f"trainer/{p.relative_to(folder)}", sha256_of(p)) for p in files),
        *(PushFile(p, p.name, sha256_of(p)) for p in sorted(start.iterdir()) if p.is_file()),
    ]


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


def _data_files(parts: list[JobFile], folder: Path) -> list[list[PushFile]]:
    """The data files of each stage; a file of two is sent once."""
    found: list[list[PushFile]] = []
    sent_as: dict[tuple[str, str], str] = {}  # (sha256, how its name ends) -> where on the box
    for part in parts:
        files = data_files(part, folder, first=sum(map(len, found)))
        known = [sent_as.setdefault((p.sha256, Path(p.remote).suffix), p.remote) for p in files]
        found.append([replace(p, remote=r) for p, r in zip(files, known, strict=True)])
    return found


def _wire_job(
    job: JobFile,
    run_id: str,
    parts: list[JobFile],
    files: list[list[PushFile]],
    adapters: list[Adapters],
) -> Job:
    told = [
        _told(part, run_id, of_part, found)
        for part, of_part, found in zip(parts, files, adapters, strict=True)
    ]
    try:
        return Job.model_validate(told_of_chain(job.stages, told) if job.stages else told[0])
    except ValidationError as e:
        raise ConfigError("; ".join(err["msg"] for err in e.errors())) from e


def _told(job: JobFile, run_id: str, files: list[PushFile], adapters: Adapters) -> dict[str, Any]:
    """job.json's object for a stage by itself."""
    data = [
        {
            "path": p.remote,
            "name": p.local.name,
            "sha256": p.sha256,
            "size_bytes": p.local.stat().st_size,
        }
        for p in files
    ]
    held_out = data.pop() if job.data.held_out_file else None
    template, text = _template(job.data.template)
    local = Path(job.model.base).is_dir()
    base, _, revision = (job.model.base, "", "") if local else job.model.base.partition("@")
    return {
        "run_id": run_id,
        "stages": [{"name": job.stage}],
        "model": {
            "base": Path(base).name if local else base,
            "revision": revision or None,
            "path": "model" if local else None,
            "precision": job.model.precision,
        },
        "data": {
            "files": data,
            "held_out": held_out,
            "template": template,
            "template_text": text,
            **job.data.reading_settings(job.stage),
        },
        "lora": job.lora.model_dump(),
        "training": job.training.model_dump(),
        "processes": job.offer.num_gpus,
        "environment": job.env,
        **adapters.told,
        **job.section_on_box(JUDGE, FUNCTION),
    }


def _template(name: str) -> tuple[str, str | None]:
    path = Path(name)
    if path.is_absolute():
        if not path.is_file():
            raise ConfigError(f"data.template: no such file: {path}")
        try:
            return path.stem, path.read_text("utf-8")
        except UnicodeDecodeError as e:
            raise ConfigError(
                f"data.template: {path} is not UTF-8: {e}", hint="save it in UTF-8"
            ) from e
    if name != "chat" and name not in prompt.names():
        raise ConfigError(
            f"data.template: {name!r} is none of {', '.join(prompt.names())}, chat, or a file"
        )
    return name, None


# -- sizes -----------------------------------------------------------------------------------------


class NotTokenised(PreflightError):
    """The data may be valid, but there is no tokenizer here to count its tokens."""


def _lengths_of_all(
    job: Job, folder: Path, pushes: list[PushFile], entry: Entry | None, notes: list[str]
) -> tuple[list[list[int]], bool]:
    """Tokens of each row, by stage, and whether they were counted by the tokenizer: where there is
    none, they are estimated for a model that the catalogue has as `entry`. Raises NotTokenised."""
    found: list[list[int]] = []
    tokenised = True
    for number, (part, place) in enumerate(job.parts()):
        said: list[str] = []
        try:
            lengths = _lengths(part, folder, place, pushes, said)
        except NotTokenised as e:
            if entry is None:
                raise
            tokenised, lengths = False, _estimated(part, folder, place, pushes, entry, said)
            said.append(f"{e}; a run asks for it")
        found.append(lengths)
        of_stage = f"stage {number + 1}, {part.stage}: " if len(job.stages) > 1 else ""
        notes += [of_stage + line for line in said]
    return found, tokenised


def _lengths(
    job: Job, folder: Path, place: str, pushes: list[PushFile], notes: list[str]
) -> list[int]:
    """Tokens of each row that will be trained on, by the trainer's own preparation on links to the
    user's files; the job's run folder is `place` in `folder`. Raises NotTokenised without a
    tokenizer."""
    try:
        with _linked(folder, place, pushes):
            prepared = stage_rows.prepare(job, folder / place)
    except InvalidJob as e:
        listed = "\n".join(f"  {s}" for s in grouped(e.samples))
        kind = NotTokenised if isinstance(e, ModelMissing) else PreflightError
        raise kind(f"{e}\n{listed}".rstrip(), hint=e.hint) from e
    except prompt.TemplateError as e:
        raise PreflightError(str(e)) from e
    except OSError as e:
        raise NotTokenised(
            f"the tokenizer of {job.model.base} cannot be had: {str(e)[:200]}",
            hint="check model.base and the network, or name a local folder",
        ) from e
    lengths = prepared.rows.lengths
    if not lengths:
        raise PreflightError(
            "no row is left to train on",
            hint="`python -m trainer.data FILE` says what became of each",
        )
    notes += [*prepared.rows.summary, *changed_rows(prepared.rows.notes)]
    if prepared.held is not None and STAGES[job.stage].looks:
        notes.append(prepare.looks_at(job, prepared.rows, prepared.held).words)
    notes.append(
        f"{len(lengths):,} rows, {sum(lengths):,} tokens an epoch, longest row "
        f"{max(lengths):,} tokens, stop token trained in every row"
    )
    return lengths


@contextmanager
def _linked(folder: Path, place: str, pushes: list[PushFile]) -> Iterator[None]:
    """While the block runs, the run folder has data/ and model/ as links to the user's files, and
    the folder `place` of a stage."""
    (folder / place).mkdir(parents=True, exist_ok=True)
    for p in pushes:
        if p.remote.startswith(("data/", "model/")):
            link = folder / p.remote
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(p.local)
    try:
        yield
    finally:
        for name in ("data", "model", "cache", "stages"):
            shutil.rmtree(folder / name, ignore_errors=True)


def _estimated(
    job: Job, folder: Path, place: str, pushes: list[PushFile], entry: Entry, notes: list[str]
) -> list[int]:
    """An estimate of each row's tokens, without a tokenizer. Raises PreflightError for defects in
    the rows."""
    with _linked(folder, place, pushes):
        files = [(folder / place / f.path, f.name) for f in job.data.files]
        rows, defects = stage_rows.read(job, files)
    try:
        prepare.validate_rows(defects)
    except InvalidJob as e:
        listed = "\n".join(f"  {s}" for s in e.samples)
        raise PreflightError(f"{e}\n{listed}".rstrip(), hint=e.hint) from e
    if not rows:
        raise PreflightError("no row is left to train on")
    vocabulary = int(entry.values.get("vocabulary") or 150_000)
    density = estimate.Density.of(vocabulary, entry.model_type)
    lengths, limit = estimate.lengths(rows, density), job.data.max_length
    too_long = sum(n > limit for n in lengths)
    notes.append(
        f"{len(rows):,} rows, about {sum(lengths):,} tokens an epoch: an estimate from characters "
        f"({density.ascii:g} of ASCII a token, {density.wide:g} of Chinese), {estimate.OFF:.0%} "
        "off at most on texts that were tried"
    )
    if too_long:
        notes.append(f"about {too_long:,} rows are longer than data.max_length {limit:,}")
    return [min(n, limit) for n in lengths]


def changed_rows(messages: list[str]) -> list[str]:
    """One line about the rows that are dropped or truncated; `messages` has a line for each row."""
    if not messages:
        return []
    more = f"; and {len(messages) - 1:,} more" if len(messages) > 1 else ""
    return [f"{len(messages):,} rows are changed or left out: {messages[0]}{more}"]


def _model_config(job: JobFile, notes: list[str]) -> dict[str, Any]:
    """The base model's config.json from its folder or the hub; without a network, what the
    catalogue knows of it. Empty where that is nothing and offer.min_gpu_memory_gib is set. Raises
    PreflightError where it is not set."""
    path = Path(job.model.base) / "config.json"
    entry = lookup(job.model.base)
    try:
        if not path.is_file():
            from huggingface_hub import hf_hub_download

            base, _, revision = job.model.base.partition("@")
            path = Path(hf_hub_download(base, "config.json", revision=revision or None))
        config = json.loads(path.read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("config.json is no object")
    except (ValueError, OSError, RecursionError) as e:
        if entry is not None:
            source = entry.source_of("hidden")
            notes.append(f"{entry.id} is known from the catalogue ({source.what}, {source.read})")
            config = entry.config()
        elif job.offer.min_gpu_memory_gib is not None:
            notes.append(
                f"memory is not predicted ({str(e)[:80]}); offer.min_gpu_memory_gib is believed"
            )
            config = {}
        else:
            raise PreflightError(
                f"the memory that {job.model.base} needs cannot be predicted: {str(e)[:200]}",
                hint="set offer.min_gpu_memory_gib in the job file",
            ) from e
    if entry is not None and entry.licence:
        gated = ", gated: the hub asks for a token of yours" if entry.gated else ""
        notes.append(f"{entry.id}: licence {entry.licence}{gated}")
    return dict(config)


def _family(
    job: JobFile, config: dict[str, Any], longest: int, notes: list[str], chained: bool = False
) -> families.Family | None:
    """The architecture's entry in families.toml, and its notes; None without a config. Raises
    PreflightError for an architecture that cannot be trained."""
    if not config:
        return None
    try:
        family = families.read(config)
        family.validate_longest(longest)
        every = family.words(longest)
    except families.FamilyError as e:
        raise PreflightError(f"{job.model.base} cannot be trained: {e}", hint=e.hint) from e
    lora = job.training.method == "lora" and job.lora.target_modules == "all-linear"
    if lora and family.mixture and chained:
        raise PreflightError(
            "an adapter of a mixture's experts is not taken up by a later stage",
            hint="name attention's modules in lora.target_modules",
        )
    if lora and family.mixture and (job.stage == "ppo" or job.judge is not None):
        raise PreflightError(
            f"stage {job.stage} holds adapters beside each other, and those of a mixture's experts "
            "cannot be",
            hint="name attention's modules in lora.target_modules",
        )
    notes.extend(w for w in every if lora or not w.startswith(("all-linear", "and all")))
    if family.mixture and job.model.precision in ("fp8", "nf4", "int8"):
        notes.append(
            f"all {family.experts} experts of a layer stay in bf16: {job.model.precision} serves "
            "the layers around them, and the memory and price shown count so"
        )
    return family


def _shape(
    job: JobFile, config: dict[str, Any], family: families.Family | None, notes: list[str]
) -> memory.Shape | None:
    if family is None:
        return None
    try:
        shape = memory.Shape.from_config(config)
    except ValueError as e:
        if job.offer.min_gpu_memory_gib is None:
            raise PreflightError(
                f"the memory that {job.model.base} needs cannot be predicted: {str(e)[:200]}",
                hint="set offer.min_gpu_memory_gib in the job file",
            ) from e
        notes.append(
            f"memory is not predicted ({str(e)[:80]}); offer.min_gpu_memory_gib is believed"
        )
        return None
    entry = lookup(job.model.base)
    if entry is not None and entry.parameters:  # towers, and what config.json does not tell of
        beside = entry.parameters - memory.parameters(shape)
        shape = replace(shape, other_parameters=beside)
    return shape
