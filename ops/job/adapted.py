"""What a job's adapter is put on, as far as it is known before a machine has the model."""

from __future__ import annotations

import re
from collections.abc import Collection

from ops.errors import PreflightError
from trainer import families, memory
from trainer.wire.job import Lora


def validate_targets(lora: Lora, shape: memory.Shape) -> None:
    """Raises PreflightError for target modules that no layer has, and where none is left of
    them."""
    named, excluded = lora.counted_modules, lora.exclude_modules
    try:
        memory.adapter_parameters(shape, 1, named)
    except ValueError as e:
        raise PreflightError(
            f"lora.{e}", hint='correct lora.target_modules, or set it to "all-linear"'
        ) from e
    experts = families.EXPERT_PARTS if shape.mixture is not None else ()
    left = [*shape.linears(), *experts] if named == "all-linear" else named
    if isinstance(excluded, list) and all(n.split(".")[-1] in excluded for n in left):
        raise PreflightError(
            "lora.exclude_modules leaves nothing to adapt", hint="take some of it out"
        )


def validate_names(lora: Lora, modules: Collection[str]) -> None:
    """Raises PreflightError for an expression, a pattern or a module to save that matches none of
    `modules`: all in a model's files, which lack a head that is the embedding."""
    modules, wanted = {*modules, "lm_head"}, lora.target_modules
    told = [("modules_to_save", re.escape(name)) for name in lora.modules_to_save or []]
    told += [("rank_pattern", key) for key in lora.rank_pattern]
    told += [("alpha_pattern", key) for key in lora.alpha_pattern]
    if isinstance(wanted, str) and wanted != "all-linear":
        told.append(("target_modules", wanted))
    for key, pattern in told:
        # at the end of a name, which may be longer in the model than in its files
        if not any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in modules):
            raise PreflightError(
                f"lora.{key}: no module of the model matches {pattern!r}",
                hint=f"correct the job file; {max(modules, key=len)} is a module",
            )
