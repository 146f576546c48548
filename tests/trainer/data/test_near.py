"""Near duplicates: what MinHash finds, against every pair compared by Python's own sets."""

from __future__ import annotations

import random

import pytest

from trainer.data import near

WORDS = [
    "".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=4 + n % 5)) for n in range(400)
]


def text(seed: int, words: int = 22) -> str:
    return near.normal(" ".join(random.Random(f"text {seed}").choices(WORDS, k=words)))


def edited(base: str, seed: int, changes: int) -> str:
    letters, draw = list(base), random.Random(seed)
    for _ in range(changes):
        letters[draw.randrange(len(letters))] = "q"
    return "".join(letters)


def jaccard(a: str, b: str) -> float:
    grams, others = ({t[n : n + 5] for n in range(max(1, len(t) - 4))} for t in (a, b))
    return len(grams & others) / len(grams | others)


def found(texts: list[str], least: float) -> list[tuple[int, float]]:
    return near.originals([(t,) for t in texts], [""] * len(texts), least)


@pytest.mark.parametrize("least", [0.5, 0.7, 0.9])
def test_planted_near_duplicates_are_found_and_nothing_else(least: float) -> None:
    originals = [text(n) for n in range(150)]
    copies = [edited(t, n, n % 9) for n, t in enumerate(originals)]
    results = found([*originals, *copies], least)
    for at in range(150):
        assert results[at] == (at, 1.0)
    wanted = told = 0
    for n, copy in enumerate(copies):
        alike = jaccard(originals[n], copy)
        first, likeness = results[150 + n]
        wanted += alike >= least
        if first != 150 + n:
            told += 1
            assert first == n
            assert likeness == pytest.approx(alike)
            assert alike >= least
    assert told >= 0.95 * wanted > 10


@pytest.mark.parametrize(
    ("a", "b"), [("", ""), ("ab", "ab"), ("好", "好"), ("\ud800", "\ud800"), ("x" * 50_000,) * 2]
)
def test_equal_texts_of_any_length_repeat_each_other(a: str, b: str) -> None:
    assert found([a, b], 0.7) == [(0, 1.0), (0, 1.0)]


def test_rows_with_other_labels_or_another_answer_repeat_nothing() -> None:
    question = text(1)
    rows = [(question, "yes"), (question, "no"), (question, "yes")]
    assert near.originals(rows, ["", "", "other"], 0.7) == [(0, 1.0), (1, 1.0), (2, 1.0)]


def test_chinese_texts_that_differ_in_one_character_are_near() -> None:
    told = "免赔额是保险公司开始赔付之前你自己要承担的那一部分损失金额所以免赔额越高保费就越低"
    assert found([told, told.replace("损失", "损害")], 0.7)[1][0] == 0


def test_case_blanks_and_width_do_not_make_a_text_another() -> None:
    assert near.normal("Ｈello\n  World") == near.normal("hello world")


def test_a_likeness_that_bands_cannot_find_is_refused() -> None:
    with pytest.raises(ValueError, match="is not between"):
        found(["a"], 0.2)
    assert found([], 0.7) == []
