"""`milktea data instruct`: more rows by any endpoint that speaks OpenAI's chat completions. From
seeds new questions with answers, in their manner; or answers for rows that have none."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ops.errors import ConfigError, PreflightError
from ops.prepare.calls import Calls, bytes_of
from ops.prepare.endpoint import Endpoint, NotAnswered
from ops.prepare.rows import RowsWritten, outputs_of, sound, write
from ops.prepare.work import Tell, at_once, ended_early, journal_of, no_tell
from ops.wait import REAL, Clock
from trainer.data import curate, quality
from trainer.data.curate import Picked, Removed
from trainer.data.estimate import Density, tokens
from trainer.data.formats import Row
from trainer.data.prompts import asked_of
from trainer.data.records import Dataset, Record
from trainer.data.sources import Reading

EXAMPLES, ROWS_PER_CALL = 5, 10
LONGEST_EXAMPLE = 1200  # characters of a seed that serves as an example
MOST_ROUNDS = 4  # of calls, until there are as many rows as were asked for
USELESS = 20  # answers of which nothing could be taken, more than others: the model is not up to it
BAD = ("no-answer", "echo", "repeats", "refusal", "placeholder", "template", "cut-short")
_DENSITY = Density.of(150_000)
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)

_ASK = """\
Here are {examples} rows for training an assistant, as a JSON array:
{shown}
Write {count} new rows of this kind{topic}, in the language of these, each with another question \
and its correct, complete answer. Vary what is asked and how. Answer with a JSON array of {count} \
objects with "instruction", "input" (empty where nothing is given) and "output", and nothing else.
This is part {number} of the work."""


@dataclass(frozen=True)
class Asked:
    """`rows` new ones from seeds about `topics`; or, with `answers`, an answer for each row."""

    rows: int = 0
    answers: bool = False
    topics: tuple[str, ...] = ()
    near: float = 0.7
    seed: int = 42
    answer_tokens: int = 1024
    calls_at_once: int = 4


@dataclass(frozen=True)
class Costs:
    """What the calls take; `worst_usd` where every answer is as long as it may be."""

    rows: int
    calls: int
    tokens_in: int
    usd: float
    worst_usd: float


def asked(
    rows: int | None, answers: bool, topics: Path | None, seed: int, answer_tokens: int, calls: int
) -> Asked:
    """Raises ConfigError for what cannot be."""
    if answers == (rows is not None):
        raise ConfigError("say how many rows, or --answers", hint="--rows 3000, or --answers")
    found = topics.read_text("utf-8").splitlines() if topics else []
    named = tuple(line.strip() for line in found if line.strip())
    if topics and (answers or not named):
        raise ConfigError(f"{topics} tells nothing here", hint="one topic a line, with --rows")
    return Asked(
        rows or 0, answers, named, seed=seed, answer_tokens=answer_tokens, calls_at_once=calls
    )


def price(
    files: Sequence[Path], endpoint: Endpoint, wanted: Asked, reading: Reading | None = None
) -> Costs:
    """What it would cost, without rounds for what is left out. Sends nothing."""
    found = sound(files, _reading(reading, wanted))
    if wanted.answers:
        calls = _answering(found, wanted)
    else:
        calls = _asking(found.rows, wanted, 0, wanted.rows)
    count = [sum(tokens(m["content"], _DENSITY) for m in call.messages) for call in calls]
    worst = sum(endpoint.usd(bytes_of(call.messages), call.most) for call in calls)
    usd = endpoint.usd(sum(count), sum(call.most for call in calls) // 3)
    return Costs(len(found.rows), len(calls), sum(count), usd, worst)


def instruct(
    files: Sequence[Path],
    out: Path | None,
    endpoint: Endpoint,
    wanted: Asked,
    *,
    max_usd: float | None,
    reading: Reading | None = None,
    force: bool = False,
    partial: bool = False,
    tell: Tell = no_tell,
    clock: Clock = REAL,
) -> RowsWritten:
    """Writes the new rows (alpaca), none of which repeats a seed or another; or the rows with their
    answers (messages). Raises as `translate.translate`; PreflightError too where fewer new rows
    came than were asked for after MOST_ROUNDS rounds, unless `partial`."""
    [target] = outputs_of(files, {"answered" if wanted.answers else "new": out}, force)
    found = sound(files, _reading(reading, wanted))
    if not wanted.answers:  # the same question to a model that draws its words
        endpoint = replace(endpoint, extra={"temperature": 0.8, **endpoint.extra})
    calls = Calls(journal_of(target), endpoint, max_usd, clock)
    try:
        make = _answered if wanted.answers else _new_rows
        picked, missing = make(found, wanted, calls, tell)
    finally:
        calls.close()
    if missing and not partial:
        if calls.why_stopped:
            raise ended_early(calls, len(picked.rows), len(picked.rows) + missing, "row")
        raise PreflightError(
            f"only {len(picked.rows):,} new rows came that repeat no other",
            money=f"${calls.spent.usd:.4f} at most, and what came is kept",
            hint="--partial writes them; more seeds or --topics bring others",
        )
    settings = asdict(wanted) | {"model": endpoint.model, "endpoint": endpoint.url}
    spent = asdict(calls.spent) | {"usd": round(calls.spent.usd, 6)}
    more = {"spent": spent}
    return write("instruct", found.rows, picked, [target], settings, found.notes, more)


def _reading(reading: Reading | None, wanted: Asked) -> Reading:
    reading = reading or Reading()
    return replace(reading, form="prompts") if wanted.answers else reading


@dataclass(frozen=True)
class _Call:
    number: int
    messages: list[dict[str, str]]
    most: int


# -- new rows --------------------------------------------------------------------------------------


def _asking(seeds: Sequence[Record], wanted: Asked, first: int, rows: int) -> list[_Call]:
    """Calls for so many rows; which seeds each shows follows from its number."""
    short = [row for row in seeds if row.characters <= LONGEST_EXAMPLE] or list(seeds)
    found = []
    for number in range(first, first + -(-rows // ROWS_PER_CALL)):
        rng = random.Random(f"{wanted.seed}:{number}")
        some = rng.sample(short, min(EXAMPLES, len(short)))
        shown = [{"instruction": row.question, "input": "", "output": row.answer} for row in some]
        topic = f" about {wanted.topics[number % len(wanted.topics)]}" if wanted.topics else ""
        said = _ASK.format(
            examples=len(some),
            shown=json.dumps(shown, ensure_ascii=False, indent=0),
            count=ROWS_PER_CALL,
            topic=topic,
            number=number + 1,
        )
        typical = sum(tokens(row.question + row.answer, _DENSITY) for row in some) / len(some)
        most = 256 + ROWS_PER_CALL * (64 + 2 * int(typical))
        found.append(_Call(number, [{"role": "user", "content": said}], most))
    return found


def _new_rows(found: Dataset, wanted: Asked, calls: Calls, tell: Tell) -> tuple[Picked, int]:
    """(the new rows with what was left out, how many are missing)."""
    seeds = found.rows
    came: dict[int, list[Record]] = {}
    removed: list[Removed] = []
    picked, first = Picked([]), 0
    for _ in range(MOST_ROUNDS):
        part = _asking(seeds, wanted, first, wanted.rows - len(picked.rows))
        first += len(part)

        def act(call: _Call) -> None:
            came[call.number] = _rows_of(call, calls, removed)
            if len(removed) >= USELESS and not any(came.values()):
                calls.stop(f"nothing can be taken of {len(removed)} answers: {removed[-1].reason}")

        at_once(part, act, calls, wanted.calls_at_once, tell)
        every = [row for number in sorted(came) for row in came[number]]
        picked = curate.dedupe(every, wanted.near, seeds)
        if calls.why_stopped or len(picked.rows) >= wanted.rows:
            break
    rows = picked.rows[: wanted.rows]
    return Picked(rows, removed=[*removed, *picked.removed]), wanted.rows - len(rows)


def _rows_of(call: _Call, calls: Calls, removed: list[Removed]) -> list[Record]:
    """The rows of one answer that are whole and sound."""
    name = f"call {call.number + 1}"
    try:
        answer = calls.ask(call.messages, call.most)
    except NotAnswered as e:
        removed.append(Removed(name, str(e)))
        return []
    said = _THOUGHT.sub("", answer.text)
    begin, end = said.find("["), said.rfind("]")
    try:
        given = json.loads(said[begin : end + 1]) if 0 <= begin < end else None
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, list):
        removed.append(Removed(name, "the answer is no JSON array of rows"))
        return []
    found = []
    for number, row in enumerate(given, 1):
        where = f"{name}, row {number}"
        record = _record(where, row)
        if record is None:
            removed.append(Removed(where, "it is no row with instruction and output"))
        elif bad := quality.judge([record], BAD):
            removed.append(Removed(where, f"{bad[0].rule}: {bad[0].what}"))
        else:
            found.append(record)
    return found


def _record(where: str, row: Any) -> Record | None:
    if not isinstance(row, dict):
        return None
    made = {name: row.get(name) or "" for name in ("instruction", "input", "output")}
    if not all(isinstance(text, str) for text in made.values()):
        return None
    if not made["instruction"].strip() or not made["output"].strip():
        return None
    question = "\n".join(text for text in (made["instruction"], made["input"]) if text)
    return Record(where, json.dumps(made, ensure_ascii=False), question, made["output"], "", 2)


# -- answers ---------------------------------------------------------------------------------------


def _answering(found: Dataset, wanted: Asked) -> list[_Call]:
    """A call for each row that has no answer."""
    return [
        _Call(number, _conversation(row, found), wanted.answer_tokens)
        for number, row in enumerate(found.rows)
        if not row.answer.strip()
    ]


def _conversation(row: Record, found: Dataset) -> list[dict[str, str]]:
    """What is said before the answer."""
    value = dict(json.loads(row.line, object_pairs_hook=tuple))
    read = asked_of(value, found.columns[row.where.rpartition(":")[0]], row.where)
    assert isinstance(read, Row), "the row was read before"
    return [
        {"role": turn.role, "content": "\n".join(text for text in (turn.text, turn.extra) if text)}
        for turn in read.turns[:-1]
    ]


def _answered(found: Dataset, wanted: Asked, calls: Calls, tell: Tell) -> tuple[Picked, int]:
    """(the rows with answers as messages, in file order; how many were not come to)."""
    rows = found.rows
    made: dict[int, str] = {}
    failed: dict[int, str] = {}

    def act(call: _Call) -> None:
        try:
            answer = calls.ask(call.messages, call.most)
        except NotAnswered as e:
            failed[call.number] = str(e)
            return
        text = _THOUGHT.sub("", answer.text).strip()
        record = rows[call.number]._replace(answer=text)
        bad = quality.judge([record], BAD)
        if answer.finish == "length":
            failed[call.number] = f"more than {wanted.answer_tokens} tokens: --answer-tokens"
        elif bad or not text:
            failed[call.number] = f"{bad[0].rule}: {bad[0].what}" if bad else "it is empty"
        else:
            made[call.number] = text

    todo = _answering(found, wanted)
    at_once(todo, act, calls, wanted.calls_at_once, tell)
    picked, missing = Picked([]), 0
    for number, row in enumerate(rows):
        answer = row.answer if row.answer.strip() else made.get(number, "")
        if not answer:
            missing += number not in failed
            picked.removed.append(Removed(row.where, failed.get(number, "not come to")))
            continue
        said = {"messages": [*_conversation(row, found), {"role": "assistant", "content": answer}]}
        line = json.dumps(said, ensure_ascii=False)
        picked.rows.append(row._replace(line=line, answer=answer))
    return picked, missing
