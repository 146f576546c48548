"""ChatGLM's own file of a learned prompt, the `prefix_encoder` of its P-Tuning v2, and PEFT's
prefix of the same meaning.

Both hold keys and values of every layer for each learned place, in the same order. They differ in
the positions: ChatGLM gives a row's first token the position 0, PEFT gives it the position k behind
k learned places. Attention sees differences of positions only, so the keys are turned by k
positions, and every score is what it was. A base that was converted to Qwen2 has the rows of each
key in another order. ChatGLM's file may hold the network that makes the prefix; what that gives is
the prefix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PrefixTuningConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from trainer.model.chatglm import MARK, row_order
from trainer.wire.chain import CONFIG, WEIGHTS
from trainer.wire.prompts import PEFT_TYPES

THEIRS = "transformer.prefix_encoder."
TABLE = "embedding.weight"
NETWORK = ("trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")
FILE = "pytorch_model.bin"  # that ChatGLM's code opens
OURS = "prompt_embeddings"  # PEFT's


class NotChatGlm(ValueError):
    """What is no prefix of ChatGLM's, or no base of it."""


class Heads(NamedTuple):
    """The keys of a ChatGLM: `size` numbers a head, of which the first half turns, in neighbouring
    pairs, by `theta`. `order`: the row that each row is in the base that is at hand."""

    layers: int
    groups: int
    size: int
    theta: float
    hidden: int
    order: Tensor

    @classmethod
    def of(cls, base: Path) -> Heads:
        """Of a base in Glm's form or converted to Qwen2. Raises NotChatGlm, OSError."""
        kind = json.loads((base / "config.json").read_bytes()).get("model_type")
        told: Any = AutoConfig.from_pretrained(base) if kind in ("glm", "qwen2") else None
        converted = kind == "qwen2" and hasattr(told, MARK)
        if kind != "glm" and not converted:
            raise NotChatGlm(
                f"{base.name}/ is a {kind}: ChatGLM's own file of a prompt belongs to GLM-4-9B, "
                "and to ChatGLM2 and ChatGLM3 as trainer/tools/convert_chatglm.py converts them"
            )
        rope = told.rope_parameters
        return cls(
            layers=told.num_hidden_layers,
            groups=told.num_key_value_heads,
            size=told.head_dim,
            theta=float(rope["rope_theta"]),
            hidden=told.hidden_size,
            order=row_order(told.head_dim) if converted else torch.arange(told.head_dim),
        )

    @property
    def width(self) -> int:
        """Numbers of one learned place."""
        return self.layers * 2 * self.groups * self.size

    def turned(self, keys: Tensor, places: int) -> Tensor:
        """fp64 keys [..., size] in ChatGLM's order, as they are so many positions later."""
        half = self.size // 2
        angles = places * self.theta ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
        pairs = torch.view_as_complex(keys[..., :half].unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles))
        return torch.cat([turned.flatten(-2), keys[..., half:]], -1)

    def to_theirs(self, prompt: Tensor) -> Tensor:
        """PEFT's prefix (k, width) as ChatGLM has it, fp32."""
        keys, values = self._apart(prompt)
        keys = self.turned(keys[..., torch.argsort(self.order)], -len(prompt))
        return torch.stack([keys, values], 2).reshape(prompt.shape).float()

    def to_ours(self, prefix: Tensor) -> Tensor:
        """ChatGLM's prefix (k, width) as PEFT has it on this base, fp32."""
        keys, values = self._apart(prefix)
        keys = self.turned(keys, len(prefix))[..., self.order]
        return torch.stack([keys, values], 2).reshape(prefix.shape).float()

    def _apart(self, prompt: Tensor) -> tuple[Tensor, ...]:
        """fp64 keys and values (k, layers, groups, size)."""
        if prompt.ndim != 2 or prompt.shape[1] != self.width:
            raise NotChatGlm(
                f"the prompt has {list(prompt.shape)} numbers, and a place of this base "
                f"{self.width}: it belongs to another base"
            )
        wide = prompt.double().view(len(prompt), self.layers, 2, self.groups, self.size)
        return wide.unbind(2)


def prefix_in(tensors: Mapping[str, Tensor]) -> Tensor:
    """The prefix (k, width) of a P-Tuning checkpoint of ChatGLM's, fp32; its network is run. Raises
    NotChatGlm."""
    own = {n.removeprefix(THEIRS): t.float() for n, t in tensors.items() if n.startswith(THEIRS)}
    if set(own) not in ({TABLE}, {TABLE, *NETWORK}):
        what = ", ".join(sorted(own)) or "no tensor of one"
        raise NotChatGlm(f"it holds {what}, and a prefix is {THEIRS}{TABLE}, or that with trans.*")
    table = own[TABLE]
    if len(own) == 1:
        return table
    first, bias, last, last_bias = (own[name] for name in NETWORK)
    try:
        return torch.tanh(table @ first.T + bias) @ last.T + last_bias
    except RuntimeError as why:
        raise NotChatGlm(f"the network of its prefix does not fit: {why}") from why


def write_theirs(adapter: Path, base: Path, folder: Path) -> int:
    """ChatGLM's file of the prefix in an adapter of PEFT's: FILE and config.json in `folder`.
    Returns the number of learned places. Raises NotChatGlm for another adapter or base."""
    path = adapter / CONFIG
    told = json.loads(path.read_bytes()) if path.is_file() else {}
    if told.get("peft_type") != PEFT_TYPES["p_tuning_v2"]:
        raise NotChatGlm(
            f"it is {told.get('peft_type') or 'a whole model'}: ChatGLM's own file is of a prefix, "
            'which training.method = "p_tuning_v2" or "prefix_tuning" makes'
        )
    heads = Heads.of(base)
    prefix = heads.to_theirs(load_file(adapter / WEIGHTS)[OURS])
    torch.save({THEIRS + TABLE: prefix}, folder / FILE)
    settings = {
        "model_type": "chatglm",
        "pre_seq_len": len(prefix),
        "prefix_projection": False,
        "num_layers": heads.layers,
        "kv_channels": heads.size,
        "multi_query_group_num": heads.groups,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return len(prefix)


def write_ours(prompt: Tensor, heads: Heads, base: str, folder: Path) -> None:
    """PEFT's adapter of what `Heads.to_ours` gives, for a base of this name: its weights and
    settings in `folder`."""
    save_file({OURS: prompt}, folder / WEIGHTS, metadata={"format": "pt"})
    PrefixTuningConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        num_virtual_tokens=len(prompt),
        num_transformer_submodules=1,
        num_layers=heads.layers,
        num_attention_heads=heads.groups,
        token_dim=heads.groups * heads.size,
        encoder_hidden_size=heads.groups * heads.size,
        prefix_projection=False,
    ).save_pretrained(str(folder))
