"""Sixty inputs on which the first edition of the trainer was wrong: each is held by a test.

cases.toml names them, says what a user sees now, and names the tests.
"""

from __future__ import annotations

import importlib.util
import itertools
import tomllib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
CASES: dict[str, list[dict[str, Any]]] = tomllib.loads((HERE / "cases.toml").read_text("utf-8"))
COUNTS = {"data": 13, "template": 11, "start": 14, "attention": 16, "rope": 2, "save": 4}
# of a case that names an architecture
AGAINST_STOCK = (
    "model/test_architectures.py::"
    "test_loss_and_gradients_are_those_of_rows_alone_in_stock_transformers_and_peft"
)


def held_by(case: dict[str, Any]) -> list[str]:
    if "architecture" in case:
        return [f"{AGAINST_STOCK}[{case['architecture']}]"]
    return list(case["tests"])


@cache
def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"case_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ids_of(test: Any) -> list[str]:
    """What stands in brackets behind a test's name, for each of its parameters; [""] of a test
    without any. As pytest makes them of texts and numbers."""
    marks = [m for m in getattr(test, "pytestmark", []) if m.name == "parametrize"]
    if not marks:
        return [""]
    told = []
    for mark in marks:  # pytest puts the lowest first, and so does pytestmark
        several = not isinstance(mark.args[0], str) or "," in mark.args[0]
        values = [getattr(v, "values", (v,) if not several else v) for v in mark.args[1]]
        told.append(["-".join(map(str, value)) for value in values])
    return ["-".join(parts) for parts in itertools.product(*told)]


def test_there_are_sixty_cases_and_each_is_right_or_told_in_words() -> None:
    assert {group: len(cases) for group, cases in CASES.items()} == COUNTS
    every = [case for cases in CASES.values() for case in cases]
    assert len({case["what"] for case in every}) == sum(COUNTS.values()) == 60
    assert {case["seen"] for case in every} == {"right", "refused", "told"}
    assert all(held_by(case) for case in every)


@pytest.mark.parametrize("group", CASES)
def test_every_test_that_holds_a_case_is_there(group: str) -> None:
    for case in CASES[group]:
        for named in held_by(case):
            file, _, rest = named.partition("::")
            name, _, bracket = rest.partition("[")
            test = getattr(module_of((HERE / file).resolve()), name, None)
            assert test is not None, named
            assert bracket.removesuffix("]") in ids_of(test), named
