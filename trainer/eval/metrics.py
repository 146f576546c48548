"""Scores of texts against their references. No torch.

BLEU-4 and ROUGE are LLaMA-Factory's (`train/sft/metric.py`), which are those of ChatGLM2's own
evaluation: words are jieba's, ROUGE is rouge_chinese's (sets of n-grams, F = 2pr / (p + r + 1e-8)),
BLEU-4 is nltk's `sentence_bleu` over characters with smoothing method 3 (Chen and Cherry 2014), and
a score of many rows is the mean of its rows. chrF is sacrebleu's (Popović 2015, six orders,
beta 2). Everything is 0 to 100 but `distinct`, which is a share.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any

import numpy as np

ORDERS = 4  # of BLEU
CHRF_ORDERS, CHRF_BETA = 6, 2
RESAMPLES = 1000  # of a bootstrap interval
# where rouge_chinese begins a new sentence, in its order
_SENTENCES = (
    re.compile("([。！？?])([^”’])"),
    re.compile(r"(\.{6})([^”’])"),
    re.compile("(…{2})([^”’])"),
    re.compile("([。！？?][”’])([^，。！？?])"),
)


class MissingWords(RuntimeError):
    """jieba, which cuts Chinese into words, is not installed."""


@dataclass(frozen=True)
class Mean:
    """A mean over rows and its 95 % interval by bootstrap."""

    value: float
    low: float
    high: float


def bleu4(answer: str, reference: str) -> float:
    """Over characters; spaces count."""
    logs = []
    halvings = 0
    for order in range(1, ORDERS + 1):
        mine, theirs = _grams(answer, order), _grams(reference, order)
        matched, total = (mine & theirs).total(), max(1, mine.total())
        if not matched:
            if order == 1:
                return 0.0
            halvings += 1
        logs.append(math.log(matched / total if matched else 1 / (2**halvings * total)))
    brevity = 1.0
    if len(answer) <= len(reference):
        brevity = math.exp(1 - len(reference) / len(answer))
    return 100 * brevity * math.exp(math.fsum(logs) / ORDERS)


def rouge(answer: str, reference: str) -> dict[str, float]:
    """F of ROUGE-1, ROUGE-2 and ROUGE-L. Raises MissingWords without jieba."""
    if not answer.strip() or not reference.strip():
        return {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
    mine, theirs = _words(answer), _words(reference)
    found = {}
    for order in (1, 2):
        a, b = set(_ngrams(mine, order)), set(_ngrams(theirs, order))
        found[f"rouge-{order}"] = _f(len(a & b), len(a), len(b))
    found["rouge-l"] = _f(longest_common(mine, theirs), len(mine), len(theirs))
    return found


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """Over all rows together (sacrebleu's `corpus_chrf`)."""
    mine, theirs, both = [0] * CHRF_ORDERS, [0] * CHRF_ORDERS, [0] * CHRF_ORDERS
    for answer, reference in zip(answers, references, strict=True):
        a, b = "".join(answer.split()), "".join(reference.split())
        for n in range(CHRF_ORDERS):
            x, y = _grams(a, n + 1), _grams(b, n + 1)
            mine[n] += x.total() if y else 0
            theirs[n] += y.total()
            both[n] += (x & y).total()
    orders = [n for n in range(CHRF_ORDERS) if mine[n] and theirs[n]]
    if not orders:
        return 0.0
    precision = sum(both[n] / mine[n] for n in orders) / len(orders)
    recall = sum(both[n] / theirs[n] for n in orders) / len(orders)
    weight = CHRF_BETA**2
    if not precision + recall:
        return 0.0
    return 100 * (1 + weight) * precision * recall / (weight * precision + recall)


def exact(answer: str, reference: str) -> float:
    """100 where both are the same text, blanks at the ends apart."""
    return 100.0 * (answer.strip() == reference.strip())


def distinct(answers: Sequence[str], order: int = 2) -> float:
    """Different n-grams of characters among all, 0 to 1 (Li et al. 2016): low means repetition."""
    grams: Counter[Any] = Counter()
    for answer in answers:
        grams.update(_grams(answer, order))
    return len(grams) / grams.total() if grams else 0.0


def interval(values: Sequence[float], seed: int = 0) -> Mean:
    """The mean of `values` with the 2.5 and 97.5 % quantiles of its bootstrap. Raises ValueError
    without values."""
    if not values:
        raise ValueError("no row was scored")
    draw = np.random.default_rng(seed)
    rows = np.asarray(values)
    means = [rows[draw.integers(0, len(rows), len(rows))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Mean(fmean(values), float(low), float(high))


def by_row(answers: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """bleu-4, rouge-1, rouge-2, rouge-l and exact of every row; nothing without rows. Raises
    MissingWords without jieba."""
    rows: dict[str, list[float]] = {}
    for answer, reference in zip(answers, references, strict=True):
        every = {"bleu-4": bleu4(answer, reference), **rouge(answer, reference)}
        every["exact"] = exact(answer, reference)
        for name, value in every.items():
            rows.setdefault(name, []).append(value)
    return rows


def ratio(
    parts: Sequence[float],
    wholes: Sequence[float],
    of: Callable[[Any], Any] = lambda value: value,
    seed: int = 0,
) -> Mean:
    """`of`(sum of `parts` / sum of `wholes`) with the 95 % interval of its bootstrap over rows, by
    the draws of `interval`. Raises ValueError without rows."""
    if not len(parts):
        raise ValueError("no row was scored")
    draw, a, b = np.random.default_rng(seed), np.asarray(parts, float), np.asarray(wholes, float)
    found = []
    for _ in range(RESAMPLES):
        rows = draw.integers(0, len(a), len(a))
        found.append(of(a[rows].sum() / b[rows].sum()))
    low, high = np.quantile(found, (0.025, 0.975))
    return Mean(float(of(a.sum() / b.sum())), float(low), float(high))


def longest_common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, by whole rows of bits (Hyyrö 2004): a row of ten
    thousand words takes milliseconds."""
    places: dict[Hashable, int] = {}
    for i, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for item in b:
        hits = row & places.get(item, 0)
        row = (row + hits | row - hits) & full
    return len(a) - row.bit_count()


def _ngrams(items: Sequence[Hashable], order: int) -> Iterator[tuple[Any, ...]]:
    return zip(*(items[i:] for i in range(order)), strict=False)


def _grams(items: Sequence[Hashable], order: int) -> Counter[Any]:
    return Counter(_ngrams(items, order))


def _f(both: int, mine: int, theirs: int) -> float:
    precision = both / mine if mine else 0.0
    recall = both / theirs if theirs else 0.0
    return 100 * 2 * (precision * recall / (precision + recall + 1e-8))


def _words(text: str) -> list[str]:
    """jieba's words as rouge_chinese counts them: a line of blanks inside is one empty word."""
    spaced = " ".join(_cutter().cut(text))
    for pattern in _SENTENCES:
        spaced = pattern.sub(r"\1\n\2", spaced)
    sentences = [" ".join(s.split()) for s in spaced.rstrip().split("\n") if s]
    return [word for sentence in sentences for word in sentence.split(" ")]


@lru_cache
def _cutter() -> Any:
    """jieba with its own dictionary. It would keep a marshalled copy in the shared temporary folder
    and trust the one that it finds there: it gets a folder of its own instead."""
    try:
        import jieba
    except ImportError as error:
        raise MissingWords(
            "ROUGE needs jieba, which cuts Chinese into words: pip install jieba"
        ) from error
    jieba.setLogLevel("ERROR")
    cutter = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        cutter.tmp_dir = folder
        cutter.initialize()
    return cutter
