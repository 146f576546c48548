from __future__ import annotations

import io
import json

import pytest
import typer
from rich.console import Console

from ops.cli.errors import errors
from ops.cli.screen import Terminal
from ops.errors import Failed
from ops.plain import json_line, number_of, plain, span
from trainer.wire import events

CLIPBOARD, TITLE, CLEAR = "\x1b]52;c;ZXZpbA==\x07", "\x1b]0;evil\x07", "\x1b[2J\x1b[H"
C1, BIDI, LINES = "\x9b31m", "\u202ereversed\u2066", "one\u2028two"


@pytest.mark.parametrize("odd", [CLIPBOARD, TITLE, CLEAR, C1, BIDI, LINES, "\r", "\x00", "\ud800"])
def test_what_would_steer_a_terminal_is_written_out(odd: str) -> None:
    told = plain(f"before{odd}after")
    assert told.isprintable() and told.startswith("before") and told.endswith("after")
    told.encode()


def test_ordinary_text_stays_as_it_is() -> None:
    text = "奶茶 – naïve\n\ttabs, emoji 🧋"
    assert plain(text) == text and plain("a\r\nb") == "a\nb"


def test_nothing_that_a_box_says_steers_the_screen() -> None:
    for live in (True, False):
        out = io.StringIO()
        screen = Terminal(Console(file=out, force_terminal=live, width=200, color_system=None))
        odd = CLIPBOARD + CLEAR + C1 + BIDI
        screen.event(events.Warned(t=1, message=odd), 0.0, 1.0, 0.0)
        screen.waiting(odd)
        screen.connecting(odd)
        told = out.getvalue().replace("\r\x1b[2K", "")
        assert "\\x1b]52" in told
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(told), repr(told)


@pytest.mark.parametrize("as_json", [True, False])
def test_nothing_that_a_box_says_steers_the_terminal_from_an_error(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = CLIPBOARD + CLEAR + C1 + BIDI + "\ud800"
    with pytest.raises(typer.Exit), errors(as_json):
        raise Failed(odd, money=odd, hint=odd)
    out, err = capsys.readouterr()
    assert "52;c;ZXZpbA==" in out + err
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\ud800"} & set(out + err)


def test_a_line_of_json_says_the_same_to_a_program() -> None:
    for odd in (CLIPBOARD, TITLE, CLEAR, C1, BIDI, LINES, "\ud800", "奶茶", '"\\'):
        line = json_line({"what": odd})
        assert json.loads(line) == {"what": odd} and "\n" not in line
        line.encode()


def test_no_answer_of_the_model_steers_the_terminal_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pathlib import Path

    from ops.api import Run
    from ops.cli.ending import last_lines

    odd = CLIPBOARD + CLEAR + C1 + BIDI + "\ud800"
    screen = Terminal(Console(file=io.StringIO()))
    screen.samples.append(events.Sample(t=1, prompt=odd, expected=odd, before=odd, after=odd))
    finished = Path(__file__).parent / "run/runs_of_0_1/stub-20261126-141035-f0e0"
    last_lines(Run(finished), screen, as_json=False)
    told = capsys.readouterr().out
    assert told.count("52;c;ZXZpbA==") == 3
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\ud800"} & set(told)


def test_one_row_is_a_row_and_two_are_rows() -> None:
    assert [number_of(n, "row") for n in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
    assert [number_of(n, "row", "is", "are") for n in (1, 2)] == ["1 row is", "2 rows are"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (119.4, "119 s"),
        (120, "2 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (36_000, "10.0 h"),
    ],
)
def test_a_duration_is_told_in_the_unit_that_people_use(seconds: float, text: str) -> None:
    assert span(seconds) == text
