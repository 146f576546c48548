"""The mutants: what is planted, and that what they name is there."""

from __future__ import annotations

import ast

import mutants
import pytest

SOURCE = """
def f(a: int = 3) -> bool:
    if not a < 5 and a + 1 in (2, 7):
        raise ValueError(f"{a} is 9")
    return True
"""


@pytest.mark.parametrize("module", mutants.TESTS)
def test_every_module_and_test_that_is_named_is_there(module: str) -> None:
    assert (mutants.ROOT / (module.replace(".", "/") + ".py")).is_file()
    assert all((mutants.ROOT / test).is_file() for test in mutants.TESTS[module])


@pytest.mark.parametrize("module", mutants.KNOWN)
def test_every_fault_that_is_excused_can_be_planted(module: str) -> None:
    planted = {fault.text for fault in mutants.faults(mutants.path_of(module).read_text("utf-8"))}
    assert set(mutants.KNOWN[module]) <= planted


def test_each_fault_changes_one_thing_and_no_message() -> None:
    made = {ast.unparse(mutants.planted(SOURCE, fault)) for fault in mutants.faults(SOURCE)}
    text = ast.unparse(ast.parse(SOURCE))
    assert text not in made and len(made) == len(mutants.faults(SOURCE))
    for old, new in (
        ("not a < 5", "a < 5"),
        ("a < 5", "a <= 5"),
        (" and ", " or "),
        ("a + 1", "a - 1"),
        ("a + 1", "a + 2"),
        (" in (", " not in ("),
        ("int=3", "int=4"),
        ("(2, 7)", "(2, 8)"),
        ("True", "False"),
    ):
        assert text.replace(old, new) in made, new
    assert not any("is 10" in other or "is 18" in other for other in made)


def test_a_module_that_is_forgotten_is_loaded_anew_however_it_is_imported() -> None:
    from ops import plain as before

    def act() -> int:
        mutants.forget("ops.plain")
        from ops import plain as again

        return int(again is before)

    assert mutants.in_child(act, 20) == 0
