"""Run folders of any stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def stage_run(run_folder: Callable[..., Path]) -> Callable[..., Path]:
    """stage_run("dpo", rows, settings={...}, **run_folder's) -> job.json of a new run folder;
    `settings` are changes of job.json's data section."""

    def make(
        stage: str, rows: list[Any], settings: dict[str, Any] | None = None, **changes: Any
    ) -> Path:
        job = run_folder(data=rows, stages=[{"name": stage}], **changes)
        told = json.loads(job.read_text())
        told["data"] |= settings or {}
        job.write_text(json.dumps(told))
        return job

    return make


@pytest.fixture
def every_step_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.loop.progress.EVENT_EVERY_S", 0.0)
