"""A stub training that looks at held-out rows, and a job for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import milktea
import rig
from ops.fakevast import FakeVast
from ops.market.provider import Provider
from ops.wait import RealClock

# Four steps; the held-out loss ends at 1.6 for a learning rate of 3e-4 and at 2.0 for any other.
LOOKS = r"""
rate=$(grep -o '"learning_rate": *[^,}]*' job.json | head -n 1 | sed 's/.*: *//')
case $rate in 0.0003|3e-4|3e-04) tenths=16;; *) tenths=20;; esac
look() { say "\"event\":\"held_out\",\"step\":$1,\"rows\":9,\"loss\":$2,\"accuracy\":0.5"; }
look 0 4.0
look 1 "$((tenths / 10 + 1)).$((tenths % 10))"
sleep 0.5
look 2 "$((tenths / 10)).$((tenths % 10))5"
sleep 0.5
look 4 "$((tenths / 10)).$((tenths % 10))"
"""


@pytest.fixture
def looking(own: rig.Rig) -> Iterator[FakeVast]:
    """An emulator whose stub trains four steps and looks at held-out rows."""
    script = own.image / "bin/milktea-train"
    text = script.read_text().replace('"total_steps":2', '"total_steps":4')
    first = text.index('say \'"event":"step"')
    script.write_text(text[:first] + LOOKS + text[first:])
    with own.emulator() as fake:
        yield fake
        assert fake.instances() == [], "a box survived the test"


@pytest.fixture
def vast(looking: FakeVast) -> milktea.Vast:
    return milktea.Vast(Provider(looking.url, looking.api_key), RealClock(rig.PACE))


@pytest.fixture
def job(own: rig.Rig) -> dict[str, Any]:
    return {
        "name": "tea",
        "model": {"base": str(rig.tiny_model(own.folder / "stub")), "precision": "fp32"},
        "data": {"files": [str(own.data)]},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
        "limits": {"max_usd": 0.5, "max_hours": 2.0},
        "image": {"ref": rig.IMAGE, "trainer": "image", "size_gib": 0.4},
        "results": {"folder": str(own.folder / "out")},
    }
