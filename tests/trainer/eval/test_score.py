"""Scores of answers, and of a run's adapter beside its base model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.eval import score
from trainer.train import run_job


def test_scores_of_equal_and_of_unrelated_answers_are_the_ends_of_the_scale() -> None:
    same = ["The cat sat on the mat today.", "今天天气很好，我们去公园。"]
    assert score.bleu4(same, same) == pytest.approx(100)
    assert score.rouge(same, same) == {"rouge-1": 100, "rouge-2": 100, "rouge-l": 100}
    other = ["xyz", "qqq"]
    assert score.bleu4(other, same) == 0 and set(score.rouge(other, same).values()) == {0}


def test_scores_agree_with_values_worked_out_by_hand() -> None:
    # 6 words each, 5 in common, 3 of 5 pairs, longest common subsequence 5 (the cat _ on the mat)
    found = score.rouge(["the cat is on the mat"], ["the cat sat on the mat"])
    assert found == pytest.approx(
        {"rouge-1": 100 * 5 / 6, "rouge-2": 100 * 3 / 5, "rouge-l": 100 * 5 / 6}
    )
    # orders 1 to 4 match 5/6, 3/5, 1/4 and none of 3, which counts as half a match
    assert score.bleu4(["the cat is on the mat"], ["the cat sat on the mat"]) == pytest.approx(
        100 * (5 / 6 * 3 / 5 * 1 / 4 * 0.5 / 3) ** 0.25
    )


def test_an_answer_that_is_too_short_pays_the_brevity_penalty() -> None:
    assert score.bleu4(["a b c d"], ["a b c d e f g h"]) == pytest.approx(
        100 * 2.718281828459045**-1
    )


def test_a_run_without_a_result_is_not_scored(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no finished result"):
        score.evaluate(tmp_path, None)


@pytest.mark.slow
def test_a_trained_adapter_scores_full_marks_where_its_base_has_none(
    run_folder: Callable[..., Path],
) -> None:
    data = [
        {"instruction": f"say {w}", "input": "", "output": f"{w} it is"}
        for w in ("tea", "milk", "rice")
    ] * 8
    job = run_folder(
        data=data, held_out=data[:3], training={"num_train_epochs": 25, "learning_rate": 1e-2}
    )
    assert run_job(job) == 0
    assert score.main([str(job.parent)]) == 0
    told = json.loads((job.parent / "evaluation.json").read_text())
    assert told["rows"] == 3
    assert told["base"]["exact"] == 0 and told["base"]["rouge-l"] < 50
    assert told["adapter"]["exact"] == 100 and told["adapter"]["rouge-l"] == pytest.approx(100)
