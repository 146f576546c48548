"""Real engines for tests of images: the machine's own, podman, and a newer Docker with either image
store (tests/image/modern-engine.sh).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "image"
MODERN = Path(os.environ.get("MILKTEA_MODERN_ENGINE", "/var/tmp/milktea-modern-engine"))


@dataclass(frozen=True)
class Engine:
    name: str
    host: str
    program: str = "docker"

    @property
    def environment(self) -> dict[str, str]:
        """What INSTALL.sh needs to find it."""
        if self.name == "podman":
            return {"DOCKER": self.program, "CONTAINERS_CONF": str(HERE / "podman.conf")}
        return {"DOCKER": self.program} | ({"DOCKER_HOST": self.host} if self.host else {})

    def docker(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            [self.program, *arguments],
            capture_output=True,
            text=True,
            env=os.environ | self.environment,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def tags(self, repository: str) -> set[str]:
        return {
            line
            for line in self.docker(
                "images", "--filter", f"reference={repository}", "--format", "{{.Tag}}"
            ).split()
            if line
        }

    def layers(self, ref: str) -> list[str]:
        return json.loads(
            self.docker("image", "inspect", "--format", "{{json .RootFS.Layers}}", ref)
        )


def modern_engines() -> Iterator[Callable[[str], Engine]]:
    """Starts the newer engine with one of its stores, once; ends it by its own process id."""
    if os.geteuid() or not (shutil.which("mmdebstrap") or (MODERN / "root").exists()):
        pytest.skip("the newer engine needs root and mmdebstrap")
    MODERN.mkdir(parents=True, exist_ok=True)
    built = subprocess.run(
        ["sh", str(HERE / "modern-engine.sh"), "build", str(MODERN)], capture_output=True, text=True
    )
    if built.returncode:
        pytest.skip(f"the newer engine cannot be built here: {built.stderr.strip()[-200:]}")
    started: dict[str, subprocess.Popen[bytes]] = {}

    def start(store: str) -> Engine:
        engine = Engine(f"28-{store}", f"unix://{MODERN}/{store}.sock")
        if store not in started and not answers(engine):
            command = ["sh", str(HERE / "modern-engine.sh"), "run", str(MODERN), store]
            started[store] = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            end = time.monotonic() + 60
            while not answers(engine):
                assert time.monotonic() < end and started[store].poll() is None, (
                    f"{engine.name} did not come up"
                )
                started[store].poll()
        return engine

    yield start
    for process in started.values():
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """unshare(1) lets no SIGTERM through while it waits for its child; the child is dockerd, which
    ends by it.
    """
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), 15)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def answers(engine: Engine) -> bool:
    environment = dict(os.environ, DOCKER_HOST=engine.host)
    return (
        subprocess.run(
            ["docker", "version"], capture_output=True, env=environment, timeout=20
        ).returncode
        == 0
    )


def podman() -> Engine:
    """This machine's, or the one that MILKTEA_PODMAN names by its path."""
    program = os.environ.get("MILKTEA_PODMAN", "podman")
    if not shutil.which(program):
        pytest.skip("no podman here")
    done = subprocess.run([program, "info"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"podman does not run here: {done.stderr.strip()[-200:]}")
    return Engine("podman", "", program)
