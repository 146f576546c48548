"""A small ChatGLM2 as the hub has it, and its forward pass written anew: in complex numbers, head
by head."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from sentencepieces import pieces, write_tokenizer_model
from torch import Tensor

from trainer.tools.convert_chatglm import convert

HIDDEN, LAYERS, HEADS, GROUPS, SIZE, WIDE = 96, 3, 6, 2, 16, 160
THEIRS: dict[str, Any] = {
    "model_type": "chatglm",
    "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": WIDE,
    "hidden_size": HIDDEN,
    "kv_channels": SIZE,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": GROUPS,
    "num_attention_heads": HEADS,
    "num_layers": LAYERS,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 512,
    "torch_dtype": "float32",
}


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    rows, qkv = len(pieces()) + 20, (HEADS + 2 * GROUPS) * SIZE
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (rows, HIDDEN),
        "transformer.encoder.final_layernorm.weight": (HIDDEN,),
        "transformer.output_layer.weight": (rows, HIDDEN),
    }
    for n in range(LAYERS):
        at = f"transformer.encoder.layers.{n}."
        shapes |= {
            f"{at}input_layernorm.weight": (HIDDEN,),
            f"{at}post_attention_layernorm.weight": (HIDDEN,),
            f"{at}self_attention.query_key_value.weight": (qkv, HIDDEN),
            f"{at}self_attention.query_key_value.bias": (qkv,),
            f"{at}self_attention.dense.weight": (HIDDEN, HEADS * SIZE),
            f"{at}mlp.dense_h_to_4h.weight": (2 * WIDE, HIDDEN),
            f"{at}mlp.dense_4h_to_h.weight": (HIDDEN, WIDE),
        }
    return {
        name: (1 if "norm" in name else 0) + (0.3 if "bias" in name else 0.12) * torch.randn(shape)
        for name, shape in shapes.items()
    }


def save(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A folder as the hub has it: two pickles with an index, remote code, sentencepiece."""
    folder.mkdir()
    rows = len(tensors["transformer.output_layer.weight"])
    text = json.dumps(THEIRS | {"padded_vocab_size": rows} | config)
    (folder / "config.json").write_text(text)
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('a stranger ran')\n")
    write_tokenizer_model(folder / "tokenizer.model")
    where = {}
    names = list(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        held = {name: tensors[name].clone() for name in part}
        if number == 1:
            held["transformer.rotary_pos_emb.inv_freq"] = torch.ones(4)
        torch.save(held, folder / file)
        where |= dict.fromkeys(held, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def their_forward(
    w: dict[str, Tensor], tokens: Tensor, theta: float, prefix: Tensor | None = None
) -> Tensor:
    """ChatGLM2's logits (tokens, vocabulary): head by head, turned in complex numbers. A `prefix`
    (k, 2 * LAYERS * GROUPS * SIZE) stands before the tokens as what was computed earlier does: its
    keys are not turned, and the first token's position is 0."""
    x, length = w["transformer.embedding.word_embeddings.weight"][tokens], len(tokens)
    turned = SIZE // 2
    angle = torch.outer(
        torch.arange(length).double(),
        theta ** (-torch.arange(0, turned, 2, dtype=torch.float64) / turned),
    )
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def rotated(head: Tensor) -> Tensor:
        pairs = torch.complex(head[:, 0:turned:2], head[:, 1:turned:2]) * turn
        return torch.cat([torch.view_as_real(pairs).flatten(1), head[:, turned:]], 1)

    past = torch.zeros(0, 2 * LAYERS, GROUPS, SIZE)
    if prefix is not None:
        past = prefix.view(len(prefix), 2 * LAYERS, GROUPS, SIZE)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    later = torch.cat([torch.zeros(length, len(past), dtype=torch.bool), later], 1)
    for n in range(LAYERS):
        at = f"transformer.encoder.layers.{n}."
        h = norm(x, w[f"{at}input_layernorm.weight"])
        mixed = h @ w[f"{at}self_attention.query_key_value.weight"].T
        mixed = mixed + w[f"{at}self_attention.query_key_value.bias"]
        q, k, v = mixed.split([HEADS * SIZE, GROUPS * SIZE, GROUPS * SIZE], 1)
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            own, shared = (
                slice(head * SIZE, head * SIZE + SIZE),
                slice(group * SIZE, (group + 1) * SIZE),
            )
            keys = torch.cat([past[:, 2 * n, group], rotated(k[:, shared])])
            values = torch.cat([past[:, 2 * n + 1, group], v[:, shared]])
            score = rotated(q[:, own]) @ keys.T / math.sqrt(SIZE)
            heads.append(score.masked_fill(later, -math.inf).softmax(1) @ values)
        x = x + torch.cat(heads, 1) @ w[f"{at}self_attention.dense.weight"].T
        h = norm(x, w[f"{at}post_attention_layernorm.weight"])
        gate, up = (h @ w[f"{at}mlp.dense_h_to_4h.weight"].T).split(WIDE, 1)
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{at}mlp.dense_4h_to_h.weight"].T
    return norm(x, w["transformer.encoder.final_layernorm.weight"]) @ (
        w["transformer.output_layer.weight"].T
    )


def quiet(line: str) -> None:
    pass


def forms(tmp_path: Path, **config: Any) -> dict[str, Path]:
    """Qwen2 from the pickles, and Glm from that."""
    convert(save(tmp_path / "chatglm2-6b", weights(), **config), tmp_path / "qwen2", quiet)
    convert(tmp_path / "qwen2", tmp_path / "glm", quiet)
    return {"qwen2": tmp_path / "qwen2", "glm": tmp_path / "glm"}
