"""Chat templates of models of 2026: what is learned is what the model will be asked to write,
behind the very prompt that a server will render."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_world import (
    CALLS,
    CONVERSATIONS,
    KINDS,
    RESULT,
    TOOLS,
    messages_of,
    opened,
    tools_of,
    write_chat_tokenizer,
    write_model_tokenizer,
)

from trainer.data.chat import SpecialTokens, open_chat
from trainer.data.render import examples, prompt
from trainer.data.template import Template, TemplateError, Turn, from_chat_template
from trainer.data.tokens import Vocabulary, encode, stop_ids, stop_token, unjoined

TODAYS = ["qwen3", "qwen3_5", "qwen3_8", "gemma4", "gpt_oss", "glm4moe"]
Model = tuple[Vocabulary, Template, Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            folder = write_model_tokenizer(tmp_path_factory.mktemp(name), name)
            made[name] = (*opened(folder), folder)
        return made[name]

    return get


def learned(model: Model, turns: list[Turn], **settings: Any) -> list[list[str]]:
    """The trained stretches of each example."""
    vocabulary, template, _ = model
    made = examples(template, turns, vocabulary.special_tokens, **settings)
    return [[s.text for s in example.segments if s.trained] for example in made]


LEARNED = {  # model, conversation -> what is learned, example by example
    ("qwen3", "plain"): [["Hello<|im_end|>"], ["See you\n\nsoon<|im_end|>"]],
    ("qwen3", "reasoning"): [
        ["<think>\nadd them\n</think>\n\ntwo<|im_end|>"],
        ["<think>\nonce more\n</think>\n\nfour<|im_end|>"],
    ],
    ("qwen3", "tools"): [
        [
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Kyoto"}}\n</tool_call>'
            "<|im_end|>"
        ],
        ["It rains<|im_end|>"],
        ["welcome<|im_end|>"],
    ],
    ("qwen3_5", "plain"): [["Hello<|im_end|>"], ["See you\n\nsoon<|im_end|>"]],
    ("qwen3_5", "reasoning"): [
        ["add them\n</think>\n\ntwo<|im_end|>"],
        ["once more\n</think>\n\nfour<|im_end|>"],
    ],
    ("qwen3_8", "plain"): [["Hello<|im_end|>", "See you\n\nsoon<|im_end|>"]],
    ("qwen3_8", "reasoning"): [
        ["add them\n</think>\n\ntwo<|im_end|>", "once more\n</think>\n\nfour<|im_end|>"]
    ],
    ("gemma4", "plain"): [["Hello<turn|>", "See you\n\nsoon<turn|>"]],
    ("gemma4", "reasoning"): [
        ["<|channel>thought\nadd them\n<channel|>two<turn|>"],
        ["<|channel>thought\nonce more\n<channel|>four<turn|>"],
    ],
    ("gemma4", "tools"): [
        [
            '<|tool_call>call:get_weather{city:<|"|>Kyoto<|"|>}<tool_call|><|tool_response>',
            "It rains<turn|>",
            "welcome<turn|>",
        ]
    ],
    ("gpt_oss", "plain"): [
        ["<|channel|>final<|message|>Hello<|return|>"],
        ["<|channel|>final<|message|>See you\n\nsoon<|return|>"],
    ],
    ("gpt_oss", "reasoning and tools"): [
        [
            "<|channel|>analysis<|message|>look it up<|end|><|start|>assistant to=functions."
            'get_weather<|channel|>commentary json<|message|>{"city": "Kyoto"}<|call|>',
            "<|channel|>analysis<|message|>say it<|end|><|start|>assistant<|channel|>final"
            "<|message|>It rains<|return|>",
        ],
        [
            "<|channel|>analysis<|message|>be polite<|end|><|start|>assistant<|channel|>final"
            "<|message|>welcome<|return|>"
        ],
    ],
    ("glm4moe", "plain"): [["\nHello<|user|>", "\nSee you\n\nsoon<|user|>"]],
    ("glm4moe", "reasoning"): [
        ["\n<think>add them</think>\ntwo<|user|>"],
        ["\n<think>once more</think>\nfour<|user|>"],
    ],
    ("glm4moe", "tools"): [
        [
            "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Kyoto</arg_value>\n"
            "</tool_call><|observation|>",
            "\nIt rains<|user|>",
            "\nwelcome<|user|>",
        ]
    ],
}


@pytest.mark.parametrize(("name", "kind"), sorted(LEARNED))
def test_each_answer_is_learned_as_the_model_will_write_it(
    model: Callable[[str], Model], name: str, kind: str
) -> None:
    assert learned(model(name), CONVERSATIONS[kind], tools=tools_of(kind)) == LEARNED[name, kind]


@pytest.mark.parametrize("kind", sorted(CONVERSATIONS))
@pytest.mark.parametrize("name", TODAYS)
def test_ids_before_an_answer_are_those_of_the_servers_prompt_and_after_it_a_stop(
    model: Callable[[str], Model], name: str, kind: str
) -> None:
    """The reference is transformers' own apply_chat_template, which servers call."""
    from transformers import PreTrainedTokenizerFast

    vocabulary, template, folder = model(name)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    turns, tools = CONVERSATIONS[kind], tools_of(kind)
    messages = messages_of(
        turns, open_chat(template.jinja, vocabulary.special_tokens).reasoning_key
    )
    made = examples(template, turns, vocabulary.special_tokens, tools=tools)
    encoded = encode(vocabulary, template, [e.segments for e in made])
    flags = {i: example.thinking for i, example in enumerate(made)}
    places = [
        (i, start)
        for i, (ids, trained) in enumerate(encoded)
        for start in range(1, len(ids))
        if trained[start] and not trained[start - 1]
    ]
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    assert len(places) == len(answers)
    stops = stop_ids(vocabulary, template)
    for (number, start), i in zip(places, answers, strict=True):
        ids, trained = encoded[number]
        flag = {} if flags[number] is None else {"enable_thinking": flags[number]}
        asked = theirs.apply_chat_template(
            messages[:i], tools=tools or None, add_generation_prompt=True, tokenize=True, **flag
        )["input_ids"]
        assert ids[:start] == asked
        end = next((k for k in range(start, len(ids)) if not trained[k]), len(ids))
        assert ids[end - 1] in stops
        whole = theirs.apply_chat_template(
            messages[: i + 1], tools=tools or None, tokenize=False, **flag
        )
        text = theirs.decode(ids[:end], skip_special_tokens=False)
        if whole.startswith(theirs.decode(asked, skip_special_tokens=False)):
            assert whole.startswith(text) or text.startswith(whole.rstrip())


