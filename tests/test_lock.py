"""requirements.lock is what is installed: exact, whole, and without what we do not want."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOX = ROOT / "ops/box/bootstrap/trainer-requirements.txt"
SERVE = ROOT / "ops/box/bootstrap/serve-requirements.txt"


def pinned(path: Path) -> dict[str, str]:
    """name -> version of every line that pins one."""
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(), re.MULTILINE)
    return {name: version for name, version in lines}


LOCKED = pinned(ROOT / "requirements.lock")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def project_of(requirement: str) -> str:
    """The canonical name that a requirement line begins with."""
    return canonical(re.split(r"[><=!;\s\[]", requirement)[0])


def test_every_dependency_is_pinned_exactly() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {project_of(requirement) for requirement in wanted}
    assert len(names) > 20
    assert names - {canonical(n) for n in LOCKED} == set()


def test_nothing_agpl_and_no_cuda_comes_in_by_the_back_door() -> None:
    assert len(LOCKED) > 60
    assert [
        n for n in LOCKED if canonical(n) == "borb" or n.startswith(("nvidia-", "triton"))
    ] == []


def test_no_index_no_path_and_no_hash_of_a_local_build_is_in_the_lock() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"https?://|file:|\+cpu| @ ", text)


def test_no_line_but_torch_is_without_a_hash() -> None:
    for path in (ROOT / "requirements.lock", BOX):
        requirements = re.sub(r"\\\n\s*", "", path.read_text()).splitlines()
        lines = [line for line in requirements if line and not line.startswith("#")]
        assert len(lines) > 40
        bare = [line for line in lines if "--hash=sha256:" not in line]
        assert bare == ([f"torch=={LOCKED['torch']}"] if path != BOX else [])


def test_a_box_installs_the_versions_that_were_tested_here() -> None:
    pushed = pinned(BOX)
    wanted = (ROOT / ".ci/box-requirements.in").read_text().split("\n")[1:]
    assert len(pushed) > 40
    assert {project_of(line) for line in wanted if line} <= {canonical(name) for name in pushed}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    gpu = {project_of(line) for line in project["optional-dependencies"]["gpu"]}
    for_gpus = {n for n in pushed if canonical(n) in gpu and n not in LOCKED}
    others = {n: v for n, v in pushed.items() if n not in for_gpus}
    assert for_gpus == gpu
    assert {n: v for n, v in others.items() if LOCKED.get(n) != v} == {}, "make lock writes both"


def test_a_box_that_serves_installs_the_server_that_was_tested_here() -> None:
    pushed = pinned(SERVE)
    assert "aiohttp" in pushed and "yarl" in pushed
    assert {n: v for n, v in pushed.items() if LOCKED.get(n) != v} == {}
    lines = re.sub(r"\\\n\s*", "", SERVE.read_text()).splitlines()[1:]
    assert [line for line in lines if "--hash=sha256:" not in line] == []
