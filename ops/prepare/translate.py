"""`milktea data translate`: rows in another language, by any endpoint that speaks OpenAI's chat
completions. What a call brought is checked text by text; what is not a translation is asked for
again in halves, alone, and once more with the reason; then its row is left out and listed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ops.errors import ConfigError, PreflightError
from ops.prepare import rows as files_of_rows
from ops.prepare import translation
from ops.prepare.calls import Calls, bytes_of
from ops.prepare.endpoint import Endpoint, NotAnswered
from ops.prepare.languages import NAMES, Language
from ops.prepare.rows import RowsWritten
from ops.prepare.texts import with_texts
from ops.prepare.translation import Piece, Wanted
from ops.prepare.work import Tell, at_once, ended_early, journal_of, no_tell
from ops.wait import REAL, Clock
from trainer.data.curate import Picked, Removed
from trainer.data.records import Record
from trainer.data.sources import Reading
from trainer.data.words import number_of

OTHER_MODEL = "another --model, or --prompt for one that cannot write JSON"
HOPELESS = 30  # texts that could not be translated, more than were: the model is not up to it


@dataclass(frozen=True)
class How:
    """`prompt` is a user's own words with {text}, for a model that translates one text at a time;
    `about` says what becomes of rows about their own language."""

    to: Language
    rows_per_call: int = 20
    chars_per_call: int = 8_000
    calls_at_once: int = 4
    about: str = "drop"
    prompt: str = ""


@dataclass(frozen=True)
class Priced:
    """What a translation takes; `worst_usd` where every answer is as long as it may be, and none
    has to be asked for again."""

    rows: int
    kept: int
    dropped: int
    texts: int
    characters: int
    calls: int
    tokens_in: int
    tokens_out: int
    usd: float
    worst_usd: float


def how(
    to: str,
    rows_per_call: int = 20,
    chars_per_call: int = 8_000,
    calls_at_once: int = 4,
    about: str = "drop",
    prompt: str = "",
) -> How:
    """Raises ConfigError for what cannot be."""
    if to not in NAMES:
        raise ConfigError(f"--to {to!r} is not known", hint=f"one of {', '.join(NAMES)}")
    if about not in translation.ABOUT_LANGUAGE:
        known = ", ".join(translation.ABOUT_LANGUAGE)
        raise ConfigError(f"--about-language {about!r} is none", hint=f"one of {known}")
    if prompt and "{text}" not in prompt:
        raise ConfigError("the prompt has no {text}", hint="--prompt 'Translate: {text}'")
    if prompt:
        rows_per_call, chars_per_call = 1, 1
    return How(Language(to), rows_per_call, chars_per_call, calls_at_once, about, prompt)


def price(
    files: Sequence[Path], endpoint: Endpoint, how: How, reading: Reading | None = None
) -> Priced:
    """What the translation would cost. Sends nothing. Raises PreflightError."""
    todo = _wanted(files, how, reading)[1]
    sums, worst = [0, 0], 0.0
    for batch in todo.batches:
        messages, most = translation.question(batch, how.to, how.prompt)
        for n, count in enumerate(translation.expected(messages, batch)):
            sums[n] += count
        worst += endpoint.usd(bytes_of(messages), most)
    return Priced(
        rows=len(todo.rows),
        kept=todo.kept,
        dropped=len(todo.dropped),
        texts=todo.pieces,
        characters=sum(len(p.source) for batch in todo.batches for p in batch),
        calls=len(todo.batches),
        tokens_in=sums[0],
        tokens_out=sums[1],
        usd=endpoint.usd(*sums),
        worst_usd=worst,
    )


def translate(
    files: Sequence[Path],
    out: Path | None,
    endpoint: Endpoint,
    how: How,
    *,
    max_usd: float | None,
    reading: Reading | None = None,
    force: bool = False,
    partial: bool = False,
    tell: Tell = no_tell,
    clock: Clock = REAL,
) -> RowsWritten:
    """Writes the rows in the other language, each in the layout that it had. Raises PreflightError
    where the work ends early: `out` is not written then, unless `partial`, and what was answered
    stays in the journal beside it. Raises as `rows.dedupe` besides."""
    [target] = files_of_rows.outputs_of(files, {how.to.code: out}, force)
    found, todo = _wanted(files, how, reading)
    calls = Calls(journal_of(target), endpoint, max_usd, clock)
    try:
        work = _Work(calls, how)
        at_once(todo.batches, work.solve, calls, how.calls_at_once, tell)
    finally:
        calls.close()
    picked, missing = _picked(todo, work)
    if missing and not partial:
        raise ended_early(calls, len(todo.rows) - missing, len(todo.rows), "row")
    if not picked.rows:
        raise _nothing(calls, picked)
    spent = asdict(calls.spent) | {"usd": round(calls.spent.usd, 6)}
    settings = {"to": how.to.code, "model": endpoint.model, "endpoint": endpoint.url}
    more = {"spent": spent, "kept_as_they_are": todo.kept}
    return files_of_rows.write(
        "translate", found.rows, picked, [target], settings, found.notes, more
    )


def _nothing(calls: Calls, picked: Picked) -> PreflightError:
    why = picked.removed[-1].reason if picked.removed else "there is none"
    return PreflightError(
        f"no row could be translated: {why}",
        money=f"${calls.spent.usd:.4f} at most, of {number_of(calls.spent.answered, 'answer')}",
        hint=OTHER_MODEL,
    )


def _wanted(
    files: Sequence[Path], how: How, reading: Reading | None
) -> tuple[files_of_rows.Dataset, Wanted]:
    found = files_of_rows.sound(files, reading)
    limits = (1, 1) if how.prompt else (how.rows_per_call, how.chars_per_call)
    todo = translation.wanted(found, how.to, how.about, *limits)
    if how.prompt:
        todo.batches = [[piece] for batch in todo.batches for piece in batch]
    return found, todo


def _picked(todo: Wanted, work: _Work) -> tuple[Picked, int]:
    """(the rows that are whole, with the reasons of the others; how many were not come to)."""
    picked, missing = Picked([], removed=list(todo.dropped)), 0
    for row, texts in zip(todo.rows, todo.texts, strict=True):
        lacking = [text for text in texts.values() if text not in work.made]
        if not lacking and row.label and (alike := _now_alike(texts.values(), work.made)):
            picked.removed.append(Removed(row.where, f"not translated: {alike}"))
        elif not lacking:
            made = with_texts(
                json.loads(row.line), {place: work.made[text] for place, text in texts.items()}
            )
            picked.rows.append(row._replace(line=json.dumps(made, ensure_ascii=False)))
        else:
            missing += _lacking(row, lacking, work, picked)
    return picked, missing


def _now_alike(texts: Iterable[str], made: Mapping[str, str]) -> str:
    """Why a pair of answers that differed is none any more; "" where it is one."""
    sources = dict.fromkeys(texts)
    alike = len({made[text].strip() for text in sources}) < len(sources)
    return "two of its texts became one" if alike else ""


def _lacking(row: Record, lacking: Sequence[str], work: _Work, picked: Picked) -> bool:
    """Lists a row that is not whole; whether that is because it was not come to."""
    known = [work.failed[text] for text in lacking if text in work.failed]
    reason = f"not translated: {known[0]}" if known else "not come to"
    picked.removed.append(Removed(row.where, reason))
    return not known


class _Work:
    """What is made of the texts, from several threads. `made` and `failed` are by source."""

    def __init__(self, calls: Calls, how: How) -> None:
        self._calls, self._how = calls, how
        self.made: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def solve(self, batch: Sequence[Piece], complaint: str = "") -> None:
        """Asks until each text is made or failed: all together, in halves, alone, alone with the
        reason. Raises Stopped."""
        messages, most = translation.question(batch, self._how.to, self._how.prompt, complaint)
        try:
            answer = self._calls.ask(messages, most)
        except NotAnswered as e:
            taken = translation.Taken(broken=str(e))
        else:
            plain = bool(self._how.prompt)
            taken = translation.take(answer.text, answer.finish, batch, self._how.to, plain)
        self.made |= taken.made
        left = [piece for piece in batch if piece.source not in taken.made]
        if len(batch) > 1:
            half = (len(left) + 1) // 2
            for part in (left[:half], left[half:]):
                if part:
                    self.solve(part)
        elif left:
            why = taken.broken or taken.faults[left[0].source]
            if not complaint and (taken.broken or not self._how.prompt):
                self.solve(left, why)  # a prompt of the user's own has no place for the reason
            else:
                self._fail(left[0], why)

    def _fail(self, piece: Piece, why: str) -> None:
        self.failed[piece.source] = why
        if len(self.failed) >= HOPELESS and len(self.failed) > len(self.made):
            self._calls.stop(
                f"{len(self.failed)} texts could not be translated and {len(self.made)} could: "
                f"this model is not up to it, the last because {why}",
                OTHER_MODEL,
            )
