"""What of a run comes home, how much of it at most, and what is made here of it.

The archive and the picture come by name; the report is made here from facts: a box sends no page
that a browser here would open. What comes is bounded by what this job can have made, whatever the
box says that it has.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ops.box import scripts, transfer
from ops.box.connection import Box
from ops.errors import AdapterError, BoxError, HostKeyChanged, Lost
from ops.market.cost import Workload
from ops.run import apart
from ops.run.apart import Looked
from ops.run.result import ADAPTER, Expected
from ops.run.session import Session
from trainer.wire import events
from trainer.wire.page import page

MANIFEST, PICTURE, REPORT = "manifest.json", "loss.png", "report.html"
COMES_HOME = (ADAPTER, PICTURE)  # of the files that a manifest lists; others stay on the box
MANIFEST_BYTES = 16 << 20  # a hundred thousand tensors and steps
CHECKPOINT_MANIFEST_BYTES = 4 << 20
PICTURE_BYTES = 4 << 20
EVENTS_BYTES = 256 << 20  # of one machine's events
SLACK_BYTES = 64 << 20  # tokenizer, templates, small files
MAX_FILES = 1024  # of a checkpoint: a part for each process, and a few more
MAX_SAMPLES = 100  # in a report
PNG = b"\x89PNG\r\n\x1a\n"


def archive_bytes(workload: Workload) -> int:
    """The most that adapter.zip of this job can take."""
    return _at_most(workload, 2.5 * workload.pull_bytes)  # PiSSA comes home with twice the rank


def checkpoint_bytes(workload: Workload) -> int:
    """The most that a checkpoint of this job can take."""
    return _at_most(workload, 1.5 * workload.checkpoint_bytes)


def _at_most(workload: Workload, predicted: float) -> int:
    unknown = workload.shape is None and not workload.cpu_practice  # sizes were guessed
    return int(predicted * (10 if unknown else 1)) + SLACK_BYTES


def fetch(session: Session, box: Box, staging: Path) -> Looked:
    """Bring the result into `staging` and verify it there. Raises AdapterError where it is not
    whole and sane, Lost, PreflightError where this disk is full."""
    folder = f"{scripts.run_folder(session.run_id)}/result"
    most = {ADAPTER: archive_bytes(session.plan.workload), PICTURE: PICTURE_BYTES}
    manifest = staging / MANIFEST
    for name in (MANIFEST, *COMES_HOME):
        (staging / name).unlink(missing_ok=True)
    try:
        transfer.pull(box, f"{folder}/{MANIFEST}", manifest, max_bytes=MANIFEST_BYTES)
        for name, (sha256, size) in apart.listing(manifest, COMES_HOME).items():
            if size > most[name]:
                why = f"{name} has {size:,} bytes, this job can have made at most {most[name]:,}"
                raise AdapterError(why, hint=apart.HINT)
            local, moving = staging / name, partial(session.moving, "pull")
            transfer.pull(box, f"{folder}/{name}", local, sha256, moving, max_bytes=size)
    except (Lost, HostKeyChanged):
        raise
    except BoxError as e:
        raise AdapterError(f"the result cannot be fetched whole: {e}") from e
    if (staging / PICTURE).is_file() and not _is_png(staging / PICTURE):
        (staging / PICTURE).unlink()
    return apart.verify(manifest, staging / ADAPTER, Expected.of(session.plan.wire_job))


def _is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(PNG)) == PNG


def lay_out(session: Session, staging: Path, looked: Looked, told: Path) -> Path:
    """Copy what was verified to results.folder/RUN and write the report beside it; `told` holds the
    run's events. Returns the folder in which the adapter lies: `staging`, where the other takes
    none."""
    out = Path(session.plan.out) / session.run_id
    offer = session.offer()
    beside = {
        "cost": f"{session.spent_usd():.4f} $",
        "machine": f"{offer.num_gpus} x {offer.gpu_name}, {offer.usd_per_hour:.3f} $/h",
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in COMES_HOME:
            if (staging / name).is_file():
                shutil.copy2(staging / name, out / name)
    except OSError as e:
        session.screen.waiting(f"{out} takes no files ({e}): the verified adapter is in {staging}")
        out = staging
    try:
        (out / REPORT).write_bytes(report(session.plan.wire_job, looked.facts, told, beside))
    except (OSError, ValueError, KeyError, TypeError) as e:
        session.screen.waiting(f"no {REPORT} was written: {e}")
    return out


def report(
    job: Mapping[str, Any], facts: Mapping[str, Any], told: Path, beside: Mapping[str, str]
) -> bytes:
    """report.html of job.json's object, a verified manifest's facts, the events in the file `told`,
    and rows of our own."""
    samples: list[Mapping[str, str]] = []
    score = None
    for event in events_of(told):
        if isinstance(event, events.Score):
            score = (event.exact_match_before, event.exact_match_after)
        if isinstance(event, events.Sample) and len(samples) < MAX_SAMPLES:
            samples.append(event.model_dump(include={"prompt", "expected", "before", "after"}))
    return page(job, facts, samples, score, beside)


def events_of(told: Path) -> Iterator[events.Event]:
    """The events in a file, line by line: it is as long as the box made it."""
    if not told.is_file():
        return
    with told.open("rb") as file:
        for line in file:
            yield from events.readable(events.whole_lines(line)[0])[0]
