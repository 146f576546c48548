"""The other main job: the practice image is built by its Dockerfile, carried as a signed folder to
a server, and trains there without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1500)]


def run(*command: str | Path, **env: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def milktea(*words: str | Path) -> str:
    return run(sys.executable, "-m", "ops.cli", *words)


def test_the_practice_image_is_built_carried_installed_and_trains_without_a_network(
    tmp_path: Path,
) -> None:
    if (
        not shutil.which("docker")
        or subprocess.run(["docker", "info"], capture_output=True).returncode
    ):
        pytest.skip("no Docker engine answers here")
    key, folder, prefix = tmp_path / "release", tmp_path / "bundle", tmp_path / "server"
    milktea("image", "keygen", key)
    base = os.environ.get("MILKTEA_BASE", "base:bookworm")
    milktea("image", "build", "practice", *(["--base", base] if base else []))
    milktea("image", "bundle", "practice", "--out", folder, "--key", key)
    script = folder / "INSTALL.sh"
    run("sh", script, "preflight", "--prefix", prefix, "--key", f"{key}.pub")
    assert not prefix.exists(), "preflight changes nothing"
    run("sh", script, "--prefix", prefix, "--key", f"{key}.pub", "--require-signature")
    assert (prefix / "EVIDENCE.html").is_file()
    jobs = tmp_path / "jobs"
    shutil.copytree(ROOT / "jobs", jobs)
    shutil.copytree(
        ROOT / "trainer/practice/practice_model", tmp_path / "trainer/practice/practice_model"
    )
    runs = tmp_path / "runs"
    run(
        prefix / "bin/milktea-run",
        "train",
        jobs / "practice.toml",
        "--run",
        "carried",
        MILKTEA_RUNS=str(runs),
    )
    assert (runs / "carried/result/adapter.zip").is_file()
    score = run(prefix / "bin/milktea-run", "evaluate", "carried", MILKTEA_RUNS=str(runs))
    assert "exact" in score
    said = run(
        prefix / "bin/milktea-run",
        "chat",
        "carried",
        "What animal is Zara?",
        MILKTEA_RUNS=str(runs),
    )
    assert "。" in said, "it learned to answer in Chinese"
