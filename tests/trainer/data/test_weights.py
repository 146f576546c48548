"""The files of weights that a model's folder names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.data.errors import InvalidJob
from trainer.data.weights import module_names, weight_files

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("told", [{}, {"weight_map": ["a"]}, {"weight_map": {"a": 3}}, ["a"]])
def test_an_index_that_names_no_files_is_refused_by_its_name(tmp_path: Path, told: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps(told))
    with pytest.raises(InvalidJob, match=f"{INDEX} has no weight_map"):
        weight_files(tmp_path)


def test_the_files_that_an_index_names_must_be_there(tmp_path: Path) -> None:
    names = {"a": "2.safetensors", "b": "1.safetensors", "c": "1.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    (tmp_path / "1.safetensors").touch()
    with pytest.raises(InvalidJob, match="lacks 1 of 2 files of weights: 2"):
        weight_files(tmp_path)
    (tmp_path / "2.safetensors").touch()
    assert [p.name for p in weight_files(tmp_path)] == ["1.safetensors", "2.safetensors"]


def test_modules_are_those_with_weights_and_what_holds_them(models: Callable[..., Path]) -> None:
    names = module_names(models())
    assert {"model", "model.layers.1.mlp", "model.layers.1.mlp.up_proj", "lm_head"} <= names
    assert not any(name.endswith("weight") for name in names)
