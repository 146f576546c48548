"""The rows of a job as its stage wants them: which reader makes them of the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.data import prepare as rows
from trainer.data.formats import Row
from trainer.data.pairs import PAIRS, TAGGED, conversations
from trainer.data.prepare import ANSWERS, Prepared, Reader
from trainer.data.prompts import PROMPTS
from trainer.data.sources import Defect
from trainer.data.tokenised import Rows
from trainer.data.windows import DOCUMENTS
from trainer.wire.job import DataFile, Job
from trainer.wire.stages import STAGES, RowKind

READERS: dict[RowKind, Reader] = {
    "rows": ANSWERS,
    "documents": DOCUMENTS,
    "pairs": PAIRS,
    "tagged": TAGGED,
    "prompts": PROMPTS,
}


def reader_of(job: Job) -> Reader:
    return READERS[STAGES[job.stage].rows]


def prepare(job: Job, run: Path, model: Path | None = None) -> Prepared:
    """Checks and tokenises the job's data for its stage; `model` as rows.prepare takes it. Raises
    InvalidJob, with every defect, or TemplateError, before anything costs time or money."""
    return rows.prepare(job, run, reader_of(job), model)


def read(job: Job, files: Sequence[tuple[Path, str]]) -> tuple[list[Row], list[Defect]]:
    """(sound rows, each side of a pair by itself; all defects) of files of the job, without a
    tokenizer."""
    found, defects = reader_of(job).read(files, rows.reading_of(job.data), None)
    return [row for item in found for row in conversations(item)], defects


def held_rows(job: Job, run: Path, data: Prepared) -> Rows | None:
    """The rows that the job holds out, by itself or in a file; None without any. Of a file of
    answers, rows that could not be trained on are left out: they can still be asked."""
    file = job.data.held_out
    if data.held is not None or file is None:
        return data.held
    if reader_of(job) is ANSWERS:
        lenient = job.data.model_copy(update={"over_length": "drop", "bad_rows": "drop"})
        job = job.model_copy(update={"data": lenient})
    held = tokenised(file, job, run, data)
    return held if len(held) else None


def tokenised(file: DataFile, job: Job, run: Path, data: Prepared) -> Rows:
    """The rows of another file of the job (held-out ones), made as those of `data` were. Raises
    InvalidJob with its defects."""
    reader = reader_of(job)
    found, defects = reader.read([(run / file.path, file.name)], rows.reading_of(job.data), None)
    rows.validate_rows(defects)
    return reader.tokenise(found, data.vocabulary, data.template, job)
