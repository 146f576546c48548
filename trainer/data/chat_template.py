"""A trained template as the Jinja text that other programs read (transformers, vLLM, SGLang,
llama.cpp): the same text for the same conversation, proven on random ones. No torch, no
transformers.

A message may carry Alpaca's input as `input` beside its `content`. Literals are written as string
expressions, so that no rule of Jinja about blanks and line ends touches them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from trainer.data.chat import DAY, THINKING_FLAGS, render_chat
from trainer.data.render import prompt as render_prompt
from trainer.data.template import Template, TemplateError, Turn, render_pieces
from trainer.data.tokens import Vocabulary, encode, prefix_ids

CONVERSATIONS = 1000  # of a proof
_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_HOLE = re.compile(r"\{(system|user|assistant|instruction|input|round|bos)\}")
_ALPHABET = (
    "a", "Hello", " ", "\n", "\n\n", "\t", "  ", "'", '"', "\\", "{", "}", "{{", "}}", "{%", "%}",
    "{user}", "{system}", "{output}", "{#", "#}", "%", "<b>", "&amp;", "你好", "，", "é", "🙂",
    "\u200b", "###", "0", ":", "问：", "[INST]", "x" * 40,
)  # fmt: skip


def chat_template(template: Template, vocabulary: Vocabulary, thinking: bool | None = None) -> str:
    """The Jinja text of `template`, beginning with the ids that training put before everything.
    The template `chat` is the tokenizer's own text, which asks for reasoning unless told otherwise
    as training did (`thinking`). Raises TemplateError where it cannot be said in Jinja."""
    if template.name == "chat":
        return _thinking_default(thinking) + _day(template.jinja) + template.jinja
    before = _literal("".join(_texts(template, vocabulary)))
    system = "{%- set told = system -%}"
    if template.preamble or template.preamble_with_input:
        system = (
            "{%- if system is none -%}{%- set told = "
            f"{_string(template.preamble_with_input)} if extra else {_string(template.preamble)}"
            " -%}{%- else -%}{%- set told = system -%}{%- endif -%}"
        )
    stop = vocabulary.eos if template.stop == "eos" else template.stop
    lead = template.assistant.partition("{assistant}")[0]
    bos = {"bos": _string(vocabulary.bos)}
    return "".join(
        (
            "{%- if messages and messages[0]['role'] == 'system' -%}",
            "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}",
            "{%- else -%}{%- set system = none -%}{%- set turns = messages -%}{%- endif -%}",
            before,
            "{%- for message in turns -%}",
            "{%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}",
            "{{ raise_exception('turns must alternate user, assistant') }}{%- endif -%}",
            "{%- if message['role'] == 'user' -%}",
            "{%- set text = message['content'] -%}",
            "{%- set extra = message['input'] if message['input'] else '' -%}",
            "{%- set joined = text + '\\n' + extra if text and extra else text + extra -%}",
            "{%- if loop.first -%}" + system + "{%- else -%}{%- set told = '' -%}",
            _filled(template.between, bos) + "{%- endif -%}",
            _user(template, bos),
            "{%- else -%}",
            _filled(template.assistant, {"assistant": "message['content']"}) + _literal(stop),
            "{%- endif -%}{%- endfor -%}",
            "{%- if add_generation_prompt -%}" + _literal(lead) + "{%- endif -%}"
            if lead.strip()
            else "",
        )
    )


def _user(template: Template, bos: dict[str, str]) -> str:
    with_input, without = (
        _told(piece, template, bos) for piece in (template.user_with_input, template.user)
    )
    if with_input == without:
        return without
    return "{%- if extra -%}" + with_input + "{%- else -%}" + without + "{%- endif -%}"


def _told(piece: str, template: Template, bos: dict[str, str]) -> str:
    """A user's turn; the system text goes where the piece has a place for it, else before it."""
    system = "{%- if told -%}" + _filled(template.system, {"system": "told"}) + "{%- endif -%}"
    values = {
        "user": "joined",
        "instruction": "text",
        "input": "extra",
        "round": "(loop.index0 // 2 + 1)",
    }
    if "{system}" not in piece:
        return system + _filled(piece, values | bos)
    before, _, after = piece.partition("{system}")
    if "{system}" in after:
        raise TemplateError(f"template {template.name}: {{system}} stands twice in a user's turn")
    return _filled(before, values) + system + _filled(after, values)


