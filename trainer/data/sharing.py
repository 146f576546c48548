"""Rows of a pack that begin alike: the tokens of the first row's beginning stand in the pack once,
and the other rows' attention reads their keys and values.

A row never borrows a token whose state is asked for: each has the last token of its prompt for
itself, because that is where its answer's first token is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trainer.data.tokenised import Rows
from trainer.families import Family
from trainer.wire.job import Job
from trainer.wire.stages import Shares

LEAST = 16  # tokens of a beginning that are worth sharing


class Borrowed(NamedTuple):
    """What a row takes of another row of its pack: its first `tokens` tokens, which the row at
    `place` of the pack begins with."""

    place: int
    tokens: int


def why_apart(job: Job, family: Family, longest: int) -> str:
    """Why the rows of a job, whose longest has `longest` tokens, do not share their beginnings; ""
    where they may."""
    section, training = getattr(job, job.stage, None), job.training
    if not isinstance(section, Shares):
        return f"stage {job.stage} shares none"
    if section.share_prompts is False:
        return f"{job.stage}.share_prompts is false"
    if not training.packing:
        return "training.packing is false"
    if job.lora.lora_dropout or training.neftune_noise_alpha:
        return "dropout and noise are drawn for each row by itself"
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


def asked_tokens(rows: Rows) -> int:
    """Tokens of prompts that each further answer to them may borrow of the first."""
    return sum(n - 1 for n in rows.lengths if n - 1 >= LEAST)


def common_tokens(rows: Rows, size: int) -> int:
    """Tokens that a pack of all rows has fewer where every `size` of them, in order, share their
    beginnings."""
    firsts = range(0, len(rows), size)
    return sum(sum(beginnings(rows, range(first, first + size))) for first in firsts)
