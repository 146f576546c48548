"""Runs that start from each other by name, each on a box of its own, on the emulator with the real
trainer: an adapter merged into the base, stacked on and continued; the results are stock PEFT's."""

from __future__ import annotations

import json
import subprocess
import time
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import rig
from ops.fakevast import FakeVast
from ops.job import config
from ops.job.planner import new_plan
from ops.use import found, words
from trainer.data.prepare import prepare
from trainer.wire.chain import Link, chain_of, weights_sha256
from trainer.wire.job import Job

ROOT = Path(__file__).parents[2]
PRACTICE = ROOT / "jobs/practice.toml"
BASE = ROOT / "trainer/practice/practice_model"
HELD_OUT = ROOT / "jobs/practice/held_out.json"
pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]


@dataclass
class Shelf:
    """Runs on one emulator, whose results lie beside each other."""

    root: Path
    own: rig.Rig
    fake: FakeVast
    rows: Any = field(default=None)

    def run(self, **changes: Any) -> Path:
        """Trains a few steps of the practice job; the result's folder at home, whose name is the
        run's. The adapter lies in `adapter/` of it."""
        raw = tomllib.loads(PRACTICE.read_text("utf-8"))
        raw |= {"results": {"folder": str(self.root / "out")}, "env": ["OMP_NUM_THREADS"]}
        for key, value in changes.items():
            raw[key] = raw.get(key, {}) | value if isinstance(value, dict) else value
        raw["training"] = raw["training"] | {"max_steps": 4, "learning_rate": 5e-4}
        plan = new_plan(config.parse(raw, PRACTICE), self.own.runs, time.time())
        outcome, _, _ = rig.whole_run(self.own, self.fake, plan=plan)
        assert getattr(outcome, "sha256", None), outcome
        assert self.fake.instances() == [], "a box survived the test"
        home: Path = outcome.adapter_zip.parent
        with zipfile.ZipFile(outcome.adapter_zip) as archive:
            archive.extractall(home / "adapter")
        if self.rows is None:
            self.rows = self._held_out(Job.model_validate(plan.wire_job))
        return home

    def _held_out(self, job: Job) -> Any:
        """The held-out rows as tokens."""
        box = self.root / "box"
        (box / "data").mkdir(parents=True)
        (box / "model").symlink_to(BASE)
        held = job.data.held_out
        assert held is not None
        (box / held.path).write_bytes(HELD_OUT.read_bytes())
        data = job.data.model_copy(update={"files": [held], "held_out": None})
        return prepare(job.model_copy(update={"data": data}), box).rows

    def loss(self, model: torch.nn.Module) -> float:
        """Of the held-out rows, by stock transformers and PEFT, row by row."""
        total, rows = 0.0, self.rows
        for a, b in zip(rows.starts[:-1], rows.starts[1:], strict=True):
            ids, trained = (torch.from_numpy(x[a:b]) for x in (rows.ids, rows.trained))
            with torch.no_grad():
                logits = model(ids.long()[None]).logits[0, :-1][trained[1:]]
            total += float(cross_entropy(logits, ids.long()[1:][trained[1:]], reduction="sum"))
        return total / sum(rows.targets())


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    with FakeVast(tmp_path / "fakevast") as fake:
        yield Shelf(tmp_path, rig.Rig(tmp_path), fake)


def base(folder: Path = BASE) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def stock(model: Any, home: Path) -> Any:
    return PeftModel.from_pretrained(model, str(home / "adapter")).eval()


def links(home: Path) -> list[Link]:
    chain = chain_of(home / "adapter.zip")
    assert chain is not None
    assert chain.links[-1].sha256 == weights_sha256(home / "adapter.zip")
    return chain.links


def told(shelf: Shelf, home: Path) -> dict[str, Any]:
    """The manifest that came home."""
    manifest: dict[str, Any] = json.loads(
        (shelf.own.runs / home.name / "result/manifest.json").read_text()
    )
    assert manifest["chain"] == json.loads((home / "adapter/chain.json").read_text())
    return manifest


def test_a_run_merges_another_into_its_base_and_a_third_goes_on_from_it(shelf: Shelf) -> None:
    first = shelf.run()
    second = shelf.run(start=first.name, how="merge")
    assert [(x.run_id, x.how) for x in links(second)] == [
        (first.name, "new"),
        (second.name, "merge"),
    ]
    assert links(second)[0] == links(first)[0]

    here = found.of_run(shelf.own.runs / first.name)
    merged = shelf.root / "merged"
    command = words.merge(here, dtype="fp32", to=merged).command
    subprocess.run(command, cwd=ROOT, env=words.environment(), check=True, capture_output=True)
    by_hand = stock(base(), first).merge_and_unload()
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        found_logits = stock(base(merged), second)(ids).logits
        assert (found_logits - stock(by_hand, second)(ids).logits).abs().max() < 1e-4
    before, after = told(shelf, second)["held_out"]["loss"]
    assert shelf.loss(base(merged)) == pytest.approx(before, abs=1e-4)
    assert shelf.loss(stock(base(merged), second)) == pytest.approx(after, abs=1e-4)
    assert after < before < shelf.loss(base())

    third = shelf.run(start=second.name, model={"base": str(merged)})
    assert [x.how for x in links(third)] == ["new", "merge", "continue"]
    assert links(third)[:2] == links(second)
    before_third, after_third = told(shelf, third)["held_out"]["loss"]
    assert before_third == pytest.approx(after, abs=1e-4) and after_third < before_third
    assert shelf.loss(stock(base(merged), third)) == pytest.approx(after_third, abs=1e-4)


def test_a_run_stacks_on_another_and_both_are_one_lora_of_stock_peft(shelf: Shelf) -> None:
    first = shelf.run()
    second = shelf.run(start=first.name, how="stack", lora={"r": 4, "lora_alpha": 8})
    assert [(x.run_id, x.how) for x in links(second)] == [
        (first.name, "new"),
        (second.name, "stack"),
    ]
    assert links(second)[0] == links(first)[0]
    before, after = told(shelf, second)["held_out"]["loss"]
    assert shelf.loss(stock(base(), first)) == pytest.approx(before, abs=1e-4)
    assert shelf.loss(stock(base(), second)) == pytest.approx(after, abs=1e-4)
    assert after < before
