"""The other main job: the practice image is built by its Dockerfile, carried as a signed folder to
a server, and trains there without a network, by the lines of the bundle's own README."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from machine import free_port

ROOT = Path(__file__).parents[2]
PODMAN_CONF = ROOT / "tests/image/podman.conf"
pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1800)]
JOB = """\
name = "mine"

[model]
base = "practice"
precision = "fp32"

[data]
files = ["practice/train.json"]
held_out = "practice/held_out.json"
template = "alpaca"
max_length = 128

[lora]
r = 16
lora_alpha = 32

[training]
num_train_epochs = 1
batch_size = 32
learning_rate = 3e-3

[limits]
max_usd = 1
max_hours = 1
"""


@dataclass(frozen=True)
class Carried:
    """A bundle on a disk, and the fingerprint that was told by telephone."""

    folder: Path
    fingerprint: str


def milktea(*words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(folder / "config")}
    done = subprocess.run(
        [sys.executable, "-m", "ops.cli", *map(str, words)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Carried:
    """`make image` and `make bundle` on the machine with a network."""
    answers = shutil.which("docker") and not (
        subprocess.run(["docker", "info"], capture_output=True).returncode
    )
    if not answers:
        pytest.skip("no Docker engine answers here")
    folder = tmp_path_factory.mktemp("sender")
    base = os.environ.get("MILKTEA_BASE", "base:bookworm")
    milktea("image", "build", "practice", *(["--base", base] if base else []), folder=folder)
    said = milktea("image", "bundle", "practice", folder=folder).stderr
    [fingerprint] = re.findall(r"tell the other side by telephone: (SHA256:\S+)", said)
    [bundle] = folder.glob("bundle-practice-*")
    return Carried(bundle, fingerprint)


@pytest.fixture(params=["docker", "podman"])
def engine(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The engine of the server, as the scripts find it. Others than this machine's are named by
    MILKTEA_SERVER_DOCKER_HOST (tests/image/modern-engine.sh) and MILKTEA_PODMAN, a podman's path
    (tests/image/modern-podman.sh)."""
    if request.param == "docker":
        host = os.environ.get("MILKTEA_SERVER_DOCKER_HOST", "")
        yield {"DOCKER_HOST": host} if host else {}
        return
    podman = os.environ.get("MILKTEA_PODMAN", "podman")
    env = {"DOCKER": podman, "CONTAINERS_CONF": str(PODMAN_CONF)}
    works = shutil.which(podman) and not (
        subprocess.run([podman, "info"], capture_output=True, env=os.environ | env).returncode
    )
    if not works:
        pytest.skip("no podman runs here")
    yield env


