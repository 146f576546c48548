"""What a program and a notebook print while a run goes on: plain lines, few of them."""

from __future__ import annotations

import time

import pytest

import rig
from ops.declare.told import Told
from ops.fakevast import FakeVast
from trainer.wire import events

SOON = time.time() + 60


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    text = capsys.readouterr().out
    assert "\r" not in text and "\x1b" not in text, "a line is never written over"
    return text.splitlines()


def test_a_whole_run_is_told_in_plain_lines(
    own: rig.Rig, fake: FakeVast, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome, _, _ = rig.whole_run(own, fake, screen=Told())
    assert not isinstance(outcome, BaseException)
    lines = told(capsys)
    assert 10 < len(lines) < 25
    assert any(line.startswith("step      1 of 2, loss 2.0000, 0.00") for line in lines)
    assert lines[-1].startswith("destroy")


def test_a_long_training_is_a_line_for_each_tenth_of_it_wherever_it_begins(
    capsys: pytest.CaptureFixture[str],
) -> None:
    screen = Told()
    for began in (0, 5000):
        screen.event(events.Started(t=0, step=began, total_steps=10_000), 0.1, 3.0, SOON)
        for step in range(began + 1, 10_001):
            row = events.Step(t=0, step=step, loss=1.5, learning_rate=0.1, grad_norm=1, eta_s=60)
            screen.event(row, 0.25, 3.0, SOON)
            if step % 100 == 0:
                held = events.HeldOut(t=0, step=step, rows=9, loss=1.25, accuracy=0.5)
                screen.event(held, 0.25, 3.0, SOON)
        lines = told(capsys)
        assert len(lines) == 10 - began // 1000
        assert lines[-1].startswith(
            "step      10000 of 10000, loss 1.5000, held-out loss 1.2500, 0.2500 of 3.00 $, done"
        )
