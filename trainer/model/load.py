"""The model of a job: loaded from disk, given its adapter, set up for packed rows.

transformers for classes, PEFT for adapters, trainer/families.py for what differs between them.
"""

from __future__ import annotations

import difflib
import json
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.quantization_config import Mxfp4Config

from trainer import families
from trainer.families import EXPERT_RANK, Family, FamilyError
from trainer.kernels import experts, rotary
from trainer.kernels.attention import name as attention_name
from trainer.kernels.attention import register
from trainer.model.balance import Balance, NoBalance, balance_of
from trainer.model.dropout import KeyedDropout, KeyedNoise, TokenKeys
from trainer.model.loss import chunks, log_probs_of, target_loss_sum
from trainer.wire.job import Job, Lora


class ModelError(ValueError):
    """A model, or a setting for it, that is refused before the first step; the text ends with what
    to do."""


def load(
    job: Job,
    folder: Path,
    device: torch.device,
    keys: TokenKeys,
    checkpoint_layers: int = 0,
    shard: int | None = None,
    longest: int | None = None,
) -> tuple[nn.Module, dict[str, str]]:
    """(the trainable model on `device`, what computes it by name): the frozen base with LoRA, or
    the parts that full and freeze train. Trained parameters are fp32. The first `checkpoint_layers`
    layers keep only their input for the backward pass; `longest` is the longest row in tokens. For
    trainer/loop/sharded.py, `shard` is this process's rank: the model stays off the device, and
    holds weights on rank 0 only. Raises ModelError."""
    validate_precision(job.model.precision, device)
    model = load_base(job, folder, device, not takes_fast_path(job, device), bool(shard), longest)
    return assemble(job, model, device, keys, checkpoint_layers, shard, longest)


def takes_fast_path(job: Job, device: torch.device) -> bool:
    """Whether the layers are to compute by trainer/kernels, which quantises by itself."""
    lora, precision = job.training.method == "lora", job.model.precision
    return device.type == "cuda" and lora and precision != "int8"


def assemble(
    job: Job,
    model: nn.Module,
    device: torch.device,
    keys: TokenKeys,
    checkpoint_layers: int = 0,
    shard: int | None = None,
    longest: int | None = None,
    fast: bool | None = None,
) -> tuple[nn.Module, dict[str, str]]:
    """What `load` returns, of a base that `load_base` loaded. `fast`: whether layers compute by
    trainer/kernels; None: where `takes_fast_path`. Raises ModelError."""
    precision = job.model.precision
    if job.training.method == "lora":
        model = add_lora(job, model, keys)
    else:
        choose_trainable(job, model)
    names = prepare(model)
    try:
        causal(model).balance = balance_of(job, causal(model))
    except NoBalance as why:
        raise ModelError(str(why)) from why
    if alpha := job.training.neftune_noise_alpha:
        causal(model).get_input_embeddings().register_forward_hook(KeyedNoise(alpha, keys))
        names["noise"] = f"NEFTune, alpha {alpha:g}"
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if takes_fast_path(job, device) if fast is None else fast:
        from trainer.kernels.patch import accelerate_model

        try:
            names |= accelerate_model(model, precision, device, checkpoint_layers=checkpoint_layers)
            if family_of(model).fused and not names["layer"].startswith("fused"):
                # the plan counted what the fused layer keeps: transformers' keeps more
                checkpoint_layers = len(decoder_layers(model))
            checkpoint_first(model, checkpoint_layers)
            return model.train(), names
        except ValueError as why:
            if precision in ("fp8", "nf4"):
                raise ModelError(
                    f"precision {precision} does not serve this model ({why}): "
                    'set model.precision = "bf16"'
                ) from why
            reason = str(why)
    else:
        reason = f"{device.type}, {job.training.method}, {precision}"
    if checkpoint_layers:
        checkpoint_first(model, checkpoint_layers)
    model = model if shard is not None else model.to(device)
    flash = device.type == "cuda" and precision != "fp32"
    names["layer"] = f"transformers ({reason})"
    names["attention"] = attention_name(False, device) if flash else "by document"
    if not family_of(model).packs(longest):
        names["attention"] = "transformers' own"
    return model.train(), names