class Server:
    """A shell on a server that has no network, where the bundle's README is followed."""

    def __init__(self, carried: Carried, folder: Path, engine: dict[str, str]) -> None:
        self.bundle, self.fingerprint = carried.folder, carried.fingerprint
        self.prefix, self.engine = folder / "milktea", engine
        self.readme = (carried.folder / "README.en.txt").read_text()

    def says(self, pattern: str) -> str:
        """The one line of the README that has this, from its command on, without its comment."""
        found = {x.strip() for x in re.findall(rf"({pattern}.*?)(?:   |\n)", self.readme)}
        assert len(found) == 1, (pattern, found)
        return found.pop()

    def types(self, line: str, folder: Path | None = None, more: str = "", code: int = 0) -> str:
        """Type a line of the README: /opt/milktea, the fingerprint and RUN are the reader's own."""
        line = line.replace("SHA256:...", self.fingerprint).replace(
            "/opt/milktea", str(self.prefix)
        )
        if "INSTALL.sh " in line and "grep" not in line:
            line = line.replace("INSTALL.sh", f"INSTALL.sh --prefix {self.prefix}")
        lonely = ["unshare", "-n"] if os.geteuid() == 0 else []
        done = subprocess.run(
            [*lonely, "sh", "-c", f"{line} {more}"],
            cwd=folder or self.bundle,
            env=os.environ | self.engine,
            capture_output=True,
            text=True,
            timeout=1200,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == code, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr


def served(server: Server, line: str, folder: Path, token: Path) -> tuple[str, str]:
    """(the page, an answer by OpenAI's interface) of `milktea-run serve`, from outside it."""
    listen = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        ["sh", "-c", "exec " + line.replace("/opt/milktea", str(server.prefix))],
        cwd=folder,
        env=os.environ | server.engine | {"MILKTEA_LISTEN": listen},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C reaches all of a terminal's processes
    )

    def ask(path: str, wish: dict[str, object] | None = None) -> str:
        headers = {"Content-Type": "application/json"}
        if path.startswith("/v1"):
            headers["Authorization"] = f"Bearer {token.read_text().strip()}"
        body = None if wish is None else json.dumps(wish).encode()
        asked = urllib.request.Request(f"http://{listen}{path}", body, headers)
        with urllib.request.urlopen(asked, timeout=60) as reply:
            return str(reply.read().decode())

    try:
        end = time.monotonic() + 120
        while True:
            try:
                ask("/health")
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.5)
        names = [found["id"] for found in json.loads(ask("/v1/models"))["data"]]
        [model] = set(names) - {"base"}
        wish = {"model": model, "messages": [{"role": "user", "content": "What animal is Zara?"}]}
        answer = json.loads(ask("/v1/chat/completions", wish))["choices"][0]["message"]["content"]
        return ask("/"), answer
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)


def test_the_lines_of_the_readme_lead_from_the_disk_to_a_trained_adapter(
    carried: Carried, engine: dict[str, str], tmp_path: Path
) -> None:
    server = Server(carried, tmp_path, engine)
    said = server.types(server.says(r"test \$\(wc -c"))
    assert "Good" in said and carried.fingerprint in said
    assert "INSTALL.sh: OK" in server.types(server.says("grep ' INSTALL.sh"))
    server.types("sh INSTALL.sh preflight", more=f"--key {carried.fingerprint}")
    assert not server.prefix.exists(), "preflight changes nothing"
    assert "DONE" in server.types(server.says("sh INSTALL.sh --key SHA256"))
    assert (server.prefix / "EVIDENCE.html").is_file()
    facts = server.types(
        server.says("sh INSTALL.sh preflight --facts").replace(" > server.txt", "")
    )
    assert facts.startswith("milktea-server 1\n")

    work = tmp_path / "训练 work"
    shutil.copytree(ROOT / "jobs/practice", work / "practice")
    (work / "job.toml").write_text(JOB)
    command = "/opt/milktea/bin/milktea-run"
    [run] = re.findall(r"^run (\S+):", server.types(server.says(f"{command} train"), work), re.M)
    assert (work / "milktea" / run / "result/adapter.zip").is_file()
    evaluate = server.says(f"{command} evaluate").replace("RUN", run)
    assert "exact" in server.types(evaluate, work)
    chat = server.says(f"{command} chat").replace("RUN", run)
    assert "。" in server.types(chat, work, '"What animal is Zara?"'), "it answers in Chinese"
    if not engine:  # the bridge of another engine wants more than this machine has
        line = server.says(f"{command} serve").replace("RUN", run)
        page, answer = served(server, line, work, work / "milktea" / run / "token")
        assert "<title>" in page and "。" in answer
    assert "prune" in server.types(server.says(f"{command} --help"), work)
    assert run in server.types(f"{command} status", work)
    assert "practice: current" in server.types(f"{command} images", work)
    said = server.types(server.says("sh INSTALL.sh rollback"), code=2)
    assert "no image of practice before" in said
    assert "removed" in server.types(f"{command} uninstall", work)
    owners = {path.lstat().st_uid for path in (work / "milktea").rglob("*")}
    assert owners == {work.stat().st_uid}
