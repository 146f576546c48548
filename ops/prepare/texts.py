"""The texts of a row, in every layout that the trainer reads, each with its place. Pure."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.data import fields, formats
from trainer.data.formats import Columns

Place = tuple[str | int, ...]
_FIELDS = (
    *("instruction", "input", "output", "history", "conversations", "messages", "prompt"),
    *("completion", "response", "text", "chosen", "rejected", *fields.SYSTEM),
)
_EXPECTED = ("answer", "solution")  # of rows that need no answer of their own
_TURN = ("content", "value", *fields.REASONING)
_DATA = ("tool", "call")  # roles whose words are no prose


def texts_of(row: Mapping[str, Any], columns: Columns, asked: bool = False) -> dict[Place, str]:
    """place -> text of what a model reads or learns in a row: no names, flags, tools, calls and
    answers of tools. `asked`: the row needs no answer of its own (the form "prompts")."""
    names = [columns.name(name) for name in (*_FIELDS, *(_EXPECTED if asked else ()))]
    found = ((name,) for name in dict.fromkeys(names) if name in row)
    return {place: text for top in found for place, text in _within(row[top[0]], top, columns)}


def _within(value: Any, place: Place, columns: Columns) -> Iterator[tuple[Place, str]]:
    if isinstance(value, str):
        if value.strip():
            yield place, value
    elif isinstance(value, list):
        for n, inner in enumerate(value):
            yield from _within(inner, (*place, n), columns)
    elif isinstance(value, dict):
        role = next((value[t] for t in (columns.role_tag, "from", "role") if t in value), None)
        if role is not None and (columns.roles or formats.ROLES).get(str(role)) in _DATA:
            return
        inner = (columns.content_tag or "content", *_TURN)
        if value.get("type") == "text":
            inner = ("text",)
        for name in dict.fromkeys(inner):
            if name in value:
                yield from _within(value[name], (*place, name), columns)


def with_texts(row: Mapping[str, Any], texts: Mapping[Place, str]) -> dict[str, Any]:
    """A copy of the row with other texts at these places."""
    made = copy.deepcopy(dict(row))
    for place, text in texts.items():
        inside: Any = made
        for step in place[:-1]:
            inside = inside[step]
        inside[place[-1]] = text
    return made
