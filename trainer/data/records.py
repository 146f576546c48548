"""Rows with what they were read from, for the tools that pick among them: every layout that the
trainer reads, checked as the trainer checks it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainer.data import fields, files, formats, near
from trainer.data.fields import Problem
from trainer.data.files import Findings
from trainer.data.formats import Columns, Row
from trainer.data.pairs import TAGS, Pair, Tagged, contradictions, pair_of, tagged_of
from trainer.data.prompts import asked_of
from trainer.data.sources import Defect, Reading, Source, find_sources
from trainer.data.template import Turn

Judged = list[Pair | Tagged]
Kind = Literal["rows", "pairs", "tagged", "prompts"]
LOOKED_AT = 20  # rows that tell what kind of rows a file holds
_NUMBER = re.compile(r"\d+")


class Record(NamedTuple):
    """One sound row. `where` is file:line, `line` its JSON as it was, `question` and `answer` what
    it says (a text that is learned whole is an answer), `label` what must be equal where rows are
    alike: a judgement, the answer that was not preferred; `unread` fields that nothing reads."""

    where: str
    line: str
    question: str
    answer: str
    label: str
    turns: int
    unread: tuple[str, ...] = ()

    @property
    def characters(self) -> int:
        return len(self.question) + len(self.answer)

    @property
    def key(self) -> str:
        """Equal for rows that say the same, but for case and blanks."""
        said = "\x00".join([near.normal(self.question), near.normal(self.answer), self.label])
        return hashlib.blake2b(said.encode("utf-8", "replace"), digest_size=16).hexdigest()

    @property
    def numbers(self) -> str:
        """All numbers in it, in order: rows that differ in one are not near duplicates."""
        return " ".join(_NUMBER.findall(f"{self.question}\n{self.answer}"))


@dataclass
class Dataset:
    """What was read: sound rows in file order, all defects, notes, and file name -> (kind, rows,
    form)."""

    rows: list[Record] = field(default_factory=list)
    defects: list[Defect] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: dict[str, tuple[Kind, int, str]] = field(default_factory=dict)
    columns: dict[str, Columns] = field(default_factory=dict)  # of each file


def read(paths: Sequence[Path], reading: Reading | None = None) -> Dataset:
    """Every row of the files. The form "prompts" reads rows that need no answer, for the stages ppo
    and grpo. Raises nothing for bad data."""
    reading, found, findings = reading or Reading(), Dataset(), Findings()
    asked = reading.form == "prompts"
    reading = replace(reading, form="auto") if asked else reading
    named = [(path, str(path)) for path in paths]
    sources, defects = find_sources(named, reading)
    if not sources:  # a registry that names preferences
        preferred, others = find_sources(named, reading, preferences=True)
        sources, defects = (preferred, others) if preferred else (sources, defects)
    findings.defects = defects
    for source in sources:
        kind = "prompts" if asked else kind_of(source)
        if kind == "rows":
            source = replace(source, form=source.form or files.detect_format(source))
        judged: Judged = []
        validate = EXAMINE[kind]
        examine = partial(validate, judged)
        before = len(found.rows)
        found.rows += islice(files.sound_rows(source, findings, examine), source.max_rows)
        _tell_apart(found.rows, before)
        findings.defects += contradictions(judged, source.name)
        form = source.form or kind
        found.files[source.name] = (kind, len(found.rows) - before, form)
        found.columns[source.name] = source.columns
    found.defects, found.notes = sorted(findings.defects), findings.notes()
    return found


def _tell_apart(rows: list[Record], begin: int) -> None:
    """Gives rows of one line of a file, as of an array without line ends, their numbers too."""
    if len({row.where for row in rows[begin:]}) < len(rows) - begin:
        for n in range(begin, len(rows)):
            rows[n] = rows[n]._replace(where=f"{rows[n].where}, row {n - begin + 1}")


def kind_of(source: Source) -> Kind:
    """What kind of rows the first of a file are."""
    votes: dict[Kind, int] = {"rows": 0, "pairs": 0, "tagged": 0}
    names = source.columns
    tags = {names.name("kto_tag"), *TAGS}

    def vote(value: Any, source: Source, where: str) -> bool:
        row = dict(value) if type(value) is tuple else {}
        two = type(row.get(names.name("output"))) is list
        if two or names.name("chosen") in row or names.name("rejected") in row:
            votes["pairs"] += 1
        elif any(type(row.get(tag)) is bool for tag in tags):
            votes["tagged"] += 1
        else:
            votes["rows"] += 1
        return True

    list(islice(files.sound_rows(replace(source, form="text"), Findings(), vote), LOOKED_AT))
    return max(votes, key=lambda kind: votes[kind])


def _row(judged: Judged, value: Any, source: Source, where: str) -> Record | list[Problem]:
    made = formats.problems_or_row(value, source.form, source.columns, where)
    if not isinstance(made, Row):
        return made
    if made.text:
        return formats.suspicious_texts(value) or Record(where, _line(value), "", made.text, "", 1)
    made_of = _of_turns(where, value, made.turns, "")._replace(unread=made.unread)
    return formats.suspicious_texts(value) or made_of


def _stage_row(
    parse: Callable[[dict[str, Any], Columns, str], Pair | Tagged | Row | list[Problem]],
    judged: Judged,
    value: Any,
    source: Source,
    where: str,
) -> Record | list[Problem]:
    """A row that a stage reads by `parse`: a pair, a tagged answer, a prompt."""
    if type(value) is not tuple:
        return [((), f"the row is {formats.kind(value)}, not an object", 'write {"...": ...}')]
    made = parse(dict(value), source.columns, where)
    if isinstance(made, Pair):
        turns, label = made.chosen, near.normal(made.rejected[-1].text)
    elif isinstance(made, Tagged):
        turns, label = made.turns, str(made.wanted)
    elif isinstance(made, Row):
        turns, label = made.turns, ""
    else:
        return made
    if not isinstance(made, Row):
        judged.append(made)
    return formats.suspicious_texts(value) or _of_turns(where, value, turns, label)


EXAMINE: dict[Kind, Callable[[Judged, Any, Source, str], Record | list[Problem]]] = {
    "rows": _row,
    "pairs": partial(_stage_row, pair_of),
    "tagged": partial(_stage_row, tagged_of),
    "prompts": partial(_stage_row, asked_of),
}


def _of_turns(where: str, value: Any, turns: Sequence[Turn], label: str) -> Record:
    *before, last = turns
    question = "\n".join(_said(turn) for turn in before)
    return Record(where, _line(value), question, _said(last), label, len(turns))


def _said(turn: Turn) -> str:
    calls = json.dumps(turn.calls, ensure_ascii=False, default=str) if turn.calls else ""
    return "\n".join(text for text in (turn.reasoning, turn.text, turn.extra, calls) if text)


def _line(value: Any) -> str:
    return json.dumps(fields.plain(value), ensure_ascii=False, default=str)
