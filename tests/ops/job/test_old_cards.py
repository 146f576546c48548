"""Cards before Ampere: what a plan takes them for, and what it refuses on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ops.errors import PreflightError
from ops.job.config import parse
from ops.job.plan import Plan
from ops.job.planner import make_plan
from trainer import memory

ROWS = [{"instruction": f"say {n}", "input": "", "output": f"it is {n} " * 30} for n in range(20)]
SMALL, GEMMA = "Qwen/Qwen3-0.6B", "google/gemma-3-1b-it"
CU126 = {"ref": "pytorch/pytorch:2.7.1-cuda12.6-cudnn9-runtime"}


def planned(
    folder: Path, cards: list[str], precision: str | None, base: str = SMALL, **more: Any
) -> Plan:
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "run").mkdir(exist_ok=True)
    told = {
        "name": "old",
        "model": {"base": base} | ({"precision": precision} if precision else {}),
        "offer": {"gpu_name": cards},
        "data": {"files": ["rows.json"], "max_length": 512},
        "limits": {"max_usd": 5},
        **more,
    }
    return make_plan(parse(told, folder / "job.toml"), "old", folder / "run", or_estimate=True)


@pytest.mark.parametrize(
    ("cards", "precision", "image", "taken", "least"),
    [
        (["Tesla T4"], None, {}, "fp16", 7.5),
        (["T4", "RTX 2080 Ti"], None, {}, "fp16", 7.5),
        (["Tesla V100"], None, CU126, "fp16", 7.0),
        (["Tesla T4", "RTX 4090"], None, {}, "bf16", 8.0),
        ([], None, {}, "bf16", 8.0),
        ([], "fp16", {}, "fp16", 7.5),
        (["Tesla T4"], "nf4", {}, "nf4", 7.5),
        ([], "nf4", {}, "nf4", 8.0),
        (["Tesla T4"], "int8", {}, "int8", 7.5),
    ],
)
def test_the_precision_and_the_cards_follow_from_what_the_job_names(
    cards: list[str],
    precision: str | None,
    image: dict[str, str],
    taken: str,
    least: float,
    tmp_path: Path,
) -> None:
    plan = planned(tmp_path, cards, precision, **({"image": image} if image else {}))
    assert plan.wire_job["model"]["precision"] == plan.workload.precision == taken
    assert plan.needs.min_compute_capability == least
    told = "loss scale" in " ".join(plan.notes)
    assert told == (taken == "fp16" or (bool(cards) and taken in ("nf4", "int8")))
    untried = any("was not tried" in note for note in plan.notes)
    assert untried == (told and bool(cards))


@pytest.mark.parametrize(
    ("cards", "precision", "image", "words", "hint"),
    [
        (["Tesla T4"], "bf16", {}, "capability 7.5", 'model.precision = "fp16"'),
        (["Tesla T4"], "fp8", {}, "needs 8.9", 'model.precision = "fp16"'),
        (["A40"], "fp8", {}, "needs 8.9", 'model.precision = "bf16"'),
        (["Tesla V100"], "fp16", {}, "has no code", "CUDA 12.6"),
        (["Tesla V100"], "int8", CU126, "needs 7.5", 'model.precision = "fp16"'),
    ],
)
def test_what_no_named_card_computes_in_is_refused_with_the_next_step(
    cards: list[str],
    precision: str,
    image: dict[str, str],
    words: str,
    hint: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(PreflightError, match=words) as refused:
        planned(tmp_path, cards, precision, **({"image": image} if image else {}))
    assert hint in (refused.value.hint or "")


def test_a_family_that_overflows_fp16_is_refused_in_it_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    env = {"base": GEMMA, "env": ["HF_TOKEN"]}
    for cards, precision in (([], "fp16"), (["Tesla T4"], None), (["Tesla T4"], "nf4")):
        with pytest.raises(PreflightError, match="is not computed in fp16: its hidden states"):
            planned(tmp_path, cards, precision, **env)
    assert planned(tmp_path, [], "nf4", **env).needs.min_compute_capability == 8.0


def test_attention_without_flash_is_counted(tmp_path: Path) -> None:
    shape = planned(tmp_path, ["Tesla T4"], "nf4").workload.shape
    assert shape is not None
    fused, old = (
        memory.predict(shape, "nf4", **more).peak_gib for more in ({}, memory.BEFORE_AMPERE)
    )
    plain, half = (memory.predict(shape, p, fused=False).activations_gib for p in ("bf16", "fp16"))
    each = 8192 * shape.layers * 3 * shape.q_size * 2 / memory.GIB
    assert old > fused and half - plain == pytest.approx(each, rel=0.01)
