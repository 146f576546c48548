"""Prompts that a model answers while it trains, each with the answer that a reward may look for.

Any row with a prompt serves: one with an answer (alpaca, sharegpt, messages, prompt), whose last
answer is what is expected, or one without; a column `answer` or `solution` says what is expected
where the row has no answer of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data import files, formats
from trainer.data.errors import InvalidJob
from trainer.data.fields import Problem
from trainer.data.files import Findings
from trainer.data.formats import Columns, Row
from trainer.data.prepare import Reader
from trainer.data.render import prompt
from trainer.data.sources import Defect, Reading, Source, find_sources
from trainer.data.template import Template, TemplateError, Turn
from trainer.data.tokenised import Rows
from trainer.data.tokens import Vocabulary, encode
from trainer.wire.job import Job

EXPECTED = ("answer", "solution")
NOT_SAID = "?"  # in the place of an answer that a row need not have


def asked_of(row: dict[str, Any], columns: Columns, where: str) -> Row | list[Problem]:
    """A row whose last turn is the expected answer, empty where none is said; or what is wrong."""
    told = next(((n, row[n]) for n in EXPECTED if row.get(n) is not None), ("", ""))
    row = {k: v for k, v in row.items() if k not in EXPECTED or k in columns.names.values()}
    form = _form(row, columns)
    value, answered = _answered(row, columns, form)
    read = formats.problems_or_row(tuple(value.items()), form, columns, where)
    if not isinstance(read, Row):
        return read
    if not read.turns:
        return [((), "the row is plain text: there is nothing to answer", "add a prompt")]
    name, said = told
    if not answered and not isinstance(said, str):
        problem = f"is {formats.kind(said)}, not a text", "write the answer in quotation marks"
        return [((name,), *problem)]
    last = read.turns[-1]
    expected = last.text if answered else said
    return read._replace(turns=(*read.turns[:-1], Turn("assistant", expected)))


def _form(row: dict[str, Any], columns: Columns) -> str:
    for form, key in (
        ("alpaca", "instruction"),
        ("sharegpt", "conversations"),
        ("messages", "messages"),
    ):
        if columns.name(key) in row:
            return form
    return "messages" if isinstance(row.get(columns.name("prompt")), list) else "prompt"


def _answered(row: dict[str, Any], columns: Columns, form: str) -> tuple[dict[str, Any], bool]:
    """(the row with an answer, whether it has one of its own)."""
    if form == "alpaca":
        name = columns.name("output")
        return ({**row, name: row.get(name) or NOT_SAID}, bool(row.get(name)))
    if form == "prompt":
        name = columns.name("completion")
        told = name in row or "response" in row
        return (row if told else {**row, name: NOT_SAID}, told)
    name = columns.name("conversations" if form == "sharegpt" else "messages")
    said: Any = row.get(name) or row.get(columns.name("prompt"))
    row = {k: v for k, v in row.items() if k != columns.name("prompt")}
    if type(said) is not list or not said or type(said[-1]) is not tuple:
        return row, True  # a defect, which the format tells
    sharegpt = form == "sharegpt"
    role = columns.role_tag or ("from" if sharegpt else "role")
    content = columns.content_tag or ("value" if sharegpt else "content")
    names = columns.roles or formats.ROLES
    if names.get(str(dict(said[-1]).get(role))) == "assistant":
        return {**row, name: said}, True
    me = next((k for k, v in columns.roles.items() if v == "assistant"), "assistant")
    return {**row, name: [*said, ((role, me), (content, NOT_SAID))]}, False


def read_prompts(
    paths: Sequence[tuple[Path, str]], reading: Reading, notes: list[str] | None = None
) -> tuple[list[Row], list[Defect]]:
    """As files.read_rows; a row's last turn is the expected answer, maybe empty."""
    findings = Findings()
    sources, findings.defects = find_sources(paths, replace(reading, form="auto"))
    found: list[Row] = []
    for source in sources:
        found += islice(_examine(source, findings), source.max_rows)
    if notes is not None:
        notes += findings.notes()
    return found, sorted(findings.defects)


def _examine(source: Source, findings: Findings) -> Iterator[Row]:
    def validate(value: Any, source: Source, where: str) -> Any:
        if type(value) is not tuple:
            return formats.problems_or_row(value, "alpaca", source.columns, where)
        return formats.suspicious_texts(value) or asked_of(dict(value), source.columns, where)

    return files.sound_rows(source, findings, validate)


def tokenise_prompts(
    found: list[Row], vocabulary: Vocabulary, template: Template, job: Job
) -> Rows:
    """Prompts up to where the model answers, nothing in them trained. Raises InvalidJob for what
    the template refuses and, as data.over_length says, for prompts of more than data.max_length."""
    _validate_expected(found, job)
    texts, refused, notes = [], [], []
    flag, tokens = job.data.enable_thinking, vocabulary.special_tokens
    for row in found:
        try:
            asked = prompt(template, row.turns[:-1], tokens, tools=row.tools, thinking=flag)
            texts.append(asked)
        except TemplateError as error:
            refused.append(f"{row.where}: {error}")
    if refused:
        raise InvalidJob(f"{len(refused)} prompts cannot be asked", refused, "mend the rows above")
    ids = [np.asarray(i, np.int32) for i, _ in encode(vocabulary, template, texts)]
    long = [k for k, one in enumerate(ids) if len(one) > job.data.max_length]
    for k in long:
        notes.append(f"{found[k].where}: {len(ids[k])} tokens, more than data.max_length")
    if long and job.data.over_length != "drop":
        raise InvalidJob(
            f"{len(long)} prompts are too long", notes, 'set data.over_length = "drop", or raise it'
        )
    kept = [k for k in range(len(ids)) if k not in set(long)]
    lengths = [len(ids[k]) for k in kept]
    rows = Rows(
        np.concatenate([np.zeros(0, np.int32), *(ids[k] for k in kept)]),
        np.zeros(sum(lengths), np.bool_),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.ones(len(kept), np.bool_),
        [found[k].where for k in kept],
        [f"{note}: dropped" for note in notes],
    )
    return replace(rows, thinking=flag)


def _validate_expected(found: list[Row], job: Job) -> None:
    """Raises InvalidJob where a reward looks for answers that rows do not say."""
    rules = getattr(job, job.stage).rewards
    kind = next((r.kind for r in rules if r.kind in ("match", "contains")), "")
    unsaid = [row.where for row in found if not row.turns[-1].text.strip()]
    if kind and unsaid:
        count = f"{len(unsaid)} of {len(found)} rows"
        raise InvalidJob(
            f"{count} say no answer, which the reward {kind!r} looks for",
            unsaid,
            'write "answer" into each row, or name another reward',
        )


PROMPTS = Reader("prompts", read_prompts, tokenise_prompts)
