"""Rows of a pack that begin alike: the tokens of the first row's beginning stand in the pack once,
and the other rows' attention reads their keys and values.

A row never borrows a token whose state is asked for: each has the last token of its prompt for
itself, because that is where its answer's first token is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.data.tokenised import Rows
from trainer.families import Family
from trainer.wire.job import Job
from trainer.wire.stages import Shares

LEAST = 64  # tokens of a beginning that are worth sharing


class SharedKeys(NamedTuple):
    """Which keys the documents of a pack of M tokens read, where these are N > M: all int64. `at`
    (N,): the token of each key. `own` (M,): the key of each token in its own document. `lent`
    (L,): the tokens that other documents read too. `copies` (J, L): their keys there, -1 where a
    token is read by fewer than J others."""

    at: Tensor
    own: Tensor
    lent: Tensor
    copies: Tensor


class Borrowed(NamedTuple):
    """What a row takes of another row of its pack: its first `tokens` tokens, which the row at
    `place` of the pack begins with."""

    place: int
    tokens: int


def why_apart(job: Job, family: Family, longest: int, on_gpu: bool) -> str:
    """Why the rows of a job, whose longest has `longest` tokens, do not share their beginnings; ""
    where they may."""
    section, training = getattr(job, job.stage, None), job.training
    if not isinstance(section, Shares):
        return f"stage {job.stage} shares none"
    asked = section.share_prompts
    if asked is False:
        return f"{job.stage}.share_prompts is false"
    if not training.packing:
        return "training.packing is false"
    if job.lora.lora_dropout or training.neftune_noise_alpha:
        return "dropout and noise are drawn for each row by itself"
    if asked is None and on_gpu:
        return f"it is not measured on a GPU yet: {job.stage}.share_prompts = true asks for it"
    return family.why_unshared(longest)


def beginnings(rows: Rows, group: Sequence[int]) -> list[int]:
    """How many tokens each row of `group` may borrow of the first; 0 for that one, and for fewer
    than LEAST."""
    head, found = rows.ids[rows.starts[group[0]] : rows.starts[group[0] + 1]], [0]
    for row in group[1:]:
        span = slice(rows.starts[row], rows.starts[row + 1])
        ids, targets = rows.ids[span], np.flatnonzero(rows.trained[span])
        most = min(len(head), (int(targets[0]) if len(targets) else len(ids)) - 1)
        differ = np.flatnonzero(ids[: max(0, most)] != head[: max(0, most)])
        same = int(differ[0]) if len(differ) else max(0, most)
        found.append(same if same >= LEAST else 0)
    return found


def shared_keys(lengths: Sequence[int], borrowed: Sequence[Borrowed]) -> tuple[SharedKeys, Tensor]:
    """(the keys of a pack whose rows have `lengths` tokens of their own and borrow these, the
    boundaries of the documents' keys int32 (rows + 1,)). A row that lends borrows nothing."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ends = np.concatenate(
        [[0], np.cumsum([n + b.tokens for n, b in zip(lengths, borrowed, strict=True)])]
    )
    at, own = [], []
    readers: dict[int, list[int]] = {}
    for row, (place, tokens) in enumerate(borrowed):
        at += [starts[place] + np.arange(tokens), np.arange(starts[row], starts[row + 1])]
        own.append(np.arange(ends[row] + tokens, ends[row + 1]))
        if tokens:
            readers.setdefault(place, []).append(row)
    lent, rounds = [np.zeros(0, np.int64)], max(map(len, readers.values()), default=0)
    copies = [np.zeros((rounds, 0), np.int64)]
    for place, those in readers.items():
        longest = np.arange(max(borrowed[row].tokens for row in those))
        block = np.full((rounds, len(longest)), -1)
        for k, row in enumerate(those):
            block[k, : borrowed[row].tokens] = ends[row] + longest[: borrowed[row].tokens]
        lent.append(starts[place] + longest)
        copies.append(block)
    made = (
        np.concatenate(at),
        np.concatenate(own),
        np.concatenate(lent),
        np.concatenate(copies, 1),
    )
    keys = SharedKeys(*(torch.from_numpy(x.astype(np.int64)) for x in made))
    return keys, torch.from_numpy(ends.astype(np.int32))