def family_in(folder: Path, longest: int = 0) -> Family:
    """The family of a model's folder. Raises ModelError for one that cannot be trained, or not on
    rows of `longest` tokens."""
    try:
        found = families.read(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        found.validate_longest(longest)
        return found
    except FamilyError as why:
        raise ModelError(f"{why}: {why.hint}") from why


def family_of(model: nn.Module) -> Family:
    """Of a loaded model, PEFT's wrappers or not."""
    inner = causal(model)
    if not hasattr(inner, "family"):
        inner.family = families.read(inner.config.to_dict())
    family: Family = inner.family
    return family


def prepare(model: nn.Module) -> dict[str, str]:
    """What no class of transformers or PEFT does by itself: angles by document, adapters of experts
    beside their weights. Returns what was done, by name."""
    names = {}
    if rotary.by_document(model):
        names["rotary"] = "by document"
    if family_of(model).mixture and hasattr(model, "peft_config"):
        if layers := experts.attach(model):
            names["experts"] = f"split adapters, {layers} layers"
    return names


def validate_precision(precision: str, device: torch.device) -> None:
    """Raises ModelError for a precision that this device lacks."""
    if precision == "fp8" and device.type != "cuda":
        raise ModelError(
            "precision fp8 needs an NVIDIA GPU of compute capability 8.9 or more, this is a CPU: "
            'set model.precision = "fp32"'
        )
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        # nf4 and int8 compute in bf16
        least = {"fp8": (8, 9), "fp32": (0, 0)}.get(precision, (8, 0))
        if found < least:
            other = "bf16" if precision == "fp8" and found >= (8, 0) else "fp32"
            raise ModelError(
                f"precision {precision} needs compute capability {least[0]}.{least[1]}, "
                f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: "
                f'set model.precision = "{other}", or ask for another card in [offer]'
            )


def checkpoint_first(model: nn.Module, count: int) -> None:
    """Recomputes the first `count` decoder layers in the backward pass, but for those that are
    fused: they do by themselves. Dropout is keyed, so they compute the same again."""
    for layer in decoder_layers(model)[:count]:
        if getattr(layer, "is_fused", False):
            continue
        forward = layer.forward
        layer.forward = lambda *args, forward=forward, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, **kwargs
        )


def load_base(
    job: Job,
    folder: Path,
    device: torch.device,
    quantise: bool = True,
    empty: bool = False,
    longest: int | None = None,
) -> nn.Module:
    """The frozen base, its `family` on it. `empty`: on the meta device, without a byte of its
    weights. Of a model with towers for pictures and sound LoRA keeps the text tower alone. Where
    rows of up to `longest` tokens cannot be packed, attention is transformers' own. Raises
    ModelError."""
    family = family_in(folder)
    logging.disable_progress_bar()
    register()
    config = AutoConfig.from_pretrained(folder)
    for part in (config, config.get_text_config()):
        silence_dropout(part)
    whole = job.model.precision == "fp32" or job.training.method == "full"
    settings: dict[str, Any] = {
        "config": config,
        "dtype": torch.float32 if whole else torch.bfloat16,
    }
    if family.packs(longest):
        settings["attn_implementation"] = "milktea"
    extra: dict[str, Any] = {}
    if quantise and job.model.precision in ("nf4", "int8"):
        extra["quantization_config"] = quantisation(job.model.precision)
        extra["device_map"] = {"": device}
    elif method := restored_from(config):
        extra["quantization_config"] = method
    auto = auto_class(config.model_type)
    if empty:
        with torch.device("meta"):
            model = auto.from_config(**settings)
    else:
        model = auto.from_pretrained(folder, **settings, **extra)
    model.config.use_cache = False
    model.requires_grad_(False)
    model.family = family
    if family.tower and job.training.method == "lora":
        drop_other_towers(model, family.tower)
    return cast(nn.Module, model)


def auto_class(kind: str) -> Any:
    """The class of transformers' that loads models of this type."""
    text = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if text else AutoModelForImageTextToText


