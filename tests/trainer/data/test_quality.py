"""Rules of quality: each finds what it is named for, and leaves sound rows alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.data.quality import LANGUAGE, RULES, judge
from trainer.data.records import Record

ASK = "How do I make a pot of green tea?"
BAD = {
    "no-answer": ["N/A", "...", "none."],
    "echo": [ASK, ASK.upper() + "  "],
    "repeats": ["tea is good for you, " * 12, "Pour it.\nStir it.\n" + "Wait a minute.\n" * 9],
    "refusal": [
        "As an AI language model, I do not drink.",
        "I'm sorry, but I cannot help with that.",
        "很抱歉，我无法提供这方面的信息。",
    ],
    "control": ["Boil\x08 water.", "Boil \u202ewater.", "Boil\ufeff water"],
    "mojibake": ["Itâ€™s easy: boil the water", "è¿™æ˜¯ä¸­æ–‡", "锟斤拷锟斤拷 water"],
    "placeholder": ["Dear [Your Name], boil it.", "<nooutput>", "Hello {{name}}, boil it."],
    "template": ["Boil it.<|im_end|>", "Boil it.\n### Response:\nYes", "[INST] boil [/INST]"],
    "open-fence": ["Run this:\n```sh\nboil water"],
    "cut-short": ["First you take a pot, then you fill it with fresh water,"],
}
GOOD = [
    "Boil water, let it cool to 80 degrees, pour it over the leaves and wait two minutes.",
    "1. Boil.\n2. Pour.\n3. Wait.\n4. Drink.",
    "```sh\nboil water\n```",
    "Sorry to hear that your tea is bitter: use cooler water.",
    "把水烧开，放凉到八十度，倒在茶叶上，等两分钟。",
    "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n| 5 | 6 |",
    "Café crème, naïve façade, Ärger, Übung, Ça va: ¿qué tal?",
    "No.",
]


def row(answer: str, question: str = ASK) -> Record:
    return Record("rows.jsonl:1", "{}", question, answer, "", 2)


@pytest.mark.parametrize(("rule", "answer"), [(r, a) for r, some in BAD.items() for a in some])
def test_a_rule_finds_what_it_is_named_for(rule: str, answer: str) -> None:
    [found] = judge([row(answer)], [rule])
    assert found.rule == rule and found.rows[0][0] == "rows.jsonl:1"


@pytest.mark.parametrize("answer", GOOD)
def test_no_rule_finds_fault_with_a_good_answer(answer: str) -> None:
    assert not judge([row(answer)], list(RULES))


def test_a_question_about_a_link_alone_and_an_answer_in_another_script_are_found() -> None:
    asked = row("It is about tea.", "Summarize https://example.com/tea")
    assert [f.rule for f in judge([asked], list(RULES))] == ["link-only"]
    english, chinese = row(GOOD[0]), row(GOOD[4] * 2)
    [found] = judge([english, chinese], [], ["Han"])
    assert found.rule == LANGUAGE and len(found.rows) == 1


def test_the_rules_find_few_of_the_rows_that_people_train_on() -> None:
    """One row in twenty at most of the practice job's own."""
    jobs = Path(__file__).parents[3] / "jobs" / "practice" / "train.json"
    rows = [
        row(one["output"], f"{one['instruction']}\n{one['input']}")
        for one in json.loads(jobs.read_text("utf-8"))
    ]
    flagged = {w for found in judge(rows, list(RULES)) for w, _ in found.rows}
    assert len(rows) > 100 and not flagged
