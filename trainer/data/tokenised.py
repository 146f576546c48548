"""Rows as tokens: ids, and which of them are targets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np

from trainer.data.chat import Example
from trainer.data.errors import InvalidJob
from trainer.data.formats import Row
from trainer.data.render import examples
from trainer.data.split import split_long
from trainer.data.template import Segment, Template, TemplateError
from trainer.data.tokens import Vocabulary, encode, stop_ids, stop_token, unjoined
from trainer.wire.job import Data

AT_ONCE = 4096  # rows tokenised together: the tokenizer spreads them over the cores


@dataclass(frozen=True)
class Rows:
    """Tokenised rows, end to end: row i is ids[starts[i]:starts[i+1]]; `trained` marks targets;
    `where` is file:line. `notes` are lines of single rows that were changed or left out, `summary`
    lines of all rows together. `thinking` is the flag with which a chat template's prompts ask for
    reasoning, None where it has none. `extra` are numbers of each row that a stage needs, by
    name."""

    ids: np.ndarray  # int32 (tokens,)
    trained: np.ndarray  # bool (tokens,)
    starts: np.ndarray  # int64 (rows + 1,)
    prompted: np.ndarray  # bool (rows,): has a prompt; plain text has none
    where: list[str]
    notes: list[str] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    thinking: bool | None = None
    extra: dict[str, np.ndarray] = field(default_factory=dict)  # (rows,)

    @classmethod
    def empty(cls) -> Rows:
        return cls(
            np.zeros(0, np.int32),
            np.zeros(0, np.bool_),
            np.zeros(1, np.int64),
            np.zeros(0, np.bool_),
            [],
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> list[int]:
        return cast(list[int], np.diff(self.starts).tolist())

    def targets(self) -> list[int]:
        """Target tokens of each row. Its first token is never one: nothing predicts it."""
        marks = self.trained.astype(np.int64)
        marks[self.starts[:-1]] = 0
        return np.add.reduceat(marks, self.starts[:-1]).tolist() if len(self) else []


def _note_long_row(
    where: str,
    tokens: int,
    limit: int,
    policy: str,
    cut: object | None,
    found: _Tokenised,
) -> None:
    """Adds to the notes or to the refusals what `policy` made of a row that is too long; `cut` is
    what is left of it."""
    what = f"{where}: {tokens} tokens, data.max_length is {limit}"
    if policy == "refuse":
        found.refused.append(what)
    elif policy == "truncate" and cut is None:
        found.refused.append(f"{what}, and its prompt alone fills that")
    else:
        found.notes.append(
            f"{what}: {'dropped' if cut is None else 'cut at the end, stop token kept'}"
        )


def tokenise(rows: Sequence[Row], vocabulary: Vocabulary, template: Template, data: Data) -> Rows:
    """Rows to ids and targets; `data` are the job's settings. Over-length rows are refused, dropped
    or cut as it says; each is in the notes or in the refusal. A row that would teach nothing, whose
    answer would not end in a stop token, or that holds a special token's text, is refused."""
    limit, policy = data.max_length, data.over_length
    stop, stops = stop_token(vocabulary, template), stop_ids(vocabulary, template)
    found = _Tokenised()
    for begin in range(0, len(rows), AT_ONCE):
        some: Sequence[Row] = rows[begin : begin + AT_ONCE]
        if policy == "split":
            counted = partial(_counted, vocabulary=vocabulary, template=template, data=data)
            some, split, pieces = split_long(some, counted, limit)
            found.long, found.cut_into = found.long + split, found.cut_into + pieces
        made = _rendered(some, vocabulary, template, data, found)
        texts = encode(vocabulary, template, [example.segments for _, example in made])
        for (row, _), (token_ids, trained) in zip(made, texts, strict=True):
            if fault := label_fault(token_ids, trained, stops):
                found.refuse(f"{row.where}: {fault}", data)
                continue
            if len(token_ids) > limit:
                found.longest = max(found.longest, len(token_ids))
                cut = truncated(token_ids, trained, stop, limit) if policy == "truncate" else None
                _note_long_row(row.where, len(token_ids), limit, policy, cut, found)
                if cut is None:
                    continue
                token_ids, trained = cut
            found.ids.append(np.asarray(token_ids, np.int32))
            found.marks.append(np.asarray(trained, np.bool_))
            found.prompted.append(bool(row.turns))
            found.where.append(row.where)
    if found.refused:
        hint = (
            long_rows_hint(found.longest, policy)
            if found.longest
            else "mend the rows above, or name another data.template"
        )
        raise InvalidJob(
            f"{len(found.refused)} of {len(rows)} rows cannot be trained on", found.refused, hint
        )
    return found.rows(data.enable_thinking)


