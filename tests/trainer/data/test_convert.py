"""Rows in another layout say the same to the trainer, or are refused with what they would lose."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trainer.data.convert import LAYOUTS, Unfit, converted
from trainer.data.formats import Columns
from trainer.data.pairs import Pair, pair_of

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "tea?"},
    {"role": "assistant", "content": "yes"},
]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def made(row: dict[str, Any], to: str, form: str = "messages", kind: str = "rows") -> Any:
    return converted(json.dumps(row), kind, form, Columns(), to)  # type: ignore[arg-type]


def test_a_conversation_goes_through_every_layout_and_comes_back() -> None:
    row = {"messages": TALK, "id": 7}
    sharegpt = made(row, "sharegpt")
    assert sharegpt["conversations"][1] == {"from": "human", "value": "hi"} and sharegpt["id"] == 7
    alpaca = made(sharegpt, "alpaca", "sharegpt")
    assert alpaca == {
        "instruction": "tea?",
        "input": "",
        "output": "yes",
        "system": "Be brief.",
        "history": [["hi", "hello"]],
        "id": 7,
    }
    assert made(alpaca, "messages", "alpaca") == row


def test_alpacas_input_stands_below_the_instruction_in_a_message() -> None:
    row = {"instruction": "Count.", "input": "a b", "output": "2"}
    assert made(row, "messages", "alpaca")["messages"][0]["content"] == "Count.\na b"
    assert made(row, "alpaca", "alpaca") == row


def test_calls_of_tools_stay_and_what_a_layout_cannot_hold_is_refused() -> None:
    turns = [
        {"role": "user", "content": "look up"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "blue"},
        {"role": "assistant", "content": "It is blue."},
    ]
    row = {"messages": turns, "tools": [TOOL]}
    there = made(row, "sharegpt")
    assert there["conversations"][1]["from"] == "function_call" and there["tools"] == [TOOL]
    assert made(there, "messages", "sharegpt")["messages"][1]["tool_calls"] == [CALL]
    with pytest.raises(Unfit, match="by turns"):
        made(row, "alpaca")
    thought = {"messages": [*TALK[:-1], {**TALK[-1], "reasoning_content": "It is late."}]}
    assert made(thought, "messages") == thought
    for layout in ("sharegpt", "alpaca"):
        with pytest.raises(Unfit, match="would lose"):
            made(thought, layout)


def test_pairs_become_preferences_and_their_better_answer_rows() -> None:
    row = {"instruction": "Tea?", "input": "", "chosen": "Yes.", "rejected": "No."}
    there = made(row, "preference", "", "pairs")
    read = pair_of(
        dict(json.loads(json.dumps(there), object_pairs_hook=tuple)), Columns(), "rows:1"
    )
    assert isinstance(read, Pair) and read.rejected[-1].text == "No."
    assert made(row, "alpaca", "", "pairs")["output"] == "Yes."
    wanted = {"messages": TALK, "label": True}
    assert made(wanted, "messages", "", "tagged") == {"messages": TALK}
    with pytest.raises(Unfit, match="not wanted"):
        made(wanted | {"label": False}, "messages", "", "tagged")
    for layout in LAYOUTS:
        with pytest.raises(Unfit):
            made({"text": "whole"}, layout, "text")
    with pytest.raises(Unfit, match="one answer"):
        made({"messages": TALK}, "preference")
