"""TensorBoard's files, read back by TensorBoard's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import milktea
from ops.errors import PreflightError
from ops.use import board


def test_the_numbers_of_runs_are_read_back_by_tensorboard_as_they_came(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = milktea.Run(tmp_path / "runs/one-20261127-040000-aa11")
    run.folder.mkdir(parents=True)

    def say(event: str, **more: Any) -> None:
        with (run.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"t": 1.5e9, "event": event, **more}) + "\n")

    step = {"learning_rate": 1e-4, "grad_norm": 1.0, "word": "no number", "extra": 3}
    say("step", step=1, loss=2.0, **step)
    say("held_out", step=1, rows=4, loss=1.75, accuracy=0.5)
    with board.Board([run], tmp_path / "logs") as writer:
        writer.write_new()
        say("step", step=2, loss=float("nan"), **step)
        say("step", step=3, loss=1.0, **step)
        writer.write_new()
    read = EventAccumulator(str(tmp_path / "logs" / run.id))
    read.Reload()
    told = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert told["loss"] == [(1, 2.0), (3, 1.0)] and told["held_out_loss"] == [(1, 1.75)]
    assert told["extra"] == [(1, 3), (2, 3), (3, 3)] and "word" not in told and "rows" not in told
    assert [e.wall_time for e in read.Scalars("loss")] == [1.5e9, 1.5e9]


def test_a_machine_without_tensorboard_is_told_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PreflightError) as refused:
        board.validate()
    assert refused.value.hint.endswith("-m pip install tensorboard")


@pytest.mark.slow
def test_tensorboard_itself_serves_the_runs_on_loopback(tmp_path: Path) -> None:
    import requests

    run = milktea.Run(tmp_path / "runs/one-20261127-040000-aa11")
    run.folder.mkdir(parents=True)
    row = {"t": 1.5e9, "event": "step", "step": 1, "loss": 2.0}
    text = json.dumps(row | {"learning_rate": 1e-4, "grad_norm": 1.0}) + "\n"
    (run.folder / "events.jsonl").write_text(text)
    with board.served([run]) as (address, _):
        from ops.wait import until

        def loss() -> Any:
            return requests.get(f"{address}data/plugin/scalars/tags", timeout=60).json() or None

        told = until(loss, every_s=0.5, timeout_s=30)
        assert set(told) == {run.id} and "loss" in told[run.id]
        assert address.startswith("http://127.0.0.1:")