def _filled(piece: str, values: dict[str, str]) -> str:
    out, at = [], 0
    for hole in _HOLE.finditer(piece):
        if (name := hole.group(1)) not in values:
            continue
        out += [_literal(piece[at : hole.start()]), "{{ " + values[name] + " }}"]
        at = hole.end()
    return "".join([*out, _literal(piece[at:])])


def _literal(text: str) -> str:
    return "{{ " + _string(text) + " }}" if text else ""


def _string(text: str) -> str:
    plain = text.replace("\\", "\\\\").replace("'", "\\'")
    for sign, name in (("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        plain = plain.replace(sign, name)
    # a brace pair inside a string would end the expression for some readers of Jinja
    return "'" + re.sub(r"(?<=[{}%#])(?=[{}%#])", "' + '", plain) + "'"


def _texts(template: Template, vocabulary: Vocabulary) -> list[str]:
    return [vocabulary.tokenizer.id_to_token(i) or "" for i in prefix_ids(vocabulary, template)]


def _thinking_default(thinking: bool | None) -> str:
    if thinking is None:
        return ""
    value = "true" if thinking else "false"
    return "".join(
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {value} -%}}{{%- endif -%}}"
        for name in THINKING_FLAGS
    )


def _day(jinja: str) -> str:
    """For a text that writes today's date, the day that training wrote: elsewhere it would be
    another one in each question. Raises TemplateError for a date that is computed otherwise."""
    formats = {found[2] for found in _DATE.finditer(jinja)}
    if len(_DATE.findall(jinja)) != jinja.count("strftime_now("):
        raise TemplateError("the tokenizer's chat template writes a date in a form of its own")
    if not formats:
        return ""
    days = ", ".join(f"{_string(f)}: {_string(DAY.strftime(f))}" for f in sorted(formats))
    return f"{{%- macro strftime_now(form) -%}}{{{{ {{{days}}}[form] }}}}{{%- endmacro -%}}"


def prove(
    template: Template,
    vocabulary: Vocabulary,
    count: int = CONVERSATIONS,
    thinking: bool | None = None,
) -> str:
    """The Jinja text of `template` once `count` random conversations have become the same ids by it
    as in training, with and without the opening of the next answer (of the template `chat`: with
    it). Raises TemplateError with the first that did not."""
    jinja = chat_template(template, vocabulary, thinking)
    draw = random.Random(0)
    for number in range(count):
        turns = conversation(draw, inputs=template.name != "chat")
        if template.name == "chat" and turns[0].role == "system" and number % 2:
            turns = turns[1:]
        prompt = bool(number % 2) or template.name == "chat"
        turns = turns[:-1] if prompt else turns
        try:
            ours = _ids(template, vocabulary, turns, prompt, thinking)
        except TemplateError:
            if template.name == "chat":  # a template that knows no system turn, say
                continue
            raise
        messages = [_message(turn) for turn in turns]
        text = render_chat(jinja, messages, vocabulary.eos, vocabulary.bos, prompt)
        theirs = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)),
            )
            raise TemplateError(
                f"template {template.name} cannot be said as a chat template for other programs: "
                f"conversation {number} differs from token {at} on "
                f"({len(ours)} tokens in training, {len(theirs)} in theirs)"
            )
    return jinja


def _ids(
    template: Template,
    vocabulary: Vocabulary,
    turns: Sequence[Turn],
    prompt: bool,
    thinking: bool | None,
) -> list[int]:
    if prompt:
        segments = render_prompt(template, turns, vocabulary.special_tokens, thinking=thinking)
    else:
        segments = render_pieces(template, turns, eos=vocabulary.eos, bos=vocabulary.bos)
    return encode(vocabulary, template, [segments])[0][0]


def _message(turn: Turn) -> dict[str, str]:
    message = {"role": turn.role, "content": turn.text}
    return message | {"input": turn.extra} if turn.extra else message


def conversation(draw: random.Random, inputs: bool = True) -> list[Turn]:
    """One to three exchanges of odd text, half of them after a system turn."""

    def text(longest: int) -> str:
        return "".join(draw.choices(_ALPHABET, k=draw.randint(1, longest)))

    turns = [Turn("system", text(8))] if draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 3)):
        extra = text(6) if inputs and draw.random() < 0.4 else ""
        turns += [Turn("user", text(12), extra), Turn("assistant", text(12))]
    return turns