def _counted(
    rows: Sequence[Row], vocabulary: Vocabulary, template: Template, data: Data
) -> list[int]:
    """Tokens of the longest example of each row, 0 of a row that is refused."""
    made = _rendered(rows, vocabulary, template, data, _Tokenised())
    texts = encode(vocabulary, template, [example.segments for _, example in made])
    longest: dict[int, int] = {}
    for (row, _), (ids, _) in zip(made, texts, strict=True):
        longest[id(row)] = max(len(ids), longest.get(id(row), 0))
    return [longest.get(id(row), 0) for row in rows]


@dataclass
class _Tokenised:
    """What tokenise() has made so far."""

    ids: list[np.ndarray] = field(default_factory=list)
    marks: list[np.ndarray] = field(default_factory=list)
    prompted: list[bool] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    longest: int = 0  # of the rows over the limit
    split: int = 0  # conversations that became several examples
    pieces: int = 0  # examples that they became
    long: int = 0  # conversations of more than data.max_length that were split
    cut_into: int = 0  # what they became
    empty_blocks: int = 0
    thinking: Counter[bool | None] = field(default_factory=Counter)

    def refuse(self, fault: str, data: Data) -> None:
        if data.bad_rows == "drop":
            self.notes.append(f"{fault}; left out")
        else:
            self.refused.append(fault)

    def rows(self, wanted: bool | None) -> Rows:
        """`wanted` is the job's enable_thinking."""
        starts = np.concatenate([[0], np.cumsum([len(i) for i in self.ids])]).astype(np.int64)
        return Rows(
            np.concatenate([np.zeros(0, np.int32), *self.ids]),
            np.concatenate([np.zeros(0, np.bool_), *self.marks]),
            starts,
            np.asarray(self.prompted, np.bool_),
            self.where,
            self.notes,
            self._summary(wanted),
            wanted if wanted is not None else self._flag(),
        )

    def _flag(self) -> bool | None:
        return (
            None if not (self.thinking[True] or self.thinking[False]) else bool(self.thinking[True])
        )

    def _summary(self, wanted: bool | None) -> list[str]:
        lines = []
        if self.long:
            lines.append(
                f"{self.long:,} conversations of more than data.max_length became "
                f"{self.cut_into:,}, split where a user speaks"
            )
        if self.split:
            lines.append(
                f"{self.split:,} conversations became {self.pieces:,} examples: the chat template "
                "writes earlier answers otherwise than it lets the model write them"
            )
        plain, reasoned = self.thinking[False], self.thinking[True]
        if wanted is None and plain:
            share = f"{plain:,} of {plain + reasoned:,} examples have" if reasoned else "no row has"
            lines.append(
                f"{share} no reasoning and are trained as with enable_thinking = false"
                if reasoned
                else f"{share} reasoning: trained as with enable_thinking = false; serve it so, or "
                "set data.enable_thinking"
            )
        if self.empty_blocks:
            lines.append(
                f"{self.empty_blocks:,} examples have no reasoning although the chat template's "
                "prompt opens a block of it: the model learns to close it, empty"
            )
        return lines


