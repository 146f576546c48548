"""Scores of answers, and of a run's adapter beside its base model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.eval import score
from trainer.train import run_job


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
