"""Preferences: pairs of answers to one prompt, and single answers that are wanted or not.

Read as they are: LLaMA-Factory's `ranking` (alpaca with `chosen` and `rejected` texts, sharegpt and
messages with a turn each), its `kto_tag` (and `label`), the 2023 form of comparison_gpt4
(`output: [better, worse]`), TRL's preference forms (a prompt given or the same beginning of both
sides; texts or messages; `margin`) and its unpaired form (`label`).

Each side is read as the conversation that it ends (trainer/data/formats.py), so a side has every
defect of a row, told at its own place; besides, equal sides, prompts that differ, rows that say the
opposite of another. No answer is ever cut: a row that is too long is refused or dropped whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data import files, formats
from trainer.data.errors import InvalidJob
from trainer.data.fields import Problem
from trainer.data.files import Findings
from trainer.data.formats import Columns, Row
from trainer.data.prepare import Reader
from trainer.data.sources import Defect, Reading, Source, find_sources
from trainer.data.template import Template, Turn
from trainer.data.tokenised import Rows, tokenise
from trainer.data.tokens import Vocabulary
from trainer.data.words import number_of
from trainer.wire.job import Job

TAGS = ("kto_tag", "label")
SIDES = ("chosen", "rejected")


class Pair(NamedTuple):
    """Two answers to one prompt; `chosen` and `rejected` are whole conversations. `tools` and
    `unread` are as in a Row."""

    where: str
    chosen: tuple[Turn, ...]
    rejected: tuple[Turn, ...]
    margin: float = 0.0
    tools: tuple[Any, ...] = ()
    unread: tuple[str, ...] = ()


class Tagged(NamedTuple):
    where: str
    turns: tuple[Turn, ...]
    wanted: bool
    tools: tuple[Any, ...] = ()
    unread: tuple[str, ...] = ()


Found = Pair | Tagged
Value = dict[str, Any]  # a row's object by key; objects inside are tuples of pairs
Read = Callable[[Value, Columns, str], Found | list[Problem]]


LARGEST_MARGIN = 1e6  # in float32 a loss is still told from its neighbour


# -- one row ---------------------------------------------------------------------------------------


def pair_of(row: Value, columns: Columns, where: str) -> Pair | list[Problem]:
    """A pair, or what is wrong with the row and where."""
    margin = row.get("margin", 0.0)
    found = _sides({k: v for k, v in row.items() if k != "margin"}, columns)
    if isinstance(found, list):
        return found
    problems: list[Problem] = []
    if type(margin) not in (int, float):
        problems.append((("margin",), f"is {formats.kind(margin)}, not a number", "write a number"))
    elif not abs(margin) <= LARGEST_MARGIN:  # NaN is not either
        problems.append((("margin",), "is no margin of rewards", f"at most {LARGEST_MARGIN:,.0f}"))
    read: list[Row] = []
    for side in found:
        one = side.read(columns, where)
        if isinstance(one, Row):
            read.append(one)
        else:
            problems += [p for p in one if p not in problems]
    if problems:
        return problems
    chosen, rejected = (row.turns for row in read)
    if chosen[:-1] != rejected[:-1]:
        return [((), "its two sides answer different prompts", "give both sides one prompt")]
    if _said(chosen[-1]) == _said(rejected[-1]):
        return [((), "its two sides are equal: nothing is preferred", "remove the row")]
    return Pair(where, chosen, rejected, float(margin), read[0].tools, read[0].unread)


def _said(answer: Turn) -> tuple[str, str, list[Any]]:
    """All that an answer says."""
    calls = [call["function"] for call in answer.calls]
    return answer.text.strip(), answer.reasoning.strip(), calls


def tagged_of(row: Value, columns: Columns, where: str) -> Tagged | list[Problem]:
    """A tagged answer, or what is wrong with the row and where."""
    names = [columns.name("kto_tag"), *TAGS]
    tag = next((name for name in names if name in row), None)
    if tag is None:
        return [((), "the row has no 'kto_tag'", 'add "kto_tag": true or false')]
    if type(row[tag]) is not bool:
        fix = "write true or false, without quotation marks"
        return [((tag,), f"is {formats.kind(row[tag])}, not true or false", fix)]
    wanted, row = row[tag], {k: v for k, v in row.items() if k != tag}
    form = formats.guess(set(row), columns) or "alpaca"
    if isinstance(row.get("prompt"), list) or isinstance(row.get("completion"), list):
        turns = [*_messages(row.get("prompt")), *_messages(row.get("completion"))]
        row = {k: v for k, v in row.items() if k not in ("prompt", "completion")}
        row, form = {**row, "messages": turns}, "messages"
    read = formats.problems_or_row(tuple(row.items()), form, columns, where)
    if not isinstance(read, Row):
        return read
    return Tagged(where, read.turns, wanted, read.tools, read.unread)


class _Side(NamedTuple):
    """A conversation in one of formats.py's forms, and where its parts stand in the user's row."""

    value: Value
    form: str
    places: dict[str, str]  # name of a field here -> its name there

    def read(self, columns: Columns, where: str) -> Row | list[Problem]:
        read = formats.problems_or_row(tuple(self.value.items()), self.form, columns, where)
        return read if isinstance(read, Row) else [self._there(p) for p in read]

    def _there(self, problem: Problem) -> Problem:
        (place, reason, fix) = problem
        for here, there in self.places.items():
            if place and place[0] == here:
                return ((there, *place[1:]), reason, fix)
        last = len(self.value.get("messages") or self.value.get("conversations") or ()) - 1
        if "" in self.places and len(place) > 1 and place[1] == last:
            return ((self.places[""], *place[2:]), reason, fix)
        return problem


def _sides(row: Value, columns: Columns) -> list[Problem] | tuple[_Side, _Side]:
    """Both sides of a row as conversations, whatever its form."""
    names = [columns.name(side) for side in SIDES]
    output = columns.name("output")
    if names[0] not in row and type(row.get(output)) is list:  # comparison_gpt4 of 2023
        answers = row[output]
        if len(answers) != 2:
            fix = "write [better, worse]"
            return [((output,), f"holds {number_of(len(answers), 'answer')}, not two", fix)]
        return _both(lambda at: _Side({**row, output: answers[at]}, "alpaca", {}))
    missing = [name for name in names if row.get(name) is None]
    if missing:
        fix = f"add {missing[0]!r}, or name another data.format"
        return [((), f"the row has no {missing[0]!r}", fix)]
    kinds = {type(row[name]) for name in names}
    if len(kinds) > 1:
        return [((names[1],), f"is another kind of value than {names[0]!r}", "write both alike")]
    [kind] = kinds
    if kind is str:
        return _of_texts(row, columns, names)
    if kind in (tuple, list):
        return _of_turns(row, columns, names)
    return [((names[0],), f"is {formats.kind(row[names[0]])}", "write a text or a turn")]


def _both(make: Callable[[int], _Side]) -> tuple[_Side, _Side]:
    return make(0), make(1)


def _of_texts(
    row: Value, columns: Columns, names: Sequence[str]
) -> list[Problem] | tuple[_Side, _Side]:
    ask = columns.name("instruction")
    kept = {k: v for k, v in row.items() if k not in names}
    if ask in row:
        out = columns.name("output")
        return _both(lambda at: _Side({**kept, out: row[names[at]]}, "alpaca", {out: names[at]}))
    if columns.name("prompt") in row:
        out = columns.name("completion")
        return _both(lambda at: _Side({**kept, out: row[names[at]]}, "prompt", {out: names[at]}))
    key = next((k for k in ("conversations", "messages") if columns.name(k) in row), None)
    if key is not None:  # a conversation, and answers that are texts
        form = "sharegpt" if key == "conversations" else "messages"
        return _both(
            lambda at: _chat_side(
                row, columns, form, [_turn(columns, form, "assistant", row[names[at]])], names[at]
            )
        )
    common = _common([row[name] for name in names])
    if not row[names[0]][:common].strip():
        reason = "its two sides begin differently, and there is no prompt"
        return [((), reason, 'add "prompt": the question that both answer')]
    return _both(
        lambda at: _Side(
            {"prompt": row[names[at]][:common], "completion": row[names[at]][common:]},
            "prompt",
            {"completion": names[at], "prompt": names[at]},
        )
    )


def _common(texts: Sequence[str]) -> int:
    """Characters that both begin with, to the end of a word: the prompt of TRL's implicit form."""
    at = 0
    for a, b in zip(*texts, strict=False):
        if a != b:
            break
        at += 1
    while at and not texts[0][at - 1].isspace() and texts[0][at - 1].isascii():
        at -= 1
    return at