def test_the_flag_of_inference_may_be_set_for_all_answers(model: Callable[[str], Model]) -> None:
    turns = CONVERSATIONS["plain"][:2]
    assert learned(model("qwen3"), turns, thinking=False) == [["Hello<|im_end|>"]]
    assert learned(model("qwen3"), turns, thinking=True) == [
        ["<think>\n\n</think>\n\nHello<|im_end|>"]
    ]


def test_only_the_last_answer_is_learned_where_the_job_says_so(
    model: Callable[[str], Model],
) -> None:
    for name in ("qwen3", "qwen3_8"):
        assert learned(model(name), CONVERSATIONS["plain"], last_only=True) == [
            ["See you\n\nsoon<|im_end|>"]
        ]


def test_an_answer_that_is_marked_as_not_to_be_learned_stays_in_the_history(
    model: Callable[[str], Model],
) -> None:
    turns = [
        Turn("user", "1"),
        Turn("assistant", "WRONG", learned=False),
        Turn("user", "2"),
        Turn("assistant", "right"),
    ]
    vocabulary, template, _ = model("qwen3_8")
    (example,) = examples(template, turns, vocabulary.special_tokens)
    assert [s.text for s in example.segments if s.trained] == ["right<|im_end|>"]
    assert "WRONG" in example.text
    nothing = [Turn("user", "1"), Turn("assistant", "WRONG", learned=False)]
    assert examples(template, nothing, vocabulary.special_tokens) == []


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5", "qwen3_8", "glm4moe"])
def test_reasoning_at_the_beginning_of_a_text_is_reasoning(
    model: Callable[[str], Model], name: str
) -> None:
    """Also without line breaks, and where the block's first word is missing."""
    plain = CONVERSATIONS["reasoning"][:2]
    for text in ("<think>\nadd them\n</think>\n\ntwo", "<think>add them</think>two"):
        inline = [plain[0], Turn("assistant", text)]
        assert learned(model(name), inline) == learned(model(name), plain)
    headless = [plain[0], Turn("assistant", "add them\n</think>\n\ntwo")]
    assert learned(model(name), headless) == learned(model(name), plain)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_8", "glm4moe"])