def restored_from(config: Any) -> Any:
    """How transformers restores the values of a checkpoint that is quantised, or None."""
    told = getattr(config, "quantization_config", None) or {}
    told = told if isinstance(told, dict) else told.to_dict()
    if told.get("quant_method") == "mxfp4":
        return Mxfp4Config(dequantize=True)
    if told.get("quant_method") == "fp8":
        return FineGrainedFP8Config(dequantize=True)
    return None


def drop_other_towers(model: nn.Module, tower: str) -> None:
    """Takes the towers for pictures and sound out of a model that is only given text: their names
    and those of their weights do not appear in an adapter's file."""
    at, _, kept = tower.rpartition(".")
    parent = model.get_submodule(at)
    for name in [n for n, _ in parent.named_children() if n != kept and n != "lm_head"]:
        setattr(parent, name, None)


def quantisation(precision: str) -> Any:
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def silence_dropout(config: Any) -> None:
    """The base model's own dropout draws from a generator, so that order would change results: off.
    lora_dropout is keyed instead."""
    for name in (
        "attention_dropout",
        "hidden_dropout",
        "attn_pdrop",
        "resid_pdrop",
        "embd_pdrop",
        "dropout",
        "activation_dropout",
    ):
        if getattr(config, name, None):
            setattr(config, name, 0.0)


def add_lora(job: Job, model: nn.Module, keys: TokenKeys) -> nn.Module:
    """PEFT's own modules and names; its dropout is replaced by ours, whose mask is keyed by row.
    Raises ModelError for modules and experts that the model does not have."""
    settings = job.lora
    modules, parameters = targets(job, model)
    ranks, alphas = dict(settings.rank_pattern), dict(settings.alpha_pattern)
    asked: dict[str, Any] = {}
    if parameters:
        validate_experts(job)
        r = min(settings.r, EXPERT_RANK)
        ends = "|".join(re.escape(p.rsplit(".", 1)[-1]) for p in parameters)
        ranks[rf".*\.experts\.(?:{ends})"] = r
        # the scale of an update stays as it is
        alphas[rf".*\.experts\.(?:{ends})"] = settings.lora_alpha * r / settings.r
        asked["target_parameters"] = parameters
    if settings.layers_to_transform is not None and isinstance(modules, list):
        asked["layers_to_transform"] = settings.layers_to_transform
    if settings.modules_to_save:
        validate_modules(model, settings.modules_to_save, "modules_to_save")
        asked["modules_to_save"] = settings.modules_to_save
        asked["ensure_weight_tying"] = bool(_tied(model))
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
        # it looks among modules, and experts are parameters
        warnings.filterwarnings("ignore", message="The following .*_pattern keys did not match")
        try:
            peft = get_peft_model(model, config)
        except ValueError as why:
            raise ModelError(f"lora: PEFT finds nothing to adapt: {why}") from why
    validate_patterns(settings, peft)
    keep_types(peft)
    layer = 0
    for module in peft.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, nn.ModuleDict):
            for name, dropout in dropouts.items():
                if isinstance(dropout, nn.Dropout) and dropout.p:
                    dropouts[name] = KeyedDropout(dropout.p, layer, keys)
                layer += 1
    return peft


def targets(job: Job, model: nn.Module) -> tuple[list[str] | str, list[str]]:
    """(modules, parameters that hold experts) as PEFT wants them named: the job's, or with
    "all-linear" those of the family's row. In a model with several towers they are those of the
    text tower. Raises ModelError."""
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
    """A regular expression where other towers have modules of the same names; PEFT takes no
    ``layers`` beside one."""
    if not family.tower:
        return modules
    ends = "|".join(re.escape(m) for m in modules)
    chosen = [layers] if isinstance(layers, int) else layers
    at = "" if chosen is None else rf"layers\.(?:{'|'.join(map(str, chosen))})\."
    return rf"{re.escape(family.tower)}\.(?:.*\.)?{at}(?:.*\.)?(?:{ends})"


