"""Rows that are described and picked: every layout, nothing lost, nothing on both sides."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from trainer.data import curate, records
from trainer.data.records import Record
from trainer.data.sources import Reading
from trainer.data.stats import stats

QUESTION, ANSWER = "What is a deductible?", "The part of a loss that you pay yourself."
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
LAYOUTS = {
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER, "id": 7},
    "sharegpt": {
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    },
    "messages": {"messages": TURNS},
    "prompt": {"prompt": QUESTION, "completion": ANSWER},
    "text": {"text": ANSWER},
    "pairs": {"prompt": QUESTION, "chosen": ANSWER, "rejected": "No idea."},
    "tagged": {"instruction": QUESTION, "output": ANSWER, "kto_tag": True},
}


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def row(n: int, question: str = "", answer: str = "", label: str = "") -> Record:
    draw = random.Random(n)
    said = " ".join("".join(draw.choices("abcdefgh", k=5)) for _ in range(5 + n % 40))
    return Record(f"f:{n}", json.dumps({"n": n}), question or said, answer or said[::-1], label, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_of_each_layout_is_read_and_kept_as_it_was(tmp_path: Path, layout: str) -> None:
    found = records.read([written(tmp_path / "rows.jsonl", [LAYOUTS[layout]])])
    assert found.defects == []
    [only] = found.rows
    assert json.loads(only.line) == LAYOUTS[layout]
    assert only.answer == ANSWER
    assert only.question == ("" if layout == "text" else QUESTION)
    assert found.files[str(tmp_path / "rows.jsonl")][0] == (
        layout if layout in ("pairs", "tagged") else "rows"
    )


def test_rows_without_an_answer_are_read_where_prompts_are_asked_for(tmp_path: Path) -> None:
    rows = [{"prompt": QUESTION}, {"prompt": QUESTION, "answer": "a share"}, {"text": "none"}]
    path = written(tmp_path / "rows.jsonl", rows)
    found = records.read([path], Reading("prompts"))
    assert [(r.question, r.answer) for r in found.rows] == [(QUESTION, ""), (QUESTION, "a share")]
    assert [d.line for d in found.defects] == [3]
    assert records.read([path]).rows == []


def test_defects_are_told_with_their_place_in_preferences_too(tmp_path: Path) -> None:
    good = LAYOUTS["pairs"]
    bad = good | {"rejected": ANSWER}
    against = good | {"chosen": good["rejected"], "rejected": good["chosen"]}
    found = records.read([written(tmp_path / "rows.jsonl", [good, bad, against])])
    assert {d.line for d in found.defects} >= {2, 3}
    assert len(found.rows) == 2


def test_equal_and_near_rows_go_and_the_first_of_each_stays() -> None:
    long = row(39)
    near = long._replace(where="f:near", answer=long.answer + " more")
    shouted = long._replace(where="f:equal", question=long.question.upper() + "  ")
    picked = curate.dedupe([row(1), long, near, shouted, row(2)])
    assert [r.where for r in picked.rows] == ["f:1", "f:39", "f:2"]
    assert [(r.row, r.reason, r.of) for r in picked.removed] == [
        ("f:near", "near", "f:39"),
        ("f:equal", "equal", "f:39"),
    ]
    assert len(curate.dedupe([long, near, shouted], near=None).rows) == 2


def test_rows_that_differ_in_a_number_are_not_near_duplicates() -> None:
    asks = "How many apples are left when somebody who has {} of them eats three apples today?"
    rows = [row(n, asks.format(n), "Some of the apples are left over, certainly") for n in range(9)]
    assert len(curate.dedupe(rows).rows) == 9


def test_rows_of_the_other_file_are_taken_out_of_this_one() -> None:
    picked = curate.dedupe([row(1), row(2)], against=[row(2)._replace(where="held:1")])
    assert [r.where for r in picked.rows] == ["f:1"]
    assert picked.removed[0].of == "held:1" and picked.removed[0].reason.startswith("equal")


@pytest.mark.parametrize("by", ["cheapest", "spread"])
def test_a_sample_never_goes_over_its_characters_and_fills_them(by: curate.By) -> None:
    rows = [row(n) for n in range(200)]
    picked = curate.sample(rows, max_characters=5_000, by=by, seed=1)
    total = sum(r.characters for r in picked.rows)
    assert 4_400 <= total <= 5_000
    assert len(picked.rows) + len(picked.removed) == 200
    assert picked == curate.sample(rows, max_characters=5_000, by=by, seed=1)
    assert len(curate.sample(rows, max_rows=7, by=by).rows) == 7


def test_cheapest_takes_the_shortest_and_spread_takes_long_ones_too() -> None:
    rows = [row(n) for n in range(200)]
    cheap = curate.sample(rows, max_characters=5_000, by="cheapest").rows
    spread = curate.sample(rows, max_characters=5_000, by="spread").rows
    assert len(cheap) > len(spread)
    assert max(r.characters for r in cheap) < max(r.characters for r in spread)


def test_a_split_leaks_no_equal_or_near_row_and_loses_none() -> None:
    rows = [row(n) for n in range(300)]
    rows += [
        r._replace(where=f"copy:{n}", answer=r.answer + " x") for n, r in enumerate(rows) if n % 3
    ]
    picked = curate.split(rows, 0.2, seed=3)
    assert len(picked.held) == 100
    assert sorted(r.where for r in [*picked.rows, *picked.held]) == sorted(r.where for r in rows)
    assert curate.dedupe(picked.rows, against=picked.held).removed == [
        r for r in curate.dedupe(picked.rows).removed
    ]


def test_which_rows_are_held_out_follows_from_what_they_say_and_the_seed() -> None:
    rows = [row(n) for n in range(100)]
    held = {r.where for r in curate.split(rows, 10, seed=3).held}
    assert held == {r.where for r in curate.split(rows[::-1], 10, seed=3).held}
    assert held != {r.where for r in curate.split(rows, 10, seed=4).held}
    with pytest.raises(ValueError, match="cannot be held out"):
        curate.split(rows, 100)


def test_stats_count_characters_scripts_turns_and_repeats() -> None:
    chinese = Record("f:1", "{}", "什么是免赔额", "自己付", "", 2)
    english = Record("f:2", "{}", "What is it", "Yours", "", 4)
    found = stats([chinese, english, english])
    assert found.rows == 3 and found.equal == 1
    assert found.total_characters == 9 + 15 * 2
    assert found.main_script == {"Latin": 2, "Han": 1}
    assert found.scripts == {"Latin": round(26 / 35, 4), "Han": round(9 / 35, 4)}
    assert found.turns == {2: 1, 4: 2}
    assert found.characters["least"] == 9 and found.characters["most"] == 15
    assert found.longest[0] == "f:2 (15)"
    assert stats([]).total_tokens == 0
