"""What people bring ends in a result, or is refused in words, by config.json where it tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from architectures import build, config
from tiny import manifest_of, write_tokenizer
from transformers import AutoModelForCausalLM

from trainer import families, memory
from trainer.loop.budget import GPU_TOKENS, STEP_TOKENS, for_step, solve
from trainer.outcome import DONE, REFUSED
from trainer.train import outcome_of
from trainer.wire.job import Job

Make = Callable[..., Path]
ROWS = [
    {"instruction": f"Say {n}", "input": "", "output": f"it is {n} " * (6 + n % 9)}
    for n in range(12)
]


def folder_of(name: str, root: Path, **changes: Any) -> Path:
    """A tiny model's folder; `changes` are keys of its configuration."""
    if changes:
        made = config(name)
        for key, value in changes.items():
            setattr(made, key, value)
        AutoModelForCausalLM.from_config(made).save_pretrained(root)
    else:
        build(name).save_pretrained(root)
    write_tokenizer(root)
    return root


def ended(make: Make, folder: Path, **training: Any) -> tuple[Path, Any]:
    path = make(model=folder, data=ROWS, training={"max_steps": 2, **training})
    return path, outcome_of(path)


@pytest.mark.parametrize("name", ["qwen3_5", "gemma2", "bloom", "gptj"])
def test_attention_of_every_kind_ends_with_a_result(
    name: str, run_folder: Make, tmp_path: Path
) -> None:
    """test_to_the_end.py trains every architecture."""
    path, end = ended(run_folder, folder_of(name, tmp_path / "model"))
    assert end.code == DONE, end.error
    assert manifest_of(path)["tensors"]


def test_full_training_of_a_mixture_ends_with_a_result(run_folder: Make, tmp_path: Path) -> None:
    path, end = ended(run_folder, folder_of("qwen3_moe", tmp_path / "model"), method="full")
    assert end.code == DONE, end.error
    assert manifest_of(path)["method"] == "full"


def test_a_mixture_on_a_gpu_has_a_micro_batch(run_folder: Make, tmp_path: Path) -> None:
    folder = folder_of("qwen3_moe", tmp_path / "model")
    job = Job.model_validate_json(run_folder(model=folder).read_bytes())
    found = solve(job, folder, 200, 24.0, 1)
    assert found is not None and found[0] >= 200


def test_a_step_of_pairs_is_one_micro_batch_where_the_card_has_much_room(
    run_folder: Make, tmp_path: Path
) -> None:
    folder = folder_of("qwen3", tmp_path / "model")
    job = Job.model_validate_json(run_folder(model=folder).read_bytes())
    assert solve(job, folder, 200, 24.0, 1) == (GPU_TOKENS, 0)
    assert for_step(20_000, job, folder, 200, 24.0, 1) == (20_000, 0)
    assert for_step(99_000, job, folder, 200, 24.0, 1) == (STEP_TOKENS, 0)
    assert for_step(9_000, job, folder, 200, 24.0, 1) == (GPU_TOKENS, 0)
    sizes = (n / 10 for n in range(10, 240))
    just = next(s for s in sizes if solve(job, folder, 200, s, 1) == (GPU_TOKENS, 0))
    assert for_step(20_000, job, folder, 200, just, 1) == (GPU_TOKENS, 0)


def test_the_oracle_reads_widths_that_differ_by_layer() -> None:
    text = {"vocab_size": 262400, "hidden_size": 2048, "num_hidden_layers": 2, "head_dim": 256}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 2, "model_type": "gemma3n_text"}
    told = {"model_type": "gemma3n", "text_config": {**text, "intermediate_size": [8192, 8192]}}
    assert memory.Shape.from_config(told).intermediate == 8192


@pytest.mark.parametrize(
    ("name", "key"), [("gpt2", "n_positions"), ("llama_tied", "max_position_embeddings")]
)
def test_rows_beyond_the_models_positions_are_told_by_config_json(
    name: str, key: str, tmp_path: Path
) -> None:
    folder = folder_of(name, tmp_path / "model", **{key: 32})
    family = families.read(json.loads((folder / "config.json").read_text()))
    assert any("knows 32 positions" in said for said in family.words(150))
    assert not any("positions" in said for said in family.words(30))


def test_rows_beyond_learned_positions_are_refused(run_folder: Make, tmp_path: Path) -> None:
    folder = folder_of("gpt2", tmp_path / "model", n_positions=32)
    _, end = ended(run_folder, folder)
    assert end.code == REFUSED and "32" in str(end.error), end.error
