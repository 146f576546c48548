"""From turns to text, by whichever kind of template a job has: what is trained, and what the model
is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.data.chat import Example, SpecialTokens, open_chat
from trainer.data.template import Segment, Template, TemplateError, Turn, render_pieces


def examples(
    template: Template,
    turns: Sequence[Turn],
    tokens: SpecialTokens,
    *,
    tools: Sequence[Any] = (),
    thinking: bool | None = None,
    last_only: bool = False,
) -> list[Example]:
    """The texts that a conversation is trained as: one, or, where a chat template renders history
    otherwise than it rendered the answer, one for each rendering; none where no answer is to be
    learned. Raises TemplateError for what the template has no place for."""
    if template.name == "chat":
        chat = open_chat(template.jinja, tokens)
        return chat.examples(turns, tools, thinking=thinking, last_only=last_only)
    _validate_tools(template, tools)
    segments = render_pieces(template, turns, eos=tokens.eos, bos=tokens.bos, last_only=last_only)
    return [Example(segments)] if any(s.trained for s in segments) else []


def prompt(
    template: Template,
    turns: Sequence[Turn],
    tokens: SpecialTokens,
    *,
    tools: Sequence[Any] = (),
    thinking: bool | None = None,
) -> list[Segment]:
    """The text up to where the model answers; the last turn is the user's or a tool's."""
    if template.name == "chat":
        text = open_chat(template.jinja, tokens).prompt(turns, tools, thinking)
        return [Segment(text, False)]
    _validate_tools(template, tools)
    return render_pieces(template, turns, eos=tokens.eos, bos=tokens.bos, answer_next=True)


def _validate_tools(template: Template, tools: Sequence[Any]) -> None:
    if tools:
        raise TemplateError(
            f'template {template.name} has no place for tools: set data.template = "chat"'
        )
