"""The progress of a run as lines of a log, where nobody follows its events: MILKTEA_TELL=1."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.wire import events

KEEPS = {"learning_rate": 1e-4, "grad_norm": 1.0}


@pytest.fixture
def in_shanghai() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as here:
        here.setenv("TZ", "UTC-8")  # POSIX counts the other way: eight hours before Greenwich
        time.tzset()
        yield
    time.tzset()


def test_a_log_says_how_far_a_run_is_in_the_time_of_its_machine(in_shanghai: None) -> None:
    words = events.Words()
    at = 1795774652.0  # 2026-11-27, 10:17:32 in Greenwich

    def told(event: type[events.Event], after_s: float, **fields: object) -> str:
        return words.line(event(t=at + after_s, **fields))  # type: ignore[arg-type]

    assert told(events.Loading, 0, what="loading the model") == "18:17:32  loading the model"
    assert told(events.Loading, 9, what="loading the model", done_bytes=5) == ""
    started = told(events.Started, 10, total_steps=900, processes=2, device="cuda:0")
    assert started == "18:17:42  900 steps on 2 x cuda:0"
    step = {"loss": 1.25, "tokens_per_second": 51234.5, "eta_s": 7500.0, **KEEPS}
    first = told(events.Step, 11, step=1, **step)
    assert first == "18:17:43  step 1 of 900, loss 1.2500, 51,234 tokens/s, 2 h 5 min left"
    assert [bool(told(events.Step, 11 + n, step=n, **step)) for n in (1, 9, 10, 11)] == [
        False,
        False,
        True,
        False,
    ]
    assert "step 900 of 900" in told(events.Step, 22, step=900, **step), "the last one is told"
    looked = told(events.HeldOut, 23, step=900, rows=56, loss=0.5, accuracy=0.975)
    assert looked.endswith("held-out rows after step 900: loss 0.5000, 97.5% right")
    assert told(events.Warned, 24, message="a\x1b[2Jb").endswith("warning: a [2Jb")
    ended = told(events.Finished, 25, steps=900, final_loss=1.0, seconds=99.6, adapter_sha256="")
    assert ended.endswith("done: 900 steps in 100 s")


@pytest.mark.parametrize("asked", [True, False])
def test_the_words_are_printed_where_they_are_asked_for_and_nowhere_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: bool,
) -> None:
    monkeypatch.setenv("MILKTEA_TELL", "1" if asked else "")
    writer = events.EventWriter(tmp_path / "events.jsonl")
    writer.write(events.Started, total_steps=12)
    writer.close()
    assert ("12 steps on 1 x cpu" in capsys.readouterr().out) is asked
    [line] = (tmp_path / "events.jsonl").read_text().splitlines()
    assert events.parse(line) == events.Started(t=events.parse(line).t, total_steps=12)
