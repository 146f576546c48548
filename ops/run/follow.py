"""Follow a training by byte offset, mirror its newest checkpoint home, and keep to the money, the
hours and the patience.

A lost connection says nothing about the training: it is made again for as long as the box's own
watchdog lets it live.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ops.box import scripts, transfer
from ops.box.connection import Box
from ops.errors import (
    BoxError,
    Failed,
    HostKeyChanged,
    Lost,
    NeverReady,
    OverBudget,
    PreflightError,
    Stalled,
    Unsuitable,
)
from ops.run import blame, retrieve
from ops.run.rental import raise_if_preempted
from ops.run.session import MARGIN_S, Session
from ops.wait import Patience, until
from trainer.wire import events

POLL_S = 2.0
ODD = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    OverflowError,
)  # of a box's manifest
MAX_LINE = 4 << 20  # bytes of one event; a longer line is passed over
EVENTS = "events.jsonl"  # at home beside the journal, byte for byte what the box wrote

STARTS = 3.0  # times as long as the plan foresaw may loading take

_Answer = tuple[int | None, bool, int, bytes]  # of scripts.parse_poll


class NoFirstStep(Unsuitable):
    """The machine does not come to train: its link, its disk, or its GPUs among each other."""


@dataclass
class _Heard:
    """For how long the box gives no answer, and answers without an event; what it said of a
    failure."""

    silent: Patience
    still: Patience
    failure: events.Failed | None = None
    stepped: bool = False  # a step was told on this machine: from then on it is the training's
    unreadable: int = 0  # lines that are no event
    window: int = scripts.POLL_BYTES  # asked for at once; grows for a long line
    skipping: bool = False  # within a line longer than MAX_LINE: passed over to its end
    gone: bool = False  # at the last look the trainer neither ran nor had ended


def follow(session: Session, box: Box) -> None:
    """Return when the training ended well.

    Raises Failed with the trainer's reason, Stalled, OverBudget, Preempted, or Lost when vast.ai
    has answered for a lease's time, and the box has not."""
    (session.journal.folder / EVENTS).touch()
    heard = _Heard(Patience(session.clock), Patience(session.clock))
    told = retrieve.events_of(session.journal.folder / EVENTS)
    heard.stepped = any(isinstance(e, events.Step) for e in told)
    until(lambda: _look(session, box, heard), every_s=POLL_S, clock=session.clock)


def _look(session: Session, box: Box, heard: _Heard) -> bool | None:
    """Bring home the events that are new. True when the training ended well, None while it runs."""
    home = session.journal.folder / EVENTS
    answer = _poll(session, box, heard, home.stat().st_size)
    while answer and _keep_events(session, box, heard, home, answer):
        _enforce(session, heard)
        answer = _poll(session, box, heard, home.stat().st_size)
    session.moved_t = session.clock.steady()  # this loop has its own patience
    if answer is None:
        if heard.silent.seconds > scripts.LEASE_S * session.clock.pace:
            raise Lost(
                f"the box could not be reached for {heard.silent.seconds:.0f} s, although vast.ai "
                "answers"
            )
    else:
        code, running, _, _ = answer
        if code is not None:
            _ended(session, box, code, heard.failure)
            return True
        if heard.gone and not running:
            _raise_gone(session, box)
        heard.gone = not running
    _enforce(session, heard)
    return None


def _keep_events(session: Session, box: Box, heard: _Heard, home: Path, answer: _Answer) -> bool:
    """Append the whole lines of an answer to `home` and act on them. True when more wait there."""
    _, _, size, news = answer
    if size > retrieve.EVENTS_BYTES:
        raise Failed(
            f"the box tells {size:,} bytes of events, no training tells more than "
            f"{retrieve.EVENTS_BYTES:,}: it is not taken home",
        )
    lines, used = events.whole_lines(news)
    full = len(news) >= heard.window
    if not used and full and heard.window >= MAX_LINE:
        used, heard.skipping = len(news), True  # kept as it came, read by nobody
    with home.open("ab") as f:
        f.write(news[:used])
    if lines:
        if heard.skipping:  # the end of a long one
            lines[0], heard.skipping = "", False
        heard.window = scripts.POLL_BYTES
        _tell_all(session, box, heard, lines)
        heard.still.renew()  # after a checkpoint has come home, however long that took
        heard.silent.renew()
        session.moved_t = session.clock.steady()
    elif full and not used:
        heard.window = min(4 * heard.window, MAX_LINE)
    return (used > 0 or full) and home.stat().st_size < size


