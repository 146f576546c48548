"""Scores against the libraries that define them, and against their numbers kept in a file."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.eval import metrics

GOLDEN = json.loads((Path(__file__).parent / "metrics_golden.json").read_text(encoding="utf-8"))
SIGNS = "今天天气不错我们去公园散步吧你好世界，。！？”’……\n\n   abc the cat sat ab12 ...?!? 中国🙂"


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: row["answer"][:12])
def test_each_score_is_what_the_fields_libraries_gave(row: dict[str, Any]) -> None:
    pytest.importorskip("jieba", reason="ROUGE needs jieba")
    answer, reference = row["answer"], row["reference"]
    found = {
        "bleu-4": metrics.bleu4(answer, reference),
        **metrics.rouge(answer, reference),
        "chrf": metrics.chrf([answer], [reference]),
    }
    assert found == pytest.approx({name: row[name] for name in found}, abs=1e-9)


def test_chrf_of_many_rows_is_sacrebleus() -> None:
    rows = GOLDEN["rows"]
    found = metrics.chrf([r["answer"] for r in rows], [r["reference"] for r in rows])
    assert found == pytest.approx(GOLDEN["chrf of all"], abs=1e-9)


def _pairs(count: int) -> list[tuple[str, str]]:
    draw = random.Random(7)

    def text() -> str:
        return "".join(draw.choices(SIGNS, k=draw.choice([0, 1, 2, 3, 5, 10, 20, 40, 80])))

    pairs = []
    for _ in range(count):
        one = text()
        other = list(one) if draw.random() < 0.6 else list(text())
        for _ in range(draw.randint(0, 4) if other else 0):
            other[draw.randrange(len(other))] = draw.choice(SIGNS)
        pairs.append((one, "".join(other)))
    return pairs


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_pairs_score_as_nltk_and_rouge_chinese_score_them(count: int) -> None:
    jieba = pytest.importorskip("jieba", reason="ROUGE needs jieba")
    bleu = pytest.importorskip("nltk.translate.bleu_score", reason="the oracle of BLEU-4")
    rouge = pytest.importorskip("rouge_chinese", reason="the oracle of ROUGE").Rouge()
    jieba.setLogLevel("ERROR")
    smoothing = bleu.SmoothingFunction().method3
    for answer, reference in _pairs(count):
        mine, theirs = " ".join(jieba.cut(answer)), " ".join(jieba.cut(reference))
        expected = dict.fromkeys(("rouge-1", "rouge-2", "rouge-l"), 0.0)
        if mine.split() and theirs.split():
            expected = {k: 100 * v["f"] for k, v in rouge.get_scores(mine, theirs)[0].items()}
        expected["bleu-4"] = 100 * bleu.sentence_bleu(
            [list(reference)], list(answer), smoothing_function=smoothing
        )
        found = {**metrics.rouge(answer, reference), "bleu-4": metrics.bleu4(answer, reference)}
        assert found == pytest.approx(expected, abs=1e-9), (answer, reference)


def test_a_runaway_answer_is_scored_at_once() -> None:
    draw = random.Random(0)
    long, other = ("".join(draw.choices("今天天气不错我们去公园", k=k)) for k in (6400, 5200))
    began = time.process_time()
    common = metrics.longest_common(long, other)
    assert time.process_time() - began < 1
    assert 0.5 * 5200 < common < 5200


def test_the_longest_common_subsequence_is_that_of_the_plain_table() -> None:
    draw = random.Random(3)
    for _ in range(200):
        a, b = ("".join(draw.choices("abc", k=draw.randint(0, 12))) for _ in range(2))
        row = [0] * (len(b) + 1)
        for x in a:
            before = 0
            for j, y in enumerate(b, 1):
                before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
        assert metrics.longest_common(a, b) == row[-1]


def test_an_interval_holds_its_mean_and_shrinks_with_more_rows() -> None:
    few, many = metrics.interval([0.0, 100.0] * 10), metrics.interval([0.0, 100.0] * 1000)
    assert few.low < few.value == many.value == 50 < few.high
    assert many.high - many.low < (few.high - few.low) / 5
    with pytest.raises(ValueError, match="no row"):
        metrics.interval([])


def test_repetition_lowers_the_share_of_distinct_pairs() -> None:
    assert metrics.distinct(["abcdef"]) == 1
    assert metrics.distinct(["ababab"]) == 2 / 5
    assert metrics.distinct([""]) == 0