def _of_turns(row: Value, columns: Columns, names: Sequence[str]) -> tuple[_Side, _Side]:
    key = next((k for k in ("conversations", "messages") if columns.name(k) in row), None)
    form = "sharegpt" if key == "conversations" else "messages"
    sides = [_messages(row[name]) for name in names]
    asked = row.get(columns.name("prompt"))
    if key is None and isinstance(asked, list | str):
        said = asked if isinstance(asked, list) else [_turn(columns, form, "user", asked)]
        row = {k: v for k, v in row.items() if k != columns.name("prompt")}
        row |= {columns.name("messages"): said}
    if _are_whole(row, columns, form, sides):
        copies = [columns.name(k) for k in ("prompt", "conversations", "messages")]
        row = {k: v for k, v in row.items() if k not in copies}
    return _both(lambda at: _chat_side(row, columns, form, sides[at], names[at]))


def _are_whole(row: Value, columns: Columns, form: str, sides: Sequence[list[Any]]) -> bool:
    """Whether both sides repeat the prompt that stands beside them, as UltraFeedback's do."""
    before = row.get(columns.name("conversations" if form == "sharegpt" else "messages"))
    role, content = _tags(columns, form)
    if type(before) is not list or not before or type(before[0]) is not tuple:
        return False
    if not all(type(turn) is tuple for side in sides for turn in side[:2]):
        return False
    first, roles = dict(before[0]).get(content), columns.roles or formats.ROLES
    return all(
        len(side) > 1
        and roles.get(str(dict(side[0]).get(role))) != "assistant"
        and any(dict(turn).get(content) == first for turn in side[:2])
        for side in sides
    )


