"""The folder of a merged model, as it comes home from a box: which files it may hold."""

from __future__ import annotations

import re
from pathlib import Path

CERTIFICATE, CONFIG, INDEX = "certificate.json", "config.json", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)
WORDS = ("chat_template.jinja", "generation_config.json", "template.json", *TOKENIZER_FILES)
_WEIGHTS = re.compile(r"[A-Za-z0-9][\w-]{0,80}(\.[\w-]{1,80}){0,3}\.safetensors", re.ASCII)


def part_of(out: Path) -> Path:
    """The folder in which the merged model `out` is made; its maker holds a lock on it (flock)."""
    return out.with_name(f".{out.name}.part")


def holds_weights(name: str) -> bool:
    """Whether a file of this name holds tensors; named as the base's own files are."""
    return _WEIGHTS.fullmatch(name) is not None


def may_hold(name: str) -> bool:
    """Whether such a folder may hold a file of this name, its certificate apart."""
    return name in (CONFIG, INDEX, *WORDS) or holds_weights(name)
