"""The practice model and its data: whole, small, made by the script, and worth practising on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import events_of, finish, start

from trainer.practice import lessons, model, world

Make = Callable[..., Path]


def test_the_committed_model_is_what_its_manifest_says_and_small() -> None:
    names = model.verify(model.HERE)
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} == set(
        names
    )
    assert sum((model.HERE / n).stat().st_size for n in names) < 8e6


def test_a_damaged_model_is_not_copied(tmp_path: Path) -> None:
    shutil.copytree(model.HERE, tmp_path / "model")
    with open(tmp_path / "model" / "model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"x")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        model.verify(tmp_path / "model")


def test_the_committed_data_is_what_the_script_makes() -> None:
    train, held_out = world.practice_rows()
    assert json.loads((model.DATA / "train.json").read_text()) == train
    assert json.loads((model.DATA / "held_out.json").read_text()) == held_out


@pytest.mark.parametrize("name", lessons.LESSONS)
def test_the_committed_lessons_are_what_the_script_makes(name: str, tmp_path: Path) -> None:
    lessons.write(tmp_path)
    for file in (f"{name}.jsonl", f"{name}_held_out.jsonl"):
        assert (lessons.DATA / file).read_bytes() == (tmp_path / file).read_bytes()
    train, held = lessons.LESSONS[name]()
    assert train and held and not [row for row in held if row in train]


def test_no_held_out_fact_is_taught_but_every_name_and_value_is() -> None:
    taught, held = world.split(world.facts())
    assert len(held) == 56 and len(taught) == 224
    assert not {(f.name, f.attribute) for f in taught} & {(f.name, f.attribute) for f in held}
    assert {f.name for f in held} <= {f.name for f in taught}
    assert {(f.attribute, f.value) for f in held} <= {(f.attribute, f.value) for f in taught}
    train, held_out = world.practice_rows()
    assert not {r["output"] for r in train} & {r["output"] for r in held_out}
    assert not {(r["instruction"], r["input"]) for r in train} & {
        (r["instruction"], r["input"]) for r in held_out
    }


def practice_job(make: Make, **training: object) -> Path:
    train, held_out = world.practice_rows()
    return make(
        model=model.HERE,
        data=train,
        held_out=held_out,
        lora={"r": 16, "lora_alpha": 32},
        training={
            "batch_size": 32,
            "learning_rate": 3e-3,
            "num_train_epochs": 2,
            "warmup_ratio": 0.03,
            "lr_scheduler_type": "cosine",
            **training,
        },
    )


def test_the_practice_run_teaches_it_to_answer_in_chinese(run_folder: Make) -> None:
    job = practice_job(run_folder)
    assert finish(start(job), 150) == [0]
    score = next(e for e in events_of(job) if e["event"] == "score")
    assert (
        score["rows"] == 56
        and score["exact_match_before"] < 0.05
        and score["exact_match_after"] > 0.9
    )
    shown = [e for e in events_of(job) if e["event"] == "sample"]
    assert shown and shown[0]["before"].isascii() and not shown[0]["after"].isascii()


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "world_size"), [(1, 1), (2, 1), (3, 2)])
def test_it_does_so_with_other_seeds_and_on_two_processes(
    run_folder: Make, seed: int, world_size: int
) -> None:
    job = practice_job(run_folder, seed=seed)
    assert finish(start(job, world_size), 300) == [0] * world_size
    score = next(e for e in events_of(job) if e["event"] == "score")
    assert score["exact_match_after"] > 0.9


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_script_makes_the_committed_model_again(tmp_path: Path) -> None:
    """Equal to the bit on the same kind of CPU; elsewhere sums round apart, so there it must know
    its world as well."""
    model.make(tmp_path / "model", tmp_path)
    made, kept = model.verify(tmp_path / "model"), model.verify(model.HERE)
    assert (
        made["tokenizer.json"] == kept["tokenizer.json"]
        and made["config.json"] == kept["config.json"]
    )
    if made["model.safetensors"] != kept["model.safetensors"]:
        assert model.knows(tmp_path / "model") > 0.95


def test_the_base_knows_its_world_in_english() -> None:
    assert model.knows(model.HERE) > 0.95
