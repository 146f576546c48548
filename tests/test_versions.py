"""The table "What is run where" of docs/architecture.md is what the locks pin."""

from __future__ import annotations

import re
from pathlib import Path

import versions

ROOT = Path(__file__).parents[1]
BOX = ROOT / "ops/box/bootstrap/trainer-requirements.txt"


def test_the_page_names_every_row_with_the_versions_that_its_lock_pins() -> None:
    page = (ROOT / "docs/architecture.md").read_text("utf-8").split("## What is run where")[1]
    table = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \| ([\d.]+) \|", page, re.MULTILINE)
    rows = {(row.name, row.torch, row.transformers) for row in versions.rows().values()}
    assert len(table) >= 5 and set(table) == rows


def test_a_box_that_has_torch_alone_installs_what_its_row_has_run() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", BOX.read_text(), re.MULTILINE))
    assert pinned["transformers"] == versions.rows()["box"].transformers


def test_an_image_row_has_every_wheel_of_its_image_but_those_for_the_gpu() -> None:
    pins = {pin.split("==")[0] for pin in versions.rows()["train-cu130"].pins}
    assert {"transformers", "peft", "accelerate", "bitsandbytes", "numpy"} <= pins
    assert not [pin for pin in pins if pin in ("torch", "triton", "pip") or "nvidia" in pin]
