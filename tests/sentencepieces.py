"""A small sentencepiece model of byte pairs, and sentencepiece's rule of merging written anew."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from transformers.convert_slow_tokenizer import import_protobuf

UNKNOWN = "中文"  # no pieces: spelt in bytes
LETTERS = "abdehilmnoprstuy 中文模型好[]gMASKsop</>\n"


def pieces() -> list[tuple[str, float, int]]:
    """(piece, score, kind) of a small sentencepiece model with byte fallback."""
    found: list[tuple[str, float, int]] = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    found += [(f"<0x{n:02X}>", 0.0, 6) for n in range(256)]
    dice, letters = random.Random(4), [c.replace(" ", "▁") for c in LETTERS if c != "\n"]
    words = {"so", "sop", "op", "hi", "▁a", "▁▁", "▁▁▁▁", "模型", "▁好", "phil", "▁p"}
    spelt = [letter for letter in letters if letter not in UNKNOWN]
    while len(words) < 90:
        words.add("".join(dice.choices(spelt, k=dice.choice((2, 2, 3)))))
    ranked = sorted(words, key=lambda word: (len(word), dice.random()))
    found += [(word, -float(rank), 1) for rank, word in enumerate(ranked)]
    seen = set(UNKNOWN)
    for letter in letters:
        if letter not in seen:
            seen.add(letter)
            found.append((letter, -1000.0 - len(seen), 1))
    return found


def write_tokenizer_model(path: Path, dummy_prefix: bool = True) -> None:
    proto = import_protobuf().ModelProto()
    for piece, score, kind in pieces():
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = dummy_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(proto.SerializeToString())


def by_the_rule(
    text: str, known: Iterable[tuple[str, float, int]] | None = None, prefix: str = "▁"
) -> list[str]:
    """sentencepiece's byte-pair encoding: the best-scored neighbours are merged, the leftmost of
    equals first, until none is a piece; what is no piece is spelt in bytes. `known` pieces are by
    default the small model's."""
    scores = {piece: score for piece, score, kind in known or pieces() if kind == 1}
    parts = list(prefix + text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[a + b], n) for n, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        x
        for part in parts
        for x in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])
    ]
