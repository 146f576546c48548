"""Rows that are held out: which, how often they are looked at, what is made of what is seen."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import events_of, manifest_of, rows

from trainer.data import held_out
from trainer.data.formats import Row
from trainer.data.prepare import prepare
from trainer.data.template import Turn
from trainer.loop.checkpoint import State
from trainer.loop.held_out import EarlyStopping, Look
from trainer.train import run_job
from trainer.wire.job import Data, Job, Training

Make = Callable[..., Path]


def row(number: int, where: str = "") -> Row:
    return Row(where, (Turn("user", f"question {number}"), Turn("assistant", "yes")))


def test_rows_stay_on_their_side_when_others_are_added_and_moved() -> None:
    some, all_of_them = [row(n) for n in range(300)], [row(n, "elsewhere") for n in range(900)]
    kept, held, told = held_out.split(some, 0.1)
    more_kept, more_held, _ = held_out.split(all_of_them[::-1], 0.1)
    assert len(kept) + len(held) == 300 and 10 < len(held) < 60
    assert told.startswith(f"{len(held)} of 300 rows are held out, never trained on")
    said, more = {r.turns for r in held}, {r.turns for r in more_held}
    assert said == more & {r.turns for r in some}
    assert not more & {r.turns for r in more_kept}


def test_equal_rows_are_on_one_side_and_held_out_once() -> None:
    twice = [row(n % 500, f"file:{n}") for n in range(1000)]
    kept, held, told = held_out.split(twice, 0.1)
    assert not {r.turns for r in held} & {r.turns for r in kept}
    assert len({r.turns for r in held}) == len(held)
    assert f"and {len(held)} that say the same" in told
    assert len(kept) + 2 * len(held) == 1000


def test_at_most_200_rows_are_held_out_and_none_of_few() -> None:
    assert len(held_out.split([row(n) for n in range(300)], 0.9)[1]) == 200
    kept, held, told = held_out.split([row(n % 99) for n in range(300)], 0.02)
    assert (len(kept), held) == (300, []) and "too few" in told
    assert held_out.split([row(n) for n in range(1000)], 0.0)[1:] == ([], "")


def test_held_out_rows_that_are_trained_on_are_told() -> None:
    assert held_out.in_both([row(1)], [row(2)]) == ""
    assert held_out.in_both([row(1), row(2)], [row(2), row(3)]).startswith("1 of 2 held-out rows")


@pytest.mark.parametrize(
    ("steps", "trained", "held"), [(10, 1e3, 900), (400, 1e6, 2e4), (9, 1e6, 1)]
)
def test_looks_take_at_most_a_fiftieth_of_the_work_between_first_and_last(
    steps: int, trained: float, held: int
) -> None:
    found = held_out.looks(Training(), steps, trained, held)
    between = len(range(found.every, steps, found.every)) if found.every else 0
    assert found.count == 2 + between and between <= held_out.MOST_LOOKS
    assert between * held / 3 <= 0.02 * trained
    assert found.cost == pytest.approx(found.count * held / 3 / trained)
    assert held_out.looks(Training(eval_steps=3), steps, trained, held).every == 3


def test_settings_that_contradict_each_other_are_refused_by_name(run_folder: Make) -> None:
    for wrong, named in (
        ({"eval_steps": 0, "early_stopping_patience": 1}, "early_stopping_patience"),
        ({"eval_steps": 0, "load_best_model_at_end": True}, "load_best_model_at_end"),
    ):
        with pytest.raises(ValidationError, match=named):
            Training.model_validate(wrong)
    told = Job.model_validate_json(run_folder(held_out=rows(1)).read_bytes()).model_dump()
    with pytest.raises(ValidationError, match="held_out_share"):
        Data.model_validate(told["data"] | {"held_out_share": 0.1})
    for stage, training, processes in (
        ("ppo", {"eval_steps": 2}, 1),
        ("grpo", {"early_stopping_patience": 2}, 1),
        ("sft", {"load_best_model_at_end": True, "method": "full"}, 2),
    ):
        changed = {"stages": [{"name": stage}], "training": training, "processes": processes}
        with pytest.raises(ValidationError, match=f"training.{next(iter(training))}"):
            Job.model_validate(told | changed)


def test_patience_ends_a_run_and_the_best_look_is_kept() -> None:
    state, asked = State(), Training(early_stopping_patience=2, load_best_model_at_end=True)
    seen, named = EarlyStopping(state, asked), {"a": torch.nn.Parameter(torch.zeros(2))}
    ended = []
    for step, loss in enumerate([1.0, 3.0, 2.0, 2.5, 2.0]):
        with torch.no_grad():
            named["a"].fill_(step)
        seen.saw(step, Look(5, loss, 0.5), named)
        ended.append(seen.exhausted)
    assert ended == [False, False, False, False, True], "an equal loss is no better one"
    again = EarlyStopping(State(looks=state.looks, stage=seen.kept()), asked)
    assert again.exhausted and again.best_step == 2
    again.take_best(named)
    assert named["a"].tolist() == [2.0, 2.0]
    plain = EarlyStopping(state, Training())
    assert not plain.exhausted and not plain.kept()


@pytest.mark.parametrize("method", ["lora", pytest.param("freeze", marks=pytest.mark.slow)])
def test_a_run_that_gets_worse_ends_early_with_the_result_of_its_best_look(
    run_folder: Make, method: str
) -> None:
    common = {"method": method, "lr_scheduler_type": "constant", "learning_rate": 0.02}
    best = {"early_stopping_patience": 2, "load_best_model_at_end": True, "eval_steps": 1}
    other = [{"instruction": "no", "input": "", "output": "zq " * 9}]
    job = run_folder(held_out=other, training=common | best | {"max_steps": 60})
    assert run_job(job) == 0
    facts, seen = manifest_of(job), looks(job)
    losses = [loss for step, loss, _ in seen if step]
    taken = 1 + losses.index(min(losses))
    assert facts["result_step"] == taken and facts["steps"] == taken + 2 < 60
    assert facts["held_out"]["loss"] == [seen[0][1], min(losses)]
    short = run_folder(training=common | {"max_steps": taken})
    assert run_job(short) == 0
    assert weights(short) == weights(job)


def weights(job: Path) -> bytes:
    with zipfile.ZipFile(job.parent / "result" / "adapter.zip") as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith(".safetensors")))


def looks(job: Path) -> list[list[float]]:
    return [
        [e["step"], e["loss"], e["accuracy"]] for e in events_of(job) if e["event"] == "held_out"
    ]


def test_a_run_looks_at_its_held_out_rows_as_transformers_sees_them(run_folder: Make) -> None:
    job = run_folder(
        data=rows(120),
        lora={"lora_dropout": 0.2},
        training={"max_steps": 5, "eval_steps": 2, "neftune_noise_alpha": 5.0},
    )
    told = Job.model_validate_json(job.read_bytes())
    shared = told.model_copy(update={"data": told.data.model_copy(update={"held_out_share": 0.1})})
    job.write_text(shared.text())
    data = prepare(shared, job.parent)
    assert data.held is not None and len(data.held) + len(data.rows) == 120
    assert not set(data.held.where) & set(data.rows.where)
    assert run_job(job) == 0
    seen = looks(job)
    assert [step for step, *_ in seen] == [0, 2, 4, 5]
    assert seen[0][1:] == pytest.approx(as_transformers(job.parent / "model", data.held), rel=1e-5)
    assert seen[-1][1] < seen[0][1]
    facts = manifest_of(job)
    assert facts["held_out_curve"] == seen and facts["held_out"]["loss"] == [
        seen[0][1],
        seen[-1][1],
    ]
    report = (job.parent / "result" / "report.html").read_text()
    assert "held-out loss" in report and "blue: of held-out rows" in report


def as_transformers(folder: Path, held: Any) -> tuple[float, float]:
    """(loss, accuracy) of the rows' targets, row by row."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loss = right = count = 0.0
    for begin, end in zip(held.starts, held.starts[1:], strict=False):
        ids = torch.tensor(held.ids[begin:end], dtype=torch.long)[None]
        wanted = ids.masked_fill(~torch.tensor(held.trained[begin:end])[None], -100)[:, 1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1]
        loss += float(torch.nn.functional.cross_entropy(logits[0], wanted[0], reduction="sum"))
        right += int((logits.argmax(-1) == wanted).sum())
        count += int((wanted != -100).sum())
    return loss / count, right / count
