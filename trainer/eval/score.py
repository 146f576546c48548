"""Score a result on rows with answers, or on questions with options, beside its base or beside
another result: what it answers (greedy), and how likely it holds the right answers.

    python -m trainer.eval.score RUN_FOLDER [DATA]             a run folder of the trainer
    python -m trainer.eval.score ADAPTER --base MODEL --data DATA [--against ADAPTER2]

ADAPTER is a folder or an adapter.zip. The table is printed, and evaluation.json written beside it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from trainer.data.errors import InvalidJob
from trainer.data.formats import Row
from trainer.data.prepare import prompt_ids
from trainer.eval import choices, likelihood, table
from trainer.eval.choices import Question
from trainer.eval.table import Side
from trainer.model import decode
from trainer.result.command import StatusLine, answer, parser_of
from trainer.result.files import unpacked
from trainer.result.open import (
    NO_ANSWERS,
    PRECISIONS,
    Chat,
    base_folder,
    base_of_result,
    here,
    load_model,
    open_words,
    precision_of_job,
    result_of_run,
    rows_in,
)

ROWS, NEW_TOKENS, SHOWN = 200, 256, 4
BASE = "base"


@dataclass(frozen=True)
class EvaluationSet:
    """What is scored: rows with answers, texts, or questions with options."""

    file: Path
    rows: list[Row] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    of: int = 0  # rows in the file
    new_tokens: int = NEW_TOKENS

    @property
    def answered(self) -> list[Row]:
        """The rows that are questions with an answer, not plain texts."""
        return [row for row in self.rows if row.turns and row.turns[-1].text.strip()]


def asked_of(file: Path, job: Path | None, most: int, new_tokens: int) -> EvaluationSet:
    """The first `most` rows of a file. Raises InvalidJob."""
    if not file.is_file():
        raise InvalidJob(f"there is no file {file}")
    questions = choices.read(file)
    if questions is not None:
        return EvaluationSet(file, [], questions[:most], len(questions), new_tokens)
    rows = [r for r in rows_in(file, job) if r.text or (r.turns and r.turns[-1].text.strip())]
    if not rows:
        raise InvalidJob(f"{file.name} has no row with an answer")
    return EvaluationSet(file, rows[:most], [], len(rows), new_tokens)


# -- one side --------------------------------------------------------------------------------------


@torch.no_grad()
def side(name: str, chat: Chat, asked: EvaluationSet, tell: Callable[[str], None]) -> Side:
    """The answers and likelihoods of one model."""
    began = time.monotonic()

    def told(what: str, of: int) -> Callable[[int], None]:
        def tell_of(done: int) -> None:
            tell(f"{name}: {what} {done} of {of}, {time.monotonic() - began:.0f} s")

        return tell_of

    found = Side(name)
    if asked.questions:
        hear = told("question", len(asked.questions))
        chosen = choices.choose(chat.model, chat.data, asked.questions, chat.device, hear)
        found.taken, found.right = chosen.taken, chosen.right
        return found
    tokens = likelihood.tokens_of(asked.rows, chat.data)
    if not len(tokens):
        raise InvalidJob("not one row can be asked", tokens.notes)
    found.notes = tokens.notes
    found.nats = likelihood.nats(chat.model, tokens, chat.device, told("row", len(tokens))).tolist()
    found.targets = tokens.targets()
    found.bytes = likelihood.bytes_of(tokens, asked.rows)
    _answers(found, chat, asked, told("answer", len(asked.answered)))
    return found


def _answers(found: Side, chat: Chat, asked: EvaluationSet, tell: Callable[[int], None]) -> None:
    rows, data = asked.answered, chat.data
    decoded = data.vocabulary.tokenizer.decode
    for start in range(0, len(rows), decode.AT_ONCE):
        prompts = [
            prompt_ids(data, row.turns[:-1], row.tools)
            for row in rows[start : start + decode.AT_ONCE]
        ]
        made = decode.generate(chat.model, prompts, {data.stop_id}, chat.device, asked.new_tokens)
        for one in made:
            ids = one.ids[:-1] if one.ended else one.ids
            found.answers.append(decoded(ids, skip_special_tokens=True).strip())
            found.tokens.append(len(ids))
            found.ended.append(one.ended)
        tell(len(found.answers))


# -- two sides -------------------------------------------------------------------------------------


def sides(
    adapter: Path, base: Path, against: tuple[Path, Path] | None, precision: str = "auto"
) -> Iterator[tuple[str, Callable[[], Chat], Callable[[Chat], Any]]]:
    """For each side its name, what loads it in this precision, and the context in which it
    computes. Raises
    TemplateError and ModelError before anything is loaded."""
    data, device = open_words(adapter, base), here()
    if against is not None:
        other, its_base = against
        words = open_words(other, its_base)
        yield (
            "other",
            lambda: Chat(load_model(other, its_base, device, precision), words, device, []),
            lambda chat: nullcontext(),
        )
    whole = not (adapter / "adapter_config.json").is_file()
    tuned: list[Chat] = []

    def opened() -> Chat:
        if not tuned:
            tuned.append(Chat(load_model(adapter, base, device, precision), data, device, []))
        return tuned[0]

    if against is None and whole:
        yield (
            BASE,
            lambda: Chat(load_model(None, base, device, precision), data, device, []),
            lambda chat: nullcontext(),
        )
    elif against is None:
        yield BASE, opened, lambda chat: cast(Any, chat.model).disable_adapter()
    yield "tuned", opened, lambda chat: nullcontext()


def evaluated(
    adapter: Path,
    base: Path,
    asked: EvaluationSet,
    against: tuple[Path, Path] | None = None,
    tell: Callable[[str], None] = lambda line: None,
    precision: str = "auto",
) -> dict[str, Any]:
    """Both sides' scores by name, with intervals; their difference; a few answers to look at.
    Raises InvalidJob, TemplateError, ModelError."""
    found = []
    for name, opened, within in list(sides(adapter, base, against, precision)):
        tell(f"{name}: loading")
        chat = opened()
        with within(chat):
            found.append(side(name, chat, asked, tell))
        del chat
    count = len(asked.questions) or len(asked.rows)
    told = {"data": asked.file.name, "rows": count, "rows_in_file": asked.of}
    told |= {"new_tokens": asked.new_tokens, "notes": found[-1].notes, "precision": precision}
    return told | table.compared(found, asked.answered, asked.questions, SHOWN)


# -- the command -----------------------------------------------------------------------------------


def main(words: list[str] | None = None) -> int:
    parser = parser_of("trainer.eval.score", "Score a result, beside its base or another result.")
    parser.add_argument("result", type=Path, help="a run folder, an adapter's folder or its zip")
    parser.add_argument("given", type=Path, nargs="?", metavar="DATA", help="as --data")
    parser.add_argument("--data", type=Path, help="rows with answers, or questions with options")
    parser.add_argument("--base", help="folder of the base model, or its hub id")
    parser.add_argument("--job", type=Path, help="job.json, which says how the rows are read")
    parser.add_argument("--against", type=Path, help="another result, instead of the base")
    parser.add_argument("--against-base", help="the other's base, where it is another")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"the first ones, {ROWS}")
    parser.add_argument(
        "--new-tokens", type=int, default=NEW_TOKENS, help=f"of an answer at most, {NEW_TOKENS}"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of a run folder, the job's on a GPU",
    )
    parser.add_argument("--to", type=Path, help="the JSON file to write")
    told, tell = parser.parse_args(words), StatusLine()

    def work() -> dict[str, Any]:
        run = told.result if (told.result / "job.json").is_file() else None
        adapter, data, precision = told.result, told.data or told.given, told.precision
        base, job = told.base and base_folder(told.base), told.job
        if run is not None:
            adapter, base, data, job = _of_run(run, base, data, job)
            if precision == "auto":
                precision = precision_of_job(result_of_run(run)[0], here())
        if base is None or data is None:
            raise InvalidJob("--base and --data are needed for a result that is no run folder")
        asked = asked_of(data, job, told.rows, told.new_tokens)
        with ExitStack() as stack:
            folder, against = stack.enter_context(unpacked(adapter)), None
            if told.against:
                other = stack.enter_context(unpacked(told.against))
                against = other, base_folder(told.against_base) if told.against_base else base
            try:
                made = evaluated(folder, base, asked, against, tell, precision)
            finally:
                tell.end()
        to = told.to or (run or adapter.parent) / "evaluation.json"
        to.write_text(json.dumps(made, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return made | {"file": str(to)}

    return answer(work, table.text, told.json)


def _of_run(
    run: Path, base: Path | None, data: Path | None, job: Path | None
) -> tuple[Path, Path, Path | None, Path | None]:
    """(adapter, base, data, job.json) of a run folder. Raises InvalidJob."""
    told, adapter = result_of_run(run)
    if data is None and (told.data.held_out is None or told.stage in NO_ANSWERS):
        why = "the job has no held_out rows"
        if told.data.held_out is not None:
            why = f"held-out rows of {told.stage} are judgements, no questions with one answer"
        raise InvalidJob(why, hint=f"milktea-run evaluate {run.name} DATA.json")
    if data is None and told.data.held_out is not None:
        data = run / told.data.held_out.path
    job = job or run / "job.json"
    folder = base or base_of_result(told, run)
    return adapter, folder, data, job


if __name__ == "__main__":
    sys.exit(main())
