"""Multiple choice by likelihood: which letter the model holds likeliest after the question, asked
in the trained template. Rows are as C-Eval, CMMLU and MMLU have them: `question`, `A`, `B`, `C`,
`D`, `answer` (a letter), perhaps `subject`; or `question`, `choices` (a list), `answer` (a number
or a letter). Any case of names, two to ten options.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from trainer.data.errors import InvalidJob
from trainer.data.files import Findings, sound_rows
from trainer.data.formats import Row
from trainer.data.prepare import Prepared, prompt_ids, validate_rows
from trainer.data.sources import Source
from trainer.data.template import Turn
from trainer.data.tokenised import Rows
from trainer.eval.likelihood import nats, tokens_of
from trainer.model.decode import packs
from trainer.model.parts import causal

LETTERS = string.ascii_uppercase[:10]
TOKENS_AT_ONCE = 8192
_CHINESE = re.compile("[\u4e00-\u9fff]")
_NEEDS = "write question, A, B, C, D and answer, as C-Eval does"


class Question(NamedTuple):
    """`answer` is the place of the right one among `options`."""

    where: str
    text: str
    options: tuple[str, ...]
    answer: int
    subject: str = ""

    def asked(self) -> str:
        """The text of the question and its options, as the model is asked."""
        ask = "答案：" if _CHINESE.search(self.text) else "Answer:"
        lines = [f"{LETTERS[n]}. {option}" for n, option in enumerate(self.options)]
        return "\n".join([self.text, *lines, ask])


@dataclass(frozen=True)
class Chosen:
    """`taken` is the place of the likeliest option of each question, `right` whether it is the
    answer."""

    taken: list[int]
    right: list[bool]


def read(file: Path) -> list[Question] | None:
    """The questions of a file, or None where its first row is no question with options. Raises
    InvalidJob with every defect."""
    found = Findings()
    source = Source(file, file.name, "choices")
    first = next(sound_rows(source, Findings(), lambda value, *_: _lower(value)), None)
    if first is None or "question" not in first or not ({"a", "b"} <= set(first) or _listed(first)):
        return None
    questions = list(sound_rows(source, found, _validated))
    validate_rows(sorted(found.defects))
    return questions


def _lower(value: Any) -> dict[str, Any]:
    return {str(k).lower(): v for k, v in value} if type(value) is tuple else {}


def _listed(row: dict[str, Any]) -> list[Any] | None:
    held = row.get("choices")
    if isinstance(held, str) and held.startswith("["):  # a cell of a table
        try:
            held = json.loads(held)
        except ValueError:
            return None
    return list(held) if isinstance(held, list | tuple) else None


def _validated(value: Any, source: Source, where: str) -> Any:
    """A Question, or problems."""
    row = _lower(value)
    listed = _listed(row)
    options = [row[c.lower()] for c in LETTERS if c.lower() in row] if listed is None else listed
    text, answer = row.get("question"), row.get("answer")
    if not isinstance(text, str) or not 2 <= len(options) <= len(LETTERS):
        return [((), "it is no question with two to ten options", _NEEDS)]
    missing = [n for n, option in enumerate(options) if option is None or not str(option).strip()]
    if missing:
        name = LETTERS[missing[0]]
        return [((), f"the option {name} is empty", "write it, or leave the question out")]
    letter = str(answer).strip().upper()
    if letter in list(LETTERS[: len(options)]):
        place = LETTERS.index(letter)
    elif listed is not None and letter.isdecimal() and int(letter) < len(options):
        place = int(letter)
    else:
        known = f"a letter of {LETTERS[: len(options)]}"
        return [
            (("answer",), f"the answer is {answer!r:.20}, none of the options", f"give {known}")
        ]
    told = tuple(str(option) for option in options)
    return Question(where, text, told, place, str(row.get("subject") or ""))


@torch.no_grad()
def choose(
    model: nn.Module,
    data: Prepared,
    questions: Sequence[Question],
    device: torch.device,
    tell: Callable[[int], None] = lambda done: None,
) -> Chosen:
    """The likeliest letter of each question. Where every letter is one token after the same prompt
    a question costs one prompt; else one for each option. Raises InvalidJob for a question that the
    template or the tokenizer has no place for."""
    prompts = [prompt_ids(data, [Turn("user", q.asked())]) for q in questions]
    letters = [_letters(data, q, p) for q, p in zip(questions, prompts, strict=True)]
    quick = bool(prompts) and packs(model, max(map(len, prompts)))
    fast = [n for n, ids in enumerate(letters) if ids and quick]
    taken = dict(zip(fast, _by_prompt(model, prompts, letters, fast, device, tell), strict=True))
    for n, question in enumerate(questions):
        if n not in taken:
            letters_of = LETTERS[: len(question.options)]
            rows = tokens_of([_answered(question, letter) for letter in letters_of], data)
            if len(rows) != len(letters_of):
                raise InvalidJob(f"{question.where} cannot be asked", rows.notes)
            _forget_ends(rows)
            taken[n] = int(np.argmin(nats(model, rows, device)))
            tell(len(taken))
    order = [taken[n] for n in range(len(questions))]
    return Chosen(order, [t == q.answer for t, q in zip(order, questions, strict=True)])


def _answered(question: Question, letter: str) -> Row:
    return Row(question.where, (Turn("user", question.asked()), Turn("assistant", letter)))


def _forget_ends(rows: Rows) -> None:
    """Makes the token that ends an answer untrained: it says nothing of the option."""
    for start, end in pairwise(rows.starts):
        rows.trained[start + np.flatnonzero(rows.trained[start:end])[-1]] = False


def _letters(data: Prepared, question: Question, prompt: list[int]) -> list[int]:
    """The token of each letter; empty where one is not a single token behind the prompt."""
    rows = tokens_of([_answered(question, c) for c in LETTERS[: len(question.options)]], data)
    found = []
    for n in range(len(rows)):
        ids = rows.ids[rows.starts[n] : rows.starts[n + 1]].tolist()
        if ids[: len(prompt)] != prompt or len(ids) < len(prompt) + 2:
            return []
        if ids[len(prompt) + 1] != data.stop_id:
            return []
        found.append(ids[len(prompt)])
    return found if len(found) == len(question.options) else []


def _by_prompt(
    model: nn.Module,
    prompts: Sequence[list[int]],
    letters: Sequence[list[int]],
    chosen: Sequence[int],
    device: torch.device,
    tell: Callable[[int], None],
) -> list[int]:
    training, inner, found = model.training, causal(model), list[int]()
    model.eval()
    waiting = list(chosen)
    while waiting:
        taken, tokens = [waiting.pop(0)], 0
        tokens = len(prompts[taken[0]])
        while waiting and tokens + len(prompts[waiting[0]]) <= TOKENS_AT_ONCE:
            tokens += len(prompts[waiting[0]])
            taken.append(waiting.pop(0))
        lengths = [len(prompts[n]) for n in taken]
        ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
        logits = inner(
            input_ids=torch.tensor([[i for n in taken for i in prompts[n]]], device=device),
            position_ids=torch.cat([torch.arange(k) for k in lengths])[None].to(device),
            use_cache=False,
            logits_to_keep=ends[1:].long() - 1,
            cu_seq_lens_q=ends,
            cu_seq_lens_k=ends,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
        ).logits[0]
        for n, row in zip(taken, logits.float().cpu(), strict=True):
            found.append(int(row[letters[n]].argmax()))
        tell(len(found))
    model.train(training)
    return found