def test_an_answer_of_the_model_is_in_the_next_prompt_as_training_had_it(
    model: Callable[[str], Model], name: str
) -> None:
    """A chat hands the model's own text back, reasoning and all."""
    vocabulary, template, _ = model(name)
    turns = CONVERSATIONS["reasoning"]
    said = Turn("assistant", "<think>\nadd them\n</think>\n\ntwo")
    texts = [
        prompt(template, [turns[0], answer, turns[2]], vocabulary.special_tokens, thinking=True)
        for answer in (turns[1], said)
    ]
    made = examples(template, turns, vocabulary.special_tokens)
    assert texts[0] == texts[1]
    assert made[-1].text.startswith(texts[0][0].text)


# -- made-up templates: one property each ----------------------------------------------------------

CHATML = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
ASK = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
TOKENS = SpecialTokens("<|im_end|>", "", ("<|im_start|>", "<|im_end|>", "<|other|>"))
ONE = [Turn("user", "Hi"), Turn("assistant", "Hello")]


def made_up(jinja: str, turns: list[Turn], tokens: SpecialTokens = TOKENS, **settings: Any) -> list:
    made = examples(from_chat_template(jinja), turns, tokens, **settings)
    return [[(s.text, s.trained) for s in example.segments] for example in made]


BLOCK = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{% generation %}"
    "{{- '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' -}}{% endgeneration %}"
    "{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}"
    "{%- endfor -%}" + ASK
)


def test_a_generation_block_writes_the_same_text_and_trains_no_token_of_the_prompt() -> None:
    assert made_up(BLOCK, ONE) == made_up(CHATML, ONE)
    assert made_up(CHATML, ONE) == [
        [
            ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
            ("Hello<|im_end|>", True),
            ("\n", False),
        ]
    ]


def test_what_a_template_keeps_out_of_its_generation_block_is_not_learned() -> None:
    jinja = BLOCK.replace(
        "{% generation %}{{- '<|im_start|>assistant\\n' + m.content",
        "{{- '<|im_start|>assistant\\n(note) ' -}}{% generation %}{{- m.content",
    )
    (parts,) = made_up(jinja, ONE)
    assert [text for text, trained in parts if trained] == ["Hello<|im_end|>"]
    assert ("(note) ", False) in parts or parts[0][0].endswith("(note) ")


def test_two_generation_blocks_side_by_side_are_learned_as_one() -> None:
    two = "{% endgeneration %}{% generation %}"
    jinja = BLOCK.replace("m.content + '<|im_end|>", f"m.content -}}}}{two}{{{{- '<|im_end|>", 1)
    assert made_up(jinja, ONE) == made_up(CHATML, ONE)


def test_a_prompt_that_is_written_otherwise_once_it_is_history_is_found_again() -> None:
    """The answer is what follows the prompt, not what stands at the prompt's place."""
    jinja = "{%- if messages[-1].role == 'assistant' -%}(answered) {% endif -%}" + CHATML
    assert made_up(jinja, ONE) == made_up(CHATML, ONE)


