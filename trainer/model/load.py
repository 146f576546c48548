"""The model of a job: loaded from disk, given its adapter, set up for packed rows.

transformers for classes, PEFT for adapters, trainer/families.py for what differs between them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.quantization_config import Mxfp4Config

from trainer import families
from trainer.families import Family, FamilyError
from trainer.kernels import delta, experts, rotary
from trainer.kernels.attention import name as attention_name
from trainer.kernels.attention import register
from trainer.kernels.backend import half, is_old
from trainer.kernels.base_parts import BaseParts
from trainer.model.balance import NoBalance, balance_of
from trainer.model.dropout import KeyedNoise, TokenKeys
from trainer.model.files import read_config, read_model
from trainer.model.lora import add_lora
from trainer.model.parts import ModelError, causal, decoder_layers, family_of, is_tied
from trainer.model.prompts import add_prompt
from trainer.wire.job import Job
from trainer.wire.prompts import PROMPT_METHODS

# their choice is a draw while they train
DRAWING_ROUTERS = ("PhimoeTopKRouter",)


def load(
    job: Job,
    folder: Path,
    device: torch.device,
    keys: TokenKeys,
    checkpoint_layers: int = 0,
    shard: int | None = None,
    longest: int | None = None,
) -> tuple[nn.Module, dict[str, str]]:
    """(the trainable model on `device`, what computes it by name): the frozen base with LoRA or a
    learned prompt, or the parts that full and freeze train. Trained parameters are fp32. The first
    `checkpoint_layers` layers keep only their input for the backward pass; `longest` is the longest
    row in tokens. Where processes keep parts of the model, `shard` is this process's rank, and only
    rank 0 reads weights. A model of method "full" then stays off the device, for
    trainer/loop/sharded.py; of another the base is in parts on the devices. Raises ModelError."""
    validate_precision(job.model.precision, device)
    model = load_base(job, folder, device, not takes_fast_path(job, device), bool(shard), longest)
    return assemble(job, model, device, keys, checkpoint_layers, shard, longest)


def add_trained(job: Job, model: nn.Module, keys: TokenKeys) -> nn.Module:
    """The frozen base with what the job trains: its adapter, its learned prompt, or parts of its
    own. Raises ModelError."""
    method = job.training.method
    if method in PROMPT_METHODS:
        return add_prompt(job, model)
    if method == "lora":
        return add_lora(job, model, keys)
    choose_trainable(job, model)
    return model


def takes_fast_path(job: Job, device: torch.device) -> bool:
    """Whether the layers are to compute by trainer/kernels, which quantises by itself; in fp16
    they do not."""
    lora, precision = job.training.method == "lora", job.model.precision
    if device.type != "cuda" or is_old(device):
        return False
    return lora and precision not in ("int8", "fp16")


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
    precision, parts = job.model.precision, None
    if shard is not None and job.training.method != "full":
        parts = BaseParts(device, shard, dist.get_world_size())
        checkpoint_layers = len(decoder_layers(model))  # else backward would need all weights
    model = add_trained(job, model, keys)
    names = prepare(model)
    try:
        causal(model).balance = balance_of(job, causal(model))
    except NoBalance as why:
        raise ModelError(str(why)) from why
    if alpha := job.training.neftune_noise_alpha:
        causal(model).get_input_embeddings().register_forward_hook(KeyedNoise(alpha, keys))
        names["noise"] = f"NEFTune, alpha {alpha:g}"
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data.float()
    if takes_fast_path(job, device) if fast is None else fast:
        from trainer.kernels.patch import accelerate_model

        try:
            names |= accelerate_model(
                model, precision, device, checkpoint_layers=checkpoint_layers, parts=parts
            )
            if family_of(model).fused and not names["layer"].startswith("fused"):
                # the plan counted what the fused layer keeps: transformers' keeps more
                checkpoint_layers = len(decoder_layers(model))
            checkpoint_first(model, checkpoint_layers)
            return _in_parts(model, parts, names).train(), names
        except ValueError as why:
            if precision in ("fp8", "nf4"):
                raise ModelError(
                    f"precision {precision} does not serve this model ({why}): "
                    'set model.precision = "bf16"'
                ) from why
            reason = str(why)
    else:
        reason = f"{device.type}, {job.training.method}, {precision}"
    hold_experts(model, precision, names)
    checkpoint_first(model, checkpoint_layers)
    if parts is not None:
        parts.place(model, decoder_layers(model))
    elif shard is None:
        model = model.to(device)
    flash = device.type == "cuda" and precision != "fp32" and not is_old(device)
    names["layer"] = f"transformers ({reason})"
    names["attention"] = attention_name(False, device) if flash else "by document"
    if why_unpacked(family_of(model), longest, device, precision):
        names["attention"] = "transformers' own"
    return _in_parts(model, parts, names).train(), names


def _in_parts(model: nn.Module, parts: BaseParts | None, names: dict[str, str]) -> nn.Module:
    """The model, whose layers gather what they compute with where `parts` has cut them."""
    if parts is not None:
        if is_tied(model):
            causal(model).tie_weights()  # what left the meta device is two
        parts.attach(decoder_layers(model))
        causal(model).base_parts = parts
        names["base"] = f"{names.get('base', '')}, in parts over {parts.world} processes".lstrip(
            ", "
        )
    return model


def family_in(folder: Path, longest: int = 0) -> Family:
    """The family of a model's folder. Raises ModelError for one that cannot be trained, or not on
    rows of `longest` tokens."""
    try:
        found = families.read(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        found.validate_longest(longest)
        return found
    except FamilyError as why:
        raise ModelError(f"{why}: {why.hint}") from why


def why_unpacked(family: Family, longest: int | None, device: torch.device, precision: str) -> str:
    """Why rows of up to `longest` tokens are computed one by one on `device`, or "" where they may
    be packed. A first call on a GPU may take seconds: it tries what would compute them."""
    why = family.why_unpacked(longest)
    if why or not family.row["delta"]:
        return why
    delta.trust(family.config, device)
    return delta.why_not(device, precision)


def prepare(model: nn.Module) -> dict[str, str]:
    """Adds what no class of transformers or PEFT does: rotary angles by document, adapters of
    experts beside their weights. Returns what was done, by name."""
    names = {}
    if still_routers(model):
        names["router"] = "as at inference"
    if rotary.by_document(model):
        names["rotary"] = "by document"
    delta.by_document(model)
    if family_of(model).mixture and hasattr(model, "peft_config"):
        if layers := experts.attach(model):
            names["experts"] = f"split adapters, {layers} layers"
    return names


def hold_experts(model: nn.Module, precision: str, names: dict[str, str]) -> None:
    """Quantises the experts for NF4, which bitsandbytes leaves as they are; `names` says so. Raises
    ModelError for a width that NF4 does not take."""
    try:
        if layers := experts.quantise(model, precision):
            names["base"] = f"{precision}, experts of {layers} layers too"
    except ValueError as why:
        raise ModelError(f"precision {precision} does not serve this model ({why})") from why


def validate_precision(precision: str, device: torch.device) -> None:
    """Raises ModelError for a precision that this device lacks."""
    if precision == "fp8" and device.type != "cuda":
        raise ModelError(
            "precision fp8 needs an NVIDIA GPU of compute capability 8.9 or more, this is a CPU: "
            'set model.precision = "fp32"'
        )
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        each = {"fp8": (8, 9), "fp32": (0, 0), "bf16": (8, 0), "int8": (7, 5)}
        if found < (least := each.get(precision, (7, 0))):
            other = "bf16" if found >= (8, 0) else "fp16" if found >= (7, 0) else "fp32"
            raise ModelError(
                f"precision {precision} needs compute capability {least[0]}.{least[1]}, "
                f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: "
                f'set model.precision = "{other}", or ask for another card in [offer]'
            )


def validate_half(family: Family, precision: str, device: torch.device) -> None:
    """Raises ModelError for a family whose numbers do not fit fp16, where that is computed in."""
    if precision != "fp32" and half(precision, device) is torch.float16:
        if why := family.why_no_fp16():
            raise ModelError(
                f"{family.model_type} is not computed in fp16: {why}: set model.precision = "
                '"fp32", or take a card of compute capability 8.0 or more and "bf16"'
            )


def checkpoint_first(model: nn.Module, count: int) -> None:
    """Recomputes the first `count` decoder layers in the backward pass. Fused layers do so by
    themselves. Dropout is keyed, so a layer computes the same again."""
    for layer in decoder_layers(model)[:count]:
        if getattr(layer, "is_fused", False):
            continue
        forward: Any = layer.forward
        layer.plain_forward = forward
        layer.forward = lambda *args, forward=forward, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, **kwargs
        )


def uncheckpoint(layers: nn.ModuleList) -> None:
    """Takes back what `checkpoint_first` did."""
    for layer in layers:
        plain: Any = layer.__dict__.pop("plain_forward", None)
        if plain is not None:
            layer.forward = plain


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
    validate_half(family, job.model.precision, device)
    logging.disable_progress_bar()
    register()
    config = read_config(folder)
    silence_dropout(config)
    whole = job.model.precision == "fp32" or job.training.method == "full"
    settings: dict[str, Any] = {
        "config": config,
        "dtype": torch.float32 if whole else half(job.model.precision, device),
    }
    if not why_unpacked(family, longest, device, job.model.precision):
        settings["attn_implementation"] = "milktea"
    extra: dict[str, Any] = {}
    if quantise and job.model.precision in ("nf4", "int8"):
        extra["quantization_config"] = quantisation(job.model.precision, device)
        extra["device_map"] = {"": device}
    elif method := restored_from(config):
        extra["quantization_config"] = method
    auto = auto_class(config.model_type)
    if empty:
        with torch.device("meta"):
            model = auto.from_config(**settings)
    else:
        model = read_model(auto, folder, **settings, **extra)
    model.config.use_cache = False
    model.requires_grad_(False)
    model.family = family
    if family.tower and not job.training.trains_base:
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


def quantisation(precision: str, device: torch.device) -> Any:
    """How bitsandbytes holds the base."""
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=half(precision, device),
    )


def silence_dropout(config: Any) -> None:
    """Turns off the base model's own dropout and noise, in `config` and in those within it: it
    draws from a generator, so the order of rows would change the result. lora_dropout is keyed
    instead."""
    noise = {"input_jitter_noise"}
    if config.model_type != "phimoe":  # its routers' threshold
        noise |= {"router_jitter_noise"}
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            silence_dropout(value)
        elif name == "moe_jitter_eps":  # DBRX's, which draws unless it is None
            setattr(config, name, None)
        elif ("drop" in name or name in noise) and type(value) in (int, float):
            setattr(config, name, type(value)(0))  # MPT's attn_pdrop must stay an int


def still_routers(model: nn.Module) -> int:
    """Makes routers that draw experts at random in training choose as at inference, and returns how
    many: what a draw gives would depend on the order of rows, and a run could not go on from a
    checkpoint to the same result."""

    def hold(module: nn.Module, given: object) -> None:
        module.training = False

    found = [m for m in model.modules() if type(m).__name__ in DRAWING_ROUTERS]
    for module in found:
        module.register_forward_pre_hook(hold)
    return len(found)


def choose_trainable(job: Job, model: nn.Module) -> None:
    """full: everything; freeze: the last `freeze_trainable_layers` layers."""
    if job.training.method == "full":
        model.requires_grad_(True)
        return
    layers = decoder_layers(model)
    for layer in layers[-job.training.freeze_trainable_layers :]:
        layer.requires_grad_(True)
