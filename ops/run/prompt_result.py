"""Pure: whether the tensors of a result are the learned prompt that its job asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ops.run.expected import CONFIG, WEIGHTS, ExpectedResult, validate
from trainer.wire.prompts import PEFT_TYPES, PREFIXES
from trainer.wire.tensors import Tensor

NAME = "prompt_embeddings"  # PEFT's
DTYPE = "float32"
_LARGEST = {  # of a number in the configuration that says how wide the tensor is
    "token_dim": 1 << 17,
    "num_layers": 10_000,
    "num_attention_heads": 1 << 14,
}


def validate_prompt(
    found: Mapping[str, Tensor], json_files: Mapping[str, Any], expect: ExpectedResult
) -> None:
    """The one tensor is the learned prompt that the job asked for: PEFT's name and type, a row for
    each learned place, and the width that its own configuration says. Nothing in the configuration
    makes PEFT read anything else."""
    validate(CONFIG in json_files, f"adapter.zip lacks {CONFIG}")
    config = json_files[CONFIG]
    validate(isinstance(config, dict), f"{CONFIG} is not an object")
    kind = PEFT_TYPES[expect.method]
    validate(
        config.get("peft_type") == kind,
        f"{CONFIG} has peft_type {config.get('peft_type')!r}, the job asked for {kind}",
    )
    base = config.get("base_model_name_or_path")
    validate(
        base == expect.base_model,
        f"{CONFIG} is of base model {base!r}, the job asked for {expect.base_model!r}",
    )
    _validate_settings(config, expect)
    validate(
        list(found) == [NAME],
        f"{WEIGHTS} holds {sorted(found)[:3]}, a learned prompt is {NAME!r} alone",
    )
    tensor, wide = found[NAME], _width(config, expect.method)
    shape = (expect.virtual_tokens, wide)
    validate(
        tensor.shape == shape and tensor.dtype == DTYPE,
        f"{WEIGHTS}: {NAME} is {tensor.dtype} {tensor.shape}, {CONFIG} says {DTYPE} {shape}",
    )
    validate(not tensor.zero, f"{WEIGHTS}: {NAME} is all zero, which no initialisation gives")


def _validate_settings(config: Mapping[str, Any], expect: ExpectedResult) -> None:
    wanted: dict[str, Any] = {
        "num_virtual_tokens": expect.virtual_tokens,
        "inference_mode": True,  # else PEFT builds the network that made it
        "task_type": "CAUSAL_LM",
        "num_transformer_submodules": 1,
    }
    if expect.method in PREFIXES:
        wanted["prefix_projection"] = expect.method == "prefix_tuning"
    for key, value in wanted.items():
        have = config.get(key)
        same = type(have) is type(value) and have == value
        validate(same, f"{CONFIG} has {key} {have!r:.80}, the job's has {value!r}")
    for key in ("auto_mapping", "tokenizer_kwargs", "revision"):
        validate(not config.get(key), f"{CONFIG} has {key} {config.get(key)!r:.80}, ours has none")
    named = config.get("tokenizer_name_or_path")
    validate(
        named is None or named == expect.base_model,
        f"{CONFIG} names the tokenizer {named!r:.80}, which is not the base's",
    )


def _width(config: Mapping[str, Any], method: str) -> int:
    """Numbers of one learned place."""
    sizes: dict[str, int] = {}
    for key, most in _LARGEST.items():
        have = config.get(key)
        sound = isinstance(have, int) and not isinstance(have, bool) and 0 < have <= most
        validate(sound, f"{CONFIG} has {key} {have!r:.80}, which is no size")
        sizes[key] = int(have or 0)
    if method not in PREFIXES:
        return sizes["token_dim"]
    validate(
        sizes["token_dim"] % sizes["num_attention_heads"] == 0,
        f"{CONFIG} has token_dim {sizes['token_dim']} for {sizes['num_attention_heads']} heads",
    )
    return 2 * sizes["num_layers"] * sizes["token_dim"]