def test_a_prompt_that_ends_as_the_answer_does_and_a_flag_that_adds_to_it_are_seen_through() -> (
    None
):
    """Gemma 4 of July 2026, after a tool's result: the prompt closes the turn that the answer goes
    on with, and with thinking it opens a channel."""
    jinja = (
        "{%- for m in messages -%}{{- m.content + ('<|im_end|>' if loop.last else '') -}}"
        "{%- endfor -%}{%- if add_generation_prompt and enable_thinking -%}{{- '<|other|>' -}}"
        "{%- endif -%}"
    )
    assert made_up(jinja, ONE) == [[("Hi<|im_end|>", False), ("Hello<|im_end|>", True)]]


def test_texts_are_given_as_parts_to_a_template_that_reads_no_others() -> None:
    """Of SmolVLM, Idefics 3, LLaVA."""
    parts = "{%- for part in m.content -%}{{- part.text -}}{%- endfor -%}"
    jinja = (
        "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}"
        + parts
        + "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
        + ASK
    )
    system = [Turn("system", "Be kind."), *ONE]
    assert made_up(jinja, system) == made_up(CHATML, system)


OPENS = (  # the prompt opens a block of reasoning, history has only the answers
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}{%- if m.reasoning_content -%}"
    "{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{- m.content + '<|im_end|>\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
)
CLOSED = (
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '\\n</think>\\n\\n' -}}"
)


def test_a_block_that_the_prompt_opens_is_closed_before_an_answer_without_reasoning() -> None:
    said = Turn("assistant", "Hello", reasoning="greet")
    ends = ("<|im_end|>", True), ("\n", False)
    prompt_of = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert made_up(OPENS, [ONE[0], said]) == [
        [(prompt_of, False), ("greet\n</think>\n\nHello" + ends[0][0], True), ends[1]]
    ]
    ((asked, (learned, _), _),) = made_up(OPENS, ONE)
    assert asked == (prompt_of, False) and learned == "\n</think>\n\nHello<|im_end|>"
    flagged = OPENS.removesuffix("{%- endif -%}") + CLOSED + "{%- endif -%}{%- endif -%}"
    ((asked, (learned, _), _),) = made_up(flagged, ONE, thinking=False)
    assert asked == (prompt_of + "\n</think>\n\n", False) and learned == "Hello<|im_end|>"


