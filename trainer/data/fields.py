"""Fields beside the texts of a row: what says whether an answer is learned, reasoning, tool calls,
tools, system prompts; and fields that nothing here reads. Pure functions of a decoded row, whose
objects are tuples of pairs (scan.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

Path_ = tuple[str | int, ...]
Problem = tuple[Path_, str, str]  # place in the row, reason, fix

LEARNED_FLAGS = ("weight", "train", "loss")  # OpenAI's, Axolotl's, ms-swift's
REASONING = ("reasoning_content", "reasoning", "thinking")
SYSTEM = ("system", "system_prompt", "system_message", "meta_instruction")
TOOLS = ("tools", "functions")
TURN_FIELDS = frozenset(
    [*LEARNED_FLAGS, *REASONING, "tool_calls", "function_call", "tool_call_id", "name"]
)
# fields that nothing here reads and that would change what is learned, and what to do about each
MEANINGFUL = {
    **dict.fromkeys(
        (
            *("weight", "weights", "train", "loss", "mask", "loss_mask", "loss_weight"),
            *("trainable", "training", "learn", "masked", "ignore"),
            *("train_detail", "training_detail"),  # Axolotl's, of parts of a turn
        ),
        "give each turn its own weight (0 or 1), or take it out",
    ),
    **dict.fromkeys(
        (
            *(*REASONING, "thought", "thoughts", "cot", "chain_of_thought", "rationale"),
            *("reasoning_details", "thinking_blocks"),  # OpenRouter's, LiteLLM's
        ),
        'write it into the answer\'s turn as "reasoning_content", or take it out',
    ),
    **dict.fromkeys(
        (*TOOLS, "tool_calls", "function_call", "available_tools"),
        'write the row as "messages" with "tools", or take it out',
    ),
    **dict.fromkeys((*SYSTEM, "history"), "write the row as a conversation, or take it out"),
    **dict.fromkeys(
        ("image", "images", "video", "videos", "audio", "audios"),
        "only text is learned: take it out, or leave the row out",
    ),
    **dict.fromkeys(
        ("chosen", "rejected", "label", "labels", "kto_tag"),
        "this stage does not learn from judgements: leave the row out, or take the field out",
    ),
    "chat_template_kwargs": "set data.enable_thinking for all rows, or take it out",
    "documents": "write them into a turn, or take it out",
}
# fields that say as much by false or 0 as by true or 1; the first ask to learn, as is done anyway
ASKS = (*LEARNED_FLAGS, "weights", "loss_weight", "trainable", "training", "learn")
BY_FALSE = frozenset((*ASKS, "label", "kto_tag"))
PLACE = re.compile(r"\{\{(\w+)\}\}")
IDENTITY = ("name", "author")  # of LLaMA-Factory's identity.json: never meant as they stand


def plain(value: Any) -> Any:
    """Tuples of pairs as dicts, all the way down."""
    if type(value) is tuple:
        return {key: plain(inner) for key, inner in value}
    return [plain(inner) for inner in value] if type(value) is list else value


def unread(
    row: Mapping[str, Any], read: Collection[str], place: Path_ = ()
) -> tuple[list[str], list[Problem]]:
    """(names of filled fields that nothing reads, those of them that would change what is
    learned)."""
    names = [k for k in row if k not in read and _tells(k, row[k])]
    problems = [
        ((*place, name), "nothing reads this field, and it can change what is learned", fix)
        for name in names
        if (fix := MEANINGFUL.get(name.lower()) or _turns_fix(row[name]))
        and not (name in ASKS and row[name] in (1, True))
    ]
    return names, problems


def _tells(name: str, value: Any) -> bool:
    """Whether a field says something: an empty one, as tables have them, does not."""
    if value in (0, False):
        return name.lower() in BY_FALSE
    return value not in (None, "", [], ())


def _turns_fix(value: Any) -> str:
    """What to do about a list of turns under a name that nobody knows."""
    if type(value) is not list or not value or type(value[0]) is not tuple:
        return ""
    keys = {k for k, _ in value[0]}
    if {"role", "content"} <= keys or {"from", "value"} <= keys:
        return 'it holds turns: name it in data.columns ({ messages = "..." }), or take it out'
    return ""


def learned(turn: Mapping[str, Any], role: str, place: Path_, problems: list[Problem]) -> bool:
    """Whether a turn is learned by what its flags say."""
    said = True
    for name in LEARNED_FLAGS:
        value = turn.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            problems.append(
                ((*place, name), f"is {value!r}, which is neither 0 nor 1", "write 0 or 1")
            )
        elif role != "assistant":
            if value and name != "weight":
                problems.append(
                    ((*place, name), f"asks to learn a turn of the {role}", "write false")
                )
        else:
            said = said and bool(value)
    return said


def reasoning(turn: Mapping[str, Any], role: str, place: Path_, problems: list[Problem]) -> str:
    """What an answer says of its reasoning, under any of the names that people use."""
    given = [(name, turn[name]) for name in REASONING if turn.get(name)]
    if not given:
        return ""
    name, value = given[0]
    if type(value) is not str:
        problems.append(((*place, name), "is not a text", "write a text in quotation marks"))
    elif role != "assistant":
        problems.append(((*place, name), f"is in a turn of the {role}", "move it to the answer"))
    elif any(other != value for _, other in given):
        problems.append(((*place, given[1][0]), f"differs from {name!r}", "keep one of them"))
    else:
        return value
    return ""


def calls(turn: Mapping[str, Any], role: str, place: Path_, problems: list[Problem]) -> list[Any]:
    """The tool calls of an answer as OpenAI writes them, their arguments decoded."""
    name = "tool_calls" if turn.get("tool_calls") else "function_call"
    given = turn.get(name)
    if not given:
        return []
    if role != "assistant":
        problems.append(((*place, name), f"is in a turn of the {role}", "move it to the answer"))
        return []
    return read_calls(given if type(given) is list else [given], (*place, name), problems)


def read_calls(given: Iterable[Any], place: Path_, problems: list[Problem]) -> list[Any]:
    found = []
    for i, raw in enumerate(given):
        call = plain(raw)
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            fix = 'write {"name": ..., "arguments": {...}}'
            problems.append(((*place, i), "is no call of a tool", fix))
            continue
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _decoded(arguments or "{}")
        if not isinstance(arguments, dict):
            problems.append(
                ((*place, i), f"the arguments of {name!r} are no object", "write {...}")
            )
            continue
        found.append(
            {"type": "function"}
            | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})
            | {"function": {"name": name, "arguments": arguments}}
        )
    return found


def calls_of_text(text: str, place: Path_, problems: list[Problem]) -> list[Any]:
    """The calls of a turn whose whole text is JSON (LLaMA-Factory's function_call)."""
    given = _decoded(text)
    if isinstance(given, dict | list):
        return read_calls(given if isinstance(given, list) else [given], place, problems)
    problems.append((place, "is no JSON of a call", 'write {"name": ..., "arguments": {...}}'))
    return []


def tools(row: Mapping[str, Any], name: str, problems: list[Problem]) -> tuple[Any, ...]:
    """The tools that a row offers, as servers hand them to a chat template; JSON text is
    decoded."""
    field = name if name != "tools" else next((n for n in TOOLS if row.get(n)), name)
    given = plain(row.get(field))
    if not given:
        return ()
    if isinstance(given, str):
        given = _decoded(given)
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        problems.append(((field,), "is no list of tools", 'write [{"type": "function", ...}]'))
        return ()
    return tuple(map(_wrapped, given))


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool whose function stands bare, as ShareGPT and xLAM write it, in OpenAI's wrapping."""
    if "function" in tool or not isinstance(tool.get("name"), str):
        return tool
    if tool.get("type", "function") != "function":
        return tool
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def system(row: Mapping[str, Any], name: str, problems: list[Problem]) -> str:
    """The system prompt that a column gives to a row, '' where none does."""
    field = name if name != "system" else next((n for n in SYSTEM if row.get(n)), name)
    value = row.get(field)
    if value is None or type(value) is str:
        return value if value and value.strip() else ""
    problems.append(((field,), "is not a text", "write a text in quotation marks"))
    return ""


def find_place(value: Any, names: Collection[str], path: Path_ = ()) -> tuple[Path_, str] | None:
    """Where in a row `{{name}}` stands, for the first of `names` that does."""
    if isinstance(value, str):
        held = [m[1] for m in PLACE.finditer(value) if m[1] in names] if "{{" in value else []
        return (path, held[0]) if held else None
    items = value if type(value) is tuple else enumerate(value) if type(value) is list else ()
    for key, inner in items:
        if found := find_place(inner, names, (*path, key)):
            return found
    return None


def fill(text: str, values: Mapping[str, str]) -> str:
    """`{{name}}` replaced where `values` has it."""
    return PLACE.sub(lambda m: values.get(m[1], m[0]), text) if "{{" in text else text


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
