"""Losses and gradients of the preference stages are those of TRL 1.16, in fp32 on a tiny model.

trl_golden.json holds TRL's numbers. Where MILKTEA_TRL names a Python with TRL (tests/trl_oracle.py
says which), they are made anew and compared too.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import trl_oracle
from trl_oracle import ANSWER_TOKENS, DPO_CASES, GRPO_CASES, POLICY, START, head, set_adapter

from trainer.data import batch
from trainer.data.pairs import Rows
from trainer.loop.ranks import StopSignal
from trainer.loop.replicas import Replicas
from trainer.stages import compared, dpo, kto, rm
from trainer.stages.group_losses import count, group_losses
from trainer.stages.pair_losses import pair_losses
from trainer.wire.job import Job
from trainer.wire.stages import Dpo, Grpo

Make = Callable[..., Path]
GOLDEN = Path(__file__).with_name("trl_golden.json")
HOST = torch.device("cpu")
PAIRS = [
    {"instruction": "Say number 3", "chosen": "it is 3, you see", "rejected": "no", "margin": 0.5},
    {"instruction": "Say please", "chosen": "please", "rejected": "please do it " * 4},
    {"instruction": "What is 1 + 2?", "chosen": "three", "rejected": "it is four " * 2},
]
TAGGED = [
    {"instruction": p["instruction"], "output": p[side], "kto_tag": side == "chosen"}
    for p, side in zip(PAIRS, ("chosen", "rejected", "chosen"), strict=True)
]
SETTINGS: dict[str, Any] = {"training": {"batch_size": 8}}


def loaded(job_path: Path, kind: Any) -> Any:
    """The stage with the adapter at its start, then moved."""
    stage = kind(Job.model_validate_json(job_path.read_bytes()), job_path.parent)
    stage.load(Replicas(StopSignal(), HOST))
    set_adapter(stage.model.named_parameters(), START)
    if isinstance(stage, compared.Referenced):
        stage.start = compared.Reference(stage.trained())
    set_adapter(stage.model.named_parameters(), POLICY)
    return stage


def told(stage: Any, work: batch.Work | None = None) -> dict[str, Any]:
    """Loss and gradients of the first step."""
    work = stage.prepare(0, stage.batches(0) if work is None else work)
    total = sum(stage.loss(0, micro)[0] for micro in work.micro) / work.count
    total.backward()
    return {
        "loss": float(total.detach()),
        "gradients": trl_oracle.gradients(stage.model.named_parameters()),
    }


def rows_of(rows: Rows) -> list[dict[str, Any]]:
    cut = rows.starts[1:-1]
    return [
        {"ids": ids.tolist(), "begin": int(np.flatnonzero(on)[0])}
        for ids, on in zip(np.split(rows.ids, cut), np.split(rows.trained, cut), strict=True)
    ]


@pytest.fixture
def stages(stage_run: Make) -> Callable[..., Any]:
    """stages("dpo", dpo={...}) -> the stage on the rows above."""
    kinds = {"dpo": dpo.Stage, "kto": kto.Stage, "rm": rm.Stage}

    def make(name: str, rows: list[Any] | None = None, **section: Any) -> Any:
        rows = rows or (TAGGED if name == "kto" else PAIRS)
        changes = SETTINGS | ({name: section} if section else {})
        return loaded(stage_run(name, rows, **changes), kinds[name])

    return make


@pytest.fixture
def asked(stages: Callable[..., Any]) -> dict[str, Any]:
    """What TRL is asked, from our own rows."""
    pairs, tagged = stages("dpo").data.rows, stages("kto").data.rows
    everything = list(range(len(tagged)))
    return {
        "pairs": rows_of(pairs),
        "margins": [float(m) for m in stages("rm").data.rows.extra["margin"][::2]],
        "tagged": [
            row | {"wanted": bool(w)}
            for row, w in zip(rows_of(tagged), tagged.extra["wanted"], strict=True)
        ],
        "mismatched": rows_of(kto.mismatch(tagged, everything, everything)),
        "advantages": [0.7, -0.7, 1.2, -1.2, 0.4, -0.4],
        "means": [[-0.5, -1.5], [-2.0, -0.25], [-1e-3, -3.0]],
    }


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GOLDEN.read_text())
    return found


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert set(ours["gradients"]) == set(theirs["gradients"]) and len(ours["gradients"]) >= 28
    for name, numbers in theirs["gradients"].items():
        assert ours["gradients"][name] == pytest.approx(numbers, abs=1e-5, rel=1e-4), name


def test_the_golden_numbers_are_of_these_rows(
    asked: dict[str, Any], golden: dict[str, Any]
) -> None:
    assert golden["rows"] == asked


@pytest.mark.parametrize("case", DPO_CASES)
def test_losses_of_pairs_and_their_gradients_are_trls(
    case: str, stages: Callable[..., Any], golden: dict[str, Any]
) -> None:
    loss_type = case if case not in ("ld", "sft") else "sigmoid"
    rows = PAIRS[:1] if case == "sft" else None  # over several pairs TRL's is a mean of tokens
    stage = stages("dpo", rows, loss_type=loss_type, **DPO_CASES[case])
    same(told(stage), golden["dpo"][case])


def test_kto_and_its_gradients_are_trls(stages: Callable[..., Any], golden: dict[str, Any]) -> None:
    """With the same mismatched rows; ours are made over the step, TRL's over a batch."""
    stage = stages("kto", desirable_weight=1.3, undesirable_weight=0.8)
    same(told(in_order(stage)), golden["kto"]["kto"])


