"""A small copy of a job's model: its classes and widths, few layers, random weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from trainer import families
from trainer.kernels.attention import register
from trainer.model import load
from trainer.model.dropout import TokenKeys
from trainer.wire.job import Job

WINDOW = 16
LENGTHS = (40, 57, 20, 33)  # tokens; longer than the window, and on both sides of LIMIT


LIMIT = 36  # the length at which angles change, where they depend on a row's length
VOCABULARY = 256
MOST_KINDS = 8  # of layers
MOST_PARAMETERS = 2e9  # of the copy, before its MLPs are made narrow
NARROW = 128


def copy_of(job: Job, folder: Path) -> nn.Module:
    """The copy as it would be trained, narrow, in fp32 on the CPU, its adapters away from their
    start: for rehearsals. Raises ModelError."""
    config, device = small(AutoConfig.from_pretrained(folder)), torch.device("cpu")
    _narrow(config.get_text_config())
    asked = job_of_copy(job, "fp32")
    base = base_copy(asked, config, device, None, torch.float32)
    model, _ = load.assemble(asked, base, device, TokenKeys())
    random_adapters(model)
    return model


def small(config: Any, windows: bool = True) -> Any:
    """The job's configuration (transformers' own object) with few layers, a short vocabulary and,
    if asked, short windows."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    load.silence_dropout(made)
    for part in (made, text):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    _shorten(text)
    if windows:
        _set_where_set(text, {"sliding_window": WINDOW, "attention_chunk_size": WINDOW})
    _shorten_angles(text)
    for part in vars(made).values():
        if part is not text and hasattr(part, "model_type"):  # towers for pictures and sound
            names = ("num_hidden_layers", "depth", "num_layers", "encoder_layers")
            _set_where_set(part, dict.fromkeys(names, 1))
    if _parameters(made) > MOST_PARAMETERS:
        _narrow(text)
    return made


def _shorten(text: Any) -> None:
    layers = text.num_hidden_layers
    each = {
        key: list(value)
        for key, value in vars(text).items()
        if isinstance(value, (list, tuple)) and len(value) == layers and layers > 1
    }
    kept = _one_of_each(list(zip(*each.values(), strict=True)) or [()] * layers)
    shared = len(kept) if getattr(text, "num_kv_shared_layers", None) else 0
    kept = kept * 2 if shared else kept  # the second half reads keys and values of the first
    for key, value in each.items():
        setattr(text, key, [value[i] for i in kept])
    short = ("vocab_size", "vocab_size_per_layer_input")
    settings = {
        "num_hidden_layers": len(kept),
        "num_kv_shared_layers": shared,
        "first_k_dense_replace": 1,
        "num_dense_layers": 1,
        "max_window_layers": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **dict.fromkeys(short, VOCABULARY),
    }
    _set_where_set(text, settings)


def _one_of_each(kinds: list[tuple[Any, ...]]) -> list[int]:
    """The first layer of each kind, in their order; two at least where there are two."""
    firsts: dict[str, int] = {}
    for i, kind in enumerate(kinds):
        firsts.setdefault(repr(kind), i)
    kept = sorted(firsts.values())[:MOST_KINDS]
    if len(kept) == 1 and len(kinds) > 1:
        kept.append(next(i for i in range(len(kinds)) if i != kept[0]))
    return sorted(kept)


def _set_where_set(part: Any, settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if getattr(part, key, None):
            setattr(part, key, value)


def _shorten_angles(text: Any) -> None:
    """Where angles depend on a row's length: they change within our rows."""
    rope = getattr(text, "rope_parameters", None) or {}
    for part in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        kind = str(part.get("rope_type"))
        if kind == "longrope":
            part["original_max_position_embeddings"] = LIMIT
            _set_where_set(text, {"original_max_position_embeddings": LIMIT})
        elif "dynamic" in kind:
            text.max_position_embeddings = LIMIT


def _narrow(text: Any) -> None:
    """Makes MLPs and experts narrow: rows do not meet each other there."""
    for key, value in list(vars(text).items()):
        if "intermediate_size" not in key:
            continue
        if isinstance(value, list):
            setattr(text, key, [min(v, NARROW) for v in value])
        elif isinstance(value, int):
            setattr(text, key, min(value, NARROW))


def _parameters(config: Any) -> int:
    with torch.device("meta"):
        model = load.auto_class(config.model_type).from_config(config)
    return sum(p.numel() for p in model.parameters())


def base_copy(
    job: Job, config: Any, device: torch.device, attention: str | None, dtype: torch.dtype
) -> Any:
    """The copy without adapters, frozen: equal values at each call."""
    register()
    auto, made = load.auto_class(config.model_type), copy.deepcopy(config)
    asked = {} if attention is None else {"attn_implementation": attention}
    cards = [device] if device.type == "cuda" else []
    with torch.device(device), torch.random.fork_rng(cards):
        torch.manual_seed(0)  # what `random_weights` leaves, or adds to, is drawn too
        try:
            model = auto.from_config(made, dtype=dtype, **asked)
        except ValueError:  # a class without eager attention
            if attention != "eager":
                raise
            model = auto.from_config(copy.deepcopy(config), dtype=dtype)
    model.config.use_cache = False
    random_weights(model)
    model.requires_grad_(False)
    model.family = families.read(model.config.to_dict())
    if model.family.tower and not job.training.trains_base:
        load.drop_other_towers(model, model.family.tower)
    return model


@torch.no_grad()
def random_weights(model: nn.Module, seed: int = 0) -> None:
    """Large enough that attention is not uniform and experts differ; values that bf16 has."""
    device = next(model.parameters()).device
    g = torch.Generator(device).manual_seed(seed)
    for name, p in model.named_parameters():
        if not p.is_floating_point() or "A_log" in name or "dt_bias" in name:
            continue
        drawn = torch.randn(p.shape, generator=g, device=device)
        if "sinks" in name:
            value = 1.0 + drawn
        elif p.ndim >= 2:
            value = drawn * min(0.5, 1.2 * p.shape[-1] ** -0.5)
        else:
            value = p.float() + 0.05 * drawn
        p.copy_(value.bfloat16())


@torch.no_grad()
def random_adapters(model: nn.Module) -> None:
    """B is zero at the start of a training, which would hide an adapter that is not applied."""
    for number, (name, p) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            g = torch.Generator(p.device).manual_seed(number)
            p.normal_(0.0, 0.05, generator=g)


def job_of_copy(job: Job, precision: str) -> Job:
    """The job with start values that need no decomposition of weights and no tokenizer, and trains
    all of the copy where it trains some layers."""
    prompt = job.prompt_learning.model_copy(update={"prompt_tuning_init_text": None})
    lora = job.lora.model_copy(update={"init_lora_weights": "default"})
    method = "full" if job.training.method == "freeze" else job.training.method
    training = job.training.model_copy(update={"method": method, "router_aux_loss_coef": 0.0})
    model = job.model.model_copy(update={"precision": precision})
    told = {"lora": lora, "prompt_learning": prompt, "training": training, "model": model}
    return job.model_copy(update=told)