def _messages(value: Any) -> list[Any]:
    """One turn, or a list of turns."""
    return list(value) if type(value) is list else [] if value is None else [value]


def _tags(columns: Columns, form: str) -> tuple[str, str]:
    """The keys of a turn's role and of its text."""
    role, content = ("from", "value") if form == "sharegpt" else ("role", "content")
    return columns.role_tag or role, columns.content_tag or content


def _turn(columns: Columns, form: str, role: str, text: str) -> tuple[tuple[str, str], ...]:
    name = next((k for k, v in columns.roles.items() if v == role), None)
    sharegpt = {"user": "human", "assistant": "gpt"}
    name = name or (sharegpt[role] if form == "sharegpt" else role)
    role_tag, content_tag = _tags(columns, form)
    return ((role_tag, name), (content_tag, text))


def _chat_side(row: Value, columns: Columns, form: str, turns: list[Any], name: str) -> _Side:
    key = columns.name("conversations" if form == "sharegpt" else "messages")
    before = row.get(key)
    said = [*(before if type(before) is list else []), *turns]
    read = (key, *(columns.name(side) for side in SIDES))
    value = {k: v for k, v in row.items() if k not in read} | {key: said}
    return _Side(value, form, {"": name})


# -- files -----------------------------------------------------------------------------------------


def _reader(read: Read) -> Callable[..., tuple[list[Any], list[Defect]]]:
    def read_files(
        paths: Sequence[tuple[Path, str]], reading: Reading, notes: list[str] | None = None
    ) -> tuple[list[Found], list[Defect]]:
        findings = Findings()
        given = replace(reading, form="auto")
        sources, findings.defects = find_sources(paths, given, preferences=True)
        found: list[Found] = []
        for source in sources:
            mine = list(islice(_examine(source, read, findings), source.max_rows))
            findings.defects += contradictions(mine, source.name)
            found += mine
        if notes is not None:
            notes += findings.notes()
        return found, sorted(findings.defects)

    return read_files


def _examine(source: Source, read: Read, findings: Findings) -> Iterator[Found]:
    def validate(value: Any, source: Source, where: str) -> Any:
        if type(value) is not tuple:
            return formats.problems_or_row(value, "alpaca", source.columns, where)
        return formats.suspicious_texts(value) or read(dict(value), source.columns, where)

    return files.sound_rows(source, findings, validate)


def contradictions(found: Sequence[Found], name: str) -> list[Defect]:
    """Rows that say the opposite of an earlier one of the file: no model can be right on both."""
    seen: dict[str, str] = {}
    defects = []
    for row in found:
        if isinstance(row, Pair):
            said, opposite = repr((row.chosen, row.rejected)), repr((row.rejected, row.chosen))
        else:
            said, opposite = repr((row.turns, row.wanted)), repr((row.turns, not row.wanted))
        line = int(row.where.rpartition(":")[2].split()[-1])
        if other := seen.get(opposite):
            reason = f"says the opposite of {other}"
            defects.append(Defect(name, line, 1, "", reason, "remove one of the two"))
        else:
            seen.setdefault(said, row.where)
    return defects