def _rendered(
    rows: Sequence[Row],
    vocabulary: Vocabulary,
    template: Template,
    data: Data,
    found: _Tokenised,
) -> list[tuple[Row, Example]]:
    """Each row's texts with their trained parts. Plain text is trained whole; what the template
    refuses, or spells out a special token, is added to `found.refused`."""
    specials = [s for s in vocabulary.special_texts if len(s) > 2]
    pattern = re.compile("|".join(map(re.escape, specials))) if specials else None
    made: list[tuple[Row, Example]] = []
    for row in rows:
        if row.text:
            end = "" if row.text.endswith(vocabulary.eos) else vocabulary.eos
            made.append((row, Example([Segment(row.text + end, True)])))
            continue
        if fault := special_token_fault(row, pattern):
            found.refuse(f"{row.where}: {fault}", data)
            continue
        try:
            some = examples(
                template,
                row.turns,
                vocabulary.special_tokens,
                tools=row.tools,
                thinking=data.enable_thinking,
                last_only=data.train_on == "last",
            )
        except TemplateError as error:
            found.refuse(f"{row.where}: {error}", data)
            continue
        if not some:
            found.notes.append(f"{row.where}: left out, no answer of it is to be learned")
        found.split += len(some) > 1
        found.pieces += len(some) if len(some) > 1 else 0
        found.empty_blocks += sum(example.empty_block for example in some)
        found.thinking.update(example.thinking for example in some)
        for example in some:
            parts = unjoined(vocabulary, example.segments) if template.name == "chat" else []
            if len(parts) > 1:
                made += [(row, Example(part)) for part in parts]
            else:
                made.append((row, example))
    return made


def long_rows_hint(longest: int, policy: str) -> str:
    """What to do about rows that are too long."""
    others = {"refuse": '"split" (conversations), "drop" or "truncate"', "truncate": '"drop"'}[
        policy
    ]
    return f"set data.max_length to {longest} (the longest row), or data.over_length to {others}"


def special_token_fault(row: Row, specials: re.Pattern[str] | None) -> str:
    """The fault of a row that spells out a special token: it would become that token in the middle
    of a text."""
    if specials is None:
        return ""
    for turn in row.turns:
        for text in (turn.text, turn.extra, turn.reasoning, turn.name, *_texts(turn.calls)):
            if text and (held := specials.search(text)):
                return _SPELLED.format(held[0])
    for text in _texts(row.tools):
        if held := specials.search(text):
            return _SPELLED.format(held[0])
    return ""


_SPELLED = "holds the text {!r}, which this tokenizer reads as a special token: write it otherwise"


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value of JSON, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def label_fault(ids: Sequence[int], trained: Sequence[bool], stops: frozenset[int]) -> str:
    """The fault of a row without a target, or with an answer that does not end in one of
    `stops`."""
    if not any(trained[1:]):
        return "not one token of it would be learned: every label is masked"
    ends = [i for i in range(len(ids)) if trained[i] and (i + 1 == len(ids) or not trained[i + 1])]
    bare = [i for i in ends if ids[i] not in stops]
    return (
        f"answer {ends.index(bare[0]) + 1} does not end in the stop token as a trained label"
        if bare
        else ""
    )


def truncated(
    ids: list[int], trained: list[bool], stop: int, limit: int
) -> tuple[list[int], list[bool]] | None:
    """The first `limit` tokens with the stop token as the last, trained one; None where no token of
    an answer would be left before it."""
    room = limit - 1
    if not any(trained[1:room]):
        return None
    # the cut falls into a later question: end with the answer before it, whose stop token is there
    while not trained[room - 1]:
        room -= 1
    if ids[room - 1] == stop and (room >= len(ids) or not trained[room]):
        return ids[:room], trained[:room]
    return [*ids[:room], stop], [*trained[:room], True]
