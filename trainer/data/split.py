"""Long conversations become several, as Vicuna's did: each piece begins where a user speaks, with
the system's words before it, and is as long as fits. No answer is cut and none is trained twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trainer.data.formats import Row
from trainer.data.template import Turn

SURE = 2  # a row of fewer bytes than a half of the limit fits: a token has a byte or more

Lengths = Callable[[Sequence[Row]], list[int]]  # tokens of each row, 0 of one that is refused


def split_long(rows: Sequence[Row], lengths: Lengths, limit: int) -> tuple[list[Row], int, int]:
    """(the rows, with the pieces of each conversation of more than `limit` tokens in its place; how
    many were split; into how many pieces). A single round that is too long stays as it is, a piece
    by itself."""
    doubtful = [row for row in rows if row.turns and SURE * _bytes(row) >= limit]
    long = {id(row) for row, n in zip(doubtful, lengths(doubtful), strict=True) if n > limit}
    found: list[Row] = []
    split = made = 0
    for row in rows:
        pieces = _pieces(row, lengths, limit) if id(row) in long else [row]
        split += len(pieces) > 1
        made += len(pieces) if len(pieces) > 1 else 0
        found += pieces
    return found, split, made


def _bytes(row: Row) -> int:
    return sum(len(f"{t.text}{t.extra}{t.reasoning}{t.calls}".encode()) for t in row.turns)


def _pieces(row: Row, lengths: Lengths, limit: int) -> list[Row]:
    """Greedy: the most rounds that fit, from the first."""
    preamble, rounds = rounds_of(row.turns)
    found: list[Row] = []
    at = 0
    while at < len(rounds):
        fits, beyond = at + 1, len(rounds) + 1  # a piece of one round is taken, whatever it has
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            if 0 < lengths([_joined(row, preamble, rounds[at:middle])])[0] <= limit:
                fits = middle
            else:
                beyond = middle
        found.append(_joined(row, preamble, rounds[at:fits]))
        at = fits
    return found


def rounds_of(turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], list[tuple[Turn, ...]]]:
    """(the system's turns at the beginning, the rounds: from what a user says to before the user
    speaks again)."""
    begin = next((k for k, turn in enumerate(turns) if turn.role != "system"), len(turns))
    starts = [k for k in range(begin, len(turns)) if turns[k].role == "user"]
    if starts[:1] != [begin]:
        starts.insert(0, begin)
    ends = [*starts[1:], len(turns)]
    return tuple(turns[:begin]), [tuple(turns[a:b]) for a, b in zip(starts, ends, strict=True)]


def _joined(row: Row, preamble: tuple[Turn, ...], rounds: Sequence[tuple[Turn, ...]]) -> Row:
    return row._replace(turns=(*preamble, *(turn for part in rounds for turn in part)))
