"""Pairs and tags: every form that people have, every defect by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data.pairs import PAIRS, TAGGED, Pair, Tagged, conversations
from trainer.data.prompts import PROMPTS
from trainer.data.sources import Reading
from trainer.data.windows import DOCUMENTS

THEIRS = Path(__file__).parents[4] / "shared/data"  # not ours to commit
ASK, GOOD, BAD = "What is 1 + 2?", "three", "four"
MESSAGES = [{"role": "user", "content": ASK}]


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


FORMS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": ASK, "input": "", "chosen": GOOD, "rejected": BAD},
    "comparison_gpt4": {"instruction": ASK, "input": "", "output": [GOOD, BAD]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": ASK}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "messages": {
        "messages": MESSAGES,
        "chosen": said("assistant", GOOD),
        "rejected": said("assistant", BAD),
    },
    "messages with texts": {"messages": MESSAGES, "chosen": GOOD, "rejected": BAD},
    "prompt": {"prompt": ASK, "chosen": GOOD, "rejected": BAD, "margin": 0.5},
    "prompt of messages": {
        "prompt": MESSAGES,
        "chosen": [said("assistant", GOOD)],
        "rejected": [said("assistant", BAD)],
    },
    "the same beginning": {"chosen": f"{ASK} {GOOD}", "rejected": f"{ASK} {BAD}"},
    "whole conversations": {
        "chosen": [*MESSAGES, said("assistant", GOOD)],
        "rejected": [*MESSAGES, said("assistant", BAD)],
    },
    "whole conversations beside their prompt": {  # UltraFeedback's
        "prompt": ASK,
        "prompt_id": "a1",
        "chosen": [*MESSAGES, said("assistant", GOOD)],
        "rejected": [*MESSAGES, said("assistant", BAD)],
        "messages": [*MESSAGES, said("assistant", GOOD)],
        "score_chosen": 8.0,
        "score_rejected": 3.0,
    },
}


def read(tmp_path: Path, reader: Any, *rows: Any) -> tuple[list[Any], list[str]]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    found, defects = reader.read([(file, file.name)], Reading())
    return found, [str(d) for d in defects]


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_is_read_from_every_form_that_people_have(form: str, tmp_path: Path) -> None:
    [pair], defects = read(tmp_path, PAIRS, FORMS[form])
    assert not defects and isinstance(pair, Pair) and pair.where == "rows.jsonl:1"
    assert [t.role for t in pair.chosen] == ["user", "assistant"]
    assert pair.chosen[0].text.strip() == pair.rejected[0].text.strip() == ASK
    assert (pair.chosen[1].text, pair.rejected[1].text) == (GOOD, BAD)
    assert pair.margin == FORMS[form].get("margin", 0.0)


def calls(city: str) -> dict[str, Any]:
    call = {"function": {"name": "rain", "arguments": {"city": city}}}
    return said("assistant", "") | {"tool_calls": [call]}


TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("asked", ["prompt", "messages"])
def test_answers_that_differ_in_their_calls_alone_are_a_pair_and_keep_their_tools(
    asked: str, tmp_path: Path
) -> None:
    row = {asked: MESSAGES, "chosen": [calls("Rome")], "rejected": [calls("Oslo")], "tools": TOOLS}
    [pair], defects = read(tmp_path, PAIRS, row)
    assert not defects and [row.tools for row in conversations(pair)] == [tuple(TOOLS)] * 2
    row = {"prompt": MESSAGES, "completion": [calls("Rome")], "label": True, "tools": TOOLS}
    [tagged], defects = read(tmp_path, TAGGED, row)
    assert not defects and conversations(tagged)[0].tools == tuple(TOOLS)


def test_what_a_prompt_expects_is_a_text_and_its_tools_are_kept(tmp_path: Path) -> None:
    row = {"prompt": MESSAGES, "answer": "3", "tools": TOOLS}
    [asked], defects = read(tmp_path, PROMPTS, row)
    assert not defects and asked.turns[-1].text == "3" and asked.tools == tuple(TOOLS)
    found, [defect] = read(tmp_path, PROMPTS, row | {"answer": 3})
    assert not found and "answer: is a number, not a text" in defect


@pytest.mark.parametrize("name", ["alpaca", "messages", "prompt", "prompt of messages"])
@pytest.mark.parametrize("wanted", [True, False])
def test_a_tagged_answer_is_read_from_every_form(name: str, wanted: bool, tmp_path: Path) -> None:
    rows: dict[str, dict[str, Any]] = {
        "alpaca": {"instruction": ASK, "input": "", "output": GOOD, "kto_tag": wanted},
        "messages": {"messages": [*MESSAGES, said("assistant", GOOD)], "label": wanted},
        "prompt": {"prompt": ASK, "completion": GOOD, "label": wanted},
        "prompt of messages": {
            "prompt": MESSAGES,
            "completion": [said("assistant", GOOD)],
            "label": wanted,
        },
    }
    [row], defects = read(tmp_path, TAGGED, rows[name])
    assert not defects and isinstance(row, Tagged) and row.wanted is wanted
    assert [t.text for t in row.turns] == [ASK, GOOD]


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != name}


PLAIN = FORMS["alpaca"]
FAULTS: list[tuple[Any, str]] = [
    (PLAIN | {"rejected": f" {GOOD} "}, "its two sides are equal"),
    (PLAIN | {"chosen": "  "}, "chosen: is empty"),
    (PLAIN | {"rejected": None}, "the row has no 'rejected'"),
    (without(PLAIN, "chosen"), "the row has no 'chosen'"),
    (PLAIN | {"rejected": 4}, "rejected: is another kind of value than 'chosen'"),
    (PLAIN | {"chosen": 3, "rejected": 4}, "chosen: is a number"),
    (PLAIN | {"chosen": "a\x00b"}, "chosen: holds a NUL character"),
    (PLAIN | {"instruction": " "}, "instruction: is empty"),
    (FORMS["prompt"] | {"margin": "much"}, "margin: is a text, not a number"),
    (FORMS["prompt"] | {"margin": 10**400}, "margin: is no margin of rewards"),
    (FORMS["prompt"] | {"margin": float("nan")}, "margin: is no margin of rewards"),
    (FORMS["comparison_gpt4"] | {"output": [GOOD]}, "output: holds 1 answer, not two"),
    (
        FORMS["whole conversations"]
        | {"rejected": [said("user", "another"), said("assistant", BAD)]},
        "its two sides answer different prompts",
    ),
    ({"chosen": "one thing", "rejected": "another"}, "begin differently, and there is no prompt"),
    (FORMS["messages"] | {"weight": 0.5}, "weight: nothing reads this field"),
    (FORMS["messages"] | {"chosen": said("user", GOOD)}, "chosen.role: it is 'user' who speaks"),
    (FORMS["sharegpt"] | {"rejected": {"from": "gpt", "value": ""}}, "rejected.value: is empty"),
    ([1], "not an object"),
]


@pytest.mark.parametrize("row, expected", FAULTS, ids=lambda v: str(v)[:30])
def test_a_faulty_pair_is_told_by_its_line(row: Any, expected: str, tmp_path: Path) -> None:
    found, defects = read(tmp_path, PAIRS, PLAIN, row, FORMS["prompt"] | {"prompt": "else?"})
    assert len(found) == 2 and defects
    assert all(d.startswith("rows.jsonl:2:") for d in defects), defects
    assert expected in defects[0]


@pytest.mark.parametrize(
    "tag, expected",
    [
        (1, "kto_tag: is a number, not true or false"),
        ("true", "kto_tag: is a text, not true or false"),
        (None, "kto_tag: is null, not true or false"),
    ],
)
def test_a_tag_that_is_not_true_or_false_is_a_defect(
    tag: Any, expected: str, tmp_path: Path
) -> None:
    row = {"instruction": ASK, "output": GOOD, "kto_tag": tag}
    _, [defect] = read(tmp_path, TAGGED, row)
    assert expected in defect
    assert "the row has no 'kto_tag'" in read(tmp_path, TAGGED, without(row, "kto_tag"))[1][0]


def test_rows_that_say_the_opposite_of_each_other_are_told(tmp_path: Path) -> None:
    other = PLAIN | {"chosen": BAD, "rejected": GOOD}
    _, [defect] = read(tmp_path, PAIRS, PLAIN, FORMS["prompt"] | {"prompt": "else?"}, other)
    assert defect.startswith("rows.jsonl:3:1: says the opposite of rows.jsonl:1")
    tagged = {"instruction": ASK, "output": GOOD, "kto_tag": True}
    _, [defect] = read(tmp_path, TAGGED, tagged, tagged | {"kto_tag": False})
    assert defect.startswith("rows.jsonl:2:1: says the opposite of rows.jsonl:1")
    assert not read(tmp_path, TAGGED, tagged, tagged)[1]  # saying a thing twice is no defect


@pytest.mark.parametrize("ranking", [True, False])
def test_a_registry_of_llama_factory_says_how_to_read_preferences(
    ranking: bool, tmp_path: Path
) -> None:
    pair = {
        "talk": [{"role": "user", "content": ASK}],
        "better": said("assistant", GOOD),
        "worse": said("assistant", BAD),
    }
    tagged = {"talk": [*MESSAGES, said("assistant", GOOD)], "good": True}
    (tmp_path / "rows.json").write_text(json.dumps([pair if ranking else tagged]))
    columns = {"messages": "talk"} | (
        {"chosen": "better", "rejected": "worse"} if ranking else {"kto_tag": "good"}
    )
    entry = {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "ranking": ranking,
        "columns": columns,
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    }
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"mine": entry}))
    [row], defects = (PAIRS if ranking else TAGGED).read([(info, info.name)], Reading())
    assert not defects and ASK in str(row) and GOOD in str(row)


@pytest.mark.skipif(not THEIRS.exists(), reason="the shared sample data is not here")
def test_llama_factorys_demo_files_are_read_as_they_are() -> None:
    """But for six pairs that a broken decoding has cut a character of."""
    names = ("dpo_zh_demo.json", "kto_en_demo.json", "wiki_demo.txt")
    (pairs, faults), (tagged, more), (texts, most) = (
        reader.read([(THEIRS / name, name)], Reading(), None)
        for name, reader in zip(names, (PAIRS, TAGGED, DOCUMENTS), strict=True)
    )
    raw = [json.loads((THEIRS / name).read_text()) for name in names[:2]]
    whole = [row for row in raw[0] if "\ufffd" not in str(row)]
    assert len(faults) == len(raw[0]) - len(whole) == 6 and not more and not most
    assert all("U+FFFD" in fault.reason for fault in faults)
    for pair, row in zip(pairs, whole, strict=True):
        assert pair.chosen[-1].text == row["chosen"]["value"]
        assert pair.rejected[-1].text == row["rejected"]["value"]
        asked = [turn["value"] for turn in row["conversations"]]
        assert [turn.text for turn in pair.chosen[:-1]] == asked
    for one, row in zip(tagged, raw[1], strict=True):
        assert [turn.text for turn in one.turns] == [t["content"] for t in row["messages"]]
        assert one.wanted is row["label"]
    lines = (THEIRS / names[2]).read_text().splitlines()
    assert [row.text.strip() for row in texts] == [line.strip() for line in lines if line.strip()]
