"""The template of a training, said to other programs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from trainer.data import template as templates
from trainer.data.chat import render_chat
from trainer.data.chat_template import chat_template, prove
from trainer.data.template import TemplateError, Turn, parse, render_pieces
from trainer.data.tokens import Vocabulary

OWN = {
    "plain text": "Q: {instruction}\n\nContext: {input}\n\nA: {output}",
    "alpaca-lora": '{"prompt_input": "{{instruction}} {instruction}\\n{input}\\n", '
    '"prompt_no_input": "%}{instruction}\\n", "response_split": "x"}',
    "pieces": """
preamble = "You help."
system = "<<{system}>>\\n"
user = "U{round}'{user}\\\\ A:"
assistant = " {assistant}"
between = "{bos}\\r\\n"
""",
}


def vocabulary(prefix: str = "", specials: tuple[str, ...] = ()) -> Vocabulary:
    """Bytes, and the special tokens that the templates name."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<s>", "<|im_end|>", "<|im_start|>", *specials])
    ids = (tokenizer.token_to_id(prefix),) if prefix else ()
    return Vocabulary(tokenizer, "</s>", "<s>", ids, "")


@pytest.mark.parametrize("prefix", ["", "<s>"])
@pytest.mark.parametrize("name", [*templates.names(), *OWN])
def test_a_thousand_conversations_become_the_tokens_of_the_training(name: str, prefix: str) -> None:
    template = parse(name, OWN[name]) if name in OWN else templates.load(name)
    prove(template, vocabulary(prefix, template.prefix))


def test_stock_transformers_renders_the_proven_text() -> None:
    from transformers import PreTrainedTokenizerFast

    told = vocabulary("<s>")
    stock = PreTrainedTokenizerFast(
        tokenizer_object=told.tokenizer, eos_token="</s>", bos_token="<s>"
    )
    stock.chat_template = prove(templates.load("alpaca"), told, 10)
    messages = [{"role": "user", "content": "Name a tea.", "input": "green"}]
    text = stock.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<s>Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nName a tea.\n\n### Input:\ngreen\n\n### Response:\n")


def test_a_tokenizers_own_template_is_taken_as_it_is() -> None:
    jinja = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    own = templates.from_chat_template(jinja)
    assert prove(own, vocabulary("<s>"), 200) == jinja
    assert prove(own, vocabulary(), 200) == jinja


def test_stock_transformers_writes_the_day_that_training_wrote() -> None:
    jinja = (
        "{% set day = strftime_now('%d %b %Y') %}{% for m in messages %}<|im_start|>{{ day + ' ' }}"
        '{{ strftime_now("%Y") }}{{ m.content }}<|im_end|>{% endfor %}'
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    from transformers import PreTrainedTokenizerFast

    own, told = templates.from_chat_template(jinja), vocabulary()
    stock = PreTrainedTokenizerFast(tokenizer_object=told.tokenizer, eos_token="</s>")
    stock.chat_template = prove(own, told, 50)
    text = stock.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>26 Jul 2024 2024hi<|im_end|>"
    with pytest.raises(TemplateError, match="a date in a form of its own"):
        prove(templates.from_chat_template(jinja.replace("'%d %b %Y'", "form")), told, 1)


def test_the_first_token_stands_where_a_users_piece_has_its_hole() -> None:
    text = 'user = "{bos}{user}\\n"\nassistant = "{assistant}"\n'
    piece = templates.parse("mine", text)
    segments = render_pieces(piece, [Turn("user", "hi")], eos="</s>", bos="<s>", answer_next=True)
    assert "".join(s.text for s in segments) == "<s>hi\n"
    prove(piece, vocabulary(), 200)


def test_turns_out_of_order_are_refused_by_the_text_itself() -> None:
    jinja = chat_template(templates.load("vicuna"), vocabulary())
    with pytest.raises(TemplateError, match="alternate"):
        render_chat(jinja, [{"role": "assistant", "content": "hi"}], "</s>", "<s>")


def test_ids_that_no_text_becomes_are_told_with_their_place() -> None:
    words = replace(vocabulary(), prefix=(vocabulary().id_of("Ġ") or 0,))  # a space's byte
    with pytest.raises(TemplateError, match=r"conversation 0 differs from token 0 on"):
        prove(templates.load("vicuna"), words)


def test_other_programs_ask_for_reasoning_as_training_did_unless_told_otherwise() -> None:
    jinja = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>"
        "{% if enable_thinking is defined and not enable_thinking %}(no){% endif %}{% endif %}"
    )
    own = templates.from_chat_template(jinja)
    told = prove(own, vocabulary(), 200, thinking=False)
    messages = [{"role": "user", "content": "hi"}]
    assert render_chat(told, messages, "</s>", "<s>", True).endswith("(no)")
    assert not render_chat(jinja, messages, "</s>", "<s>", True).endswith("(no)")
