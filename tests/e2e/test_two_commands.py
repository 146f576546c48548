"""The README's first screen: its two commands as a user types them, and what it shows of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from unicodedata import east_asian_width

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
FIRST_SCREEN = README.split("\n## ", 1)[0]
pytestmark = pytest.mark.timeout(300)


def shape(line: str) -> str:
    """A line without what differs from run to run."""
    return re.sub(r"\d{8}-\d{6}-[0-9a-f]{4}|[0-9a-f]{16,}…?|\d[\d.,:]*|\s+", "#", line).strip("#")


def columns(line: str) -> int:
    """Of a terminal: Chinese takes two each."""
    return sum(2 if east_asian_width(c) in "WF" else 1 for c in line)


Ran = tuple["subprocess.CompletedProcess[str]", Path]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """(`make rent-and-train`, its runs folder). The emulator is its own: on one that has run long
    another machine may be the cheapest than the README shows."""
    runs, state = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("emulator")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("VAST_", "MAKE", "MFLAGS"))}
    env |= {"MILKTEA_RUNS": str(runs), "COLUMNS": "150", "MILKTEA_EMULATOR": str(state)}
    done = subprocess.run(
        ["make", "rent-and-train"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    yield done, runs
    os.kill(json.loads((state / "server.json").read_text())["pid"], signal.SIGTERM)


@pytest.fixture(scope="module")
def said(ran: Ran) -> tuple[str, Path]:
    """(what the command printed, its runs folder)."""
    return ran[0].stdout, ran[1]


def test_nothing_is_printed_but_our_own_words(ran: Ran) -> None:
    done, _ = ran
    assert re.fullmatch(r"VAST_API_KEY is not set: .*\n", done.stderr), done.stderr
    noise = [line for line in done.stdout.splitlines() if re.search(r"(?i)warning|deprecat", line)]
    assert noise == []


def test_the_practice_run_learns_and_ends_with_no_box(said: tuple[str, Path]) -> None:
    text, runs = said
    cost, adapter, talk = text.strip().splitlines()[-3:]
    assert re.fullmatch(r"cost +[\d.]+ \$ \(vast\.ai's bill [\d.]+ \$, predicted [\d.]+ \$\)", cost)
    assert (ROOT / adapter.split()[1]).is_file()
    assert re.fullmatch(r"talk +\.venv/bin/milktea serve practice-[\w-]+ +\(or chat\)", talk)
    assert "destroy   absent in 3 spaced reads" in text
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
    shown = FIRST_SCREEN.split("$ make rent-and-train\n", 1)[1].split("\n```", 1)[0].splitlines()
    assert len(shown) == 10
    printed = {shape(line) for line in said[0].splitlines()}
    answers = ("before:", "after:")  # the model's own words
    assert all(any(word in line for line in printed) for word in answers)
    missing = [
        line
        for line in shown
        if not line.strip().startswith(answers) and shape(line) not in printed
    ]
    assert missing == []


def test_make_test_runs_the_suite() -> None:
    """On one file: the suite cannot run itself."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PYTEST"))}
    env["PYTEST_ADDOPTS"] = "tests/ops/test_wait.py"
    done = subprocess.run(
        ["make", "test"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout


def test_the_first_screen_is_40_lines_of_100_columns_with_two_commands() -> None:
    lines = FIRST_SCREEN.splitlines()
    assert len(lines) <= 40
    assert [line for line in lines if columns(line) > 100] == []
    typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    assert typed == ["make rent-and-train", "make test"]


def test_every_page_that_the_readme_links_to_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"^\[\w+\]: (\S+)", README, re.M)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []
