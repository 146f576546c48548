"""What a rented machine costs, as its renter told it and as time passed since."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from trainer.serve.meter import read_meter

TOLD = {"usd": 0.25, "usd_per_hour": 0.36, "max_usd": 1.0, "ends_in_s": 600.0}


def test_dollars_run_on_and_the_end_comes_nearer_since_the_file_was_written(tmp_path: Path) -> None:
    file = tmp_path / "meter"
    file.write_text(json.dumps(TOLD))
    os.utime(file, (time.time() - 100, time.time() - 100))
    found = read_meter(file)
    assert found and found["usd"] == pytest.approx(0.26, abs=1e-3)
    assert found["ends_in_s"] == pytest.approx(500, abs=2) and found["max_usd"] == 1.0
    os.utime(file, (time.time() - 10_000, time.time() - 10_000))
    late = read_meter(file)
    assert late and late["ends_in_s"] == 0.0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"usd": 1}', json.dumps(TOLD | {"usd": "much"}), "[" * 3000]
)
def test_a_file_that_tells_nothing_shows_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / "meter"
    assert read_meter(file) is None
    file.write_text(text)
    assert read_meter(file) is None
    file.write_text(json.dumps(TOLD | {"usd": float("nan")}))
    assert read_meter(file) is None
