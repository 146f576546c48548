"""`milktea serve`: which results stand beside each other, and the server's command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops.errors import PreflightError
from ops.use import words
from ops.use.found import Found
from trainer.serve.server import named, parse


def test_results_of_one_base_are_served_under_their_names(tmp_path: Path) -> None:
    one, two = (Found(n, tmp_path / n / "adapter.zip", "org/base@abc") for n in ("a-1", "b-2"))
    word = words.serve([one, two], ["--host=127.0.0.1", "--port=0"])
    read = parse([*word.arguments, "--json"])  # as words.show runs it
    assert read.json and read.port == 0 and read.base == "org/base@abc"
    assert named(read.results) == {"a-1": one.adapter, "b-2": two.adapter}
    assert read.feedback == tmp_path / "a-1"


def test_results_of_two_bases_or_of_one_name_are_refused(tmp_path: Path) -> None:
    one = Found("a-1", tmp_path / "adapter.zip", "org/base")
    with pytest.raises(PreflightError, match="have 2 bases: org/base, org/other"):
        words.serve([one, Found("b-2", tmp_path / "adapter.zip", "org/other")])
    with pytest.raises(PreflightError, match="one name"):
        words.serve([one, one])
    with pytest.raises(PreflightError, match="does not say"):
        words.serve([Found("c", tmp_path / "adapter.zip")])
