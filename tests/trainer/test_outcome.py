"""However a run ends, it says why in one sentence, once, and what to do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import events_of, finish, start, write_model

from trainer.data import batch
from trainer.data.errors import InvalidJob
from trainer.loop import budget
from trainer.outcome import Unexpected, is_reported
from trainer.stages import sft
from trainer.train import outcome_of
from trainer.wire import events
from trainer.wire.job import Job

Make = Callable[..., Path]
Patch = pytest.MonkeyPatch


def fails_on(patch: Patch, rank: int | None, error: Exception) -> None:
    """The third step's batches fail: on one process, or on all."""
    real = sft.Stage.batches

    def batches(self: sft.Stage, step: int) -> batch.Work:
        if step == 2 and rank in (None, int(os.environ.get("RANK", "0"))):
            raise error
        return real(self, step)

    patch.setattr(sft.Stage, "batches", batches)


def failures(job: Path) -> list[dict[str, Any]]:
    return [e for e in events_of(job) if e["event"] == "failed"]


def test_an_error_that_nobody_foresaw_is_an_event_with_a_hint(
    run_folder: Make, monkeypatch: Patch
) -> None:
    fails_on(monkeypatch, None, KeyError("a name\nthat is missing"))
    job = run_folder()
    assert finish(start(job)) == [1]
    [failed] = failures(job)
    assert failed["reason"].startswith("KeyError: ") and "\n" not in failed["reason"]
    assert "log.txt" in failed["hint"] and "milktea resume" in failed["hint"]
    said = (job.parent / "stderr0.txt").read_text()
    assert "Traceback" in said and "stopped: KeyError" in said
    assert json.loads((job.parent / ".trainer_exit").read_text()) == 1


@pytest.mark.parametrize("rank", [0, 1, None])
def test_of_two_processes_the_one_that_fails_first_says_why(
    run_folder: Make, monkeypatch: Patch, rank: int | None
) -> None:
    fails_on(monkeypatch, rank, ValueError("row 7 is broken"))
    job = run_folder()
    assert finish(start(job, 2)) == [1, 1]
    told = failures(job)
    assert told and told[0]["reason"] == "ValueError: row 7 is broken"
    assert len(told) == 1 or rank is None  # both may find the same at the same moment


def test_a_reason_of_an_earlier_start_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    assert not is_reported(tmp_path, 0.0)
    before = time.time()
    log = events.EventWriter(tmp_path / "events.jsonl")
    log.write(events.Failure, reason="no memory")
    log.write(events.Warned, message="last words")
    log.close()
    assert is_reported(tmp_path, before - 1) and not is_reported(tmp_path, time.time() + 1)


def test_a_lost_process_is_no_end_where_torchrun_starts_it_again(
    run_folder: Make, monkeypatch: Patch
) -> None:
    fails_on(monkeypatch, None, ValueError("connection reset"))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    job = run_folder()
    assert finish(start(job)) == [1] and failures(job) == []
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    assert finish(start(job)) == [1] and len(failures(job)) == 1


def test_out_of_gpu_memory_is_told_with_what_to_lower(run_folder: Make, monkeypatch: Patch) -> None:
    fails_on(monkeypatch, None, torch.OutOfMemoryError("CUDA out of memory: tried 3 GiB"))
    outcome = outcome_of(run_folder())
    assert outcome.code == 1 and isinstance(outcome.error, Unexpected)
    assert "tried 3 GiB" in str(outcome.error) and "data.max_length" in outcome.error.hint


def test_a_model_whose_size_cannot_be_told_is_refused(run_folder: Make, tmp_path: Path) -> None:
    write_model(tmp_path / "odd")
    job = Job.model_validate_json(run_folder().read_bytes())
    fits = budget.solve(job, tmp_path / "odd", 100, 80.0, 1)
    assert fits is not None and fits[0] >= 100
    wrong = job.model_copy(update={"lora": job.lora.model_copy(update={"target_modules": ["q"]})})
    with pytest.raises(InvalidJob, match="target_modules: q is not among") as caught:
        budget.solve(wrong, tmp_path / "odd", 100, 80.0, 1)
    assert caught.value.hint
    (tmp_path / "odd" / "config.json").write_text("{}")
    with pytest.raises(InvalidJob, match="how much memory tiny/random needs cannot be told"):
        budget.solve(job, tmp_path / "odd", 100, 80.0, 1)
