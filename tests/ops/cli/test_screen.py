"""What a terminal shows while a run goes on, at 60 columns."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from ops.cli import screen
from ops.cli.screen import Terminal
from ops.market.models import parse_instance
from ops.run.eta import Eta
from ops.run.journal import Line
from trainer.wire import events

INSTANCE = parse_instance({"id": 7, "actual_status": "loading"})


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def terminal(out: io.StringIO) -> Terminal:
    return Terminal(Console(file=out, force_terminal=True, width=60, color_system=None))


def drawn(out: io.StringIO) -> str:
    """The line that stands on the screen now."""
    return out.getvalue().split("\r\x1b[2K")[-1]


def step(number: int) -> events.Step:
    more: dict[str, Any] = {"learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_second": 1e3}
    return events.Step(t=1.0, step=number, loss=2.0, eta_s=55.0, **more)


def test_phase_money_bar_and_the_time_that_is_left_fit_into_60_columns(
    terminal: Terminal, out: io.StringIO
) -> None:
    terminal.event(events.Started(t=1.0, step=0, total_steps=2000), 0.0, 0.5, 0.0)
    terminal.event(step(1000), 0.0123, 0.5, 0.0)
    line = drawn(out)
    assert len(line) < 60
    for words in ("train", "0.0123 of 0.50 $", "████────", "1000/2000"):
        assert words in line


PREDICTED = {
    "boot_s": 60.0,
    "pull_s": 60.0,
    "transfer_s": 90.0,
    "start_s": 30.0,
    "train_s": 600.0,
    "home_s": 30.0,
}


def test_one_time_to_the_end_goes_through_all_phases_beside_the_money(
    terminal: Terminal, out: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(now: float, line: Line | None = None) -> str:
        monkeypatch.setattr(screen.time, "time", lambda: now)
        if line is not None:
            terminal.line(line)
        terminal.meter(0.0123, 0.5)
        return drawn(out)

    monkeypatch.setattr(screen, "REDRAW_S", 0.0)
    assert "home in" not in at(0.0, Line(0, 0.0, "planned", {"began": 0.0}))
    at(1.0, Line(1, 1.0, "offers", {"predicted": PREDICTED}))
    rent = {"offer": dict.fromkeys(("id", "num_gpus", "gpu_name", "country", "machine_id"), 1)}
    rent["offer"] |= {"usd_per_hour": 0.3}
    assert "0.0123 of 0.50 $  home in 14 min" in at(2.0, Line(2, 2.0, "renting", rent))
    assert "home in 13 min" in at(92.0), "a boot of 2 min, a minute and a half ago"
    assert "home in 12 min" in at(300.0), "what takes longer than predicted is not over yet"
    assert "home in 12 min" in at(300.0, Line(3, 300.0, "booted", {"seconds": 1.0}))
    event = step(1000).model_copy(update={"t": 400.0})
    monkeypatch.setattr(screen.time, "time", lambda: 410.0)
    terminal.event(event, 0.0123, 0.5, 0.0)
    line = at(410.0)
    assert len(line) < 60 and "train" in line and "0.0123 of 0.50 $  home in 75 s" in line
    assert "home in 30 s" in at(500.0, Line(4, 500.0, "ended", {"exit_code": 0}))
    assert "home in" not in at(510.0, Line(5, 510.0, "destroyed", {"reads": [1, 2, 3]}))


def test_of_several_stages_the_later_ones_are_in_the_time_to_the_end() -> None:
    eta = Eta()
    stages = PREDICTED | {"stages_s": [100.0, 200.0, 300.0]}
    eta.line(Line(1, 1.0, "offers", {"predicted": stages}))
    for number, later_s in ((1, 500.0), (2, 300.0), (3, 0.0)):
        eta.started(events.Started(t=5.0, step=0, total_steps=9, number=number, stages=3))
        eta.step(step(4))
        assert eta.left_s(1.0) == 55.0 + later_s + 30.0
    left = PREDICTED | {"stages_s": [200.0, 300.0]}  # of a second machine
    eta.line(Line(2, 1.0, "offers", {"predicted": left}))
    eta.started(events.Started(t=5.0, step=0, total_steps=9, number=2, stages=3))
    eta.step(step(4))
    assert eta.left_s(1.0) == 55.0 + 300.0 + 30.0


def test_the_time_to_the_end_has_what_the_box_does_after_its_training() -> None:
    def at(n: int, kind: str, **data: Any) -> float | None:
        eta.line(Line(n, 10.0 * n, kind, data))
        return eta.left_s(10.0 * n)

    eta = Eta()
    moved = {"transfer_s": 90.0, "result_s": 20.0, "merged_s": 40.0}
    after = {"evaluate_s": 300.0, "merge_s": 100.0}
    at(1, "offers", predicted=PREDICTED | moved | after)
    assert at(2, "booted") == (90.0 - 60.0 + 30.0) + 600.0 + 20.0 + 300.0 + 140.0 + 30.0
    assert at(3, "ended", exit_code=0) == 20.0 + 300.0 + 140.0 + 30.0
    assert at(4, "pulled") == 300.0 + 140.0 + 30.0
    assert at(5, "evaluated") == 140.0 + 30.0
    assert at(6, "merged") == 30.0
    eta = Eta()
    at(1, "offers", predicted=PREDICTED | moved | {"merge_s": 100.0})
    assert at(4, "pulled") == 140.0 + 30.0
    assert eta.left_s(60.0) == 140.0 + 30.0 - 20.0, "the merge runs once the result is at home"
    assert at(7, "serving") is None, "everything is at home"


def test_a_boot_has_a_bar_of_the_time_that_the_plan_foresaw(
    terminal: Terminal, out: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen.time, "time", lambda: 62.0)
    terminal.line(Line(1, 1.0, "offers", {"predicted": PREDICTED}))
    terminal.line(Line(2, 2.0, "starting", {"instance_id": 7}))
    terminal._drawn = 0.0
    terminal.booting(INSTANCE, 60.0)
    assert re.search(r"boot +home in 14 min +████──── loading 60 s", drawn(out))


def test_a_transfer_shows_its_share_and_the_money(terminal: Terminal, out: io.StringIO) -> None:
    terminal.meter(0.01, 0.5)
    terminal.moving("push", 30_000_000, 60_000_000)
    assert re.search(r"push +0\.0100 of 0\.50 \$ +████──── +50% of 60\.0 MB", drawn(out))


def test_what_nothing_changes_is_drawn_again_with_the_newest_dollars(
    terminal: Terminal, out: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "REDRAW_S", 0.0)
    terminal.line(Line(3, 5.0, "launched", {"state": "started"}))
    signs = set()
    for n in range(4):
        terminal.meter(0.01 * n, 0.5)
        assert f"{0.01 * n:.4f} of 0.50 $" in drawn(out) and "launch" in drawn(out)
        signs.add(drawn(out)[0])
    assert len(signs) == 4, "a sign of life that turns"
    terminal.line(Line(4, 9.0, "destroyed", {"reads": [1, 2, 3]}))
    terminal.meter(0.05, 0.5)
    assert "\r" not in drawn(out) and drawn(out).strip() == "", "at rest when it has ended"


def test_a_terminal_that_cannot_be_asked_chooses_nothing(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("3\n"))
    assert terminal.choose([("leave", "go: 0.1 $"), ("destroy", "now: 0.1 $")]) is None


def test_nothing_is_drawn_over_a_conversation_in_this_terminal(
    terminal: Terminal, out: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "REDRAW_S", 0.0)
    terminal.line(Line(1, 0.0, "serving", {"ends_at": 60.0}))
    before = out.getvalue()
    assert "the result is served on the box until" in before
    terminal.meter(0.1, 1.0)
    assert out.getvalue() == before
    terminal.talking("http://127.0.0.1:1/#t", 60.0)
    assert "http://127.0.0.1:1/#t" in out.getvalue()
    terminal.meter(0.2, 1.0)
    assert "0.2000 of 1.00 $" in drawn(out), "the page leaves this terminal free"


def test_what_the_box_said_is_shown_with_the_time_when_it_said_it(
    terminal: Terminal, out: io.StringIO
) -> None:
    terminal.line(Line(1, 1000.0, "planned", {"began": 990.0}))
    for t in (1030.0, 1.0, 9e12):  # the last two by clocks that are wrong
        terminal.event(events.HeldOut(t=t, step=1, rows=9, loss=2.0, accuracy=0.5), 0.0, 0.5, 0.0)
    times = [float(x) for x in re.findall(r"([\d.]+) s  held out", out.getvalue())]
    assert times[:2] == [40.0, 40.0] and times[2] < 9e9
