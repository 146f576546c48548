"""The README's first command as a user types it, on the emulator, with a real training; and what
its README says it prints."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(300)


def shape(line: str) -> str:
    """A line without what differs from run to run."""
    return re.sub(r"[0-9a-f]{16,}…?|\d[\d.,:]*|\s+", "#", line).strip("#")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(what `make rent-and-train` printed, its runs folder). The emulator is its own: on one that
    has run long another machine may be the cheapest than the README shows."""
    runs, state = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("emulator")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("VAST_", "MAKE", "MFLAGS"))}
    env |= {"MILKTEA_RUNS": str(runs), "COLUMNS": "150", "MILKTEA_EMULATOR": str(state)}
    done = subprocess.run(
        ["make", "rent-and-train"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    yield done.stdout, runs
    os.kill(json.loads((state / "server.json").read_text())["pid"], signal.SIGTERM)


def test_the_practice_run_learns_and_ends_with_no_box(said: tuple[str, Path]) -> None:
    text, runs = said
    last = text.strip().splitlines()[-1]
    assert re.search(
        r"destroyed, verified absent x3; cost [\d.]+ \$ \(vast\.ai's bill [\d.]+ \$", last
    ), last
    score = re.search(r"exact match: ([\d.]+)% before, ([\d.]+)% after", text)
    assert score and float(score[1]) < 10 and float(score[2]) > 90, text
    assert text.count("before:") == text.count("after:") >= 3
    events = [
        json.loads(line) for line in next(runs.glob("*/events.jsonl")).read_text().splitlines()
    ]
    losses = [e["loss"] for e in events if e["event"] == "step"]
    assert losses[-1] < losses[0] / 3
    assert all(e["grad_norm"] > 0 for e in events if e["event"] == "step")


def test_the_adapter_loads_in_stock_peft(said: tuple[str, Path], tmp_path: Path) -> None:
    _, runs = said
    pulled = [
        json.loads(line) for line in next(runs.glob("*/journal.jsonl")).read_text().splitlines()
    ]
    adapter = Path(next(line["adapter"] for line in pulled if line["kind"] == "pulled"))
    zipfile.ZipFile(adapter).extractall(tmp_path)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(ROOT / "trainer/practice/practice_model")
    model = PeftModel.from_pretrained(base, tmp_path)
    assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def test_the_readme_shows_what_the_command_prints(said: tuple[str, Path]) -> None:
    readme = (ROOT / "README.md").read_text()
    shown = readme.split("$ make rent-and-train\n", 1)[1].split("\n```", 1)[0].splitlines()
    printed = {shape(line)[:24] for line in said[0].splitlines()}
    # as time allows
    varying = re.compile(
        r"train +step|save +checkpoint|boot +(provisioning|loading)|(push|pull) +[0-9.]+ "
        r"%|before:|after:|^  \S"
    )
    missing = [
        line for line in shown if shape(line)[:24] not in printed and not varying.search(line)
    ]
    assert len(shown) > 10
    assert missing == []
