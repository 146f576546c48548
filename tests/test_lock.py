"""requirements.lock is what is installed: exact, whole, and without what we do not want."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKED = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned_exactly() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {canonical(re.split(r"[><=!;\s\[]", requirement)[0]) for requirement in wanted}
    assert len(names) > 20
    assert names - {canonical(n) for n in LOCKED} == set()


def test_nothing_agpl_and_no_cuda_comes_in_by_the_back_door() -> None:
    assert len(LOCKED) > 60
    assert [n for n in LOCKED if canonical(n) == "borb" or n.startswith(("nvidia-", "triton"))] == []


def test_no_index_no_path_and_no_hash_of_a_local_build_is_in_the_lock() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"https?://|file:|\+cpu| @ ", text)


def test_a_box_installs_the_versions_that_were_tested_here() -> None:
    pushed = (ROOT / "ops/box_side/trainer-requirements.txt").read_text().split()
    assert len(pushed) > 8
    assert [line for line in pushed if LOCKED.get(line.split("==")[0]) != line.split("==")[-1]] == [], "make lock writes this file too"