# -- tokens ----------------------------------------------------------------------------------------


def conversations(item: Row | Found) -> list[Row]:
    """An item as the rows that are tokenised of it."""
    if isinstance(item, Row):
        return [item]
    turns = (item.chosen, item.rejected) if isinstance(item, Pair) else (item.turns,)
    return [Row(item.where, side, tools=item.tools) for side in turns]


def tokenise_pairs(found: list[Pair], vocabulary: Vocabulary, template: Template, job: Job) -> Rows:
    """Rows 2k and 2k + 1 are the chosen and the rejected side of pair k, in which only the last
    answer is trained; `extra["margin"]` is the pair's, on both. Raises InvalidJob as
    tokenised.tokenise, and for data.over_length = "truncate"."""
    sides = [row for pair in found for row in conversations(pair)]
    rows, kept = _whole(sides, 2, vocabulary, template, job)
    margins = np.asarray([found[k].margin for k in kept], np.float32)
    return replace(rows, extra={"margin": np.repeat(margins, 2)})


def tokenise_tagged(
    found: list[Tagged], vocabulary: Vocabulary, template: Template, job: Job
) -> Rows:
    """Rows in which only the last answer is trained; `extra["wanted"]` is 1 or 0. Raises InvalidJob
    as tokenised.tokenise, for data.over_length = "truncate", and where all are of one kind."""
    plain = [row for tagged in found for row in conversations(tagged)]
    rows, kept = _whole(plain, 1, vocabulary, template, job)
    wanted = np.asarray([found[k].wanted for k in kept], np.float32)
    if len(kept) and wanted.min() == wanted.max():
        what = "wanted" if wanted[0] else "unwanted"
        raise InvalidJob(
            f"every answer is {what}: there is nothing to tell apart", hint="add others"
        )
    return replace(rows, extra={"wanted": wanted})


def _whole(
    sides: list[Row], size: int, vocabulary: Vocabulary, template: Template, job: Job
) -> tuple[Rows, list[int]]:
    """(rows of groups of `size` that are short enough, the numbers of these groups)."""
    policy, most = job.data.over_length, job.data.max_length
    if policy in ("truncate", "split"):
        raise InvalidJob(
            f'data.over_length = "{policy}" would change what is compared: an answer stays whole, '
            "with all of its prompt",
            hint='set data.over_length = "drop"',
        )
    last = {"max_length": 1 << 30, "over_length": "refuse", "train_on": "last"}
    rows = tokenise(sides, vocabulary, template, job.data.model_copy(update=last))
    if len(rows) != len(sides):
        raise InvalidJob(
            "answers that are not to be learned have no place among preferences", rows.notes
        )
    long = np.asarray(rows.lengths).reshape(-1, size).max(1, initial=0)
    over = np.flatnonzero(long > most)
    told = [f"{rows.where[k * size]}: {long[k]} tokens, data.max_length is {most}" for k in over]
    if len(over) and policy == "refuse":
        raise InvalidJob(
            f"{len(over)} of {len(long)} rows cannot be trained on",
            told,
            f'set data.max_length to {long.max()} (the longest row), or data.over_length to "drop"',
        )
    kept = [k for k in range(len(long)) if long[k] <= most]
    chosen = [k * size + i for k in kept for i in range(size)]
    return _select(rows, chosen, [f"{t}: dropped" for t in told]), kept


def _select(rows: Rows, chosen: Sequence[int], notes: list[str]) -> Rows:
    spans = [slice(rows.starts[r], rows.starts[r + 1]) for r in chosen]
    lengths = [s.stop - s.start for s in spans]
    return replace(
        rows,
        ids=np.concatenate([np.zeros(0, np.int32), *(rows.ids[s] for s in spans)]),
        trained=np.concatenate([np.zeros(0, np.bool_), *(rows.trained[s] for s in spans)]),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompted=np.ones(len(spans), np.bool_),
        where=[rows.where[r] for r in chosen],
        notes=[*rows.notes, *notes],
    )


PAIRS = Reader("pairs", _reader(pair_of), tokenise_pairs)
TAGGED = Reader("tagged", _reader(tagged_of), tokenise_tagged)