def _tell_all(session: Session, box: Box, heard: _Heard, lines: list[str]) -> None:
    """Of several checkpoints only the newest is mirrored: the box may have removed the others."""
    found, odd = events.readable(lines)
    if odd:
        if not heard.unreadable:
            said = "a line of the trainer's events cannot be read and is passed over"
            session.note("event", event="warning", message=said)
        heard.unreadable += odd
    newest = next((e for e in reversed(found) if isinstance(e, events.Checkpoint)), None)
    for event in found:
        heard.failure = event if isinstance(event, events.Failed) else heard.failure
        heard.stepped = heard.stepped or isinstance(event, events.Step)
        _tell(session, event)
        if event is newest:
            mirror(session, box, newest)


def _poll(session: Session, box: Box, heard: _Heard, offset: int) -> _Answer | None:
    """One answer, or None when the box could not be reached and vast.ai did not take it away."""
    try:
        done = box.run(scripts.poll(session.run_id, offset, heard.window))
        answer = scripts.parse_poll(done.stdout_bytes)
    except (Lost, ValueError) as e:
        session.screen.waiting(f"no connection ({e}); the training goes on without us")
    else:
        heard.silent.renew()
        heard.still.look()
        return answer
    online = raise_if_preempted(session, box)
    with suppress(NeverReady):
        box.connect(deadline_s=20 * session.clock.pace)
    heard.silent.look(counts=online)
    heard.still.look(counts=False)
    return None


def _tell(session: Session, event: events.Event) -> None:
    session.screen.event(event, session.spent_usd(), session.plan.max_usd, session.dies_at())
    match event:
        case events.Started():
            session.note(
                "event",
                event="started",
                step=event.step,
                total_steps=event.total_steps,
                kernels=event.kernels,
            )
        case events.Warned():
            session.note("event", event="warning", message=event.message)
        case events.Failed():
            session.note(
                "event",
                event="failed",
                reason=event.reason,
                samples=event.samples[:20],
                hint=event.hint,
            )
        case events.Finished():
            session.note(
                "event",
                event="finished",
                steps=event.steps,
                final_loss=event.final_loss,
                seconds=event.seconds,
            )
        case _:
            pass


def mirror(session: Session, box: Box, checkpoint: events.Checkpoint) -> None:
    """Bring one checkpoint home whole, then forget the older. A failure is no reason to stop: the
    next one comes."""
    folder = session.journal.folder / "checkpoints" / str(checkpoint.step)
    remote = f"{scripts.run_folder(session.run_id)}/{checkpoint.path}"
    try:
        moved = pull_folder(
            box,
            remote,
            folder,
            checkpoint.manifest_sha256,
            partial(session.moving, "save"),
            max_bytes=retrieve.checkpoint_bytes(session.plan.workload),
        )
    except HostKeyChanged:
        raise
    except (BoxError, PreflightError, OSError, *ODD) as e:
        session.screen.waiting(f"checkpoint {checkpoint.step} not mirrored: {e}")
        return
    session.note(
        "checkpoint",
        step=checkpoint.step,
        folder=str(folder),
        manifest_sha256=checkpoint.manifest_sha256,
        bytes_out=moved,
    )
    for older in folder.parent.iterdir():
        if older != folder:
            shutil.rmtree(older, ignore_errors=True)


def pull_folder(
    box: Box,
    remote: str,
    local: Path,
    manifest_sha256: str | None,
    progress: transfer.Progress | None = None,
    *,
    max_bytes: int,
) -> int:
    """Pull the files that `remote`/manifest.json names, each checked, the manifest last. Returns
    the bytes moved. Raises what `transfer.pull` raises, and ODD for a manifest that is none or that
    names more than `max_bytes` or retrieve.MAX_FILES; nothing stays here then."""
    try:
        local.mkdir(parents=True, exist_ok=True)
        staged = local / "manifest.json.incoming"
        most = retrieve.CHECKPOINT_MANIFEST_BYTES
        transfer.pull(box, f"{remote}/manifest.json", staged, manifest_sha256, max_bytes=most)
        files = _listed(json.loads(staged.read_text("utf-8"))["files"], max_bytes)
        for name, (sha256, size) in files.items():
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            transfer.pull(box, f"{remote}/{name}", local / name, sha256, progress, max_bytes=size)
        staged.rename(local / "manifest.json")
    except BaseException:
        shutil.rmtree(local, ignore_errors=True)
        raise
    return sum(size for _, size in files.values())


