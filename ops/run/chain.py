"""Results of a run's stages. Each is fetched and verified when its stage ends, and pushed to the
next box when this one is lost, so that no stage is trained twice."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from ops.box.connection import Box
from ops.box.transfer import sha256_of
from ops.errors import AdapterError, BoxError, HostKeyChanged, PreflightError
from ops.run import retrieve
from ops.run.expected import ExpectedResult
from ops.run.session import Session
from trainer.wire import events
from trainer.wire.job import WIRE, Job

FACTS = "facts.json"  # beside a stage's result: what a report shows of it
CHECKPOINT = re.compile(r"(?:(stages/\d+-[a-z]+)/)?checkpoints/(\d+)")


def job_of(session: Session) -> Job | None:
    """The job of a run of several stages; None for a run of one."""
    told = session.plan.wire_job
    if told["wire"] != WIRE or len(told.get("stages", [])) < 2:
        return None
    return Job.model_validate(told)


def folders(session: Session) -> list[str]:
    """The folder of each stage, relative to the run folder here and on the box; [""] for a run of
    one."""
    job = job_of(session)
    return [""] if job is None else [job.folder(n) for n in range(len(job.stages))]


def result_at_home(session: Session, number: int) -> Path | None:
    """The folder of the verified result of stage `number` (from 0); None where it is not here."""
    places = folders(session)
    folder = session.journal.folder / places[number] / "result"
    return folder if len(places) > 1 and (folder / FACTS).is_file() else None


def remember(session: Session, event: events.StageEnded) -> None:
    """Note in the journal that a stage has ended, once per box."""
    job = job_of(session)
    number = event.number - 1
    if job is None or not 0 <= number < len(job.stages):
        return
    if number not in _ended(session):
        session.note(
            "stage_ended",
            number=number,
            stages=len(job.stages),
            stage=job.stages[number].name,
            steps=event.steps,
            final_loss=event.final_loss,
            numbers={name[:80]: value for name, value in list(event.numbers.items())[:32]},
        )


def bring_home(session: Session, box: Box) -> None:
    """Fetch and verify the results of the stages that have ended and are not here, except the last
    stage's, which is fetched as the run's. Raises AdapterError for one that does not verify, Lost,
    HostKeyChanged, PreflightError."""
    job = job_of(session)
    if job is None:
        return
    for number in sorted(_ended(session) - {len(job.stages) - 1}):
        if result_at_home(session, number) is None:
            _fetch(session, box, job, number)


def _ended(session: Session) -> set[int]:
    """The stages that the current box has reported as ended; results on earlier boxes may be
    gone."""
    lines = session.journal.lines
    rented = session.journal.last("renting")
    since = lines[rented.n :] if rented else lines
    return {line["number"] for line in since if line.kind == "stage_ended"}


def try_to_bring_home(session: Session, box: Box) -> None:
    """`bring_home`, but a failure only shows a message; a later call tries again."""
    try:
        bring_home(session, box)
    except HostKeyChanged:
        raise
    except (BoxError, AdapterError, PreflightError, OSError) as e:
        session.screen.waiting(f"the result of a stage is not at home yet: {e}")


def _fetch(session: Session, box: Box, job: Job, number: int) -> None:
    place = job.folder(number)
    incoming = session.journal.folder / place / "incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    expect = ExpectedResult.of(job.part(number).model_dump(mode="json"))
    workload = session.plan.workload.each[number]
    inspected = retrieve.fetch_from(session, box, f"{place}/result", incoming, expect, workload)
    (incoming / FACTS).write_text(json.dumps(inspected.facts), "utf-8")
    incoming.rename(incoming.with_name("result"))
    session.note(
        "stage_pulled",
        number=number,
        stage=job.stages[number].name,
        sha256=inspected.verified.sha256,
        bytes_out=inspected.verified.size_bytes,
    )


def results_to_push(session: Session) -> list[Path]:
    """The files of the results that are here, of the stages before the first without a result."""
    found: list[Path] = []
    if job_of(session) is None:
        return found
    for number in range(len(folders(session))):
        if (result := result_at_home(session, number)) is None:
            break
        names = (retrieve.MANIFEST, *retrieve.PULLED)
        found += [result / name for name in names if (result / name).is_file()]
    return found


def sections(session: Session) -> list[retrieve.StageSection]:
    """The stages before the last, for the report and results.folder."""
    found = []
    for number, place in enumerate(folders(session)[:-1]):
        if (result := result_at_home(session, number)) is not None:
            facts = json.loads((result / FACTS).read_text("utf-8"))
            found.append(retrieve.StageSection(Path(place).name, result, facts))
    return found


def newest_checkpoint(session: Session) -> Path | None:
    """The newest complete checkpoint mirrored here, of the first stage without a result; None
    without one."""
    places = folders(session)
    if places != [""]:
        missing = (n for n in range(len(places)) if result_at_home(session, n) is None)
        places = [places[n] for n in [next(missing, len(places) - 1)]]
    complete = [
        p.parent
        for p in (session.journal.folder / places[0] / "checkpoints").glob("*/manifest.json")
        if p.parent.name.isdigit()
    ]
    return max(complete, key=lambda p: int(p.name), default=None)


def saved_words(session: Session) -> str:
    """Text: which checkpoint is at home, or that none is."""
    newest = newest_checkpoint(session)
    if newest is None:
        return "no checkpoint of it is at home"
    return f"the checkpoint of step {newest.name} is at home"


def home_of(session: Session, path: str) -> Path | None:
    """The local path of the checkpoint at `path` on the box; None where it belongs to no stage of
    this run."""
    match = CHECKPOINT.fullmatch(path)
    if match is None or (match[1] or "") not in folders(session):
        return None
    return session.journal.folder / path


def is_here(session: Session, checkpoint: events.Checkpoint) -> bool:
    """Whether this checkpoint, and not another of its name, is complete here."""
    folder = home_of(session, checkpoint.path)
    try:
        found = folder and sha256_of(folder / "manifest.json")
    except OSError:
        return False
    return found == checkpoint.manifest_sha256


def order_of(path: str) -> tuple[int, int]:
    """(stage, step) of the checkpoint at `path` on the box; the newest has the largest."""
    stage = re.search(r"stages/(\d+)-", path)
    return (int(stage[1]) if stage else 0, int(path.rpartition("/")[2]))