def test_reasoning_that_a_template_drops_is_learned_behind_the_prompt_that_opens_it() -> None:
    """DeepSeek-R1: the template reads no reasoning, its prompt ends with <think>, and of each
    answer, the last too, it writes what follows </think>."""
    jinja = (
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{- '<|im_start|>' +"
        " m.content.split('</think>')[-1] + '<|im_end|>' -}}{%- else -%}{{- m.content -}}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|><think>\\n' -}}{%- endif -%}"
    )
    prompt = ("Hi<|im_start|><think>\n", False)
    for said in (
        Turn("assistant", "<b>Hello</b>", reasoning="greet"),
        Turn("assistant", "<think>\ngreet\n</think>\n\n<b>Hello</b>"),
        Turn("assistant", "greet\n</think>\n\n<b>Hello</b>"),
    ):
        learned = ("greet\n</think>\n\n<b>Hello</b><|im_end|>", True)
        assert made_up(jinja, [ONE[0], said]) == [[prompt, learned]]
    first, second = made_up(jinja, [*ONE, Turn("user", "Bye"), ONE[1]])
    assert first == [prompt, ("\n</think>\n\nHello<|im_end|>", True)]
    assert second[0] == ("Hi<|im_start|>Hello<|im_end|>Bye<|im_start|><think>\n", False)


def test_an_answer_without_a_stop_token_of_its_own_ends_with_what_servers_stop_at() -> None:
    bare = "{%- for m in messages -%}{{- '<|im_start|>' + m.content -}}{%- endfor -%}" + (
        "{%- if add_generation_prompt -%}<|im_start|>{%- endif -%}"
    )
    (parts,) = made_up(bare, ONE)
    assert parts[-1] == ("Hello<|im_start|>", True)
    (parts,) = made_up(bare, ONE, TOKENS._replace(stops=("<|other|>",)))
    assert parts[-1] == ("Hello<|im_end|>", True)


def test_generation_config_says_which_of_two_tokens_is_the_stop() -> None:
    two = CHATML.replace("'<|im_end|>\\n'", "'<|other|><|im_end|>\\n'")
    assert made_up(two, ONE)[0][1] == ("Hello<|other|>", True)
    stops = TOKENS._replace(stops=("<|im_end|>",))
    assert made_up(two, ONE, stops)[0][1] == ("Hello<|other|><|im_end|>", True)


LOST = {
    "the reasoning": (CHATML, [ONE[0], ONE[1]._replace(reasoning="why")], [], "reasoning"),
    "a tool call": (CHATML, [ONE[0], ONE[1]._replace(calls=CALLS)], TOOLS, "get_weather"),
    "the tools": (CHATML, ONE, TOOLS, "get_weather"),
    "the system prompt": (
        CHATML.replace(
            "{{- '<|im_start|>' + m.role",
            "{%- if m.role != 'system' -%}{{- '<|im_start|>' + m.role",
        ).replace("'<|im_end|>\\n' -}}{%- endfor", "'<|im_end|>\\n' -}}{%- endif -%}{%- endfor"),
        [Turn("system", "Be terse"), *ONE],
        [],
        "Be terse",
    ),
    "a part of the answer": (
        CHATML.replace("+ m.content +", "+ m.content.split('|')[0] +"),
        [ONE[0], Turn("assistant", "one|two")],
        [],
        "its text",
    ),
}


@pytest.mark.parametrize("what", sorted(LOST))
def test_what_a_template_would_lose_is_refused(what: str) -> None:
    jinja, turns, tools, word = LOST[what]
    with pytest.raises(TemplateError, match=word):
        made_up(jinja, turns, tools=tools)


REFUSED = {
    "no Jinja": ("{% for %}", ONE, "not Jinja"),
    "an exception of its own": ("{{ raise_exception('turns must alternate') }}", ONE, "alternate"),
    "a block that the prompt opens and nothing closes": (
        CHATML.replace("assistant\\n' -}}{%- endif", "assistant\\n<think>\\n' -}}{%- endif"),
        ONE,
        "<think>",
    ),
    "answers that it leaves out": (
        CHATML.replace("in messages -", "in messages if m.role != 'assistant' -"),
        ONE,
        "does not begin as the chat template's own prompt",
    ),
    "a noncharacter in a text": (CHATML, [Turn("user", "a\ufdd0"), ONE[1]], "U\\+FDD0"),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_template_that_cannot_serve_says_why(kind: str) -> None:
    jinja, turns, word = REFUSED[kind]
    with pytest.raises(TemplateError, match=word):
        made_up(jinja, turns)


def test_a_date_is_written_in_the_format_that_the_template_asks_for() -> None:
    jinja = "{{ strftime_now('%d %b %Y') }}" + CHATML
    assert made_up(jinja, ONE)[0][0][0].startswith("26 Jul 2024<|im_start|>")


def test_arguments_are_json_text_where_a_template_wants_text() -> None:
    jinja = CHATML.replace(
        "m.content +",
        "m.content + (m.tool_calls[0].function.name + m.tool_calls[0].function.arguments"
        " if m.tool_calls else '') +",
    )
    turns = [ONE[0], Turn("assistant", "", calls=CALLS)]
    (parts,) = made_up(jinja, turns)
    assert parts[1] == ('get_weather{"city": "Kyoto"}<|im_end|>', True)


def test_arguments_stay_objects_where_json_text_was_of_no_help() -> None:
    jinja = CHATML.replace(
        "m.content +",
        "m.content + (m.tool_calls[0].function.arguments.city + ' (get_weather)'"
        " if m.tool_calls else '') +"
        " (1 / 0 if m.content == 'bad' else '') +",
    )
    bad, good = (Turn("assistant", text, calls=CALLS) for text in ("bad", "Rain in "))
    with pytest.raises(TemplateError, match="refuses this conversation"):
        made_up(jinja, [ONE[0], bad])
    ((_, (learned, _), _),) = made_up(jinja, [ONE[0], good])
    assert learned == "Rain in Kyoto (get_weather)<|im_end|>"


def test_the_prompt_for_an_answer_after_a_tools_result_is_the_servers(
    model: Callable[[str], Model],
) -> None:
    vocabulary, template, _ = model("qwen3")
    turns = [Turn("user", "weather?"), Turn("assistant", "", calls=CALLS), RESULT]
    (segment,) = prompt(template, turns, vocabulary.special_tokens, tools=TOOLS, thinking=False)
    assert segment.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert "<tool_response>\nrain\n</tool_response>" in segment.text


def test_no_token_reaches_from_a_prompt_into_an_answer(tmp_path: Path) -> None:
    """' helpful' would be one token where the prompt's blank and the answer stand together."""
    jinja = CHATML.replace("\\n' + m.content", ": ' + m.content").replace(
        "assistant\\n'", "assistant: '"
    )
    vocabulary, template = opened(write_chat_tokenizer(tmp_path, jinja, KINDS["qwen3"][0]))
    turns = [Turn("user", "Hi"), Turn("assistant", "helpful")]
    (example,) = examples(template, turns, vocabulary.special_tokens)
    together = vocabulary.tokenizer.encode(example.text, add_special_tokens=False).ids
    alone = vocabulary.tokenizer.encode(example.segments[0].text, add_special_tokens=False).ids
    assert example.segments[0].text.endswith("assistant: ") and together[: len(alone)] != alone
    ((ids, trained),) = encode(vocabulary, template, [example.segments])
    assert ids[: len(alone)] == alone
    assert trained.index(True) == len(alone)
    assert vocabulary.tokenizer.decode(ids[len(alone) :], skip_special_tokens=False) == (
        "helpful<|im_end|>\n"
    )


def test_where_a_token_would_reach_into_an_answer_each_answer_is_a_row(tmp_path: Path) -> None:
    """In the history such a token is one: inference makes tokens of the whole prompt."""
    jinja = CHATML.replace("\\n' + m.content", ": ' + m.content").replace(
        "assistant\\n'", "assistant: '"
    )
    vocabulary, template = opened(write_chat_tokenizer(tmp_path, jinja, KINDS["qwen3"][0]))
    turns = [Turn("user", "Hi"), Turn("assistant", "helpful"), *ONE]
    (example,) = examples(template, turns, vocabulary.special_tokens)
    rows = unjoined(vocabulary, example.segments)
    assert [[s.text for s in row if s.trained] for row in rows] == [
        ["helpful<|im_end|>"],
        ["Hello<|im_end|>"],
    ]
    for row, (ids, trained) in zip(rows, encode(vocabulary, template, rows), strict=True):
        alone = vocabulary.tokenizer.encode(row[0].text, add_special_tokens=False).ids
        assert ids[: len(alone)] == alone and trained.index(True) == len(alone)
    (whole,) = examples(from_chat_template(CHATML), turns, TOKENS)
    assert unjoined(vocabulary, whole.segments) == [whole.segments]


def test_a_chat_template_that_writes_the_start_token_twice_is_refused(tmp_path: Path) -> None:
    folder = write_chat_tokenizer(
        tmp_path, "{{ bos_token }}{{ bos_token }}" + CHATML, ["<s>", *KINDS["qwen3"][0]], bos="<s>"
    )
    with pytest.raises(TemplateError, match="twice"):
        stop_token(*opened(folder))
