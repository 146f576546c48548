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
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from machine import free_port
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
PODMAN_CONF = ROOT / "tests/image/podman.conf"
RUN = "/opt/milktea/bin/milktea-run"
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

    @contextmanager
    def terminal(self, line: str, folder: Path) -> Iterator[Terminal]:
        """A terminal in which this line was typed; it closes at the end of the block."""
        screen, keyboard = os.openpty()
        process = subprocess.Popen(
            ["setsid", "--ctty", "sh", "-c", line.replace("/opt/milktea", str(self.prefix))],
            cwd=folder,
            env=os.environ | self.engine,
            stdin=keyboard,
            stdout=keyboard,
            stderr=keyboard,
        )
        os.close(keyboard)
        try:
            yield Terminal(screen)
        finally:
            os.close(screen)
            process.wait(60)


class Terminal:
    """What a person in front of a server sees."""

    def __init__(self, screen: int) -> None:
        self._screen, self.shows = screen, ""

    def until(self, pattern: str) -> str:
        """Wait for this; returns its first group. Fails where the program ended without it."""
        while not (found := re.search(pattern, self.shows)):
            try:
                more = os.read(self._screen, 4096)
            except OSError:  # nobody has the other side
                more = b""
            assert more, self.shows
            self.shows += more.decode("utf-8", "replace")
        return found[1]


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
        while True:
            try:
                ask("/health")
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.5)
        names = [found["id"] for found in json.loads(ask("/v1/models"))["data"]]
        [model] = set(names) - {"base"}
        wish = {"model": model, "messages": [{"role": "user", "content": "What animal is Zara?"}]}
        answer = json.loads(ask("/v1/chat/completions", wish))["choices"][0]["message"]["content"]
        return ask("/"), answer
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)


def closed_terminal(server: Server, work: Path) -> None:
    """A training whose terminal closes after its first step goes on to its end."""
    with server.terminal(f"{RUN} train job.toml --run closed", work) as terminal:
        terminal.until(r"(step 1 of \d+, loss [\d.]+)")
    server.types(f"{RUN} logs -f closed", work)
    assert events_of(work / "milktea/closed")[-1]["event"] == "finished"
    assert (work / "milktea/closed/result/adapter.zip").is_file()
    assert re.search(r"^closed +ended with 0", server.types(f"{RUN} status", work), re.M)
    written = (work / "milktea/closed/log.txt").read_text()
    assert "loading the model" in written and "done: " in written
    assert server.types(f"{RUN} logs closed", work) == written


def stopped(server: Server, work: Path) -> None:
    """A training of a model in shards that came on a disk of its own, on a server in Shanghai: its
    log has that server's time, it goes on when its terminal closes and ends when it is told to,
    with a checkpoint, from which the same line goes on."""
    job = JOB.replace('"practice"\nprec', '"company/Sharded"\nprec')
    (work / "long.toml").write_text(job.replace("num_train_epochs = 1", "max_steps = 100_000"))
    run, begin = work / "milktea/long", f"{RUN} train long.toml --run long"
    step = r"step (\d+) of 100000, loss"
    # podman mounts an image where it was asked to, not on the machine
    zone = "Asia/Shanghai" if "DOCKER" not in server.engine and os.geteuid() == 0 else None
    with server.terminal(in_shanghai(begin, work) if zone else begin, work) as terminal:
        shown = terminal.until(rf"(\d\d:\d\d):\d\d  {step}")
    begun, *_ = steps_of(run)
    assert shown == datetime.fromtimestamp(begun["t"], zone and ZoneInfo(zone)).strftime("%H:%M")
    told = len(steps_of(run))
    while len(steps_of(run)) <= told + 1:
        time.sleep(0.1)
    status = server.types(f"{RUN} status", work)
    assert re.search(r"^long +trains ", status, re.M) and "milktea-long-" in status
    assert "trains already" in server.types(begin, work, code=2)
    with server.terminal(f"{RUN} logs -f long", work) as terminal:
        terminal.until(step)
        assert "run long stopped" in server.types(f"{RUN} stop long", work)
        terminal.until(r"(checkpoint of step \d+)")
    assert re.search(r"^long +ended with 143 ", server.types(f"{RUN} status", work), re.M)
    saved = [event for event in events_of(run) if event["event"] == "checkpoint"][-1]
    assert "goes on from its last checkpoint" in server.types(f"{begin} --detach", work)
    with server.terminal(f"{RUN} logs -f long", work) as terminal:
        assert int(terminal.until(step)) == saved["step"] + 1
    server.types(f"{RUN} stop long", work)
    assert "does not train" in server.types(f"{RUN} stop long", work, code=2)


