"""Prompt templates as data: from a row to text, with the parts that are trained marked. No torch,
no transformers.

A template is one of
  - a name: trainer/data/templates/NAME.toml, or NAME.jinja, a chat template;
  - a user's own text with {instruction}, {input} and {output} (the paragraph that holds {input}
    goes when a row has none);
  - Alpaca-LoRA's JSON (prompt_input, prompt_no_input, response_split);
  - a TOML like ours, with either with_input/without_input texts or pieces with the holes {system},
    {user}, {assistant}, {round} and {bos}: system, user, assistant; preamble, the system's text
    where a row has none; between, before each later user turn; prefix, tokens before everything;
  - "chat": the Jinja chat template that comes with the tokenizer.

`stop` is the token that ends an answer: "eos" (the tokenizer's own) unless the template says
otherwise. Training and use render with the same code (trainer/data/render.py), and the template
travels with the adapter whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "templates"
_HOLE = re.compile(r"\{(system|user|assistant|instruction|input|round|bos)\}")
_PIECES = {
    "preamble",
    "system",
    "user",
    "assistant",
    "stop",
    "between",
    "prefix",
    "with_input",
    "without_input",
}


class TemplateError(ValueError):
    """A template that cannot be used; the text ends with what to do."""


class Turn(NamedTuple):
    """`role` is user, assistant, system or tool. `extra` is Alpaca's input, which belongs to a user
    turn. An assistant turn may have `reasoning`, which comes before the text, and `calls` of tools
    as OpenAI writes them (arguments decoded); it is learned unless `learned` says no. `name` and
    `call_id` belong to a tool's turn."""

    role: str
    text: str
    extra: str = ""
    reasoning: str = ""
    calls: tuple[Any, ...] = ()
    learned: bool = True
    name: str = ""
    call_id: str = ""


