"""The wire's files as they are: whoever changes one of these changes what an older box, an older
laptop or an older image can read. A new key is optional; anything else is a new number of WIRE."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tiny import events_of, manifest_of, rows

from trainer.train import run_job
from trainer.wire.events import parse
from trainer.wire.job import WIRE, Job

GOLDEN = Path(__file__).parent / "golden"
Make = Callable[..., Path]


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text("utf-8"))


def shape(value: Any, *, depth: int = 3) -> Any:
    """Keys and kinds; of what is named by the run (tensors, files, versions) one entry."""
    if isinstance(value, dict) and depth:
        return {k: shape(v, depth=depth - 1) for k, v in value.items()}
    return type(value).__name__


def holds(value: Any, kept: Any) -> bool:
    """Whether `value` says all that `kept` says."""
    if isinstance(kept, dict):
        return all(k in value and holds(value[k], v) for k, v in kept.items())
    if isinstance(kept, list):
        return len(value) == len(kept) and all(map(holds, value, kept))
    return bool(value == kept)


def test_the_number_is_that_of_the_golden_files() -> None:
    assert golden("job.json")["wire"] == golden("manifest.json")["wire"] == WIRE


def test_a_job_of_this_wire_is_read_as_it_was_meant() -> None:
    written = golden("job.json")
    assert holds(json.loads(Job.model_validate(written).model_dump_json()), written)


def test_a_job_of_several_stages_is_read_as_it_was_meant() -> None:
    written = golden("chain.json")
    job = Job.model_validate(written)
    assert holds(json.loads(job.model_dump_json()), written)
    assert Job.model_validate_json(job.text()) == job
    (pt, first), (rm, _), (ppo, last) = job.parts()
    assert (first, last) == ("stages/1-pt", "stages/3-ppo")
    assert pt.training.max_steps == 3 and pt.data.files[0].path == "../../data/1.jsonl"
    assert pt.start is None and pt.model.path == "../../model"
    assert rm.start is not None and rm.start.path == "../../stages/1-pt/adapter"
    assert ppo.start is not None and (ppo.start.path, ppo.start.how) == (rm.start.path, "stack")
    assert ppo.judge is not None and ppo.judge.path == "../../stages/2-rm/adapter"


def test_a_job_that_asks_nothing_new_is_written_for_the_oldest_image_of_this_wire() -> None:
    def keys(value: dict[str, Any]) -> set[str]:
        return {f"{k}.{j}" for k, v in value.items() for j in (v if isinstance(v, dict) else [""])}

    kept = golden("job.json")
    text = Job.model_validate(kept).text()
    assert keys(json.loads(text)) <= keys(kept)
    assert Job.model_validate_json(text) == Job.model_validate(kept)


def test_every_key_that_a_later_job_may_leave_out_has_a_default() -> None:
    """The least that a job of this wire says. A key added later must not be needed."""
    full = golden("job.json")
    least = {k: full[k] for k in ("wire", "run_id")}
    least["model"] = {"base": full["model"]["base"]}
    least["data"] = {"files": full["data"]["files"]}
    assert Job.model_validate(least).stage == "sft"


@pytest.mark.parametrize(
    "wrong",
    [
        {"wire": 1},
        {"stage": "sft"},
        {"stages": []},
        {"stages": [{"name": "sft"}] * 13},
        {"environment": ["HF_TOKEN=secret"]},
        {"environment": ["lower"]},
        {"deadline_unix_s": 1.0},
    ],
)
def test_what_is_no_job_of_this_wire_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Job.model_validate(golden("job.json") | wrong)


def test_the_trainer_writes_a_manifest_of_these_keys_and_kinds(run_folder: Make) -> None:
    job = run_folder(training={"max_steps": 2})
    assert run_job(job) == 0
    written, kept = manifest_of(job), golden("manifest.json")
    by_run = ("members", "tensors", "versions", "kernels")
    assert {k: type(written[k]) for k in by_run} == dict.fromkeys(by_run, dict)
    for name in by_run:
        assert shape(next(iter(written.pop(name).values()))) == shape(
            next(iter(kept.pop(name).values()))
        )
    assert holds(shape(written), shape(kept)), "later keys come beside these"


def test_the_trainer_writes_events_of_these_keys(run_folder: Make) -> None:
    job = run_folder(held_out=rows(1), training={"max_steps": 2, "save_every_s": 1e-3})
    assert run_job(job) == 0
    kept = {
        row["event"]: row
        for row in map(json.loads, (GOLDEN / "events.jsonl").read_text("utf-8").splitlines())
    }
    seen = {row["event"]: row for row in events_of(job)}
    for name in ("started", "step", "sample", "score", "finished"):
        assert set(seen[name]) >= set(kept[name]), name


def test_every_golden_event_is_read_as_what_it_is() -> None:
    for line in (GOLDEN / "events.jsonl").read_text("utf-8").splitlines():
        assert type(parse(line)).__name__.lower().startswith(json.loads(line)["event"][:4])


def test_a_job_whose_variable_did_not_come_is_refused_by_its_name(
    run_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.launch import prepare_inputs, read_job

    monkeypatch.delenv("HF_TOKEN", raising=False)
    job = run_folder(environment=["HF_TOKEN"])
    with pytest.raises(ValueError, match="HF_TOKEN of the job's env did not come"):
        prepare_inputs(read_job(job), job.parent)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    prepare_inputs(read_job(job), job.parent)


@pytest.mark.parametrize("step", [-1, 1 << 63, int("9" * 400)])
def test_a_step_that_no_training_counts_to_is_no_event(step: int) -> None:
    line = json.dumps({"t": 1, "event": "loading", "what": "it", "done_bytes": step})
    with pytest.raises(ValueError):
        parse(line)
    assert parse(line.replace(str(step), str((1 << 63) - 1)))
