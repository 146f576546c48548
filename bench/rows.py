"""One configuration that is measured, and its rows: lengths as in real data, packed to a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class Setting:
    """One configuration. ``tokens`` is the micro-batch; a step is ``accumulate`` of them on each
    GPU."""

    model: str = "llama-7b"
    precision: str = "bf16"
    r: int = 16
    tokens: int = 16384
    checkpoint_layers: int = 0
    keep_transpose: bool = False
    accumulate: int = 1
    rows: str = "alpaca"  # or a fixed row length, as "4096"
    # 0: pack to ``tokens``; else a micro-batch is several packs of this many tokens, end to end
    pack: int = 0
    steps: int = 20


def lengths(setting: Setting, count: int = 20000) -> npt.NDArray[np.int64]:
    """Row lengths [count]: log-normal with median 180 and 95th percentile 520 tokens, as in
    Alpaca's demo set, or all the same."""
    if setting.rows != "alpaca":
        return np.full(count, int(setting.rows))
    drawn = np.random.default_rng(0).lognormal(math.log(180), 0.645, count)
    return np.clip(drawn.round().astype(np.int64), 16, min(2048, setting.tokens))


def batches(
    setting: Setting,
    vocab: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    count: int = 24,
) -> list[dict[str, Any]]:
    """``count`` packed micro-batches on ``device``, each rank its own. Tokens come from 300 words,
    so that there is something to learn."""
    from trainer.data.packing import pack

    size = lengths(setting)
    enough = int(1.1 * count * world * setting.tokens / size.mean()) + 50
    budget = setting.pack or setting.tokens
    packs = [
        p
        for p in pack(range(min(enough, len(size))), size.tolist(), budget)
        if size[p].sum() > 0.98 * budget
    ]
    generator = np.random.default_rng(1)
    each = setting.tokens // budget
    packs = [list(chain(*packs[i : i + each])) for i in range(0, len(packs) - each + 1, each)]
    # neighbours hold rows of like length: ranks get equal work, as packing.share deals it
    steps = generator.permutation(len(packs) // world)
    packs = [packs[i * world + rank] for i in steps]
    words = generator.integers(0, vocab, 300)
    return [_batch(size[p], words, generator, device) for p in packs[:count]]


def _batch(
    rows: np.ndarray, words: np.ndarray, generator: np.random.Generator, device: torch.device
) -> dict[str, Any]:
    ids = words[np.minimum(generator.geometric(0.02, int(rows.sum())), 300) - 1]
    labels, positions = np.roll(ids, -1), np.concatenate([np.arange(n) for n in rows])
    ends = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
    labels[positions < np.repeat((rows * 0.3).astype(int), rows)] = -100  # the prompt
    labels[ends[1:] - 1] = -100
    host = {"input_ids": ids, "position_ids": positions, "labels": labels}
    tensors: dict[str, Any] = {k: torch.from_numpy(v)[None].to(device) for k, v in host.items()}
    tensors["targets_at"] = torch.from_numpy(np.flatnonzero(labels >= 0)).to(device)
    return tensors | {
        "cu": torch.from_numpy(ends).to(device),
        "longest": int(rows.max()),
        "count": int(rows.sum()),
    }
