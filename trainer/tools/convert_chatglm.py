"""Converts ChatGLM2 and ChatGLM3 to a model class of transformers, so that no code from the hub
runs.

    python -m trainer.tools.convert_chatglm SOURCE TARGET

The result is a Qwen2 model, which has the same layers but for the rotation: ChatGLM turns the
neighbouring pairs (2i, 2i+1) of the first half of a head and leaves the second half; Qwen2 turns
(i, i + d/2) of all. So the rows of each head of q and k are put into another order, and what is
not turned gets the frequency 0, by the factors of rope type `longrope`. A SOURCE that this made is
turned back: into a Glm model, for programs that know that type and not `longrope`.

The tokenizer is made of the sentencepiece model. The special tokens are numbered after its pieces
and no text becomes one of them, as in ChatGLM's own code: `sop` is a part of "philosophy".
ChatGLM3 gets a chat template (trainer/data/templates/chatglm3.jinja), which writes its roles,
[gMASK] and, as <sop>, sop. The tokenizer is read by `tokenizers` and `PreTrainedTokenizerFast`;
transformers' AutoTokenizer takes Qwen2's own rules for any Qwen2 model, and this one's for the Glm
form.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from trainer.data.template import FOLDER
from trainer.model.chatglm import MARK, reorder, row_order
from trainer.tools import checkpoint, sentencepiece_bpe
from trainer.tools.checkpoint import InvalidCheckpoint, Progress

SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")  # of ChatGLM3
OURS = ("chat_template.jinja", "generation_config.json")  # written beside ChatGLM3's tokenizer
NOT_TURNED = 1e30  # divides a frequency to 0
FIRST = "take ChatGLM2-6B or ChatGLM3-6B; of GLM-4 the hub has folders that end in -hf"
NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}
TOP = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
}
LAYER = "transformer.encoder.layers."
DROPPED = "transformer.rotary_pos_emb.inv_freq"


def convert(
    source: Path, target: Path, progress: Progress, shard_bytes: int = checkpoint.SHARD_BYTES
) -> list[Path]:
    """Write config.json, safetensors and tokenizer.json into the new folder ``target``; returns the
    shards.

    Every weight keeps its precision and its bits. Raises InvalidCheckpoint for a model that is none
    of these, a missing or torn file, or a pickle that names anything but tensors. Memory: one
    shard."""
    theirs = _json(source / "config.json")
    if MARK in theirs:
        return _back(source, target, theirs, progress, shard_bytes)
    config = qwen2_config(theirs)
    files = weight_files(source)
    roles = _has_roles(source)
    tokenizer = read_tokenizer(source / "tokenizer.model", roles)
    made = _converted([checkpoint.read(file) for file in files], config)
    checkpoint.new_folder(target)
    shards = checkpoint.write(made, target, progress, shard_bytes)
    checkpoint.write_json(target / "config.json", config)
    _write_tokenizer(tokenizer, target, int(config["max_position_embeddings"]))
    if roles:
        _write_chat(tokenizer, target)
    for path in source.iterdir():
        if path.name.startswith(("LICENSE", "MODEL_LICENSE", "NOTICE")):
            shutil.copyfile(path, target / path.name)
    return shards


def qwen2_config(theirs: dict[str, Any]) -> dict[str, Any]:
    """config.json of the converted model from ChatGLM's; raises InvalidCheckpoint for another
    model."""
    if theirs.get("model_type") != "chatglm" or "multi_query_group_num" not in theirs:
        raise InvalidCheckpoint(
            "this is not ChatGLM2 or ChatGLM3 (ChatGLM-6B, the first, is another model, with "
            "positions in two dimensions)",
            FIRST,
        )
    for key, wanted in (
        ("add_qkv_bias", True),
        ("add_bias_linear", False),
        ("rmsnorm", True),
        ("post_layer_norm", True),
        ("apply_residual_connection_post_layernorm", False),
        ("multi_query_attention", True),
    ):
        if theirs.get(key) is not wanted:
            raise InvalidCheckpoint(
                f"config.json says {key} = {theirs.get(key)}, ChatGLM2 has {wanted}", FIRST
            )
    size, length = int(theirs["kv_channels"]), int(theirs["seq_length"])
    theta = 10000.0 * float(theirs.get("rope_ratio", 1))
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        MARK: "halves",
        "vocab_size": int(theirs["padded_vocab_size"]),
        "hidden_size": int(theirs["hidden_size"]),
        "intermediate_size": int(theirs["ffn_hidden_size"]),
        "num_hidden_layers": int(theirs["num_layers"]),
        "num_attention_heads": int(theirs["num_attention_heads"]),
        "num_key_value_heads": int(theirs["multi_query_group_num"]),
        "head_dim": size,
        "hidden_act": "silu",
        "rms_norm_eps": float(theirs["layernorm_epsilon"]),
        "max_position_embeddings": length,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": rope_factors(size, theta),
            "long_factor": rope_factors(size, theta),
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": length,
        },
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": theirs.get("torch_dtype", "float16"),
    }


def rope_factors(size: int, theta: float) -> list[float]:
    """What longrope divides the frequencies theta^(-2i/size) by: the first half becomes
    theta^(-4i/size), which is ChatGLM's over half of a head; the second half 0.
    """
    turned = size // 4
    return [theta ** (2 * i / size) for i in range(turned)] + [NOT_TURNED] * (size // 2 - turned)


def weight_files(source: Path) -> list[Path]:
    """The files of weights, safetensors before pickles; raises InvalidCheckpoint where one is
    missing."""
    for pattern, index in (
        ("*.safetensors", checkpoint.INDEX),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ):
        found = sorted(source.glob(pattern))
        if not found:
            continue
        named = (
            set(_json(source / index)["weight_map"].values())
            if (source / index).is_file()
            else set()
        )
        if lost := sorted(named - {path.name for path in found}):
            raise InvalidCheckpoint(
                f"{index} names {lost[0]}, which is not there", "download it again"
            )
        return [path for path in found if not named or path.name in named]
    raise InvalidCheckpoint(
        f"{source} has neither safetensors nor pytorch_model*.bin", "download it again"
    )


def read_tokenizer(path: Path, roles: bool) -> Tokenizer:
    """The tokenizer of ChatGLM2's sentencepiece model; ``roles`` adds ChatGLM3's. Raises
    InvalidCheckpoint where the file is of another kind.
    """
    if not roles:
        return sentencepiece_bpe.read(path, SPECIAL, (SPECIAL[1], SPECIAL[3]), FIRST)
    special = [*(f"<{t}>" if t == "sop" else t for t in SPECIAL), *ROLES]
    before = (special[1], special[3])
    return sentencepiece_bpe.read(path, special, before, FIRST, (*before, *ROLES))


def _converted(
    parts: list[dict[str, Tensor]], config: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors under their new names; the names are checked before the first is made."""
    names = {name for part in parts for name in part if name != DROPPED}
    if prefix := [name for name in names if name.startswith("transformer.prefix_encoder.")]:
        raise InvalidCheckpoint(
            f"{prefix[0]}: this is a P-Tuning checkpoint, no base model",
            "python -m trainer.tools.chatglm_prompt CHECKPOINT BASE TARGET converts it",
        )
    wanted = set(TOP)
    for number in range(config["num_hidden_layers"]):
        wanted |= {
            f"{LAYER}{number}.{name}"
            for name in (
                *NAMES,
                "self_attention.query_key_value.weight",
                "self_attention.query_key_value.bias",
                "mlp.dense_h_to_4h.weight",
            )
        }
    if differing := sorted(wanted ^ names):
        word = "has no" if differing[0] in wanted else "has a tensor that ChatGLM2 has not:"
        raise InvalidCheckpoint(
            f"the checkpoint {word} {differing[0]} ({len(differing)} differ)", "download it again"
        )
    order = row_order(config["head_dim"])
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]

    def each() -> Iterator[tuple[str, Tensor]]:
        for part in parts:
            for name, tensor in part.items():
                if name in TOP:
                    yield TOP[name], tensor
                elif name != DROPPED:
                    number, _, rest = name.removeprefix(LAYER).partition(".")
                    at = f"model.layers.{number}."
                    if rest in NAMES:
                        yield at + NAMES[rest], tensor
                    elif rest == "mlp.dense_h_to_4h.weight":
                        gate, up = tensor.chunk(2)
                        yield f"{at}mlp.gate_proj.weight", gate
                        yield f"{at}mlp.up_proj.weight", up
                    else:
                        kind = rest.rpartition(".")[2]
                        q, k, v = tensor.split([query, key, key])
                        yield f"{at}self_attn.q_proj.{kind}", reorder(q, order)
                        yield f"{at}self_attn.k_proj.{kind}", reorder(k, order)
                        yield f"{at}self_attn.v_proj.{kind}", v

    return each()


