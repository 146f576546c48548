"""What docs/troubleshooting.md promises is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ops import errors
from ops.box import scripts
from ops.job.config import keys

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
NOT_OF_AN_ERROR = {0, 1, 130}  # done, a fault of ours, interrupted


def rows(title: str) -> list[list[str]]:
    """The cells of the table under this heading, without its head."""
    section = PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    table = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[1:]]


def test_the_table_of_exit_codes_has_every_code_once() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type)]
    codes = {k.exit_code for k in kinds if issubclass(k, errors.MilkteaError)}
    told = [int(code) for code, _ in rows("Exit codes")]
    assert len(told) == len(set(told)) and set(told) == codes | NOT_OF_AN_ERROR


@pytest.mark.parametrize("what, ends", rows("What could keep billing, and what ends it"))
def test_what_ends_a_bill_is_named_as_the_code_has_it(what: str, ends: str) -> None:
    assert what and ends
    for limit in re.findall(r"`(limits\.\w+)`", ends):
        assert limit in keys()
    if "minutes of silence" in ends:
        assert f"after {scripts.LEASE_S // 60} minutes of silence" in ends
