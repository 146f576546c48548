"""Where attention finds the keys of rows that borrow their beginning of another row of the pack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.data.sharing import Borrowed


class SharedKeys(NamedTuple):
    """Which keys the documents of a pack of M tokens read, where these are N > M: all int64 but the
    last. `at` (N,): the token of each key. `own` (M,): the key of each token in its own document.
    `lent` (L,): the tokens that other documents read too. `copies` (J, L): their keys there, -1
    where a token is read by fewer than J others. `reads` int32 (3, M): of each token the first one
    that its document borrows, the one after the last (both M where it borrows none), and the one
    after the last token that reads it."""

    at: Tensor
    own: Tensor
    lent: Tensor
    copies: Tensor
    reads: Tensor


def shared_keys(lengths: Sequence[int], borrowed: Sequence[Borrowed]) -> tuple[SharedKeys, Tensor]:
    """(the keys of a pack whose rows have `lengths` tokens of their own and borrow these, the
    boundaries of the documents' keys int32 (rows + 1,)). A row that lends borrows nothing. Raises
    ValueError where other rows stand between the borrowing ones and the row that they borrow of."""
    for row, (place, tokens) in enumerate(borrowed):
        if tokens and any(other.place != place for other in borrowed[place + 1 : row]):
            raise ValueError(f"row {row} does not follow those that borrow of row {place} too")
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
    reads = np.full((3, int(starts[-1])), int(starts[-1]))
    reads[2] = np.repeat(starts[1:], lengths)
    for row, (place, tokens) in enumerate(borrowed):
        if tokens:
            reads[:2, starts[row] : starts[row + 1]] = [[starts[place]], [starts[place] + tokens]]
            reads[2, starts[place] : starts[place] + tokens] = starts[row + 1]
    made = (
        np.concatenate(at),
        np.concatenate(own),
        np.concatenate(lent),
        np.concatenate(copies, 1),
    )
    every = (*(x.astype(np.int64) for x in made), reads.astype(np.int32))
    return SharedKeys(*(torch.from_numpy(x) for x in every)), torch.from_numpy(
        ends.astype(np.int32)
    )
