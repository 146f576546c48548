from __future__ import annotations

from trainer.data.mistakes import KINDS, SHOWN, grouped


def test_equal_mistakes_are_counted_and_the_first_ten_shown() -> None:
    lines = [f"rows.json:{n}:5: output: the value is {n}: write text" for n in range(200_000)]
    told = grouped(lines)
    assert told[:SHOWN] == lines[:SHOWN]
    assert told[SHOWN:] == ["... and 199,990 more of this kind in rows.json"]


def test_each_kind_and_each_file_is_counted_by_itself() -> None:
    same = [f"{file}:{n}: {what}" for n in range(12) for file in "ab" for what in ("odd", "even")]
    told = grouped(same)
    assert len(told) == 4 * (SHOWN + 1)
    assert sum(line.startswith("... and 2 more") for line in told) == 4


def test_few_mistakes_are_all_told_as_they_are() -> None:
    lines = ["a.json:1:1: x: y", "no place at all", "b c:2: ümlaut: 'word' is wrong"]
    assert grouped(lines) == lines and grouped([]) == []


def test_a_thousand_kinds_are_no_thousand_lines() -> None:
    told = grouped(f"rows.json:1:1: field_{chr(97 + n % 26)}{'x' * n}: wrong" for n in range(1000))
    assert len(told) == KINDS + 1
    assert told[-1] == f"... and {1000 - KINDS} more of {1000 - KINDS} other kinds"
