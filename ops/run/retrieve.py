"""Fetch the result of a run, within limits, and write it to results.folder with a report.

Only the archive and the picture are pulled, by name; the report is made here from facts, so that no
browser opens a page from a box. Every size is limited by what this job can have made, whatever the
box says.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ops.box import pull, scripts
from ops.box.connection import Box
from ops.errors import AdapterError, BoxError, HostKeyChanged, Lost
from ops.market.workload import Workload
from ops.run import report_facts, sandbox
from ops.run.expected import ADAPTER, ExpectedResult
from ops.run.sandbox import Inspected
from ops.run.session import Session
from trainer.wire import events
from trainer.wire.page import page

MANIFEST, PICTURE, REPORT = "manifest.json", "loss.png", "report.html"
# of the files that a manifest lists; the others stay on the box
PULLED = (ADAPTER, PICTURE)
MANIFEST_BYTES = 16 << 20  # enough for a hundred thousand tensors and steps
CHECKPOINT_MANIFEST_BYTES = 4 << 20
PICTURE_BYTES = 4 << 20
EVENTS_BYTES = 256 << 20  # of one machine's events
SLACK_BYTES = 64 << 20  # tokenizer, templates, small files
MAX_FILES = 1024  # of a checkpoint: a shard for each process, and a few more
MAX_SAMPLES = 100  # in a report
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def archive_bytes(workload: Workload) -> int:
    """How large adapter.zip of this job can be at most, in bytes."""
    return _max_bytes(workload, 2.5 * workload.pull_bytes)  # PiSSA comes home with twice the rank


def checkpoint_bytes(workload: Workload) -> int:
    """How large a checkpoint of this job can be at most, in bytes."""
    return _max_bytes(workload, 1.5 * workload.checkpoint_bytes)


def merged_bytes(workload: Workload) -> int:
    """How large the weights of this job's merged model can be at most, in bytes: a head that was
    tied to its embedding may come beside it."""
    return _max_bytes(workload, 1.5 * workload.merged_bytes)


def _max_bytes(workload: Workload, predicted: float) -> int:
    unknown = workload.shape is None and not workload.cpu_practice  # `predicted` was a guess
    return int(predicted * (10 if unknown else 1)) + SLACK_BYTES


def fetch(session: Session, box: Box, staging: Path) -> Inspected:
    """Pull the result into `staging` and verify it there. Raises AdapterError for a result that
    does not verify, Lost, HostKeyChanged, and PreflightError where this disk is full."""
    expect = ExpectedResult.of(session.plan.wire_job)
    return fetch_from(session, box, "result", staging, expect, session.plan.workload)


def fetch_from(
    session: Session,
    box: Box,
    place: str,
    staging: Path,
    expect: ExpectedResult,
    workload: Workload,
) -> Inspected:
    """As `fetch`, of the result in the folder `place` of the run folder, which a stage of
    `workload` made."""
    folder = f"{scripts.run_folder(session.run_id)}/{place}"
    max_bytes = {ADAPTER: archive_bytes(workload), PICTURE: PICTURE_BYTES}
    manifest = staging / MANIFEST
    for name in (MANIFEST, *PULLED):
        (staging / name).unlink(missing_ok=True)
    try:
        pull.pull(box, f"{folder}/{MANIFEST}", manifest, max_bytes=MANIFEST_BYTES)
        for name, (sha256, size) in sandbox.listing(manifest, PULLED).items():
            if size > max_bytes[name]:
                why = (
                    f"{name} has {size:,} bytes, this job can have made at most {max_bytes[name]:,}"
                )
                raise AdapterError(why, hint=sandbox.HINT)
            local, moving = staging / name, partial(session.moving, "pull")
            pull.pull(box, f"{folder}/{name}", local, sha256, moving, max_bytes=size)
    except (Lost, HostKeyChanged):
        raise
    except BoxError as e:
        raise AdapterError(f"the result cannot be fetched whole: {e}") from e
    if (staging / PICTURE).is_file() and not _is_png(staging / PICTURE):
        (staging / PICTURE).unlink()
    return sandbox.verify(manifest, staging / ADAPTER, expect)


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(PNG_MAGIC)) == PNG_MAGIC


@dataclass(frozen=True)
class StageSection:
    """A stage before the last: its name, the folder of its verified result, facts for a report."""

    name: str
    folder: Path
    facts: Mapping[str, Any]


def write_out(
    session: Session,
    staging: Path,
    inspected: Inspected,
    events_file: Path,
    stages: Sequence[StageSection] = (),
) -> Path:
    """Copy what was verified to results.folder/RUN, the result of each of `stages` to a folder of
    its name there, and write the report beside it; `events_file` holds the run's events. Returns
    the folder that has the adapter: `staging`, where results.folder cannot be written."""
    out = Path(session.plan.out) / session.run_id
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in PULLED:
            if (staging / name).is_file():
                shutil.copy2(staging / name, out / name)
        for section in stages:
            (out / section.name).mkdir(exist_ok=True)
            shutil.copy2(section.folder / ADAPTER, out / section.name / ADAPTER)
    except OSError as e:
        session.screen.waiting(f"{out} takes no files ({e}): the verified adapter is in {staging}")
        out = staging
    try:
        (out / REPORT).write_bytes(
            report(
                session.plan.wire_job,
                inspected.facts,
                events_file,
                report_facts.rows(session),
                stages,
                cards=report_facts.cards(session, events_of(events_file)),
                commands=report_facts.commands(session.run_id),
                notes=session.plan.notes,
            )
        )
    except (OSError, ValueError, KeyError, TypeError) as e:
        session.screen.waiting(f"no {REPORT} was written: {e}")
    return out


def report(
    job: Mapping[str, Any],
    facts: Mapping[str, Any],
    events_file: Path,
    extra_rows: Mapping[str, str],
    stages: Sequence[StageSection] = (),
    *,
    cards: Sequence[tuple[str, str, str]] = (),
    commands: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> bytes:
    """report.html from job.json's object, a verified manifest's facts, the events in `events_file`,
    `extra_rows` (name -> text) for its table, a section for each of `stages`, and `cards`,
    `commands` and `notes` as trainer.wire.page has them."""
    samples: list[Mapping[str, str]] = []
    score = None
    for event in events_of(events_file):
        if isinstance(event, events.Score):
            score = (event.exact_match_before, event.exact_match_after)
        if isinstance(event, events.Sample) and len(samples) < MAX_SAMPLES:
            samples.append(event.model_dump(include={"prompt", "expected", "before", "after"}))
    told = [(section.name, section.facts) for section in stages]
    return page(job, facts, samples, score, extra_rows, told, cards, commands, notes)


def events_of(events_file: Path) -> Iterator[events.Event]:
    """The events in a file, read line by line because the box decides how long it is; none without
    the file."""
    if not events_file.is_file():
        return
    with events_file.open("rb") as file:
        for line in file:
            yield from events.readable(events.whole_lines(line)[0])[0]