@dataclass(frozen=True)
class Segment:
    """A stretch of the rendered text; `trained` is True for an answer and the stop token that ends
    it."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Template:
    """Pieces with holes. `user` is used for turns without an input, `user_with_input` for the
    others; each has its preamble."""

    name: str
    source: str
    user: str
    user_with_input: str
    preamble: str = ""
    preamble_with_input: str = ""
    system: str = "{system}"
    assistant: str = "{assistant}"
    stop: str = "eos"
    between: str = ""
    prefix: tuple[str, ...] = ()
    jinja: str = field(default="", repr=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()


def names() -> list[str]:
    return sorted(p.stem for p in FOLDER.iterdir() if p.suffix in (".toml", ".jinja"))


def load(name: str, text: str | None = None) -> Template:
    """The template of job.data: `text` (a user's own file, whole) wins over the name. 'chat' is
    empty: `from_chat_template` makes the one to use.

    Raises TemplateError for an unknown name or a text without the places that it needs."""
    if text is not None:
        return parse(name, text)
    if name == "chat":
        return Template("chat", "", "", "")
    path = FOLDER / f"{name}.jinja"
    if path.is_file():
        return from_chat_template(path.read_text("utf-8"))
    path = FOLDER / f"{name}.toml"
    if not path.is_file():
        raise TemplateError(
            f"no template called {name!r}: use one of {', '.join(names())}, chat, or the "
            "path of your own text file"
        )
    return parse(name, path.read_text(encoding="utf-8"))


def from_chat_template(jinja: str) -> Template:
    """The 'chat' template, of the tokenizer's own Jinja text."""
    if not jinja:
        raise TemplateError(
            "data.template is 'chat', but this tokenizer has no chat template: name one of "
            + ", ".join(names())
            + " or your own file"
        )
    return Template("chat", jinja, "", "", jinja=jinja)


def parse(name: str, text: str) -> Template:
    """A template file's text, in any of the forms above."""
    if text.lstrip().startswith("{") and '"prompt_input"' in text:
        return _from_alpaca_lora(name, text)
    if re.search(r"^[ \t]*(user|with_input)[ \t]*=", text, re.M):
        return _from_toml(name, text)
    return _from_text(name, text, text, text)


def _from_alpaca_lora(name: str, text: str) -> Template:
    try:
        data = json.loads(text)
        with_input, without = (
            data["prompt_input"] + "{output}",
            data["prompt_no_input"] + "{output}",
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TemplateError(
            f"template {name}: not Alpaca-LoRA's JSON ({error}): it wants prompt_input and "
            "prompt_no_input"
        ) from error
    return _from_text(name, text, with_input, without)


def _from_toml(name: str, text: str) -> Template:
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise TemplateError(f"template {name}: {error}: mend the TOML") from error
    unknown = set(data) - _PIECES
    if unknown:
        raise TemplateError(
            f"template {name}: unknown key {sorted(unknown)[0]!r}: it may have "
            f"{', '.join(sorted(_PIECES))}"
        )
    for key, told in data.items():
        texts = told if key == "prefix" and isinstance(told, list) else [told]
        if not all(isinstance(text, str) for text in texts):
            raise TemplateError(f"template {name}: {key!r} is no text: put it in quotation marks")
    if "with_input" in data:
        return _from_text(
            name,
            text,
            data["with_input"],
            data.get("without_input", data["with_input"]),
            data.get("stop", "eos"),
        )
    for key, hole in (("user", "{user}"), ("assistant", "{assistant}")):
        if hole not in data.get(key, ""):
            raise TemplateError(
                f"template {name}: {key!r} must hold {hole}: add it where the text belongs"
            )
    preamble, prefix = data.get("preamble", ""), data.get("prefix", ())
    return Template(
        name,
        text,
        data["user"],
        data["user"],
        preamble,
        preamble,
        data.get("system", "{system}"),
        data["assistant"],
        data.get("stop", "eos"),
        data.get("between", ""),
        (prefix,) if isinstance(prefix, str) else tuple(prefix),
    )


def _from_text(
    name: str, source: str, with_input: str, without: str, stop: str = "eos"
) -> Template:
    """Two texts with {instruction}, {input} and {output}; the paragraphs before the instruction are
    the preamble."""
    for text in (with_input, without):
        if "{instruction}" not in text:
            raise TemplateError(
                f"template {name}: no {{instruction}} in it: write {{instruction}}, "
                "{input} and {output} where they belong"
            )
    before, after = _cut_at_output(with_input)
    alone = _without_input(_cut_at_output(without)[0])
    if "{instruction}" not in before or "{instruction}" not in alone:
        raise TemplateError(
            f"template {name}: a row without an input has no place for its {{instruction}}: write "
            "it before {output}, with a blank line between it and {input}"
        )
    preamble_with_input, user_with_input = _cut_preamble(before)
    preamble, user = _cut_preamble(alone)
    if after.strip():
        raise TemplateError(
            f"template {name}: text after {{output}} ({after.strip()[:30]!r}) would never be "
            "learned: end with {output}; eos follows"
        )
    return Template(
        name,
        source,
        user,
        user_with_input,
        preamble,
        preamble_with_input,
        "{system}\n\n",
        "{assistant}",
        stop,
        "\n\n",
    )


def _cut_at_output(text: str) -> tuple[str, str]:
    before, _, after = (
        text.partition("{output}") if "{output}" in text else (text.rstrip("\n") + "\n", "", "")
    )
    return before, after


def _cut_preamble(text: str) -> tuple[str, str]:
    """The blocks before the one with {instruction}, and the rest."""
    start = text.rfind("\n\n", 0, text.index("{instruction}"))
    return (text[:start], text[start + 2 :]) if start >= 0 else ("", text)


def _without_input(text: str) -> str:
    return "\n\n".join(block for block in text.split("\n\n") if "{input}" not in block)


def _fill(piece: str, values: Mapping[str, str]) -> str:
    """One pass, so that braces inside a user's text stay as they are."""
    return _HOLE.sub(lambda hole: values.get(hole.group(1), hole.group(0)), piece)


def render_pieces(
    template: Template,
    turns: Sequence[Turn],
    *,
    eos: str,
    bos: str = "",
    last_only: bool = False,
    answer_next: bool = False,
) -> list[Segment]:
    """The text of a conversation in segments. `last_only` trains no answer but the last,
    `answer_next` stops where the model is to answer (the last turn is the user's).

    Raises TemplateError when turns do not alternate user, assistant (a leading system turn may come
    first), or hold what only a chat template has a place for."""
    turns = list(turns)
    _validate_plain(template, turns)
    system = turns.pop(0).text if turns and turns[0].role == "system" else None
    stop = eos if template.stop == "eos" else template.stop
    segments: list[Segment] = []
    for number, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[number % 2]:
            raise TemplateError(
                f"turn {number + 1} is {turn.role}'s: turns must alternate user, assistant"
            )
        if turn.role == "user":
            head = template.preamble_with_input if turn.extra else template.preamble
            system_text = (system if system is not None else head) if number == 0 else ""
            if number:
                segments.append(Segment(_fill(template.between, {"bos": bos}), False))
            segments.append(
                Segment(_user_text(template, turn, system_text, number // 2 + 1, bos), False)
            )
        else:
            text = _fill(template.assistant, {"assistant": turn.text}) + stop
            learned = turn.learned and (not last_only or number == len(turns) - 1)
            segments.append(Segment(text, learned))
    if answer_next:
        lead = template.assistant.partition("{assistant}")[0]
        if lead.strip():
            segments.append(Segment(lead, False))
    return segments


def _validate_plain(template: Template, turns: Sequence[Turn]) -> None:
    special = [
        what
        for what, found in (
            ("reasoning", any(t.reasoning for t in turns)),
            ("tool calls", any(t.calls for t in turns)),
            ("tool turns", any(t.role == "tool" for t in turns)),
        )
        if found
    ]
    if special:
        raise TemplateError(
            f"template {template.name} has no place for {' and '.join(special)}: set "
            'data.template = "chat"'
        )


def _user_text(
    template: Template, turn: Turn, system_text: str, round_number: int, bos: str
) -> str:
    system = _fill(template.system, {"system": system_text}) if system_text else ""
    joined = f"{turn.text}\n{turn.extra}" if turn.text and turn.extra else turn.text + turn.extra
    values = {
        "user": joined,
        "instruction": turn.text,
        "input": turn.extra,
        "round": str(round_number),
        "bos": bos,
        "system": system,
    }
    piece = template.user_with_input if turn.extra else template.user
    return _fill(piece, values) if "{system}" in piece else system + _fill(piece, values)


def alpaca_turns(row: Mapping[str, str]) -> list[Turn]:
    """An Alpaca row as turns; history (LLaMA-Factory) comes before the instruction."""
    turns = [Turn("system", row["system"])] if row.get("system") else []
    history: Iterable[tuple[str, str]] = row.get("history") or ()  # type: ignore[assignment]
    for question, answer in history:
        turns += [Turn("user", question), Turn("assistant", answer)]
    return [
        *turns,
        Turn("user", row["instruction"], row.get("input") or ""),
        Turn("assistant", row["output"]),
    ]
