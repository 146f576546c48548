"""Fields beside the texts of a row: used, or refused with their place; never passed over where they
change what is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data.files import examine_files, read_rows
from trainer.data.formats import Columns, Row, problems_or_row
from trainer.data.sources import Reading
from trainer.data.template import Turn

CALL = {"type": "function", "function": {"name": "w", "arguments": {}}}
TOOL = {"type": "function", "function": {"name": "w"}}


def U(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def A(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def H(value: str, **more: Any) -> dict[str, Any]:
    return {"from": "human", "value": value, **more}


def G(value: str, **more: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": value, **more}


def read(folder: Path, row: dict[str, Any], **how: Any) -> Row:
    path = folder / "a.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    rows, defects = read_rows([path], Reading(**how))
    assert defects == [] and len(rows) == 1, defects
    return rows[0]


def defects_of(folder: Path, row: dict[str, Any], **how: Any) -> list[str]:
    path = folder / "a.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return [str(d) for d in examine_files([path], Reading(**how)).defects]


NOT_LEARNED = {
    "OpenAI's weight": {"messages": [U("1"), A("no", weight=0), U("2"), A("yes", weight=1)]},
    "Axolotl's train": {
        "conversations": [H("1"), G("no", train=False), H("2"), G("yes", train=True)]
    },
    "ms-swift's loss": {"messages": [U("1"), A("no", loss=False), U("2"), A("yes")]},
}


@pytest.mark.parametrize("kind", sorted(NOT_LEARNED))
def test_an_answer_that_its_author_marked_is_not_learned(tmp_path: Path, kind: str) -> None:
    turns = read(tmp_path, NOT_LEARNED[kind]).turns
    assert [t.learned for t in turns if t.role == "assistant"] == [False, True]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_read_under_the_names_that_people_use(tmp_path: Path, name: str) -> None:
    turns = read(tmp_path, {"messages": [U("1+1"), A("two", **{name: "add"})]}).turns
    assert turns[1] == Turn("assistant", "two", reasoning="add")


def test_tool_calls_tools_and_results_are_read_as_openai_writes_them(tmp_path: Path) -> None:
    text = {"id": "c1", "type": "function", "function": {"name": "w", "arguments": '{"x": 1}'}}
    row = read(
        tmp_path,
        {
            "messages": [
                U("weather?"),
                A(None, tool_calls=[text]),
                {"role": "tool", "tool_call_id": "c1", "name": "w", "content": "rain"},
                A("It rains"),
            ],
            "tools": [TOOL],
        },
    )
    function = {"name": "w", "arguments": {"x": 1}}
    assert row.turns[1].calls == ({"type": "function", "id": "c1", "function": function},)
    assert row.turns[2] == Turn("tool", "rain", name="w", call_id="c1")
    assert row.tools == (TOOL,)


def test_tool_turns_of_sharegpt_are_read_as_llama_factory_writes_them(tmp_path: Path) -> None:
    row = read(
        tmp_path,
        {
            "conversations": [
                H("weather?"),
                {"from": "function_call", "value": '{"name": "w", "arguments": {}}'},
                {"from": "observation", "value": "rain"},
                G("It rains"),
            ],
            "tools": json.dumps([TOOL]),
        },
    )
    assert row.turns[1].calls == (CALL,) and row.turns[2].role == "tool"
    assert row.tools == (TOOL,)


def test_a_tool_turn_may_follow_a_call_that_is_written_in_the_text(tmp_path: Path) -> None:
    turns = [H("w?"), G("<tool_call>w</tool_call>"), {"from": "tool", "value": "rain"}, G("Rain")]
    roles = [t.role for t in read(tmp_path, {"conversations": turns}).turns]
    assert roles == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
def test_a_system_column_is_the_first_turn(tmp_path: Path, name: str) -> None:
    for row in (
        {"conversations": [H("Hi"), G("Arr")]},
        {"messages": [U("Hi"), A("Arr")]},
        {"instruction": "Hi", "output": "Arr"},
        {"prompt": "Hi", "completion": "Arr"},
    ):
        assert read(tmp_path, row | {name: "pirate"}).turns[0] == Turn("system", "pirate")
        assert read(tmp_path, row | {name: None}).turns[0].role == "user"


def test_two_halves_of_a_conversation_are_one(tmp_path: Path) -> None:
    for row in (
        {"prompt": [U("Hi")], "completion": [A("Hello")]},
        {"prompt": "Hi", "response": "Hello"},
    ):
        assert read(tmp_path, row).turns == (Turn("user", "Hi"), Turn("assistant", "Hello"))


def test_of_two_answers_the_completion_is_learned_and_the_other_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Hi", "completion": "Hello", "response": "Go away"}\n')
    rows, defects = read_rows([path], Reading())
    assert not defects and rows[0].turns == (Turn("user", "Hi"), Turn("assistant", "Hello"))
    assert rows[0].unread == ("response",)
    (defect,) = defects_of(tmp_path, {"prompt": "Hi"})
    assert "has no 'completion'" in defect


def test_a_system_turn_stays_and_the_same_one_twice_is_one(tmp_path: Path) -> None:
    said = {"role": "system", "content": "pirate"}
    turns = (Turn("system", "pirate"), Turn("user", "Hi"), Turn("assistant", "Arr"))
    row = {"messages": [said, U("Hi"), A("Arr")]}
    assert read(tmp_path, row).turns == read(tmp_path, row | {"system": "pirate"}).turns == turns


def test_a_call_without_a_content_is_an_answer(tmp_path: Path) -> None:
    """An answer of two fields, as OpenAI writes it where null is left out."""
    row = {"messages": [U("weather?"), {"role": "assistant", "tool_calls": [CALL]}]}
    assert read(tmp_path, row).turns[1] == Turn("assistant", "", calls=(CALL,))


BARE = [
    {"name": "w", "parameters": {"x": 1}},
    {"type": "function", "name": "w", "parameters": {"x": 1}},
]


@pytest.mark.parametrize("bare", BARE)
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_a_tool_without_its_wrapping_is_as_a_server_hands_it_to_the_template(
    tmp_path: Path, column: str, bare: dict[str, Any]
) -> None:
    wrapped = {"type": "function", "function": {"name": "w", "parameters": {"x": 1}}}
    talk = {"messages": [U("Hi"), A("Hello")]}
    for written in ([bare], json.dumps([bare]), [wrapped]):
        assert read(tmp_path, talk | {column: written}).tools == (wrapped,)
    other = {"type": "web_search", "name": "w"}
    assert read(tmp_path, talk | {column: [other]}).tools == (other,)


def test_tools_beside_the_column_that_the_job_names_are_a_defect(tmp_path: Path) -> None:
    renamed = {"messages": [U("Hi"), A("Hello")], "apis": [TOOL], "tools": [TOOL]}
    (defect,) = defects_of(tmp_path, renamed, columns={"tools": "apis"})
    assert ": tools: " in defect


REFUSED = {  # row -> what the one defect says
    "a weight between": ({"messages": [U("1"), A("2", weight=0.5)]}, "messages[1].weight"),
    "a user's turn to learn": ({"messages": [U("1", train=True), A("2")]}, "messages[0].train"),
    "reasoning of a user": ({"messages": [U("1", reasoning="x"), A("2")]}, "messages[0].reasoning"),
    "two reasonings": (
        {"messages": [U("1"), A("2", reasoning="x", thinking="y")]},
        "messages[1].thinking",
    ),
    "a call without a name": ({"messages": [U("1"), A("2", tool_calls=[{}])]}, "tool_calls[0]"),
    "arguments that are no object": (
        {"messages": [U("1"), A("2", tool_calls=[{"name": "w", "arguments": "x"}])]},
        "tool_calls[0]",
    ),
    "tools that are no list": ({"messages": [U("1"), A("2")], "tools": "w"}, "tools"),
    "two system prompts": (
        {"system": "a", "messages": [{"role": "system", "content": "b"}, U("1"), A("2")]},
        "messages[0].role",
    ),
    "pictures": ({"conversations": [H("<image>What?"), G("a cat")], "images": ["a.png"]}, "images"),
    "a judgement": ({"messages": [U("1"), A("2")], "label": True}, "label"),
    "reasoning beside an instruction": (
        {"instruction": "1+1", "output": "2", "reasoning_content": "add"},
        "reasoning_content",
    ),
    "tools beside an instruction": ({"instruction": "1", "output": "2", "tools": [TOOL]}, "tools"),
    "a mask of turns": ({"messages": [U("1"), A("2")], "loss_mask": [0, 1]}, "loss_mask"),
    "a row that is not to be learned": ({"messages": [U("1"), A("2")], "weight": 0}, "weight"),
    "an answer that is not wanted": ({"messages": [U("1"), A("2")], "label": False}, "label"),
    "an answer that is not trained": (
        {"messages": [U("1"), A("2", trainable=False)]},
        "messages[1].trainable",
    ),
    "parts of an answer (Axolotl)": (
        {"messages": [U("1"), A("2", train_detail=[{"begin_offset": 0}])]},
        "messages[1].train_detail",
    ),
    "reasoning in parts (OpenRouter)": (
        {"messages": [U("1"), A("2", reasoning_details=[{"text": "x"}])]},
        "messages[1].reasoning_details",
    ),
    "flags of the template": (
        {"messages": [U("1"), A("2")], "chat_template_kwargs": {"enable_thinking": False}},
        "chat_template_kwargs",
    ),
    "turns that are null": ({"messages": None}, "messages"),
    "a second conversation": (
        {"instruction": "1", "output": "2", "chat": [U("1"), A("2")]},
        "chat",
    ),
    "an unfilled name": ({"instruction": "hi", "output": "I am {{name}}."}, "output"),
    "a system prompt as a number": ({"instruction": "1", "output": "2", "system": 3}, "system"),
    "a system prompt beside a text": ({"text": "1", "system": "2"}, "system"),
    "a blank question": ({"instruction": "", "input": "  ", "output": "2"}, "instruction"),
    "three texts as a pair": (
        {"instruction": "1", "output": "2", "history": [["a", "b", "c"]]},
        "history[0]",
    ),
    "a pair with a number": (
        {"instruction": "1", "output": "2", "history": [["a", 1]]},
        "history[0]",
    ),
    "a content part without a text": (
        {"messages": [U([{"type": "text", "text": None}]), A("2")]},
        "messages[0].content[0]",
    ),
    "a picture as a content part": (
        {"messages": [U([{"type": "text", "text": "1"}, {"type": "image_url"}]), A("2")]},
        "messages[0].content[1]",
    ),
    "a call that is no JSON": (
        {"conversations": [H("w?"), {"from": "function_call", "value": "call w"}, G("x")]},
        "conversations[1].value",
    ),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_field_that_would_change_what_is_learned_is_a_defect_at_its_place(
    tmp_path: Path, kind: str
) -> None:
    row, word = REFUSED[kind]
    (defect,) = defects_of(tmp_path, row)
    assert defect.startswith("a.jsonl:1:") and f"{word}: " in defect


@pytest.mark.parametrize(
    ("text", "place", "name"),
    [
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', 59, "content"),
        ('{"instruction": "a", "output": "b", "x": {"y": 1, "z": 2, "y": 3}}', 64, "y"),
    ],
)
def test_a_field_that_an_object_inside_a_row_has_twice_is_a_defect(
    tmp_path: Path, text: str, place: int, name: str
) -> None:
    end = ', {"role": "assistant", "content": "c"}]}'
    (tmp_path / "a.jsonl").write_text(text.replace("]}", end) + "\n")
    (defect,) = map(str, examine_files([tmp_path / "a.jsonl"]).defects)
    assert defect.startswith(f"a.jsonl:1:{place}: ") and f"{name!r} is given twice" in defect


def test_a_row_that_is_no_object_is_shown_by_its_first_thirty_characters() -> None:
    for value in ("x" * 40, list(range(40))):
        ((place, reason, _),) = problems_or_row(value, "text", Columns(), "a.jsonl:1")
        assert place == () and reason.endswith(f" ({json.dumps(value)[:30]}), not an object")


def test_other_fields_are_counted_and_told_once_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"id": n, "source": "x" if n else None, "messages": [U("1", mood="glad"), A("2")]}
        for n in range(3)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    report = examine_files([path])
    assert report.ok and report.notes == [
        "a.jsonl: nothing reads the fields mood (3 rows), id (2 rows), source (2 rows)"
    ]


def test_one_of_two_system_columns_is_read_where_the_job_names_it(tmp_path: Path) -> None:
    row = {"prompt": "1", "completion": "2", "persona": "pirate"}
    columns = {"system": "persona"}
    assert read(tmp_path, row, columns=columns).turns[0] == Turn("system", "pirate")
    (defect,) = defects_of(tmp_path, row | {"system_prompt": "other"}, columns=columns)
    assert ": system_prompt: " in defect


KINDS = {
    "trees": (
        [
            {"message_id": "a", "parent_id": None, "text": "How long?", "role": "prompter"},
            {"message_id": "b", "parent_id": "a", "text": "Eight.", "role": "assistant"},
        ],
        "messages of trees",
    ),
    "classes": ([{"text": "an awful film", "label": "negative"}] * 2, "data.columns"),
    "preferences": ([{"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}] * 2, "preferences"),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_data_set_of_another_kind_is_refused_once_in_words(tmp_path: Path, kind: str) -> None:
    rows, words = KINDS[kind]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    (defect,) = examine_files([path]).defects
    assert words in str(defect)


def test_columns_map_classes_and_other_names(tmp_path: Path) -> None:
    columns = {"instruction": "text", "output": "label"}
    row = read(tmp_path, {"text": "awful", "label": "bad"}, columns=columns)
    assert row.turns == (Turn("user", "awful"), Turn("assistant", "bad"))
    columns = {"instruction": "question", "input": "context", "output": "answer"}
    row = read(tmp_path, {"question": "q", "context": "c", "answer": "a"}, columns=columns)
    assert row.turns[0] == Turn("user", "q", "c")
    turns = [{"speaker": "human", "said": "q"}, {"speaker": "gpt", "said": "a"}]
    columns = {"conversations": "talk", "role": "speaker", "content": "said"}
    assert read(tmp_path, {"talk": turns}, columns=columns).turns[1] == Turn("assistant", "a")


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"question": "2+2?", "answer": "4"}, 'instruction = "question", output = "answer"'),
        ({"inputs": "cat", "targets": "chat"}, 'instruction = "inputs", output = "targets"'),
        ({"问题": "2+2?", "答案": "4"}, 'instruction = "问题", output = "答案"'),
        (
            {"问题": "How much?", "补充": "large", "回答": "4"},
            'instruction = "问题", input = "补充", output = "回答"',
        ),
        ({"input": "春", "target": "秋"}, 'instruction = "input", output = "target"'),
        (
            {"instruction": "When?", "context": "1901.", "response": "1901"},
            'instruction = "instruction", input = "context", output = "response"',
        ),
    ],
)
def test_a_row_with_other_names_says_which_columns_to_name(
    tmp_path: Path, row: dict[str, str], mapping: str
) -> None:
    assert any(f"data.columns = {{ {mapping} }}" in d for d in defects_of(tmp_path, row))


@pytest.mark.parametrize(
    ("turns", "form"), [([U("1"), A("2")], "messages"), ([H("1"), G("2")], "conversations")]
)
def test_turns_in_a_column_of_another_name_say_which_to_name(
    tmp_path: Path, turns: list[Any], form: str
) -> None:
    row = {"id": 1, "conversation": turns}
    assert f'set data.columns = {{ {form} = "conversation" }}' in defects_of(tmp_path, row)[0]
    assert len(read(tmp_path, row, columns={form: "conversation"}).turns) == 2


def test_placeholders_are_filled_and_others_left_as_they_are(tmp_path: Path) -> None:
    row = {
        "instruction": "{{x}} hi",
        "input": "",
        "output": "I am {{name}}, by {{author}}. {{ y }}",
    }
    turns = read(tmp_path, row, fill={"name": "Tea", "author": "us"}).turns
    assert turns[0].text == "{{x}} hi" and turns[1].text == "I am Tea, by us. {{ y }}"


def test_rows_that_are_not_sound_are_dropped_and_counted_where_the_job_says_so(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"conversations": [H("Hi"), G("Hello")]},
        {"conversations": [G("Welcome"), H("Hi"), G("Hello")]},
        {"conversations": [H("Hi"), G("Hello"), H("Bye")]},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + "{broken\n")
    report = examine_files([path], Reading(bad_rows="drop"))
    assert report.rows == 1 and report.ok
    (note,) = report.notes
    assert note.startswith("a.jsonl: 3 rows left out") and "a.jsonl:2:" in note
    assert len(examine_files([path]).defects) == 3


def test_an_array_that_is_cut_short_is_refused_although_bad_rows_are_dropped(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"instruction": "a", "output": "b"}, {"instruction": "a", "out')
    assert len(examine_files([path], Reading(bad_rows="drop")).defects) == 1
