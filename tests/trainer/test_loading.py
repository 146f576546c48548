from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from trainer import loading
from trainer.loading import cache_of, told


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def until(run: Path, count: int) -> None:
    end = time.monotonic() + 20
    while len(events(run)) < count:
        assert time.monotonic() < end, events(run)
        time.sleep(0.01)


def test_a_download_is_told_while_bytes_come_and_is_silent_while_they_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "EVERY_S", 0.02)
    blobs = tmp_path / "blobs"
    with told(tmp_path, "downloading a/b", blobs):
        assert [e["done_bytes"] for e in events(tmp_path)] == [0]
        blobs.mkdir()
        (blobs / "one.incomplete").write_bytes(bytes(100))
        until(tmp_path, 2)
        (blobs / "two").write_bytes(bytes(50))
        until(tmp_path, 3)
        time.sleep(0.1)  # five looks without a byte
    assert [e["done_bytes"] for e in events(tmp_path)] == [0, 100, 150]
    assert {e["what"] for e in events(tmp_path)} == {"downloading a/b"}


def test_the_hub_s_cache_of_a_model_is_where_the_hub_puts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cache_of("Qwen/Qwen3-8B") == tmp_path / "models--Qwen--Qwen3-8B" / "blobs"


def test_what_ends_with_an_error_is_told_no_longer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), told(tmp_path, "installing"):
        raise ValueError("x")
    assert len(events(tmp_path)) == 1
