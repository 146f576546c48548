"""A plan asks the hub, and where nobody answers takes what its cache has here."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest

from ops.job import hub
from ops.job.hub import NotHere


def cached(monkeypatch: pytest.MonkeyPatch, cache: Path, model: str, *names: str) -> None:
    """A hub's cache that has these files of a model."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    folder = cache / f"models--{model.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("a" * 40)
    (folder / "snapshots" / ("a" * 40)).mkdir(parents=True)
    for name in names:
        (folder / "snapshots" / ("a" * 40) / name).write_text("{}")


def test_a_hub_that_does_not_answer_is_given_up_at_once_without_a_word_of_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cached(monkeypatch, tmp_path, "org/whole", "config.json", "tokenizer.json")
    cached(monkeypatch, tmp_path, "org/half", "config.json")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "LOOK_S", 0.3)
    caplog.set_level(logging.WARNING)
    with socket.create_server(("127.0.0.1", 0)) as dumb:
        place = f"http://127.0.0.1:{dumb.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", place)
        hub._unreachable.cache_clear()
        assert hub.file("org/whole", "config.json").name == "config.json"
        folder = hub.cached_folder("org/whole", None)
        assert folder is not None and (folder / "tokenizer.json").is_file()
        for missing in (
            lambda: hub.file("org/other@main", "config.json"),
            lambda: hub.cached_folder("org/half", None),
        ):
            with pytest.raises(NotHere, match="is not on this machine, and the hub cannot be re"):
                missing()
    hub._unreachable.cache_clear()
    assert caplog.records == []