def ends_in(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith("." + wanted)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or "Conv1D" in type(module).__name__


def validate_experts(job: Job) -> None:
    """Raises ModelError for settings that adapters of experts cannot have."""
    settings = job.lora
    odd = [
        name
        for name, on in (
            ("lora_dropout", settings.lora_dropout),
            ("use_dora", settings.use_dora),
            ("init_lora_weights", settings.init_lora_weights == "pissa"),
        )
        if on
    ]
    if odd:
        raise ModelError(
            f"lora.{odd[0]} does not work on the experts of a mixture: leave it out, or name only "
            "attention's modules in lora.target_modules"
        )


def start_values(model: nn.Module, job: Job) -> dict[str, Tensor]:
    """Copies of the adapter's start values, by their names in the file, where the method needs them
    at the end (PiSSA); else nothing."""
    if job.training.method != "lora" or job.lora.init_lora_weights != "pissa":
        return {}
    return {
        k: v.detach().to("cpu", copy=True)
        for k, v in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        if "lora_A" in k or "lora_B" in k
    }


def validate_patterns(settings: Lora, peft: nn.Module) -> None:
    """Raises ModelError for a key of rank_pattern or alpha_pattern that no adapted module has."""
    adapted = [n for n, m in peft.named_modules() if hasattr(m, "lora_A")]
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(settings, name):
            if not any(re.fullmatch(rf"(.*\.)?({key})", module) for module in adapted):
                raise ModelError(
                    f"lora.{name}: no module with an adapter matches {key!r}: correct the job "
                    f"file; {adapted[0].removeprefix('base_model.model.')} is one"
                )


def keep_types(peft: nn.Module) -> None:
    """A module of modules_to_save trains in fp32: what goes in is made fp32, and what comes out
    what it was in the model."""
    for module in peft.modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        like = next(module.original_module.parameters()).dtype
        module.register_forward_pre_hook(
            lambda _m, given: tuple(x.float() if _is_number(x) else x for x in given)
        )
        module.register_forward_hook(lambda _m, _given, made, like=like: made.to(like))


def _is_number(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _tied(model: nn.Module) -> bool:
    config: Any = causal(model).config
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def validate_modules(model: nn.Module, wanted: list[str], key: str = "target_modules") -> None:
    """Raises ModelError for an entry of lora's `key` that matches nothing, naming the close
    ones."""
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


def choose_trainable(job: Job, model: nn.Module) -> None:
    """full: everything; freeze: the last `freeze_trainable_layers` layers."""
    if job.training.method == "full":
        model.requires_grad_(True)
        return
    layers = decoder_layers(model)
    for layer in layers[-job.training.freeze_trainable_layers :]:
        layer.requires_grad_(True)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len)


def causal(model: nn.Module) -> Any:
    """The transformers model inside PEFT's wrappers."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else model


NOT_FOR_THE_MODEL = ("labels", "rows", "targets_at")  # and what a stage adds, by "stage/..."


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Of a micro-batch what the model's forward takes."""
    return {
        k: v for k, v in batch.items() if k not in NOT_FOR_THE_MODEL and not k.startswith("stage/")
    }


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """(B, T, H) after the final norm, before the head. Of a model with several towers, the text
    tower's."""
    states: Tensor = decoded(model, **inputs).last_hidden_state
    return states


def decoded(model: nn.Module, **inputs: Any) -> Any:
    """What the layers return, before the head."""
    inner = causal(model)
    tower = family_of(model).tower
    if tower:
        core = inner.get_submodule(tower)
    else:
        core = getattr(inner, inner.base_model_prefix, None) or inner.model
    return core(**inputs, use_cache=False)


def target_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Summed cross-entropy over the batch's target tokens, fp32 scalar. Only target positions meet
    the head. Where no row of the table says how logits come about the model's own forward makes
    them."""
    inputs = model_inputs(batch)
    inner, family = causal(model), family_of(model)
    balance: Balance | None = getattr(inner, "balance", None)
    asked = {} if balance is None else {"output_router_logits": True}
    at = batch["targets_at"]
    made = (inner if family.own_logits else partial(decoded, model))(**inputs, **asked)
    loss = _cross_entropy(inner, family, made, batch["labels"], at)
    if balance is not None:
        loss = loss + balance.added(made.router_logits, inputs.get("attention_mask"), len(at))
    return loss


def ends(model: nn.Module) -> list[nn.Module]:
    """The embedding, and the layer that makes logits, as far as the model has them."""
    inner: Any = causal(model)
    found = (inner.get_input_embeddings(), inner.get_output_embeddings())
    return [layer for layer in found if layer is not None]


def _head(inner: Any) -> Any:
    """The layer that makes logits; the trained one, where it is trained whole beside an adapter."""
    head = inner.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper) and not head.disable_adapters:
        return head.modules_to_save[head.active_adapters[0]]
    return head


def _cross_entropy(inner: Any, family: Family, made: Any, labels: Tensor, at: Tensor) -> Tensor:
    """Summed over the targets: of `made`, which is what the layers return or, where the family's
    own forward makes its logits, what that does. labels (B, T) are already shifted."""
    if family.own_logits:
        logits = made.logits.flatten(0, 1).index_select(0, at)
    else:
        head = _head(inner)
        scale, cap = logit_rules(inner, family)
        hidden = made.last_hidden_state  # (B, T, H)
        if type(head) is nn.Linear and head.bias is None:
            weight = head.weight.to(hidden.dtype)  # one that trains is fp32
            return target_loss_sum(hidden, weight, labels, at, scale, cap)
        logits = head(hidden.flatten(0, 1).index_select(0, at)).float() * scale
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return nn.functional.cross_entropy(
        logits.float(), labels.flatten().index_select(0, at), reduction="sum"
    )


def target_log_probs(
    model: nn.Module, batch: dict[str, Any], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(log p of each target token of the batch, entropy where it stands), fp32 (targets,), in the
    order of `targets_at`. Only target positions meet the head, and no logits are kept where a row
    of the table says how logits come about."""
    inner, family = causal(model), family_of(model)
    labels, at, inputs = batch["labels"], batch["targets_at"], model_inputs(batch)
    head = inner.get_output_embeddings()
    if not family.own_logits and type(head) is nn.Linear and head.bias is None:
        hidden = hidden_states(model, **inputs)
        rules = logit_rules(inner, family)
        return log_probs_of(hidden, head.weight, labels, at, *rules, temperature)
    if family.own_logits:
        logits = inner(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, at)
    else:
        logits = head(hidden_states(model, **inputs).flatten(0, 1).index_select(0, at))
    every = (logits.float() / temperature).log_softmax(-1)
    chosen = every.gather(1, labels.flatten().index_select(0, at)[:, None])[:, 0]
    return chosen, -(every.detach().exp() * every.detach()).sum(-1)


def target_facts(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """(summed cross-entropy, how many are the likeliest token) of the batch's targets, fp64 (2,);
    without gradients, and without what balances the experts of a mixture."""
    inner, family = causal(model), family_of(model)
    labels, at, inputs = batch["labels"], batch["targets_at"], model_inputs(batch)
    wanted = labels.flatten().index_select(0, at)
    head, made = _head(inner), None
    if family.own_logits:
        made = inner(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, at)
    else:
        hidden = hidden_states(model, **inputs).flatten(0, 1).index_select(0, at)
    scale, cap = (1.0, None) if family.own_logits else logit_rules(inner, family)
    found = torch.zeros(2, dtype=torch.float64, device=labels.device)
    vocabulary = inner.config.get_text_config().vocab_size
    for part in chunks(len(at), vocabulary):
        logits = head(hidden[part].to(head.weight.dtype)) if made is None else made[part]
        logits = logits.float() * scale
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        found[0] += nn.functional.cross_entropy(logits, wanted[part], reduction="sum")
        found[1] += (logits.argmax(-1) == wanted[part]).sum()
    return found


def logit_rules(inner: nn.Module, family: Family) -> tuple[float, float | None]:
    """(what logits are multiplied by, what they are capped at)."""
    config: Any = inner.config
    text = config.get_text_config()
    multiply, divide, cap = (
        getattr(text, family.row[key], None) if family.row[key] else None
        for key in ("multiply", "divide", "cap")
    )
    scale = (1.0 if multiply is None else multiply) / (divide or 1.0)
    return float(scale), None if cap is None else float(cap)