def sharded_model(server: Server, folder: Path) -> None:
    """`milktea image model add` of a folder with shards, and INSTALL.sh of that disk."""
    base = ROOT / "trainer/practice/practice_model"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="300KB")
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder)
    assert len(list(folder.glob("model-0000*.safetensors"))) > 2
    disk = folder.with_name("disk")
    add = ("image", "model", "add", folder, "--name", "company/Sharded", "--out", disk)
    milktea(*add, folder=server.bundle.parent)
    server.types(f"sh INSTALL.sh --key {server.fingerprint}", disk)
    assert "company/Sharded\n" in server.types(f"{RUN} models", folder)


def events_of(run: Path) -> list[dict[str, Any]]:
    """Those that are whole: a run may be writing."""
    lines = (run / "events.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [event for event in events_of(run) if event["event"] == "step"]


def in_shanghai(line: str, folder: Path) -> str:
    """This line on a machine whose clock shows Shanghai's time."""
    etc = folder.parent / "etc"
    made = f"cp -a /etc {etc} && ln -sfn /usr/share/zoneinfo/Asia/Shanghai {etc}/localtime"
    return f"unshare -m sh -c '{made} && mount --bind {etc} /etc && {line}'"


def merged(server: Server, work: Path, run: str) -> None:
    """`milktea-run merge` leaves a certificate, and a model that stock transformers opens."""
    line = server.says(f"{RUN} merge").replace("RUN", run)
    assert "certificate: passed" in server.types(line, work)
    model = work / "milktea" / run / "merged-bf16"
    certificate = json.loads((model / "certificate.json").read_text())
    assert certificate["numbers"]["share_of_effect"] <= 0.01
    words = AutoTokenizer.from_pretrained(model)
    asked = [{"role": "user", "content": "What animal is Zara?"}]
    prompt = words.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    opened = AutoModelForCausalLM.from_pretrained(model)
    answer = opened.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert "。" in words.decode(answer[0]), "it answers in Chinese"


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
    said = server.types(server.says(f"{RUN} train"), work)
    [run] = re.findall(r"^run (\S+):", said, re.M)
    assert "step 1 of " in said and "held-out rows" in said, "its progress is shown"
    assert (work / "milktea" / run / "result/adapter.zip").is_file()
    evaluate = server.says(f"{RUN} evaluate").replace("RUN", run)
    assert "exact" in server.types(evaluate, work)
    chat = server.says(f"{RUN} chat").replace("RUN", run)
    assert "。" in server.types(chat, work, '"What animal is Zara?"'), "it answers in Chinese"
    if not engine:  # the bridge of another engine wants more than this machine has
        line = server.says(f"{RUN} serve").replace("RUN", run)
        page, answer = served(server, line, work, work / "milktea" / run / "token")
        assert "<title>" in page and "。" in answer
    merged(server, work, run)
    closed_terminal(server, work)
    sharded_model(server, tmp_path / "sharded")
    stopped(server, work)
    assert "prune" in server.types(server.says(f"{RUN} --help"), work)
    assert run in server.types(f"{RUN} status", work)
    assert "practice: current" in server.types(f"{RUN} images", work)
    said = server.types(server.says("sh INSTALL.sh rollback"), code=2)
    assert "no image of practice before" in said
    assert "removed" in server.types(f"{RUN} uninstall", work)
    owners = {path.lstat().st_uid for path in (work / "milktea").rglob("*")}
    assert owners == {work.stat().st_uid}
