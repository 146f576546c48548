"""What a row of each format must be, as pure functions: a decoded row becomes turns or text, or
problems with their place in the row.

alpaca    instruction, input (may be absent), output; history and system as LLaMA-Factory has them
sharegpt  conversations: [{from, value}, ...]
messages  OpenAI's: [{role, content}, ...]
prompt    prompt, completion (or response)
text      text
Names that a dataset_info.json gives to columns, roles and tags are followed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trainer.data.template import Turn

Path_ = tuple[str | int, ...]
Problem = tuple[Path_, str, str]  # place in the row, reason, fix
KEYS = {
    "alpaca": {"instruction", "output"},
    "sharegpt": {"conversations"},
    "messages": {"messages"},
    "prompt": {"prompt"},
    "text": {"text"},
}
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "system": "system",
    "developer": "system",
}


@dataclass(frozen=True)
class Columns:
    """Canonical name -> the name in this file, and the tags of chat formats."""

    names: dict[str, str] = field(default_factory=dict)
    role_tag: str = ""
    content_tag: str = ""
    roles: dict[str, str] = field(default_factory=dict)

    def name(self, canonical: str) -> str:
        return self.names.get(canonical, canonical)


class Row(NamedTuple):
    """One training row. `where` is file:line (or file:row N for Parquet). Either `turns` or `text`
    is filled."""

    where: str
    turns: tuple[Turn, ...] = ()
    text: str = ""


def guess(keys: set[str], columns: Columns) -> str | None:
    """The format that a row with these fields has, or None."""
    for form, wanted in KEYS.items():
        if {columns.name(k) for k in wanted} <= keys:
            return form
    return None


def problems_or_row(value: Any, form: str, columns: Columns, where: str) -> Row | list[Problem]:
    """`value` as scan.py yields it: objects are tuples of pairs."""
    if type(value) is not tuple:
        shown = json.dumps(value, ensure_ascii=False, default=list)[:30]
        return [((), f"the row is {_kind(value)} ({shown}), not an object", 'write {"...": ...}')]
    row = dict(value)
    if len(row) != len(value):
        keys = [k for k, _ in value]
        twice = next(k for k in keys if keys.count(k) > 1)
        return [((twice,), f"the field {twice!r} is given twice", "keep one")]
    return READERS[form](row, columns, where)


def _alpaca(row: dict[str, Any], columns: Columns, where: str) -> Row | list[Problem]:
    names = columns.names
    ask, extra, reply = (
        names.get("instruction", "instruction"),
        names.get("input", "input"),
        names.get("output", "output"),
    )
    instruction: Any = row.get(ask)
    given: Any = row.get(extra)
    output: Any = row.get(reply)
    system, history = (
        row.get(names.get("system", "system")),
        row.get(names.get("history", "history")),
    )
    sound = (
        type(instruction) is str
        and type(output) is str
        and (given is None or type(given) is str)
        and not system
        and not history
    )
    if sound and output.strip() and (instruction.strip() or (given and given.strip())):
        return Row(where, (Turn("user", instruction, given or ""), Turn("assistant", output)))
    problems: list[Problem] = []
    _text(row, ask, problems, may_be_empty=bool(isinstance(given, str) and given.strip()))
    _text(row, extra, problems, may_be_absent=True)
    _text(row, reply, problems)
    system_name, history_name = names.get("system", "system"), names.get("history", "history")
    _text(row, system_name, problems, may_be_absent=True)
    turns = [Turn("system", system)] if system and isinstance(system, str) else []
    turns += _history(row, history_name, problems)
    return problems or Row(
        where, (*turns, Turn("user", instruction or "", given or ""), Turn("assistant", output))
    )


def _history(row: dict[str, Any], name: str, problems: list[Problem]) -> list[Turn]:
    history, turns = row.get(name) or [], []
    if type(history) is not list:
        problems.append(
            (
                (name,),
                f"is {_kind(history)}, not a list of pairs",
                'write [["question", "answer"], ...], or leave it out',
            )
        )
        return []
    for i, pair in enumerate(history):
        if (
            type(pair) is not list
            or len(pair) != 2
            or not all(type(x) is str and x.strip() for x in pair)
        ):
            problems.append(
                ((name, i), "is not a pair of two texts", 'write ["question", "answer"]')
            )
        else:
            turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _chat(row: dict[str, Any], columns: Columns, where: str, form: str) -> Row | list[Problem]:
    key = columns.name("conversations" if form == "sharegpt" else "messages")
    role_tag = columns.role_tag or ("from" if form == "sharegpt" else "role")
    content_tag = columns.content_tag or ("value" if form == "sharegpt" else "content")
    given = row.get(key)
    problems: list[Problem] = []
    if given is None:
        return [_missing(row, key)]
    if type(given) is not list:
        fix = f'write [{{"{role_tag}": ..., "{content_tag}": ...}}, ...]'
        return [((key,), f"is {_kind(given)}, not a list of turns", fix)]
    if not given:
        return [((key,), "has no turn", "remove the row, or fill it")]
    turns: list[Turn] = []
    system = row.get(columns.name("system"))
    if isinstance(system, str) and system.strip():
        turns.append(Turn("system", system))
    for i, turn in enumerate(given):
        if type(turn) is not tuple:
            fix = f'write {{"{role_tag}": ..., "{content_tag}": ...}}'
            problems.append(((key, i), f"the turn is {_kind(turn)}, not an object", fix))
            continue
        one = dict(turn)
        role = _role(one, role_tag, (key, i), columns, problems)
        content = _content(one, content_tag, (key, i), role, problems)
        expected = "user" if not turns or turns[-1].role in ("system", "assistant") else "assistant"
        if role == "system":
            if turns:
                problems.append(
                    (
                        (key, i, role_tag),
                        "a system turn that is not the first",
                        "move it to the front, or remove it",
                    )
                )
                continue
        elif role and role != expected and not problems:
            problems.append(
                (
                    (key, i, role_tag),
                    f"it is {one[role_tag]!r} who speaks, the {expected} must speak here",
                    "let user and assistant take turns",
                )
            )
        if role:
            turns.append(Turn(role, content))
    if not problems and turns[-1].role != "assistant":
        problems.append(
            (
                (key, len(given) - 1, role_tag),
                "the conversation does not end with an answer, so there is nothing to learn "
                "after it",
                "add the answer, or remove the last turn",
            )
        )
    return problems or Row(where, tuple(turns))


def _role(
    turn: dict[str, Any], tag: str, place: Path_, columns: Columns, problems: list[Problem]
) -> str:
    name = turn.get(tag)
    if name is None:
        problems.append((place, f"the turn has no {tag!r}", f"add {tag!r}"))
        return ""
    role = (columns.roles or ROLES).get(name) if isinstance(name, str) else None
    if role is None:
        known = list(columns.roles or ROLES)
        close = difflib.get_close_matches(str(name), known, 1, 0.5)
        problems.append(
            (
                (*place, tag),
                f"nobody is called {name!r}",
                f"write {close[0]!r}" if close else f"use one of {', '.join(known)}",
            )
        )
        return ""
    return role


def _content(
    turn: dict[str, Any], tag: str, place: Path_, role: str, problems: list[Problem]
) -> str:
    content = turn.get(tag)
    if (
        type(content) is list
        and content
        and all(type(p) is tuple and dict(p).get("type") == "text" for p in content)
    ):
        content = "".join(str(dict(p).get("text", "")) for p in content)  # OpenAI's content parts
    if content is None:
        problems.append((place, f"the turn has no {tag!r}", f"add {tag!r}"))
    elif type(content) is not str:
        problems.append(
            ((*place, tag), f"is {_kind(content)}, not a text", "write a text in quotation marks")
        )
    elif not content.strip() and role != "system":
        problems.append(
            ((*place, tag), "is empty", "write something, or remove the turn with its partner")
        )
    else:
        return content
    return ""


def _prompt(row: dict[str, Any], columns: Columns, where: str) -> Row | list[Problem]:
    ask = columns.name("prompt")
    reply = columns.name("completion")
    if reply not in row and "response" in row:
        reply = "response"
    problems: list[Problem] = []
    _text(row, ask, problems)
    _text(row, reply, problems)
    return problems or Row(where, (Turn("user", row[ask]), Turn("assistant", row[reply])))


def _plain(row: dict[str, Any], columns: Columns, where: str) -> Row | list[Problem]:
    problems: list[Problem] = []
    _text(row, columns.name("text"), problems)
    return problems or Row(where, (), row[columns.name("text")])


def _text(
    row: dict[str, Any],
    name: str,
    problems: list[Problem],
    may_be_empty: bool = False,
    may_be_absent: bool = False,
) -> None:
    value = row.get(name)
    if value is None:
        if name in row and not may_be_absent:
            problems.append(((name,), "is null", "write a text"))
        elif not may_be_absent:
            problems.append(_missing(row, name))
    elif type(value) is not str:
        problems.append(
            ((name,), f"is {_kind(value)}, not a text", "write a text in quotation marks")
        )
    elif not value.strip() and not (may_be_empty or may_be_absent):
        problems.append(((name,), "is empty", "write something, or remove the row"))


def _missing(row: dict[str, Any], name: str) -> Problem:
    close = difflib.get_close_matches(
        name, [k for k in row if k not in ("instruction", "input", "output")], 1, 0.6
    )
    if close:
        return ((close[0],), f"the row has no {name!r}, but {close[0]!r}", f"call it {name!r}")
    return (
        (),
        f"the row has no {name!r}",
        f"add {name!r}; it has {', '.join(map(repr, row)) or 'nothing'}",
    )


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        tuple: "an object",
    }
    return names.get(type(value), type(value).__name__)


READERS: dict[str, Callable[[dict[str, Any], Columns, str], Row | list[Problem]]] = {
    "alpaca": _alpaca,
    "sharegpt": lambda row, columns, where: _chat(row, columns, where, "sharegpt"),
    "messages": lambda row, columns, where: _chat(row, columns, where, "messages"),
    "prompt": _prompt,
    "text": _plain,
}


def suspicious_texts(value: Any, path: Path_ = ()) -> list[Problem]:
    """Characters that no text should hold, anywhere in a row: NUL, U+FFFD (what is left of a broken
    decoding), half of a surrogate pair."""
    if isinstance(value, str):
        if "\x00" in value:
            return [(path, "holds a NUL character", "remove it")]
        if "\ufffd" in value:
            return [
                (
                    path,
                    "holds U+FFFD, what is left of a broken decoding",
                    "take the text from its source again, as UTF-8",
                )
            ]
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return [
                (
                    path,
                    f"holds half a character (\\u{ord(value[error.start]):04x})",
                    "write both halves of the pair, or the character itself",
                )
            ]
        return []
    items = value if type(value) is tuple else enumerate(value) if type(value) is list else ()
    return [problem for key, inner in items for problem in suspicious_texts(inner, (*path, key))]