def _listed(files: dict[str, Any], max_bytes: int) -> dict[str, tuple[str, int]]:
    """sha256 and bytes by name. Raises ODD for more than this job can have made, or elsewhere."""
    found = {name: (str(said["sha256"]), int(said["bytes"])) for name, said in files.items()}
    sizes = [size for _, size in found.values()]
    if len(found) > retrieve.MAX_FILES or min(sizes, default=0) < 0 or sum(sizes) > max_bytes:
        raise ValueError(
            f"the manifest names {len(found):,} files of {sum(sizes):,} bytes, this job can have "
            f"made at most {retrieve.MAX_FILES:,} of {max_bytes:,}"
        )
    for name in found:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"the manifest names {name!r:.80}, outside its folder")
    return found


def newest_checkpoint(session: Session) -> Path | None:
    """The mirrored checkpoint to continue from: the newest whose manifest is there."""
    whole = [
        p.parent
        for p in (session.journal.folder / "checkpoints").glob("*/manifest.json")
        if p.parent.name.isdigit()
    ]
    return max(whole, key=lambda p: int(p.name), default=None)


def _ended(session: Session, box: Box, code: int, failure: events.Failed | None) -> None:
    session.note("ended", exit_code=code)
    if code == 0:
        return
    tail = box.run(scripts.log_tail(session.run_id)).stdout
    (session.journal.folder / "log.txt").write_text(tail, "utf-8")
    reason = failure.reason if failure else "\n".join(tail.strip().splitlines()[-8:])
    if died := blame.gpu_word(f"{reason}\n{tail}"):
        raise Unsuitable(f"its GPU died ({died}): the training ended with exit code {code}")
    samples = f" (rows: {', '.join(failure.samples[:5])})" if failure and failure.samples else ""
    raise Failed(
        f"the training ended with exit code {code}: {reason}{samples}",
        hint=(failure.hint if failure else "")
        or f"`milktea logs {session.run_id}` shows its last lines",
    )


def _raise_gone(session: Session, box: Box) -> NoReturn:
    """Twice, a poll apart, neither running nor ended: killed whole, or the container restarted."""
    tail = box.run(scripts.log_tail(session.run_id)).stdout
    raise Failed(
        "the trainer's processes are gone without an exit code: killed from outside, most often "
        f"for memory\n{tail[-800:]}",
        hint="lower data.max_length, or take a machine with more memory, "
        f"then `milktea resume {session.run_id}`",
    )


def _enforce_start(session: Session, heard: _Heard) -> None:
    """Until the first step the plan's own prediction is the measure, and the machine is to
    blame."""
    foreseen = session.predicted(session.offer())
    patience_s = max(session.plan.stall_s, STARTS * (foreseen.transfer_s + foreseen.start_s))
    if heard.still.seconds > patience_s:
        raise NoFirstStep(
            f"{blame.NO_STEP} {heard.still.seconds / 60:.0f} minutes of silence; the plan foresaw "
            f"{(foreseen.transfer_s + foreseen.start_s) / 60:.0f} minutes to load"
        )


def _enforce(session: Session, heard: _Heard) -> None:
    if not heard.stepped:
        _enforce_start(session, heard)
    elif heard.still.seconds > session.plan.stall_s:
        raise Stalled(
            f"no event for {heard.still.seconds / 60:.0f} minutes (limits.stall_minutes)",
            hint=f"`milktea logs {session.run_id}` shows what it did last",
        )
    if session.left_s() < MARGIN_S:
        raise OverBudget(
            f"limits.max_usd = {session.plan.max_usd} or limits.max_hours is reached; the "
            "newest checkpoint is at home",
            hint=f"raise the limit in the job file, then `milktea resume {session.run_id}` goes "
            "on from the checkpoint",
        )
