"""The model of a job: loaded from disk, given its adapter, set up for packed rows. transformers for
classes, PEFT for adapters."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

from trainer.kernels.attention import name as attention_name
from trainer.kernels.attention import register
from trainer.model.dropout import KeyedDropout, TokenKeys
from trainer.model.loss import target_loss_sum
from trainer.wire.job import Job


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
) -> tuple[nn.Module, dict[str, str]]:
    """(the trainable model on `device`, what computes it by name): the frozen base with LoRA, or
    the parts that full and freeze train. Trained parameters are fp32. The first `checkpoint_layers`
    layers keep only their input for the backward pass. For trainer/loop/sharded.py, `shard` is this
    process's rank: the model stays off the device, and holds weights on rank 0 only."""
    refuse_precision(job.model.precision, device)
    fast = device.type == "cuda" and job.training.method == "lora" and job.model.precision != "int8"
    model = load_base(job, folder, device, quantise=not fast, empty=bool(shard))
    if job.training.method == "lora":
        model = add_lora(job, model, keys)
    else:
        choose_trainable(job, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if fast:
        from trainer.kernels.patch import accelerate_model

        try:
            names = accelerate_model(
                model, job.model.precision, device, checkpoint_layers=checkpoint_layers
            )
            checkpoint_first(model, checkpoint_layers)
            return model.train(), names
        except ValueError as why:
            if job.model.precision in ("fp8", "nf4"):
                raise ModelError(
                    f"precision {job.model.precision} does not serve this model ({why}): set "
                    'model.precision = "bf16"'
                ) from why
            reason = str(why)
    else:
        reason = f"{device.type}, {job.training.method}, {job.model.precision}"
    if checkpoint_layers:
        checkpoint_first(model, checkpoint_layers)
    model = model if shard is not None else model.to(device)
    flash = device.type == "cuda" and job.model.precision != "fp32"
    return model.train(), {
        "layer": f"transformers ({reason})",
        "attention": attention_name(False, device) if flash else "by document",
    }


def refuse_precision(precision: str, device: torch.device) -> None:
    """Raises ModelError for a precision that this device lacks."""
    if precision == "fp8" and device.type != "cuda":
        raise ModelError(
            "precision fp8 needs an NVIDIA GPU of compute capability 8.9 or more, this is a "
            'CPU: set model.precision = "fp32"'
        )
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        least = {"fp8": (8, 9), "bf16": (8, 0)}.get(precision, (0, 0))
        if found < least:
            other = "bf16" if precision == "fp8" and found >= (8, 0) else "fp32"
            raise ModelError(
                f"precision {precision} needs compute capability {least[0]}.{least[1]}, "
                f"{torch.cuda.get_device_name(device)} has "
                f'{found[0]}.{found[1]}: set model.precision = "{other}", or ask for another '
                "card in [offer]"
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
        )  # type: ignore[method-assign]


def load_base(
    job: Job, folder: Path, device: torch.device, quantise: bool = True, empty: bool = False
) -> nn.Module:
    """The frozen base. `empty`: on the meta device, without a byte of its weights."""
    logging.disable_progress_bar()
    register()
    config = AutoConfig.from_pretrained(folder)
    silence_dropout(config)
    dtype = (
        torch.float32
        if job.model.precision == "fp32" or job.training.method == "full"
        else torch.bfloat16
    )
    extra: dict[str, Any] = {}
    if quantise and job.model.precision in ("nf4", "int8"):
        extra["quantization_config"] = quantisation(job.model.precision)
        extra["device_map"] = {"": device}
    settings = {"config": config, "dtype": dtype, "attn_implementation": "milktea"}
    if empty:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(**settings)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, **settings, **extra)
    model.config.use_cache = False
    model.requires_grad_(False)
    return model


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
    """PEFT's own modules and names; its dropout is replaced by ours, whose mask is keyed by row."""
    settings = job.lora
    if settings.target_modules != "all-linear":
        refuse_unknown_modules(model, settings.target_modules)
    torch.manual_seed(job.training.seed)  # the adapter's start values
    config = LoraConfig(
        r=settings.r,
        # PEFT divides by it: any number will do
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True
        if settings.init_lora_weights == "default"
        else settings.init_lora_weights,
        base_model_name_or_path=job.model.base,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # artefact.py writes the right name
        warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path`")
        # PEFT's, about what it asks transformers
        warnings.filterwarnings("ignore", category=FutureWarning)
        peft = get_peft_model(model, config)
    layer = 0
    for module in peft.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, nn.ModuleDict):
            for name, dropout in dropouts.items():
                if isinstance(dropout, nn.Dropout) and dropout.p:
                    dropouts[name] = KeyedDropout(dropout.p, layer, keys)
                layer += 1
    return peft


def start_values(model: nn.Module, job: Job) -> dict[str, Tensor]:
    """Copies of the adapter's start values, by their names in the file, where the method needs them
    at the end (PiSSA); else nothing."""
    if job.training.method != "lora" or job.lora.init_lora_weights != "pissa":
        return {}
    return {
        k: v.detach().to("cpu", copy=True)
        for k, v in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def refuse_unknown_modules(model: nn.Module, wanted: list[str]) -> None:
    """Raises ModelError for a target_modules entry that matches nothing, naming the close ones."""
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or "Conv1D" in type(module).__name__
    }
    every = [name for name, _ in model.named_modules()]
    for name in wanted:
        if not any(m == name or m.endswith("." + name) for m in every):
            close = difflib.get_close_matches(name, linear, 3, 0.4)
            near = f"; close: {', '.join(close)}" if close else ""
            raise ModelError(
                f"lora.target_modules: this model has no {name!r}{near}. It has "
                f"{', '.join(sorted(linear))}: "
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


NOT_FOR_THE_MODEL = ("labels", "rows", "targets_at")


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """(B, T, H) after the final norm, before the head."""
    inner = causal(model)
    return getattr(inner, inner.base_model_prefix)(**inputs, use_cache=False).last_hidden_state


def target_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Summed cross-entropy over the batch's target tokens, fp32 scalar. Only target positions meet
    the head."""
    # (B, T, H)
    hidden = hidden_states(model, **{k: v for k, v in batch.items() if k not in NOT_FOR_THE_MODEL})
    inner = causal(model)
    # labels (B, T), already shifted
    head, config, labels = inner.get_output_embeddings(), inner.config, batch["labels"]
    odd = (
        getattr(config, "final_logit_softcapping", None)
        or getattr(config, "logit_scale", None)
        or getattr(config, "logits_scaling", None)
    )
    if type(head) is nn.Linear and head.bias is None and not odd:
        return target_loss_sum(hidden, head.weight, labels, batch["targets_at"])
    if odd:
        raise ModelError(
            f"{type(inner).__name__} scales or caps its logits, which this trainer does not: "
            "name another base model"
        )
    chosen = hidden.flatten(0, 1).index_select(0, batch["targets_at"])  # (targets, H)
    return nn.functional.cross_entropy(
        head(chosen).float(), labels.flatten().index_select(0, batch["targets_at"]), reduction="sum"
    )
