"""What a row of each format must be, as pure functions: a decoded row becomes turns or text, or
problems with their place in the row.

alpaca    instruction, input (may be absent), output; history and system as LLaMA-Factory has them
sharegpt  conversations: [{from, value}, ...]
messages  OpenAI's: [{role, content}, ...]
prompt    prompt, completion (or response)
text      text
Names that data.columns or a dataset_info.json give to columns, roles and tags are followed. Fields
beside the texts are read by fields.py; a field that nothing reads and that could change what is
learned is a problem.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from trainer.data import fields
from trainer.data.fields import Path_, Problem
from trainer.data.template import Turn

KEYS = {
    "alpaca": {"instruction", "output"},
    "sharegpt": {"conversations"},
    "messages": {"messages"},
    "prompt": {"prompt"},
    "text": {"text"},
}
TEXT_PARTS = ("text", "input_text", "output_text")  # of a turn's content, as OpenAI has them
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_call": "call",
    "tool_call": "call",
}
FOLLOWS = {  # who may speak after whom
    "": ("user",),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
# names that other data sets give to an instruction and to its output, to say how to map them
_ASKS = (
    "question", "query", "inputs", "problem", "source", "prompt", "input", "instruction",
    "问题", "提问", "指令", "输入",
)  # fmt: skip
_ANSWERS = (
    "answer", "response", "targets", "target", "solution", "completion", "chosen", "label",
    "答案", "回答", "回复", "输出",
)  # fmt: skip


# and to what stands beside an instruction
_BESIDE = ("context", "补充", "背景", "上下文")
_OURS = frozenset(["input", "completion", "response"]).union(*KEYS.values())


@dataclass(frozen=True)
class Columns:
    """Canonical name -> the name in this file, and the tags of chat formats."""

    names: dict[str, str] = field(default_factory=dict, hash=False)
    role_tag: str = ""
    content_tag: str = ""
    roles: dict[str, str] = field(default_factory=dict, hash=False)

    def name(self, canonical: str) -> str:
        return self.names.get(canonical, canonical)


class Row(NamedTuple):
    """One training row. `where` is file:line (or file:row N for Parquet). Either `turns` or `text`
    is filled; `tools` are what the model may call, `unread` the names of fields that nothing
    reads."""

    where: str
    turns: tuple[Turn, ...] = ()
    text: str = ""
    tools: tuple[Any, ...] = ()
    unread: tuple[str, ...] = ()


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
        return [((), f"the row is {kind(value)} ({shown}), not an object", 'write {"...": ...}')]
    row = dict(value)
    if len(row) != len(value):
        return [twice(key for key, _ in value)]
    found = READERS[form](row, columns, where)
    if len(row) <= len(KEYS[form]) or not isinstance(found, Row):
        return found
    read = _read_by(form, columns)
    if form == "prompt":
        read |= {_reply(row, columns)}
    names, problems = fields.unread(row, read)
    return problems or (found._replace(unread=(*found.unread, *names)) if names else found)


@lru_cache
def _read_by(form: str, columns: Columns) -> frozenset[str]:
    """Names of the fields that a reader reads."""
    canonical = {
        "alpaca": ("instruction", "input", "output", "history", "system"),
        "sharegpt": ("conversations", "system", "tools"),
        "messages": ("messages", "system", "tools"),
        "prompt": ("prompt", "system", "tools"),
        "text": ("text",),
    }[form]
    found = {columns.name(name) for name in canonical}
    if "system" in canonical and columns.name("system") == "system":
        found |= set(fields.SYSTEM)
    if "tools" in canonical and columns.name("tools") == "tools":
        found |= set(fields.TOOLS)
    return frozenset(found)


def kind_fault(form: str, keys: set[str]) -> tuple[str, str] | None:
    """(reason, fix) where rows with these fields are of a kind that must not be read as `form`."""
    if {"chosen", "rejected"} <= keys:
        return (
            "its rows are preferences (chosen, rejected), which this stage does not learn from",
            "leave the file out, or keep the field that is to be learned alone",
        )
    if form == "text" and {"parent_id", "role"} <= keys:
        return (
            "its rows are messages of trees (parent_id, role), not texts to learn whole",
            "export each path of a tree as one conversation: "
            '{"messages": [{"role": ..., "content": ...}, ...]}',
        )
    label = next((k for k in ("label", "labels", "label_text", "sentiment") if k in keys), None)
    if form == "text" and label:
        return (
            f"its rows are texts with a {label}, of which only the text would be learned",
            f'set data.format = "alpaca" and data.columns = {{ instruction = "text", output = '
            f'"{label}" }}, or take {label!r} out to learn the texts',
        )
    return None


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
    problems: list[Problem] = []
    system = fields.system(row, names.get("system", "system"), problems)
    history = row.get(names.get("history", "history"))
    sound = (
        type(instruction) is str
        and type(output) is str
        and (given is None or type(given) is str)
        and not system
        and not history
        and not problems
    )
    if sound and output.strip() and (instruction.strip() or (given and given.strip())):
        return Row(where, (Turn("user", instruction, given or ""), Turn("assistant", output)))
    _text(row, ask, problems, may_be_empty=bool(isinstance(given, str) and given.strip()))
    _text(row, extra, problems, may_be_absent=True)
    _text(row, reply, problems)
    turns = [Turn("system", system)] if system else []
    turns += _history(row, names.get("history", "history"), problems)
    return problems or Row(
        where, (*turns, Turn("user", instruction or "", given or ""), Turn("assistant", output))
    )


def _history(row: dict[str, Any], name: str, problems: list[Problem]) -> list[Turn]:
    history, turns = row.get(name) or [], []
    if type(history) is not list:
        problems.append(
            (
                (name,),
                f"is {kind(history)}, not a list of pairs",
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
    given = row.get(key)
    if given is None and key not in row:
        return [_missing(row, key)]
    role_tag = columns.role_tag or ("from" if form == "sharegpt" else "role")
    content_tag = columns.content_tag or ("value" if form == "sharegpt" else "content")
    fix = f'write [{{"{role_tag}": ..., "{content_tag}": ...}}, ...]'
    if type(given) is not list:
        return [((key,), f"is {kind(given)}, not a list of turns", fix)]
    if not given:
        return [((key,), "has no turn", "remove the row, or fill it")]
    problems: list[Problem] = []
    turns: list[Turn] = []
    names: dict[str, None] = {}
    system = fields.system(row, columns.name("system"), problems)
    if system:
        turns.append(Turn("system", system))
    read = fields.TURN_FIELDS | {role_tag, content_tag}
    for i, turn in enumerate(given):
        if type(turn) is not tuple:
            turn_fix = f'write {{"{role_tag}": ..., "{content_tag}": ...}}'
            problems.append(((key, i), f"the turn is {kind(turn)}, not an object", turn_fix))
            continue
        one = dict(turn)
        if len(one) > 2:
            unread, wrong = fields.unread(one, read, (key, i))
            names.update(dict.fromkeys(unread))
            problems += wrong
        made = _turn(one, role_tag, content_tag, (key, i), columns, problems)
        if made and _may_follow(made, turns, one[role_tag], (key, i, role_tag), problems):
            turns.append(made)
    tools = fields.tools(row, columns.name("tools"), problems)
    if not problems and turns[-1].role != "assistant":
        problems.append(
            (
                (key, len(given) - 1, role_tag),
                "the conversation does not end with an answer, so there is nothing to learn "
                "after it",
                "add the answer, or remove the last turn",
            )
        )
    return problems or Row(where, tuple(turns), tools=tools, unread=tuple(names))


def _may_follow(
    made: Turn, turns: list[Turn], name: str, place: Path_, problems: list[Problem]
) -> bool:
    """Whether a turn stands where its role may speak; adds the problem where it does not."""
    if made.role == "system":
        if turns and turns[-1] != made:
            fix = "move it to the front, or remove it"
            problems.append((place, "a system turn that is not the first", fix))
        return not turns
    allowed = FOLLOWS[turns[-1].role if turns else ""]
    if made.role not in allowed and not problems:
        problems.append(
            (
                place,
                f"it is {name!r} who speaks, the {allowed[0]} must speak here",
                "let user and assistant take turns",
            )
        )
    return True


def _turn(
    one: dict[str, Any],
    role_tag: str,
    content_tag: str,
    place: Path_,
    columns: Columns,
    problems: list[Problem],
) -> Turn | None:
    role = _role(one, role_tag, place, columns, problems)
    if role == "call":
        text = _content(one, content_tag, place, "assistant", problems)
        calls = fields.calls_of_text(text, (*place, content_tag), problems) if text else []
        learned = fields.learned(one, "assistant", place, problems)
        return Turn("assistant", "", calls=tuple(calls), learned=learned)
    if len(one) == 2 and content_tag in one:
        content = _content(one, content_tag, place, role, problems)
        return Turn(role, content) if role else None
    calls = fields.calls(one, role, place, problems)
    may_be_empty = bool(calls) or role == "tool"
    content = _content(one, content_tag, place, role, problems, may_be_empty)
    name, call_id = (one.get("name"), one.get("tool_call_id")) if role == "tool" else ("", "")
    made = Turn(
        role,
        content,
        reasoning=fields.reasoning(one, role, place, problems),
        calls=tuple(calls),
        learned=fields.learned(one, role, place, problems),
        name=name if isinstance(name, str) else "",
        call_id=call_id if isinstance(call_id, str) else "",
    )
    return made if role else None


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
    turn: dict[str, Any],
    tag: str,
    place: Path_,
    role: str,
    problems: list[Problem],
    may_be_empty: bool = False,
) -> str:
    content = turn.get(tag)
    if may_be_empty and not content:
        return ""
    if (
        type(content) is list and content and all(type(p) is tuple for p in content)
    ):  # OpenAI's content parts
        kinds: list[Any] = [dict(p).get("type") for p in content]
        if others := [n for n, held in enumerate(kinds) if held not in TEXT_PARTS]:
            fault = f"is a part of the type {kinds[others[0]]!r}, and only texts are learned"
            problems.append(((*place, tag, others[0]), fault, "drop the part, or the row"))
            return ""
        texts: list[Any] = [dict(p).get("text") for p in content]
        for n, text in enumerate(texts):
            if type(text) is not str:
                problems.append(((*place, tag, n), "has no text", "write a text, or drop the part"))
                return ""
        content = "".join(texts)
    if content is None:
        problems.append((place, f"the turn has no {tag!r}", f"add {tag!r}"))
    elif type(content) is not str:
        problems.append(
            ((*place, tag), f"is {kind(content)}, not a text", "write a text in quotation marks")
        )
    elif not content.strip() and role not in ("system", "tool"):
        problems.append(
            ((*place, tag), "is empty", "write something, or remove the turn with its partner")
        )
    else:
        return content
    return ""


def _prompt(row: dict[str, Any], columns: Columns, where: str) -> Row | list[Problem]:
    ask = columns.name("prompt")
    reply = _reply(row, columns)
    asked, answered = row.get(ask), row.get(reply)
    if type(asked) is list and type(answered) is list:  # TRL's conversations in two halves
        whole = {k: v for k, v in row.items() if k not in (ask, reply)}
        return _chat(whole | {columns.name("messages"): [*asked, *answered]}, columns, where, "")
    problems: list[Problem] = []
    system = fields.system(row, columns.name("system"), problems)
    _text(row, ask, problems)
    _text(row, reply, problems)
    tools = fields.tools(row, columns.name("tools"), problems)
    lead = (Turn("system", system),) if system else ()
    turns = (*lead, Turn("user", row[ask]), Turn("assistant", row[reply])) if not problems else ()
    return problems or Row(where, turns, tools=tools)


def _reply(row: dict[str, Any], columns: Columns) -> str:
    """The name of the answer beside a prompt: completion, or response where there is none."""
    name = columns.name("completion")
    return "response" if name not in row and "response" in row else name


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
            ((name,), f"is {kind(value)}, not a text", "write a text in quotation marks")
        )
    elif not value.strip() and not (may_be_empty or may_be_absent):
        problems.append(((name,), "is empty", "write something, or remove the row"))


def _missing(row: dict[str, Any], name: str) -> Problem:
    close = difflib.get_close_matches(
        name, [k for k in row if k not in ("instruction", "input", "output")], 1, 0.6
    )
    if close:
        fix = f"call it {name!r}" if name in _OURS else "name that in data.columns, or --column"
        return ((close[0],), f"the row has no {name!r}, but {close[0]!r}", fix)
    for column, value in row.items():
        if type(value) is list and value and type(value[0]) is tuple:
            turns = {"role": "messages", "from": "conversations"}
            form = next((form for key, form in turns.items() if key in dict(value[0])), "")
            if form:
                fix = f'set data.columns = {{ {form} = "{column}" }}'
                return ((column,), f"the row has no {form!r}, but turns in {column!r}", fix)
    asks = next((k for k in _ASKS if isinstance(row.get(k), str)), None)
    answers = next((k for k in _ANSWERS if isinstance(row.get(k), str)), None)
    mapped = f", or say what the file calls it: data.columns, --column {name}=NAME"
    if name not in _OURS:  # data.columns told what the file calls it
        mapped = ', or leave such rows out: data.bad_rows = "drop" (commands: --drop-bad)'
    elif name in ("instruction", "output") and asks and answers:
        beside = next((k for k in _BESIDE if isinstance(row.get(k), str)), None)
        named = {"instruction": asks, "input": beside, "output": answers}
        told = [(key, column) for key, column in named.items() if column]
        set_ = ", ".join(f'{key} = "{column}"' for key, column in told)
        words = " ".join(f"--column {key}={_word(column)}" for key, column in told)
        mapped = f", or set data.columns = {{ {set_} }} (commands: {words})"
    return (
        (),
        f"the row has no {name!r}",
        f"add {name!r}{mapped}; it has {', '.join(map(repr, row)) or 'nothing'}",
    )


def _word(column: str) -> str:
    """A column's name as a shell takes it."""
    return column if re.fullmatch(r"[\w.-]+", column) else shlex.quote(column)


def kind(value: Any) -> str:
    """What a value of JSON is, in words."""
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
    """What no row should hold, at any depth: a field given twice in one object; in a text NUL,
    U+FFFD (what is left of a broken decoding), half of a surrogate pair."""
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
    if type(value) is tuple and len(dict(value)) != len(value):
        return [twice((key for key, _ in value), path)]
    items = value if type(value) is tuple else enumerate(value) if type(value) is list else ()
    return [problem for key, inner in items for problem in suspicious_texts(inner, (*path, key))]


def twice(keys: Iterable[str], path: Path_ = ()) -> Problem:
    """That one of the `keys` of the object at `path` is given twice."""
    counted = Counter(keys)
    name = max(counted, key=lambda key: counted[key])
    return ((*path, name), f"the field {name!r} is given twice", "keep one")
