"""What two models made of the same rows, compared: means with intervals, and the interval of the
difference, row against row. No torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from trainer.data.formats import Row
from trainer.data.words import number_of
from trainer.eval import metrics
from trainer.eval.choices import LETTERS, Question
from trainer.eval.metrics import Mean

_LABELS = {
    "bleu-4": "BLEU-4",
    "rouge-1": "ROUGE-1",
    "rouge-2": "ROUGE-2",
    "rouge-l": "ROUGE-L",
    "chrf": "chrF",
    "exact": "exact match, %",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "answer_tokens": "tokens of an answer",
    "length_ratio": "length to reference",
    "ended": "ended by itself, %",
    "distinct-2": "distinct-2",
    "accuracy": "accuracy, %",
}
_WIDTH, _CUT = 24, 300


@dataclass
class Side:
    """What one model made: of each answered row the answer, its tokens and whether it ended by
    itself; of each measured row the nats, target tokens and bytes; of each question the option
    taken and whether it was right."""

    name: str
    answers: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compared(
    sides: Sequence[Side], rows: Sequence[Row], questions: Sequence[Question], shown: int
) -> dict[str, Any]:
    """{"scores": side -> name -> Mean, "difference": name -> Mean (last side less first),
    "examples": ...}; of questions also accuracy by subject."""
    references = [row.turns[-1].text.strip() for row in rows]
    by_row = {side.name: _by_row(side, references) for side in sides}
    scores = {side.name: _scores(side, references, by_row[side.name]) for side in sides}
    first, last = sides[0], sides[-1]
    difference = {
        name: metrics.interval(np.subtract(values, by_row[first.name][name]).tolist())
        for name, values in by_row[last.name].items()
    }
    told: dict[str, Any] = {
        "scores": {n: {k: _told(v) for k, v in s.items()} for n, s in scores.items()},
        "difference": {k: _told(v) for k, v in difference.items()},
        "examples": [
            {"prompt": _prompt(row), "expected": reference}
            | {side.name: side.answers[n] for side in sides}
            for n, (row, reference) in enumerate(list(zip(rows, references, strict=True))[:shown])
        ],
    }
    if questions:
        told["subjects"] = _subjects(sides, questions)
        told["chance"] = 100 * fmean(1 / len(q.options) for q in questions)
        told["examples"] = [
            {"prompt": q.asked(), "expected": LETTERS[q.answer]}
            | {side.name: LETTERS[side.taken[n]] for side in sides}
            for n, q in enumerate(questions[:shown])
        ]
    return told


def _by_row(side: Side, references: Sequence[str]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    if side.right:
        found["accuracy"] = [100.0 * right for right in side.right]
    if side.answers:
        pairs = list(zip(side.answers, references, strict=True))
        try:
            found |= metrics.by_row(side.answers, references)
        except metrics.MissingWords as missing:
            print(f"left out: {missing}", file=sys.stderr)
            found["bleu-4"] = [metrics.bleu4(a, r) for a, r in pairs]
            found["exact"] = [metrics.exact(a, r) for a, r in pairs]
        found["answer_tokens"] = [float(n) for n in side.tokens]
        found["ended"] = [100.0 * e for e in side.ended]
    return found


def _scores(
    side: Side, references: Sequence[str], by_row: dict[str, list[float]]
) -> dict[str, Mean]:
    found = {name: metrics.interval(values) for name, values in by_row.items()}
    if side.answers:
        lengths = [len(r) for r in references]
        found["length_ratio"] = metrics.ratio([len(a) for a in side.answers], lengths)
        for name, value in (
            ("chrf", metrics.chrf(side.answers, references)),
            ("distinct-2", metrics.distinct(side.answers)),
        ):
            found[name] = Mean(value, math.nan, math.nan)  # of all rows together
    if side.nats:
        found["perplexity"] = metrics.ratio(side.nats, side.targets, np.exp)
        per_bit: Callable[[Any], Any] = lambda nats: nats / math.log(2)  # noqa: E731
        found["bits_per_byte"] = metrics.ratio(side.nats, side.bytes, per_bit)
    return {name: found[name] for name in _LABELS if name in found}


def _told(mean: Mean) -> dict[str, float]:
    """The mean with its interval, where it has one."""
    return {k: v for k, v in asdict(mean).items() if not math.isnan(v)}


def _subjects(sides: Sequence[Side], questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Subject -> questions and each side's accuracy, where the file has subjects."""
    found: dict[str, dict[str, float]] = {}
    for subject in sorted({q.subject for q in questions if q.subject}):
        at = [n for n, q in enumerate(questions) if q.subject == subject]
        found[subject] = {"questions": len(at)} | {
            side.name: 100 * fmean(side.right[n] for n in at) for side in sides
        }
    return found


def _prompt(row: Row) -> str:
    turn = row.turns[-2] if len(row.turns) > 1 else row.turns[-1]
    return "\n".join(x for x in (turn.text, turn.extra) if x)


# -- as text ---------------------------------------------------------------------------------------


def text(told: dict[str, Any]) -> str:
    """The table of `compared`, with the examples."""
    names = list(told["scores"])
    of = f" of {told['rows_in_file']:,}" if told["rows"] < told["rows_in_file"] else ""
    lines = [
        f"{told['rows']:,}{of} rows of {told['data']}; in brackets 95 % of 1,000 resamples",
        f"{'':20}" + "".join(f"{n:>{_WIDTH}}" for n in (*names, f"{names[-1]} - {names[0]}")),
    ]
    for name, label in _LABELS.items():
        if name not in told["scores"][names[-1]]:
            continue
        cells = [_cell(told["scores"][n].get(name)) for n in names]
        cells.append(_cell(told["difference"].get(name), sign="+"))
        lines.append(f"{label:20}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells).rstrip())
    if "chance" in told:
        lines.append(f"chance is {told['chance']:.1f} %")
    for subject, row in told.get("subjects", {}).items():
        each = ", ".join(f"{n} {row[n]:.1f} %" for n in names)
        lines.append(f"  {subject}: {each} of {number_of(row['questions'], 'question')}")
    for example in told["examples"]:
        lines += ["", *(f"{k + ':':10} {_short(v)}" for k, v in example.items())]
    if told["notes"]:
        lines += [
            "",
            f"{number_of(len(told['notes']), 'row', 'was', 'were')} left out, first "
            f"{told['notes'][0]}",
        ]
    return "\n".join([*lines, *([f"\nwritten to {told['file']}"] if "file" in told else [])])


def _cell(mean: dict[str, float] | None, sign: str = "") -> str:
    if mean is None:
        return ""
    value = f"{mean['value']:{sign}.2f}"
    if "low" not in mean:
        return value
    return f"{value} [{mean['low']:.2f}, {mean['high']:.2f}]"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _CUT else f"{line[:_CUT]}..."
