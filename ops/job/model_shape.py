"""What the base model is: its config.json, its family and its shape in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ops.catalogue.models import lookup
from ops.errors import PreflightError
from ops.job import hub, old_cards
from ops.job.adapted import validate_names, validate_targets
from ops.job.job_file import JobFile
from trainer import families, memory
from trainer.data.errors import InvalidJob
from trainer.data.weights import module_names
from trainer.wire.prompts import PROMPT_METHODS


def model_config(job: JobFile, notes: list[str]) -> dict[str, Any]:
    """The base model's config.json from its folder or the hub; without a network, what the
    catalogue knows of it. Empty where that is nothing and offer.min_gpu_memory_gib is set. Raises
    PreflightError where it is not set."""
    path = Path(job.model.base) / "config.json"
    entry = lookup(job.model.base)
    try:
        if not path.is_file():
            path = hub.file(job.model.base, "config.json")
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


def family_of(
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
    if old_cards.computes_in_fp16(job):
        if why := family.why_no_fp16():
            raise PreflightError(
                f"{job.model.base} ({family.model_type}) is not computed in fp16: {why}",
                hint='set model.precision = "bf16" and name a card of compute capability 8.0 or '
                'more in offer.gpu_name, or set model.precision = "fp32"',
            )
        notes.extend(old_cards.notes(job))
    if job.training.method in PROMPT_METHODS and (why := family.why_no_prompt()):
        raise PreflightError(
            f"{job.model.base} ({family.model_type}) takes no learned prompt: {why}",
            hint='set training.method = "lora", or name another model',
        )
    _validate_training(job, family)
    if job.training.method == "lora" and (why := family.lora_fault(job.lora)):
        reason, _, hint = why.rpartition(": ")
        raise PreflightError(f"{job.model.base} ({family.model_type}): {reason}", hint=hint)
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
    held = family.holds_experts and job.model.precision != "int8"
    if family.mixture and job.model.precision in ("fp8", "nf4", "int8") and not held:
        notes.append(
            f"all {family.experts} experts of a layer stay in bf16: {job.model.precision} serves "
            "the layers around them, and the memory and price shown count so"
        )
    return family


def _validate_training(job: JobFile, family: families.Family) -> None:
    """Raises PreflightError for settings that this architecture has no place for."""
    training = job.training
    if training.router_aux_loss_coef and not family.mixture:
        raise PreflightError(
            f"training.router_aux_loss_coef: {family.model_type} has no experts to balance",
            hint="take it out",
        )
    layers = family.layers
    if training.method == "freeze" and 0 < layers < training.freeze_trainable_layers:
        raise PreflightError(
            f"training.freeze_trainable_layers = {training.freeze_trainable_layers}: the model has "
            f"{layers}",
            hint=f'set at most {layers}, or training.method = "full"',
        )


def _modules_in(folder: Path) -> set[str]:
    try:
        return module_names(folder)
    except InvalidJob as e:
        raise PreflightError(f"{e}", hint=e.hint) from e


def shape_of(
    job: JobFile, config: dict[str, Any], family: families.Family | None, notes: list[str]
) -> memory.Shape | None:
    """The model's sizes; None where they cannot be known. Raises PreflightError where offer says no
    memory either."""
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
    if job.training.method == "lora":
        validate_targets(job.lora, shape)
        if Path(job.model.base).is_dir() and not family.wrapper and not family.mixture:
            validate_names(job.lora, _modules_in(Path(job.model.base)))
    entry = lookup(job.model.base)
    if entry is not None and entry.parameters:  # towers, and what config.json does not tell of
        beside = entry.parameters - memory.parameters(shape)
        shape = replace(shape, other_parameters=beside)
    return shape