def in_order(stage: Any) -> Any:
    """The stage with one step of all rows in the order of the file."""

    class Order:
        total_steps = 1

        def step(self, step: int) -> list[int]:
            return list(range(len(stage.data.rows) // stage.rows_per_item))

    stage.order = Order()
    return stage


@pytest.mark.parametrize("case, center", [("rm", 0.0), ("rm, centred", 0.01)])
def test_a_reward_model_and_its_gradients_are_trls(
    case: str, center: float, stages: Callable[..., Any], golden: dict[str, Any]
) -> None:
    stage = stages("rm", center_rewards_coefficient=center)
    stage.model.score.weight.data.copy_(head(stage.model.score.weight.shape[1]))
    same(told(stage), golden["rm"][case])


@pytest.mark.parametrize("case", GRPO_CASES)
def test_grpo_and_its_gradients_are_trls(
    case: str, stages: Callable[..., Any], golden: dict[str, Any]
) -> None:
    """Answers drawn from the start, by a policy that has moved since."""
    told_ = {k: v for k, v in GRPO_CASES[case].items() if k != "importance_sampling_level"}
    told_["max_completion_length"] = ANSWER_TOKENS
    told_["loss_type"] = "gspo" if case == "gspo" else told_["loss_type"]
    settings, stage = Grpo(**told_), stages("dpo")
    [micro] = in_order(stage).batches(0).micro
    numbers = list(micro["stage/numbers"])
    advantage = torch.tensor(golden["rows"]["advantages"])[numbers]
    with torch.no_grad(), stage.start.in_place():
        old = compared.answer_log_probs(stage.model, micro)[0]
    policy = compared.answer_log_probs(stage.model, micro)[0]
    lengths = micro["stage/lengths"]
    mask = (torch.arange(policy.shape[1]) < lengths[:, None]).float()
    reference = old if settings.beta else None
    losses = group_losses(settings, policy, old, reference, advantage, mask)
    total = losses.sum() / count(settings, len(policy), int(mask.sum()))
    total.backward()
    ours = trl_oracle.gradients(stage.model.named_parameters())
    same({"loss": float(total.detach()), "gradients": ours}, golden["grpo"][case])


def test_losses_of_means_are_trls(golden: dict[str, Any]) -> None:
    means = torch.tensor(golden["rows"]["means"])
    simpo = pair_losses(Dpo(loss_type="simpo"), means, means, torch.ones_like(means))
    assert simpo.tolist() == pytest.approx(golden["means"]["simpo"], abs=1e-5)
    orpo = pair_losses(Dpo(loss_type="orpo"), means, means, torch.ones_like(means))
    term = (orpo + means[:, 0]).tolist()  # less the chosen answers' cross-entropy
    assert term == pytest.approx(golden["means"]["orpo_term"], abs=1e-5)


def test_smoothed_losses_are_what_swapped_labels_make_of_the_plain_one() -> None:
    dice = torch.Generator().manual_seed(4)
    policy, reference = torch.randn(2, 9, 2, generator=dice, dtype=torch.float64) * 5
    lengths, e = torch.ones(9, 2), 0.2

    def losses(kind: Literal["sigmoid", "robust"], smoothing: float) -> list[torch.Tensor]:
        settings = Dpo(loss_type=kind, label_smoothing=smoothing)
        pairs = ((policy, reference), (policy.flip(1), reference.flip(1)))
        return [pair_losses(settings, *pair, lengths) for pair in pairs]

    plain, swapped = losses("sigmoid", 0.0)
    assert torch.allclose(losses("sigmoid", e)[0], (1 - e) * plain + e * swapped), "cDPO"
    right, wrong = losses("robust", e)
    assert torch.allclose((1 - e) * right + e * wrong, plain), "robust is unbiased"


def test_trl_says_today_what_the_golden_numbers_say(
    asked: dict[str, Any], golden: dict[str, Any], models: Make, tmp_path: Path
) -> None:
    python = os.environ.get("MILKTEA_TRL")
    if not python:
        pytest.skip("MILKTEA_TRL names no Python with TRL 1.16 (tests/trl_oracle.py)")
    (tmp_path / "model").symlink_to(models("gqa"))
    (tmp_path / "rows.json").write_text(json.dumps(asked))
    script = Path(trl_oracle.__file__)
    subprocess.run([python, str(script), str(tmp_path)], check=True, capture_output=True)
    found = json.loads((tmp_path / "golden.json").read_text())
    for stage in ("dpo", "kto", "rm", "grpo"):
        for case, numbers in golden[stage].items():
            same(found[stage][case], numbers)