def _back(
    source: Path, target: Path, config: dict[str, Any], progress: Progress, shard_bytes: int
) -> list[Path]:
    """From the converted model, or one that was merged into it, to transformers' Glm."""
    rope, size = config["rope_parameters"], int(config["head_dim"])
    order = torch.argsort(row_order(size))
    parts = [checkpoint.read(file) for file in weight_files(source)]

    def each() -> Iterator[tuple[str, Tensor]]:
        gates = {n: t for part in parts for n, t in part.items() if ".mlp.gate_proj." in n}
        for part in parts:
            for name, tensor in part.items():
                if ".q_proj." in name or ".k_proj." in name:
                    yield name, reorder(tensor, order)
                elif ".mlp.up_proj." in name:
                    gate = gates[name.replace("up_proj", "gate_proj")]
                    yield name.replace("up_proj", "gate_up_proj"), torch.cat([gate, tensor])
                elif name not in gates:
                    yield name, tensor

    checkpoint.new_folder(target)
    shards = checkpoint.write(each(), target, progress, shard_bytes)
    theirs = {k: v for k, v in config.items() if k not in (MARK, "use_sliding_window")}
    theirs |= {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope["rope_theta"],
            "partial_rotary_factor": 0.5,
        },
    }
    checkpoint.write_json(target / "config.json", theirs)
    for path in source.iterdir():
        if path.name.startswith((*OURS, "tokenizer", "LICENSE", "MODEL_LICENSE", "NOTICE")):
            shutil.copyfile(path, target / path.name)
    return shards


