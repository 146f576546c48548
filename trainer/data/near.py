"""Near duplicates among texts, by MinHash over character 5-grams. Pure; numpy only.

Candidates come from bands of the signatures; each is then judged by the exact share of 5-grams that
both hold (Jaccard), so a wrong pair is never told; a right one is missed at most where no band of
the two agrees (of pairs at 0.7: 1.3 %).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

GRAM = 5  # characters
HASHES = 64
SLACK = 0.2  # what a signature's estimate may lack of the truth: more than three deviations
LEAST, WIDE_BANDS = 0.4, 0.65  # smallest likeness that is found; below the second, bands of 2
_random = np.random.default_rng(20230401)
_A = _random.integers(0, 2**63, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_B = _random.integers(0, 2**63, HASHES, dtype=np.uint64)
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_BLANK = re.compile(r"\s+")
_PART = 20_000  # 5-grams that are hashed at a time


def normal(text: str) -> str:
    """`text` with case, blanks and the Unicode forms of one character made equal."""
    return _BLANK.sub("", unicodedata.normalize("NFKC", text).lower())


def likeness(a: str, b: str) -> float:
    """The share of 5-grams that two normal texts have in common, of all that either has."""
    if a == b:
        return 1.0
    grams, others = _set(a), _set(b)
    both = len(np.intersect1d(grams, others, assume_unique=True))
    return both / (len(grams) + len(others) - both)


def originals(
    texts: Sequence[tuple[str, ...]], labels: Sequence[str], near: float
) -> list[tuple[int, float]]:
    """For each row (the row before it that it repeats, their likeness), (its own place, 1.0) where
    it repeats none. Rows repeat each other where each of their normal texts is alike by `near` and
    their labels are equal; the row that is repeated itself repeats none. Raises ValueError for a
    `near` outside LEAST to 1."""
    if not LEAST <= near <= 1:
        raise ValueError(f"near {near} is not between {LEAST} and 1")
    size = 4 if near >= WIDE_BANDS else 2
    marks = np.stack([_signature("".join(row)) for row in texts]) if texts else _signature("")
    bands = marks.reshape(len(texts), -1, size) if texts else marks
    buckets: dict[bytes, list[int]] = {}
    found: list[tuple[int, float]] = []
    for at, row in enumerate(texts):
        label = labels[at].encode("utf-8", "replace")
        keys = [b"%d:" % n + band.tobytes() + label for n, band in enumerate(bands[at])]
        candidates = sorted({other for key in keys for other in buckets.get(key, ())})
        best = _best(at, row, candidates, texts, marks, near)
        found.append(best or (at, 1.0))
        if best is None:
            for key in keys:
                buckets.setdefault(key, []).append(at)
    return found


def _best(
    at: int,
    row: tuple[str, ...],
    candidates: list[int],
    texts: Sequence[tuple[str, ...]],
    marks: NDArray[np.uint32],
    near: float,
) -> tuple[int, float] | None:
    """The candidate that is most like a row, of those that are like enough."""
    if not candidates:
        return None
    guesses = (marks[candidates] == marks[at]).mean(1)
    best: tuple[int, float] | None = None
    for other, guess in zip(candidates, guesses, strict=True):
        if guess < near - SLACK or len(texts[other]) != len(row):
            continue
        alike = min(likeness(a, b) for a, b in zip(row, texts[other], strict=True))
        if alike >= near and (best is None or alike > best[1]):
            best = (other, alike)
    return best


def _grams(text: str) -> NDArray[np.uint64]:
    """A number for each 5-gram; of a shorter text one for the whole."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    size = min(GRAM, len(codes))
    if not size:
        return np.zeros(1, np.uint64)
    number = np.zeros(len(codes) - size + 1, np.uint64)
    for n in range(size):
        number = number * _PRIME + codes[n : len(codes) - size + 1 + n]
    return number ^ (number >> np.uint64(31))


@lru_cache(maxsize=4096)
def _set(text: str) -> NDArray[np.uint64]:
    return np.unique(_grams(text))


def _signature(text: str) -> NDArray[np.uint32]:
    """The smallest of the 5-grams' numbers under each hash."""
    grams = _grams(text)
    least = np.full(HASHES, 2**32 - 1, np.uint32)
    for begin in range(0, len(grams), _PART):
        part = grams[begin : begin + _PART, None] * _A + _B
        least = np.minimum(least, (part >> np.uint64(32)).min(0).astype(np.uint32))
    return least
