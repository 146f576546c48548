"""A row in another layout, with nothing lost: what is written is read back, and must say the same.
Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from trainer.data import formats
from trainer.data.formats import Columns, Row
from trainer.data.pairs import Pair, Tagged, pair_of, tagged_of
from trainer.data.records import Kind
from trainer.data.template import Turn

Layout = Literal["messages", "sharegpt", "alpaca", "preference"]
LAYOUTS = get_args(Layout)
_SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


class Unfit(ValueError):
    """A row that the other layout cannot hold; the text says what it would lose."""


class _Parsed(NamedTuple):
    turns: tuple[Turn, ...]
    rejected: tuple[Turn, ...] = ()
    tools: tuple[Any, ...] = ()
    others: tuple[str, ...] = ()  # names of fields that nothing reads, which are kept


def converted(line: str, kind: Kind, form: str, columns: Columns, to: Layout) -> dict[str, Any]:
    """The row of a `Record.line`. Of a pair the preferred answer stays in the layouts that hold one
    answer, of a tagged one the answer that is wanted. Raises Unfit."""
    parsed = _parsed(line, kind, form, columns)
    if to == "preference" and not parsed.rejected:
        raise Unfit("it has one answer, not two")
    row = _WRITERS[to](parsed)
    if to == "preference":
        back: Any = pair_of(_pairs_of(row), Columns(), "")
        same = isinstance(back, Pair) and _said(back.chosen) == _said(parsed.turns)
        same = same and _said(back.rejected) == _said(parsed.rejected)
    else:
        back = formats.problems_or_row(_tuples(row), to, Columns(), "")
        same = isinstance(back, Row) and _said(back.turns) == _said(parsed.turns)
        same = same and list(back.tools) == list(parsed.tools)
    if not same:
        raise Unfit(f"{to} would lose a part of it")
    whole = json.loads(line)
    return row | {name: whole[name] for name in parsed.others if name not in row}


def _parsed(line: str, kind: Kind, form: str, columns: Columns) -> _Parsed:
    value = json.loads(line, object_pairs_hook=tuple)
    if kind == "prompts":
        raise Unfit("it needs no answer, and these layouts do")
    if kind == "pairs":
        pair = pair_of(dict(value), columns, "")
        assert isinstance(pair, Pair), "the row was read before"
        return _Parsed(pair.chosen, pair.rejected)
    if kind == "tagged":
        tagged = tagged_of(dict(value), columns, "")
        assert isinstance(tagged, Tagged), "the row was read before"
        if not tagged.wanted:
            raise Unfit("its answer is not wanted")
        return _Parsed(tagged.turns)
    row = formats.problems_or_row(value, form, columns, "")
    assert isinstance(row, Row), "the row was read before"
    if row.text:
        raise Unfit("it is a text that is learned whole")
    return _Parsed(row.turns, (), row.tools, row.unread)


def _said(turns: Sequence[Turn]) -> list[Turn]:
    """Turns as every layout has them: Alpaca's input is a part of what the user says."""
    return [turn._replace(text=_text(turn), extra="") for turn in turns]


def _text(turn: Turn) -> str:
    return "\n".join(part for part in (turn.text, turn.extra) if part)


def _message(turn: Turn) -> dict[str, Any]:
    made: dict[str, Any] = {"role": turn.role, "content": _text(turn)}
    if turn.reasoning:
        made["reasoning_content"] = turn.reasoning
    if turn.calls:
        made["tool_calls"] = list(turn.calls)
    if not turn.learned and turn.role == "assistant":
        made["weight"] = 0
    if turn.role == "tool":
        made |= {"name": turn.name} if turn.name else {}
        made |= {"tool_call_id": turn.call_id} if turn.call_id else {}
    return made


def _messages(parsed: _Parsed) -> dict[str, Any]:
    tools = {"tools": list(parsed.tools)} if parsed.tools else {}
    return {"messages": [_message(turn) for turn in parsed.turns], **tools}


def _sharegpt(parsed: _Parsed) -> dict[str, Any]:
    turns = []
    for turn in parsed.turns:
        if turn.calls:
            calls = [call["function"] for call in turn.calls]
            value = json.dumps(calls if len(calls) > 1 else calls[0], ensure_ascii=False)
            turns.append({"from": "function_call", "value": value})
        else:
            turns.append({"from": _SHAREGPT[turn.role], "value": _text(turn)})
    tools = {"tools": list(parsed.tools)} if parsed.tools else {}
    return {"conversations": turns, **tools}


def _alpaca(parsed: _Parsed) -> dict[str, Any]:
    turns = list(parsed.turns)
    system = turns.pop(0).text if turns[0].role == "system" else ""
    *before, asked, answer = turns if len(turns) > 1 else [Turn("user", ""), *turns]
    if any(turn.role not in ("user", "assistant") for turn in turns) or len(before) % 2:
        raise Unfit("alpaca has questions and answers by turns, and no more")
    history = [[_text(a), b.text] for a, b in zip(before[::2], before[1::2], strict=True)]
    row: dict[str, Any] = {"instruction": asked.text, "input": asked.extra, "output": answer.text}
    return row | ({"system": system} if system else {}) | ({"history": history} if history else {})


def _preference(parsed: _Parsed) -> dict[str, Any]:
    *before, chosen = parsed.turns
    return {
        "prompt": [_message(turn) for turn in before],
        "chosen": [_message(chosen)],
        "rejected": [_message(parsed.rejected[-1])],
    }


_WRITERS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "preference": _preference,
}


def _tuples(row: dict[str, Any]) -> Any:
    return json.loads(json.dumps(row), object_pairs_hook=tuple)


def _pairs_of(row: dict[str, Any]) -> dict[str, Any]:
    return dict(_tuples(row))
