"""How many tokens each row has: by the trainer's own preparation, or estimated from characters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ops.box.transfer import PushFile
from ops.catalogue.models import Entry, did_you_mean
from ops.errors import PreflightError
from ops.job import hub
from trainer.data import estimate, prepare, sharing, stage_rows
from trainer.data import template as prompt
from trainer.data.errors import InvalidJob, ModelMissing
from trainer.data.mistakes import grouped
from trainer.data.words import number_of
from trainer.wire.job import Job
from trainer.wire.stages import STAGES

CHECK = "check model.base and the network, or name a local folder"
FEW_STEPS = 20


class NotTokenised(PreflightError):
    """The data may be valid, but there is no tokenizer here to count its tokens."""


class Counted(NamedTuple):
    """Tokens of each row; and of prompts that several answers have in common, each once, 0 where
    none were looked for."""

    lengths: list[int]
    common: int = 0


def lengths_of_all(
    job: Job, folder: Path, pushes: list[PushFile], entry: Entry | None, notes: list[str]
) -> tuple[list[Counted], bool]:
    """The tokens of each stage, and whether they were counted by the tokenizer: where there is
    none, they are estimated for a model that the catalogue has as `entry`. Raises NotTokenised."""
    found: list[Counted] = []
    tokenised = True
    for number, (part, place) in enumerate(job.parts()):
        said: list[str] = []
        try:
            counted = lengths_of(part, folder, place, pushes, said)
        except NotTokenised as e:
            if entry is None:
                raise
            tokenised = False
            counted = Counted(_estimated(part, folder, place, pushes, entry, said))
            said.append(f"{e}; a run asks for it")
        said += _few_steps(part, len(counted.lengths))
        found.append(counted)
        of_stage = f"stage {number + 1}, {part.stage}: " if len(job.stages) > 1 else ""
        notes += [of_stage + line for line in said]
    return found, tokenised


def _few_steps(job: Job, rows: int) -> list[str]:
    """A line where so few steps are made of the rows that little is learned."""
    training = job.training
    steps = prepare.order_of(job, rows // STAGES[job.stage].rows_per_item).total_steps
    if steps >= FEW_STEPS or training.max_steps:
        return []
    return [
        f"{number_of(steps, 'step')} in all: hardly anything is learned in so few. A smaller "
        f"training.batch_size (it is {training.batch_size}) makes more of them, and so do more "
        f"training.num_train_epochs ({training.num_train_epochs:g})"
    ]


def lengths_of(
    job: Job, folder: Path, place: str, pushes: list[PushFile], notes: list[str]
) -> Counted:
    """The tokens of the rows that will be trained on, by the trainer's own preparation on links to
    the user's files; the job's run folder is `place` in `folder`. Raises NotTokenised without a
    tokenizer."""
    try:
        with _linked(folder, place, pushes):
            prepared = stage_rows.prepare(job, folder / place, _cached(job))
    except InvalidJob as e:
        listed = "\n".join(f"  {s}" for s in grouped(e.samples))
        if isinstance(e, ModelMissing):
            near = did_you_mean(job.model.base)
            raise NotTokenised(f"{e}\n{listed}".rstrip(), hint=e.hint + near) from e
        raise PreflightError(f"{e}\n{listed}".rstrip(), hint=e.hint) from e
    except prompt.TemplateError as e:
        raise PreflightError(str(e)) from e
    except OSError as e:
        raise NotTokenised(
            f"the tokenizer of {job.model.base} cannot be had: {str(e)[:200]}",
            hint=f"{CHECK}{did_you_mean(job.model.base)}",
        ) from e
    lengths = prepared.rows.lengths
    if not lengths:
        raise PreflightError(
            "no row is left to train on",
            hint="`python -m trainer.data FILE` says what became of each",
        )
    notes += [*prepared.rows.summary, *changed_rows(prepared.rows.notes)]
    if prepared.held is not None and STAGES[job.stage].looks:
        notes.append(prepare.looks_at(job, prepared.rows, prepared.held).words)
    notes.append(
        f"{number_of(len(lengths), 'row')}, {sum(lengths):,} tokens an epoch, longest row "
        f"{max(lengths):,} tokens, stop token trained in every row"
    )
    rows, common = STAGES[job.stage].rows, 0
    if rows == "pairs":
        common = sharing.common_tokens(prepared.rows, 2)
    elif rows == "prompts":
        common = sharing.asked_tokens(prepared.rows)
    return Counted(lengths, common)


def _cached(job: Job) -> Path | None:
    """The base model's folder in the hub's cache, where the hub would be asked in vain; else None.
    Raises NotTokenised."""
    if job.model.path:
        return None
    try:
        return hub.cached_folder(job.model.base, job.model.revision)
    except hub.NotHere as e:
        raise NotTokenised(str(e), hint=f"{CHECK}{did_you_mean(job.model.base)}") from e


@contextmanager
def _linked(folder: Path, place: str, pushes: list[PushFile]) -> Iterator[None]:
    """While the block runs, the run folder has data/ and model/ as links to the user's files, and
    the folder `place` of a stage."""
    (folder / place).mkdir(parents=True, exist_ok=True)
    for p in pushes:
        if p.remote.startswith(("data/", "model/")):
            link = folder / p.remote
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(p.local)
    try:
        yield
    finally:
        for name in ("data", "model", "cache", "stages"):
            shutil.rmtree(folder / name, ignore_errors=True)


def _estimated(
    job: Job, folder: Path, place: str, pushes: list[PushFile], entry: Entry, notes: list[str]
) -> list[int]:
    """An estimate of each row's tokens, without a tokenizer. Raises PreflightError for defects in
    the rows."""
    with _linked(folder, place, pushes):
        files = [(folder / place / f.path, f.name) for f in job.data.files]
        rows, defects = stage_rows.read(job, files)
    try:
        prepare.validate_rows(defects)
    except InvalidJob as e:
        listed = "\n".join(f"  {s}" for s in e.samples)
        raise PreflightError(f"{e}\n{listed}".rstrip(), hint=e.hint) from e
    if not rows:
        raise PreflightError("no row is left to train on")
    vocabulary = int(entry.values.get("vocabulary") or 150_000)
    density = estimate.Density.of(vocabulary, entry.model_type)
    lengths, limit = estimate.lengths(rows, density), job.data.max_length
    too_long = sum(n > limit for n in lengths)
    notes.append(
        f"{number_of(len(rows), 'row')}, about {sum(lengths):,} tokens an epoch: an "
        "estimate from characters "
        f"({density.ascii:g} of ASCII a token, {density.wide:g} of Chinese), {estimate.OFF:.0%} "
        "off at most on texts that were tried"
    )
    if too_long:
        notes.append(
            f"about {number_of(too_long, 'row', 'is', 'are')} longer than data.max_length {limit:,}"
        )
    return [min(n, limit) for n in lengths]


def changed_rows(messages: list[str]) -> list[str]:
    """One line about the rows that are dropped or truncated; `messages` has a line for each row."""
    if not messages:
        return []
    more = f"; and {len(messages) - 1:,} more" if len(messages) > 1 else ""
    return [
        f"{number_of(len(messages), 'row', 'is', 'are')} changed or left out: {messages[0]}{more}"
    ]