def _write_tokenizer(tokenizer: Tokenizer, target: Path, length: int) -> None:
    tokenizer.save(str(target / "tokenizer.json"))
    checkpoint.write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": length,
            "padding_side": "left",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
        },
    )


def _write_chat(tokenizer: Tokenizer, target: Path) -> None:
    """ChatGLM3's chat template, and the tokens at which its own code ends an answer."""
    shutil.copyfile(FOLDER / "chatglm3.jinja", target / OURS[0])
    ends = [tokenizer.token_to_id(token) for token in ("</s>", ROLES[1], ROLES[3])]
    checkpoint.write_json(target / OURS[1], {"eos_token_id": ends})


def _has_roles(source: Path) -> bool:
    """ChatGLM3's tokenizer names the roles in its code or its settings, which are read as text."""
    texts = (source / "tokenization_chatglm.py", source / "tokenizer_config.json")
    return any(ROLES[1] in path.read_text("utf-8", "replace") for path in texts if path.is_file())


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(
            f"{path} cannot be read: {error}", "download the model again"
        ) from error
    if not isinstance(found, dict):
        raise InvalidCheckpoint(f"{path} is no JSON object", "download the model again")
    return found


if __name__ == "__main__":
    sys.exit(checkpoint.main(convert, __doc__ or ""))
