"""Templates: the text they write, which part of it is trained, and that the stop token always
is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import CHATML, write_tokenizer

from trainer.data import template as prompt
from trainer.data.chat import SpecialTokens
from trainer.data.render import examples
from trainer.data.render import prompt as asked_text
from trainer.data.template import (
    Segment,
    Template,
    TemplateError,
    Turn,
    alpaca_turns,
    from_chat_template,
    load,
    parse,
    render_pieces,
)
from trainer.data.tokens import Vocabulary, encode, open_vocabulary, stop_token, token_hash

TOKENS = SpecialTokens("</s>", "<s>")
ONE = [Turn("user", "Q1"), Turn("assistant", "A1")]
TWO = [Turn("system", "S"), *ONE, Turn("user", "Q2", "more"), Turn("assistant", "A2")]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return open_vocabulary(folder)


def rendered(template: Template, turns: list[Turn]) -> list[Segment]:
    """The one text that a conversation becomes."""
    (example,) = examples(template, turns, TOKENS)
    return example.segments


def written(name: str, turns: list[Turn]) -> tuple[str, list[str]]:
    """(the whole text, its trained parts)"""
    segments = rendered(load(name), turns)
    return "".join(s.text for s in segments), [s.text for s in segments if s.trained]


EXPECTED = {
    "vicuna": (
        "S USER: Q1 ASSISTANT: A1</s>USER: Q2\nmore ASSISTANT: A2</s>",
        [" A1</s>", " A2</s>"],
    ),
    "llama2": (
        "[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2\nmore [/INST] A2 </s>",
        [" A1 </s>", " A2 </s>"],
    ),
    "chatml": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n"
        "<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2\nmore<|im_end|>\n"
        "<|im_start|>assistant\nA2<|im_end|>",
        ["A1<|im_end|>", "A2<|im_end|>"],
    ),
    "chatglm2": (
        "S\n\n[Round 1]\n\n问：Q1\n\n答：A1</s>\n\n[Round 2]\n\n问：Q2\nmore\n\n答：A2</s>",
        ["A1</s>", "A2</s>"],
    ),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_conversation_of_two_rounds_is_written_as_its_model_family_writes_it(name: str) -> None:
    assert written(name, TWO) == EXPECTED[name]


def test_every_template_file_is_covered_by_a_test() -> None:
    chatglm3 = "chatglm3"  # by tests/trainer/tools/test_convert_chatglm.py
    assert prompt.names() == sorted([*EXPECTED, "alpaca", chatglm3])


def test_alpaca_has_two_texts_one_for_rows_with_an_input() -> None:
    bare, trained = written("alpaca", alpaca_turns({"instruction": "Q", "output": "A"}))
    assert bare.startswith(
        "Below is an instruction that describes a task. Write"
    ) and bare.endswith("### Instruction:\nQ\n\n### Response:\nA</s>")
    assert trained == ["A</s>"]
    full, _ = written("alpaca", alpaca_turns({"instruction": "Q", "input": "I", "output": "A"}))
    assert "paired with an input" in full and full.endswith(
        "### Instruction:\nQ\n\n### Input:\nI\n\n### Response:\nA</s>"
    )


def test_a_users_own_preamble_is_one_small_text_file() -> None:
    text = (
        "Praise the cook, who salts with care.\n\n### Instruction:\n{instruction}\n\n### "
        "Input:\n{input}\n\n### Response:\n{output}\n"
    )
    mine = parse("mine", text)
    said = "".join(s.text for s in rendered(mine, ONE))
    assert (
        said
        == "Praise the cook, who salts with care.\n\n### Instruction:\nQ1\n\n### Response:\nA1</s>"
    )
    with_input = "".join(
        s.text for s in rendered(mine, [Turn("user", "Q", "I"), Turn("assistant", "A")])
    )
    assert (
        with_input == "Praise the cook, who salts with care.\n\n### Instruction:\nQ\n\n### "
        "Input:\nI\n\n### Response:\nA</s>"
    )


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("Q: {instruction}", "Q: Q1\nA1</s>"),
        ("Q: {instruction}\n\n\n", "Q: Q1\nA1</s>"),
        ("\n\nQ: {instruction}\nA: {output}", "Q: Q1\nA: A1</s>"),
        ("\nQ: {instruction}\nA: {output}", "\nQ: Q1\nA: A1</s>"),
    ],
)
def test_a_text_without_an_output_ends_in_one_and_blank_lines_before_it_are_no_preamble(
    text: str, written: str
) -> None:
    assert "".join(s.text for s in rendered(parse("mine", text), ONE)) == written


def test_a_prefix_is_one_token_or_a_list_of_them() -> None:
    pieces = "user = '{user}'\nassistant = '{assistant}'\nprefix = "
    assert parse("mine", pieces + "'<s>'").prefix == ("<s>",)
    assert parse("mine", pieces + "['[gMASK]', 'sop']").prefix == ("[gMASK]", "sop")


def test_alpaca_loras_json_template_is_taken_as_it_is() -> None:
    text = json.dumps(
        {
            "description": "x",
            "prompt_input": "Pre\n\n### I:\n{instruction}\n\n### In:\n{input}\n\n### R:\n",
            "prompt_no_input": "Pre\n\n### I:\n{instruction}\n\n### R:\n",
            "response_split": "### R:",
        }
    )
    segments = rendered(parse("mine", text), ONE)
    assert [(s.text, s.trained) for s in segments] == [
        ("Pre\n\n### I:\nQ1\n\n### R:\n", False),
        ("A1</s>", True),
    ]


def test_an_empty_instruction_leaves_no_blank_line_before_the_input() -> None:
    turns = [Turn("user", "", "What?"), Turn("assistant", "That.")]
    said, _ = written("vicuna", turns)
    assert said.endswith(". USER: What? ASSISTANT: That.</s>")
    own = rendered(from_chat_template(CHATML), turns)
    assert own[0].text == "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"


def test_an_answer_that_is_not_to_be_learned_is_written_and_not_trained() -> None:
    turns = [TWO[1], TWO[2]._replace(learned=False), *TWO[3:]]
    said, trained = written("chatml", turns)
    assert "A1" in said and trained == ["A2<|im_end|>"]


def test_of_a_conversation_the_last_answer_alone_is_trained_where_that_is_asked_for() -> None:
    for name, end in (("chatml", "<|im_end|>"), ("vicuna", "</s>")):
        template = load(name)
        (last,) = examples(template, TWO, TOKENS, last_only=True)
        (both,) = examples(template, TWO, TOKENS)
        assert [s.text.strip() for s in last.segments if s.trained] == [f"A2{end}"]
        assert [s.text.strip() for s in both.segments if s.trained] == [f"A1{end}", f"A2{end}"]
        assert [s.text for s in last.segments] == [s.text for s in both.segments]
        assert render_pieces(template, TWO, eos="</s>", bos="<s>") == both.segments


def test_the_model_is_asked_with_what_stands_before_its_answers() -> None:
    mine = parse("mine", "user = '{user}\\n'\nassistant = 'BOT: {assistant} END'".replace("'", '"'))
    asked = asked_text(mine, ONE[:1], TOKENS)
    assert "".join(s.text for s in asked) == "Q1\nBOT: "
    assert not any(s.trained for s in asked)
    assert "".join(s.text for s in rendered(mine, ONE)) == "Q1\nBOT: A1 END</s>"


@pytest.mark.parametrize(
    ("turns", "tools", "word"),
    [
        ([TWO[1], TWO[2]._replace(reasoning="why")], [], "reasoning"),
        ([TWO[1], TWO[2]._replace(calls=({},))], [], "tool calls"),
        ([*ONE, Turn("tool", "rain"), ONE[1]], [], "tool turns"),
        (ONE, [{"name": "f"}], "tools"),
    ],
)
def test_what_only_a_chat_template_has_a_place_for_is_refused(
    turns: list[Turn], tools: list[dict], word: str
) -> None:
    with pytest.raises(TemplateError, match=f"no place for {word}.*chat"):
        examples(load("vicuna"), turns, TOKENS, tools=tools)


def test_braces_in_a_users_text_are_left_alone() -> None:
    said, _ = written(
        "alpaca", [Turn("user", "print {output} and {instruction}"), Turn("assistant", "{input}")]
    )
    assert "print {output} and {instruction}" in said and said.endswith("{input}</s>")
    mine = parse("mine", 'user = "{user}\\n"\nassistant = "{bos}{assistant}"')
    assert rendered(mine, ONE)[-1].text == "{bos}A1</s>"


@pytest.mark.parametrize("name", [*sorted(EXPECTED), "alpaca", "chat"])
def test_the_prompt_for_an_answer_is_how_the_training_row_begins(
    vocabulary: Vocabulary, name: str
) -> None:
    template = from_chat_template(CHATML) if name == "chat" else load(name)
    turns = TWO if name != "alpaca" else ONE
    whole, marks = encode(vocabulary, template, [rendered(template, turns)])[0]
    asked, _ = encode(
        vocabulary,
        template,
        [asked_text(template, turns[:-1], TOKENS)],
    )[0]
    assert whole[: len(asked)] == asked
    assert all(marks[len(asked) :]) or name == "chat"


@pytest.mark.parametrize("name", [*sorted(EXPECTED), "alpaca", "chat"])
def test_every_answer_ends_in_the_stop_token_as_a_trained_label(
    vocabulary: Vocabulary, name: str
) -> None:
    template = from_chat_template(CHATML) if name == "chat" else load(name)
    stop = stop_token(vocabulary, template)
    own = "<|im_end|>" if name == "chat" else template.stop
    assert vocabulary.tokenizer.id_to_token(stop) == ("</s>" if own == "eos" else own)
    ids, marks = encode(vocabulary, template, [rendered(template, TWO)])[0]
    ends = [i for i in range(len(ids)) if marks[i] and not [*marks, False][i + 1]]
    assert len(ends) == 2 and {ids[i] for i in ends} == {stop}


def test_the_trained_tokens_are_exactly_the_answers(vocabulary: Vocabulary) -> None:
    template = load("vicuna")
    ids, marks = encode(vocabulary, template, [rendered(template, TWO)])[0]
    learned = vocabulary.tokenizer.decode(
        [i for i, m in zip(ids, marks, strict=True) if m], skip_special_tokens=False
    )
    assert learned == " A1</s> A2</s>"


def test_our_rendering_of_a_chat_template_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    messages = [
        {"role": t.role, "content": t.text}
        for t in [Turn("system", "S"), *ONE, Turn("user", "Q2"), Turn("assistant", "A2")]
    ]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False)
    ours = rendered(
        from_chat_template(CHATML),
        [Turn(m["role"], m["content"]) for m in messages],
    )
    assert "".join(s.text for s in ours) == theirs
    assert [s.text for s in ours if s.trained] == ["A1<|im_end|>", "A2<|im_end|>"]


REFUSED = {
    "a chat template without a stop token": (
        lambda: from_chat_template("{% for m in messages %}{{ m.content }} {% endfor %}"),
        "stop",
    ),
    "a stop text that is many tokens": (
        lambda: parse("x", 'user = "{user}"\nassistant = "{assistant}"\nstop = "###END"'),
        "tokens in this tokenizer",
    ),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_template_that_cannot_stop_is_refused(vocabulary: Vocabulary, kind: str) -> None:
    make, words = REFUSED[kind]
    with pytest.raises(TemplateError, match=words):
        stop_token(vocabulary, make())


MALFORMED = {
    "no place for the instruction": ("Hello {input}", "{instruction}"),
    "text after the answer": ("{instruction}\n{output}\nThe end", "never be learned"),
    "unknown key": ('user = "{user}"\nassistant = "{assistant}"\nstopp = "x"', "stopp"),
    "no place for the answer": ('user = "{user}"\nassistant = "x"', "{assistant}"),
    "broken TOML": ('user = "{user}', "TOML"),
    "broken JSON": ('{"prompt_input": "x"', "JSON"),
    "lists in Alpaca-LoRA's": ('{"prompt_input": "", "prompt_no_input": [""]}', "wants prompt"),
    "endless brackets in it": ('{"prompt_input": ' + "[" * 100_000, "wants prompt_input"),
    "a number for a text": ("user = 7\nassistant = '{assistant}'", "'user' is no text"),
    "a list for a text": ("user = ['{user}']\nassistant = '{assistant}'", "'user' is no text"),
    "numbers in the prefix": (
        "user = '{user}'\nassistant = '{assistant}'\nprefix = [1]",
        "'prefix' is no text",
    ),
    "too many digits": ("user = " + "9" * 5000, "mend the TOML"),
    "input beside the instruction": ("Q: {instruction} {input}\nA: {output}", "a blank line"),
    "the answer first": ("{output}\n\n{instruction}", "before {output}"),
    "endless empty lines": ("\n" * 200_000, "no {instruction}"),
}


@pytest.mark.parametrize("kind", sorted(MALFORMED))
def test_a_malformed_template_file_says_what_is_missing(kind: str) -> None:
    text, word = MALFORMED[kind]
    with pytest.raises(TemplateError) as caught:
        parse("mine", text)
    assert word in str(caught.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(TemplateError, match=r"alpaca.*vicuna"):
        load("alpacca")


def test_the_token_hash_changes_with_template_and_tokenizer(vocabulary: Vocabulary) -> None:
    first = token_hash(vocabulary, load("alpaca"))
    assert first == token_hash(vocabulary, load("alpaca")) != token_hash(vocabulary, load("vicuna"))
    changed = parse("alpaca", load("alpaca").source.replace("Write a response", "Give a response"))
    assert token_hash(vocabulary, changed) != first


def test_a_tokenizer_that_puts_a_start_token_first_does_so_once(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, processors

    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = open_vocabulary(tmp_path)
    for template in (load("alpaca"), from_chat_template("{{ bos_token }}" + CHATML)):
        ids, marks = encode(vocabulary, template, [rendered(template, ONE)])[0]
        assert ids[0] == 1 and ids.count(1) == 1 and not marks[0]
