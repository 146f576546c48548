"""The original LLaMA layout (params.json, consolidated.NN.pth, tokenizer.model) to what
transformers loads.

    python -m trainer.tools.convert_llama SOURCE TARGET

What changes: names; model-parallel shards joined; and rows of wq and wk, because Meta's code
rotates neighbouring pairs of a head's dimensions (2i, 2i+1) and transformers' rotates halves (i, i
+ d/2). Formula: row 2i+j of a head goes to j*d/2 + i.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from trainer.tools import checkpoint, sentencepiece_bpe
from trainer.tools.checkpoint import InvalidCheckpoint, Progress

PRECISIONS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
ROWS, COLUMNS, WHOLE = 0, 1, None  # how a tensor was cut for model parallelism
TOP = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", COLUMNS),
    "norm.weight": ("model.norm.weight", WHOLE),
    "output.weight": ("lm_head.weight", ROWS),
}
LAYER = {
    "attention.wq.weight": ("self_attn.q_proj.weight", ROWS),
    "attention.wk.weight": ("self_attn.k_proj.weight", ROWS),
    "attention.wv.weight": ("self_attn.v_proj.weight", ROWS),
    "attention.wo.weight": ("self_attn.o_proj.weight", COLUMNS),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", ROWS),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", COLUMNS),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", ROWS),
    "attention_norm.weight": ("input_layernorm.weight", WHOLE),
    "ffn_norm.weight": ("post_attention_layernorm.weight", WHOLE),
}
COPIED = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "generation_config.json", "LICENSE", "LICENSE.txt", "USE_POLICY.md")  # fmt: skip
JSON = "tokenizer.json and tokenizer_config.json from the hub's folder of this model"
Parts = list[dict[str, Tensor]]


def convert(
    source: Path, target: Path, progress: Progress, shard_bytes: int = checkpoint.SHARD_BYTES
) -> list[Path]:
    """Write config.json, safetensors and the tokenizer into the new folder ``target``; returns the
    shards.

    Every weight keeps its precision and its bits. Raises InvalidCheckpoint for a missing or torn
    file, a tensor that the layout does not have, or a pickle that names anything but tensors.
    Memory: one shard."""
    params, files = _read_params(source), sorted(source.glob("consolidated.*.pth"))
    if not files:
        raise InvalidCheckpoint(
            f"{source} has no consolidated.NN.pth", "name the folder of one size: 7B"
        )
    parts = [checkpoint.read(file) for file in files]
    names = _common_names(parts, files)
    config, tokenizer = _config(params, parts), _tokenizer(source)
    checkpoint.new_folder(target)
    shards = checkpoint.write(_converted(parts, names, params), target, progress, shard_bytes)
    checkpoint.write_json(target / "config.json", config)
    for name in COPIED:
        for folder in (source, source.parent):
            if (folder / name).is_file() and not (target / name).exists():
                shutil.copyfile(folder / name, target / name)
    if tokenizer:
        tokenizer.save(str(target / "tokenizer.json"))
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
        told |= {"bos_token": "<s>", "eos_token": "</s>"}
        checkpoint.write_json(target / "tokenizer_config.json", told)
    return shards


def _tokenizer(source: Path) -> Tokenizer | None:
    """Of LLaMA 1 and 2, from their sentencepiece model; None where tokenizer.json is there."""
    places = (source, source.parent)
    if any((folder / "tokenizer.json").is_file() for folder in places):
        return None
    found = [path for folder in places if (path := folder / "tokenizer.model").is_file()]
    if not found:
        raise InvalidCheckpoint(f"{source} has no tokenizer.model", f"put it there, or {JSON}")
    return sentencepiece_bpe.read(found[0], (), ("<s>",), JSON)


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """wq or wk, (heads * d, in): within each head, row 2i + j moves to j * d/2 + i."""
    pairs: Tensor = weight.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).reshape(weight.shape)


def _common_names(parts: Parts, files: list[Path]) -> list[str]:
    for part, file in zip(parts[1:], files[1:], strict=True):
        if odd := parts[0].keys() ^ part.keys():
            raise InvalidCheckpoint(
                f"{file.name} and {files[0].name} differ in {sorted(odd)[0]}", "download them again"
            )
    return sorted((name for name in parts[0] if not name.endswith("rope.freqs")), key=_order)


def _converted(
    parts: Parts, names: list[str], params: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        new, axis = _new_name(name)
        arrays = [part[name] for part in parts]
        if name == "tok_embeddings.weight" and arrays[0].shape[1] == len(parts[0]["norm.weight"]):
            axis = ROWS  # cut by columns in LLaMA 1 and 2, by rows from 3 on: its width tells
        whole = arrays[0] if axis is WHOLE or len(arrays) == 1 else torch.cat(arrays, axis)
        if name.endswith("attention.wq.weight"):
            whole = halves_from_pairs(whole, params["n_heads"])
        if name.endswith("attention.wk.weight"):
            whole = halves_from_pairs(whole, params["n_kv_heads"])
        yield new, whole


def _read_params(source: Path) -> dict[str, Any]:
    try:
        params: dict[str, Any] = json.loads((source / "params.json").read_text())
        whole = {key: int(params[key]) for key in ("dim", "n_layers", "n_heads")}
        if min(whole.values()) < 1 or whole["dim"] % whole["n_heads"]:
            raise ValueError(f"{whole} is no shape of a model")
        more = {"rope_theta": 10000.0, "n_kv_heads": whole["n_heads"]} | params
        whole["n_kv_heads"] = int(more["n_kv_heads"] or whole["n_heads"])
        return params | whole | {key: float(more[key]) for key in ("norm_eps", "rope_theta")}
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise InvalidCheckpoint(
            f"{source / 'params.json'} cannot be read: {error}",
            "name the folder of one size, as LLaMA/7B",
        ) from error


def _new_name(name: str) -> tuple[str, int | None]:
    if name in TOP:
        return TOP[name]
    if (found := re.fullmatch(r"layers\.(\d+)\.(.+)", name)) and found[2] in LAYER:
        new, axis = LAYER[found[2]]
        return f"model.layers.{found[1]}.{new}", axis
    raise InvalidCheckpoint(
        f"the checkpoint has a tensor {name!r}, which LLaMA's layout has not",
        "only LLaMA's own .pth files are converted",
    )


def _order(name: str) -> tuple[int, str]:
    found = re.match(r"layers\.(\d+)\.", name)
    return (int(found[1]) if found else -1 if name.startswith("tok") else 1 << 20), name


def _config(params: dict[str, Any], parts: Parts) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM. The vocabulary is counted, because params.json of LLaMA 1
    says -1.
    """
    try:
        output = parts[0]["output.weight"]
        vocabulary = sum(len(part["output.weight"]) for part in parts)
        intermediate = sum(len(part["layers.0.feed_forward.w1.weight"]) for part in parts)
        width = len(parts[0]["norm.weight"])
        precision = PRECISIONS[output.dtype]
    except KeyError as error:
        raise InvalidCheckpoint(
            f"the checkpoint has no {error}: it is not one of LLaMA's", "download it again"
        ) from error
    layers = {int(found[1]) for name in parts[0] if (found := re.match(r"layers\.(\d+)\.", name))}
    if len(layers) != params["n_layers"]:
        raise InvalidCheckpoint(
            f"params.json says {params['n_layers']} layers, the checkpoint has {len(layers)}",
            "download it again",
        )
    theta, epsilon = params["rope_theta"], params["norm_eps"]
    # params.json does not say: LLaMA 3, 1, 2
    context = 8192 if vocabulary > 32000 else 2048 if epsilon <= 1e-6 else 4096
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"],
        "rms_norm_eps": epsilon,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": precision,
    }


if __name__ == "__main__":
    sys.exit(checkpoint.main(convert, __doc__ or ""))
