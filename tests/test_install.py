"""milktea installed for good (`pip install .`), away from its checkout."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import tomli_w

ROOT = Path(__file__).parents[1]
PACKAGES = ("ops", "trainer", "milktea.py")


@pytest.fixture(scope="module")
def committed() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = listed.stdout.splitlines()
    assert len(files) > 200
    return files


@pytest.fixture(scope="module")
def wheel(committed: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the files that are committed, built in a folder of its own."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in [*committed, "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source], check=True
    )
    [built] = out.glob("milktea-*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_packages_and_no_other(
    wheel: Path, committed: list[str]
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(packed) == sorted(committed)


@pytest.mark.slow
def test_an_installed_milktea_works_in_a_folder_that_has_only_the_job(
    wheel: Path, tmp_path: Path
) -> None:
    place, mine = tmp_path / "installed", tmp_path / "mine"
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--target", place]
    subprocess.run([*pip, wheel], check=True)
    shutil.copytree(ROOT / "jobs", mine)
    job = (mine / "practice.toml").read_text("utf-8")
    assert '"../trainer/practice/practice_model"' in job
    (mine / "practice.toml").write_text(
        job.replace("../trainer", str(place / "trainer"), 1), "utf-8"
    )

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("VAST_")}
        environment |= {"PYTHONPATH": str(place), "MILKTEA_EMULATOR": str(tmp_path / "emulator")}
        return subprocess.run(
            [sys.executable, *arguments], cwd=mine, env=environment, capture_output=True, text=True
        )

    def python(*arguments: str | Path) -> str:
        done = run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    files = python("-c", "import ops, trainer; print(ops.__file__, trainer.__file__)")
    assert files.count(str(place)) == 2, "what runs is what was installed"
    assert python(place / "bin/milktea", "--version").startswith("milktea 0.")
    try:
        assert "\n✓" in python(place / "bin/milktea", "plan", "practice.toml"), "an offer"
        own = tomllib.loads((mine / "practice.toml").read_text("utf-8"))
        own["image"] |= {"ref": "me/train-cu130:3", "trainer": "image"}
        (mine / "image.toml").write_text(tomli_w.dumps(own), "utf-8")
        noted = python(place / "bin/milktea", "plan", "image.toml")
        assert "whether the trainer in me/train-cu130:3 speaks wire 2 is not known here" in noted
    finally:
        server = json.loads((tmp_path / "emulator/server.json").read_text())
        os.kill(server["pid"], signal.SIGTERM)
    for word in (("image", "build"), ("image", "bundle"), ("image", "size"), ("image", "lock")):
        done = run(place / "bin/milktea", *word)
        assert done.returncode == 2 and "made from a checkout of milktea" in done.stderr
        assert "Traceback" not in done.stderr
    models = "from ops.catalogue import models; print(len(models.entries()))"
    assert int(python("-c", models)) > 50
