"""The adapter of a job on a model: PEFT's modules and names, our dropout."""

from __future__ import annotations

import difflib
import re
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from trainer.families import EXPERT_RANK, Family
from trainer.model.dropout import KeyedDropout, TokenKeys
from trainer.model.parts import ModelError, ends_in, family_of, is_linear, is_tied
from trainer.wire.job import Job, Lora


def add_lora(job: Job, model: nn.Module, keys: TokenKeys) -> nn.Module:
    """Add the job's adapter with PEFT's own modules and names. Its dropout is replaced by the
    trainer's, whose mask is keyed by row. Raises ModelError for modules and experts that the model
    does not have."""
    settings = job.lora
    if fault := family_of(model).lora_fault(settings):
        raise ModelError(fault)
    modules, parameters = targets(job, model)
    ranks, alphas = dict(settings.rank_pattern), dict(settings.alpha_pattern)
    asked: dict[str, Any] = {}
    if parameters:
        r = min(settings.r, EXPERT_RANK)
        ends = "|".join(re.escape(p.rsplit(".", 1)[-1]) for p in parameters)
        ranks[rf".*\.experts\.(?:{ends})"] = r
        # keeps the scale of an update
        alphas[rf".*\.experts\.(?:{ends})"] = settings.lora_alpha * r / settings.r
        asked["target_parameters"] = parameters
    asked |= _layers(settings, modules)
    if settings.modules_to_save:
        validate_modules(model, settings.modules_to_save, "modules_to_save")
        asked["modules_to_save"] = settings.modules_to_save
        asked["ensure_weight_tying"] = bool(is_tied(model))
    torch.manual_seed(job.training.seed)  # the adapter's start values
    init: Any = settings.init_lora_weights
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # PEFT only divides by it
        lora_dropout=settings.lora_dropout,
        target_modules=modules,
        exclude_modules=settings.exclude_modules,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True if init == "default" else init,
        base_model_name_or_path=job.model.base,
        task_type="CAUSAL_LM",
        **asked,
    )
    with warnings.catch_warnings():
        # trainer/result/adapter.py writes the right name
        warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path`")
        warnings.filterwarnings("ignore", category=FutureWarning)  # about what PEFT asks
        # PEFT looks among modules only, and experts are parameters
        warnings.filterwarnings("ignore", message="The following .*_pattern keys did not match")
        try:
            peft = get_peft_model(model, config)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, RuntimeError) as why:
            said = " ".join(str(why).split())[:400]
            raise ModelError(f"lora: PEFT cannot adapt the model so: {said}") from why
    validate_patterns(settings, peft)
    keep_types(peft)
    key_dropouts(peft, keys)
    return peft


def _layers(settings: Lora, modules: list[str] | str) -> dict[str, Any]:
    """What PEFT is told of layers_to_transform. Raises ModelError."""
    if settings.layers_to_transform is None:
        return {}
    if modules == "all-linear":
        raise ModelError(
            "lora.layers_to_transform: the modules of this architecture are not known here: name "
            "them in lora.target_modules"
        )
    # an expression has the layers
    named = isinstance(modules, list)
    return {"layers_to_transform": settings.layers_to_transform} if named else {}


def add_adapter(job: Job, peft: Any, config: LoraConfig, keys: TokenKeys) -> None:
    """Add the adapter that is trained to a model that PEFT has wrapped and that has none, with the
    start values that `add_lora` gives. Raises ModelError."""
    torch.manual_seed(job.training.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # about what PEFT asks
        peft.add_adapter("default", config)
    peft.set_adapter("default")
    validate_patterns(job.lora, peft)
    key_dropouts(peft, keys)
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad_("lora_" in name).requires_grad:
            parameter.data = parameter.data.float()


def key_dropouts(peft: nn.Module, keys: TokenKeys) -> None:
    """Make every adapter's dropout draw by `keys`."""
    layer = 0
    for module in peft.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, nn.ModuleDict):
            for name, dropout in dropouts.items():
                if isinstance(dropout, nn.Dropout) and dropout.p:
                    dropouts[name] = KeyedDropout(dropout.p, layer, keys)
                layer += 1


def targets(job: Job, model: nn.Module) -> tuple[list[str] | str, list[str]]:
    """(modules, parameters that hold experts) by the names that PEFT takes: the job's, or with
    "all-linear" those of the family's row; in a model with several towers those of the text tower.
    Raises ModelError."""
    family, wanted = family_of(model), job.lora.target_modules
    if wanted == "all-linear":
        adapted = family.all_linear()
        held = {n for n, m in model.named_modules() if is_linear(m)}
        found = [m for m in adapted.modules if any(ends_in(n, m) for n in held)]
        if not found:
            return "all-linear", []
        return _in_tower(found, family, job.lora.layers_to_transform), list(adapted.experts)
    if isinstance(wanted, str):
        return wanted, []
    modules, parameters = family.named(list(wanted))
    validate_modules(model, modules)
    return _in_tower(modules, family, job.lora.layers_to_transform), parameters


def _in_tower(
    modules: list[str], family: Family, layers: list[int] | int | None
) -> list[str] | str:
    """The modules, as a regular expression where other towers have modules of the same names; PEFT
    accepts no ``layers`` beside such an expression."""
    if not family.tower:
        return modules
    ends = "|".join(re.escape(m) for m in modules)
    chosen = [layers] if isinstance(layers, int) else layers
    at = "" if chosen is None else rf"layers\.(?:{'|'.join(map(str, chosen))})\."
    return rf"{re.escape(family.tower)}\.(?:.*\.)?{at}(?:.*\.)?(?:{ends})"


def start_values(model: nn.Module, job: Job) -> dict[str, Tensor]:
    """Copies of the adapter's start values, by their names in the file, for methods that need them
    at the end (PiSSA); empty for others."""
    if job.training.method != "lora" or job.lora.init_lora_weights != "pissa":
        return {}
    return {
        k: v.detach().to("cpu", copy=True)
        for k, v in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        if "lora_A" in k or "lora_B" in k
    }


def validate_patterns(settings: Lora, peft: nn.Module) -> None:
    """Raises ModelError for a key of rank_pattern or alpha_pattern that no adapted module has."""
    held = (n for n, m in peft.named_modules() if hasattr(m, "lora_A"))
    adapted = [n.removeprefix("base_model.model.") for n in held]  # as PEFT matches them
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(settings, name):
            if not any(re.fullmatch(rf"(.*\.)?({key})", module) for module in adapted):
                raise ModelError(
                    f"lora.{name}: no module with an adapter matches {key!r}: correct the job "
                    f"file; {adapted[0]} is one"
                )


def keep_types(peft: nn.Module) -> None:
    """Make modules of modules_to_save train in fp32: their input is cast to fp32, their output back
    to the model's dtype."""
    for module in peft.modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        like = next(module.original_module.parameters()).dtype
        module.register_forward_pre_hook(
            lambda _m, given: tuple(x.float() if _is_number(x) else x for x in given)
        )
        module.register_forward_hook(lambda _m, _given, made, like=like: _cast(made, like))


def _cast(made: Any, like: torch.dtype) -> Any:
    """Numbers in `like`; of a router, which returns several tensors, each that holds numbers."""
    if isinstance(made, tuple):
        return tuple(_cast(part, like) for part in made)
    return made.to(like) if _is_number(made) else made


def _is_number(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def validate_modules(model: nn.Module, wanted: list[str], key: str = "target_modules") -> None:
    """Raises ModelError for an entry of lora's `key` that matches nothing, naming similar ones."""
    linear = {n.rsplit(".", 1)[-1] for n, module in model.named_modules() if is_linear(module)}
    every = [name for name, _ in model.named_modules()]
    for name in wanted:
        if not any(ends_in(m, name) for m in every):
            close = difflib.get_close_matches(name, linear, 3, 0.4)
            near = f"; close: {', '.join(close)}" if close else ""
            raise ModelError(
                f"lora.{key}: this model has no {name!r}{near}. "
                f"It has {', '.join(sorted(linear))}: "
                'correct the job file, or use target_modules = "all-linear"'
            )
