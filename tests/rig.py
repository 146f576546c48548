"""The rig of the integration tests: an emulator, a stub image whose training takes no time, and a
client on a plan.

The stub is a shell script in place of the image's `milktea-train`: it copies a finished result and
speaks the wire. Everything else is real: HTTP, SSH, processes, files.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ops.box import scripts
from ops.box.transfer import PushFile, sha256_of
from ops.errors import MilkteaError
from ops.fakevast import FakeVast
from ops.job.plan import Plan
from ops.market.client import Vast
from ops.market.provider import Provider
from ops.market.ranking import Needs
from ops.market.workload import Workload
from ops.run.journal import Journal, Line
from ops.run.rent_and_train import rent_and_train
from ops.run.session import Detached, Interrupted, Session
from ops.wait import Clock, RealClock
from trainer.wire.job import WIRE, Job

IMAGE = "milktea/stub:1"
PACE = 0.002  # spaced reads need no real seconds where the emulator's clock does not care

PNG = b"\x89PNG\r\n\x1a\nnobody draws this"
STUB = (Path(__file__).parent / "stub-train.sh").read_text()


def stub_image(folder: Path, data_sha256: str, wire: int = WIRE) -> Path:
    """A folder of executables for `FakeVast.register_image`, with a finished result to copy, as a
    trainer of this wire left it."""
    (folder / "bin").mkdir(parents=True)
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint/state.bin").write_bytes(b"state" * 100)
    state = {"state.bin": {"sha256": sha256_of(folder / "checkpoint/state.bin"), "bytes": 500}}
    (folder / "checkpoint/manifest.json").write_text(json.dumps({"step": 1, "files": state}))
    adapter(folder / "result", data_sha256, wire)
    whole = sha256_of(folder / "result/adapter.zip")
    text = STUB.replace("@FOLDER@", str(folder)).replace("@ADAPTER@", whole)
    text = text.replace("@WIRE@", str(wire))
    scores = {"base": {"rouge-l": {"value": 7.5}}, "tuned": {"rouge-l": {"value": 31.25, "low": 1}}}
    (folder / "scores.json").write_text(json.dumps({"scores": scores, "rows": 5}))
    (folder / "serve.py").write_bytes(Path(__file__).with_name("stub_serve.py").read_bytes())
    script = folder / "bin/milktea-train"
    script.write_text(text.replace("@MANIFEST@", sha256_of(folder / "checkpoint/manifest.json")))
    script.chmod(0o755)
    return folder / "bin"


def adapter(folder: Path, data_sha256: str, wire: int = WIRE) -> dict[str, Any]:
    """A small sane adapter in PEFT's form, a picture, and their manifest."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": rng.normal(size=(4, 16)).astype(np.float32),
        f"{prefix}.lora_B.weight": rng.normal(size=(16, 4)).astype(np.float32),
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "stub",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj"],
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
    }
    members = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(tensors),
        "README.md": b"# stub\n",
    }
    with zipfile.ZipFile(folder / "adapter.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members.items():
            z.writestr(name, content)
    (folder / "loss.png").write_bytes(PNG)
    archive = (folder / "adapter.zip").read_bytes()
    files = {"adapter.zip": archive, "loss.png": PNG}
    listing = {"files": listed(files), "members": listed(members)}
    if wire == 1:
        (folder / "report.html").write_text("<script>alert(1)</script>")
        whole = {"adapter_sha256": sha256_of(folder / "adapter.zip"), "adapter_bytes": len(archive)}
        listing = {**whole, "files": listed(members), "extras": ["loss.png", "report.html"]}
    manifest = {
        "wire": wire,
        "run_id": "@RUN@",
        "stages": [{"name": "sft"}],
        "base_model": "stub",
        **listing,
        "tensors": {n: {"shape": list(t.shape), "dtype": "float32"} for n, t in tensors.items()},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
        "steps": 2,
        "final_loss": 1.0,
        "data_sha256": [data_sha256],
        "template": {"name": "alpaca", "sha256": "0" * 64, "token_hash": "0" * 64},
        "versions": {},
        "kernels": {},
        "curve": [[1, 2.0], [2, 1.0]],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def listed(files: dict[str, bytes]) -> dict[str, Any]:
    return {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in files.items()
    }


def tiny_model(folder: Path) -> Path:
    """A model folder as the hub has them: config, tokenizer with an end token, one safetensors
    file. Never loaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True)
    words = ["<unk>", "</s>", *(chr(c) for c in range(33, 127)), "▁"]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    config = {
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 128,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(save({"w": np.zeros(4, np.float32)}))
    return folder


class Jumping:
    """A clock that jumps over what it is told to sleep. Only sleeping moves it: by the seconds that
    it is told, scaled by `pace`, and by `slow_s` more. What `at` holds is done on the way, once."""

    def __init__(self, pace: float = 1.0, slow_s: float = 0.0) -> None:
        self.pace, self.slow_s = pace, slow_s
        self.slept_s = 0.0
        self.at: dict[float, Callable[[], object]] = {}
        self._began = float(int(time.time()))

    def now(self) -> float:
        return self._began + self.slept_s

    def steady(self) -> float:
        return self.slept_s

    def sleep(self, seconds: float) -> None:
        self.slept_s += max(0.0, seconds) * self.pace + self.slow_s
        for when in [when for when in self.at if when <= self.slept_s]:
            self.at.pop(when)()


class Silent:
    """A screen that keeps what it was told."""

    def __init__(self, choice: str = "fetch") -> None:
        self.told: list[str] = []
        self.choice = choice
        self.samples: list[Any] = []
        self.score = None

    def line(self, line: Any) -> None:
        self.told.append(line.kind)

    def waiting(self, message: str) -> None:
        self.told.append(message)

    def choose(self, choices: Any) -> str | None:
        assert choices[0][0] == "go on", "the default keeps what is paid for"
        assert all("$" in text for _, text in choices)
        self.told.append([key for key, _ in choices])
        return self.choice

    def talking(self, page: str, ends_at: float) -> None:
        self.told.append(page)

    def plan(self, *told: Any) -> None: ...
    def booting(self, *told: Any) -> None: ...
    def connecting(self, *told: Any) -> None: ...
    def moving(self, *told: Any) -> None: ...
    def event(self, *told: Any) -> None: ...
    def destroying(self, why: str) -> None: ...
    def meter(self, *told: Any) -> None: ...


class Rig:
    """Folders and data of one test; `plan()` makes a new run, `session(journal)` a client on it.
    `wire` is what the image's trainer speaks."""

    def __init__(self, folder: Path, wire: int = WIRE) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.data = folder / "rows.json"
        if not self.data.exists():
            self.data.write_text('[{"instruction": "q", "input": "", "output": "a"}]')
        self.image = folder / "image"
        if not self.image.exists():
            stub_image(self.image, sha256_of(self.data), wire)

    @contextmanager
    def emulator(self, **more: Any) -> Iterator[FakeVast]:
        with FakeVast(self.folder / "fakevast", **more) as fake:
            fake.register_image("milktea/stub*", self.image / "bin")
            yield fake

    def plan(self, **more: Any) -> Plan:
        run_id = f"stub-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        data = PushFile(self.data, "data/0-rows.json", sha256_of(self.data))
        wire_job = Job.model_validate(
            {
                "run_id": run_id,
                "model": {"base": "stub", "precision": "fp32"},
                "data": {
                    "files": [
                        {
                            "path": data.remote,
                            "name": "rows.json",
                            "sha256": data.sha256,
                            "size_bytes": self.data.stat().st_size,
                        }
                    ]
                },
                "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
            }
        )
        settings: dict[str, Any] = {
            "run_id": run_id,
            "image": IMAGE,
            "trainer": "image",
            "wire_job": json.loads(wire_job.model_dump_json()),
            "pushes": [data],
            "needs": Needs(min_reliability=0.9, hours=2, disk_gib=16),
            "workload": Workload(1e5, 1e6, cpu_practice=True, disk_gib=16, image_bytes=4e8),
            "max_usd": 1.0,
            "max_s": 7200.0,
            "stall_s": 600.0,
            "out": str(self.folder / "out"),
            "notes": [],
        }
        return Plan(**settings | more)


def client(
    plan: Plan,
    journal: Any,
    url: str,
    key: str,
    *,
    screen: Any = None,
    clock: Clock | None = None,
    pace: float = PACE,
) -> Session:
    """A client that acts on `plan`; its first line is written when the journal is empty."""
    if not journal.lines:
        journal.append("planned", **plan.to_line())
    return Session(
        journal, plan, Vast(Provider(url, key), clock or RealClock(pace)), screen or Silent()
    )


def whole_run(
    own: Rig, fake: FakeVast, *, screen: Any = None, plan: Plan | None = None, **more: Any
) -> tuple[Any, list[Line], Any]:
    """(outcome or the error, journal lines, the screen) of one whole run."""
    plan, screen = plan or own.plan(**more), screen or Silent()
    with Journal(own.runs / plan.run_id) as j:
        session = client(plan, j, fake.url, fake.api_key, screen=screen)
        try:
            return rent_and_train(session), j.lines, screen
        except (MilkteaError, Detached, Interrupted) as e:
            return e, j.lines, screen


def sh(script: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", script],
        cwd=home,
        env={"HOME": str(home), "PATH": os.environ["PATH"], **env},
        capture_output=True,
        text=True,
        timeout=100,
    )


def watched(
    home: Path,
    *,
    kill_at: int,
    max_s: int,
    lease_s: int,
    renew_every_s: int,
    when_silent: str = "destroy",
    hold_s: int | None = None,
    launched_at: int | None = None,
    ended_at: int | None = None,
    max_age: int | None = None,
) -> int:
    """The virtual second at which the real watchdog text asks for destruction, with the client
    dying at `kill_at`, the training launched and ended at those seconds.

    `sleep` and `curl` are shell functions over one virtual clock, /proc/uptime is a file of it;
    everything else is what runs on a box."""
    stage = f"""
now=0; kill_at={kill_at}
sleep() {{
  now=$((now + $1))
  echo "$now.50 0" >uptime
  seen=$now; [ $seen -gt $kill_at ] && seen=$kill_at
  echo $((seen / {renew_every_s} * {renew_every_s})) >lease
  [ $now -ge {-1 if launched_at is None else launched_at} ] && [ -e run ] && echo run >launched
  [ $now -ge {10**9 if ended_at is None else ended_at} ] && echo 0 >run/exit_code
  [ $now -lt 1000000 ] || exit 9
}}
curl() {{
  case "$*" in *"-X GET"*) echo 200; return;; esac
  echo "$now" >gone_at; echo "$*" >asked; exit 0
}}
"""
    shutil.rmtree(home / "milktea", ignore_errors=True)
    (home / "milktea").mkdir()
    if launched_at is not None:
        (home / "milktea/run").mkdir()
    if max_age is not None:
        assert sh(scripts.end_at(max_age), home).returncode == 0
    (home / "milktea/lease").write_text("0\n")
    (home / "milktea/uptime").write_text("0.50 0\n")
    # `exit` inside the function ends the watchdog's shell: the instance is gone
    done = sh(
        stage + scripts.WATCHDOG,
        home,
        MILKTEA_MAX_S=str(max_s),
        MILKTEA_LEASE_S=str(lease_s),
        MILKTEA_WATCH_S=str(scripts.WATCH_S),
        MILKTEA_WHEN_SILENT=when_silent,
        MILKTEA_HOLD_S="" if hold_s is None else str(hold_s),
        MILKTEA_API="http://127.0.0.1:9",
        MILKTEA_UPTIME="uptime",
        CONTAINER_ID="77",
        CONTAINER_API_KEY="only-this-box",
    )
    assert done.returncode == 0, done.stderr
    asked = (home / "milktea/asked").read_text()
    assert "/api/v0/instances/77/" in asked
    return int((home / "milktea/gone_at").read_text())


def train_here(plan: Plan, box: Path) -> None:
    """What the plan pushes, put into the folder `box` and trained there in this process."""
    import torch

    from trainer.launch import prepare_inputs, read_job
    from trainer.train import run_job

    for push in plan.pushes:
        (box / push.remote).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(push.local, box / push.remote)
    (box / "job.json").write_text(Job.model_validate(plan.wire_job).text())
    torch.set_num_threads(1)
    prepare_inputs(read_job(box / "job.json"), box)
    assert run_job(box / "job.json") == 0
