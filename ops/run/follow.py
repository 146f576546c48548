"""Follow a training: read its events from a byte offset, mirror its newest checkpoint, and hold it
to limits.max_usd, max_hours and stall_minutes.

A lost connection says nothing about the training: we reconnect for as long as the box's own
watchdog lets the box live.
"""

from __future__ import annotations

import json
import math
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ops.box import pull, scripts
from ops.box.connection import Box
from ops.box.transfer import Progress
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
from ops.run import blame, chain, retrieve
from ops.run.rental import raise_if_preempted
from ops.run.session import MARGIN_S, MORE, Session
from ops.wait import Patience, until
from trainer.wire import events

POLL_S = 2.0
AGAIN_S = 60.0  # before a checkpoint is fetched again whose pull the link has broken
# what reading a manifest raises that is not what a trainer writes
BAD_MANIFEST = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
MAX_LINE = 4 << 20  # bytes of one event; a longer line is skipped
EVENTS = "events.jsonl"  # here beside the journal, byte for byte what the box wrote

START_FACTOR = 3.0  # loading may take so many times what the plan predicted

# of scripts.parse_poll: exit code, whether the trainer runs, bytes of its events, the new ones
_Answer = tuple[int | None, bool, int, bytes]


class Restarted(BoxError):
    """The box was restarted, which ended its training: `launch` has to be called again."""


class NoFirstStep(Unsuitable):
    """The machine did not reach step 1: its link, its disk, or the links between its GPUs."""


@dataclass
class _State:
    """What `follow` remembers between two polls."""

    silent: Patience  # since the box last answered
    still: Patience  # since its last event
    failure: events.Failure | None = None
    stepped: bool = False  # this machine reached step 1: a later hang is the training's fault
    unreadable: int = 0  # lines that are not events
    window: int = scripts.POLL_BYTES  # bytes to ask for; grows for a long line
    skipping: bool = False  # inside a line longer than MAX_LINE: skip to its end
    gone: bool = False  # at the last poll the trainer neither ran nor had an exit code
    due: events.Checkpoint | None = None  # the newest that was told, until it is at home
    due_t: float = -math.inf  # by the steady clock: not fetched before


def follow(session: Session, box: Box) -> None:
    """Return when the training ended with exit code 0.

    Raises Failed with the trainer's reason, NoFirstStep, Stalled, OverBudget, Preempted, or Lost
    when vast.ai answered and the box did not for LEASE_S."""
    (session.journal.folder / EVENTS).touch()
    state = _State(Patience(session.clock), Patience(session.clock))
    for event in retrieve.events_of(session.journal.folder / EVENTS):  # told to an earlier client
        _remember(state, event)
    until(lambda: _look(session, box, state), every_s=POLL_S, clock=session.clock)


def _look(session: Session, box: Box, state: _State) -> int | None:
    """Fetch the new events. The exit code when the training ended with 0, None while it runs."""
    home = session.journal.folder / EVENTS
    answer = _poll(session, box, state, home.stat().st_size)
    while answer and _keep_events(session, box, state, home, answer):
        _enforce(session, state)
        answer = _poll(session, box, state, home.stat().st_size)
    if answer:
        _mirror_due(session, box, state)
    session.moved_t = session.clock.steady()  # this loop has its own patience
    if answer is None:
        if state.silent.seconds > scripts.LEASE_S * session.clock.pace:
            raise Lost(
                f"the box could not be reached for {state.silent.seconds:.0f} s, although vast.ai "
                "answers"
            )
    else:
        code, running, _, _ = answer
        if code is not None:
            with suppress(Lost):  # the next poll says it again
                _record_end(session, box, code, state.failure)
                return code
        if state.gone and not running:
            with suppress(Lost):  # the next poll says it again
                _raise_gone(session, box)
        state.gone = not running
    _enforce(session, state)
    return None


def _keep_events(session: Session, box: Box, state: _State, home: Path, answer: _Answer) -> bool:
    """Append the complete lines of an answer to `home` and act on them. True when more are there to
    fetch."""
    _, _, size, news = answer
    if size > retrieve.EVENTS_BYTES:
        raise Failed(
            f"the box tells {size:,} bytes of events, no training tells more than "
            f"{retrieve.EVENTS_BYTES:,}: it is not taken home",
        )
    lines, used = events.whole_lines(news)
    full = len(news) >= state.window
    if not used and full and state.window >= MAX_LINE:
        used, state.skipping = len(news), True  # appended as it is, but not parsed
    with home.open("ab") as f:
        f.write(news[:used])
    if lines:
        if state.skipping:  # the first line is the end of the long one
            lines[0], state.skipping = "", False
        state.window = scripts.POLL_BYTES
        _handle(session, box, state, lines)
        state.still.renew()  # here, and not before: mirroring a checkpoint may take long
        state.silent.renew()
        session.moved_t = session.clock.steady()
    elif full and not used:
        state.window = min(4 * state.window, MAX_LINE)
    return (used > 0 or full) and home.stat().st_size < size


def _handle(session: Session, box: Box, state: _State, lines: list[str]) -> None:
    """Act on each event. Only the newest of several checkpoints is mirrored: the box may have
    removed the others."""
    found, unreadable = events.readable(lines)
    if unreadable:
        if not state.unreadable:
            message = "a line of the trainer's events cannot be read and is passed over"
            session.note("event", event="warning", message=message)
        state.unreadable += unreadable
    newest = next((e for e in reversed(found) if isinstance(e, events.Checkpoint)), None)
    for event in found:
        _remember(state, event)
        _record(session, event)
        if isinstance(event, events.StageEnded):
            chain.remember(session, event)
            chain.try_to_bring_home(session, box)
        if event is newest:
            _mirror_due(session, box, state)


def _remember(state: _State, event: events.Event) -> None:
    if isinstance(event, events.Started | events.Failure):
        state.failure = event if isinstance(event, events.Failure) else None
    elif isinstance(event, events.Checkpoint):
        state.due, state.due_t = event, -math.inf
    elif isinstance(event, events.Step):
        state.stepped = True


def _mirror_due(session: Session, box: Box, state: _State) -> None:
    """Mirror the newest checkpoint that was told, unless it is at home. Where the link breaks it
    stays due: the next one may be an hour away, and the box may be outbid before."""
    if state.due is None or session.clock.steady() < state.due_t:
        return
    try:
        if not chain.is_here(session, state.due):
            chain.try_to_bring_home(session, box)
            mirror(session, box, state.due)
        state.due = None
    except Lost:
        state.due_t = session.clock.steady() + AGAIN_S * session.clock.pace


def _poll(session: Session, box: Box, state: _State, offset: int) -> _Answer | None:
    """One answer of the box. None when the box could not be reached and still exists at vast.ai;
    raises Preempted when it does not."""
    try:
        done = box.run(scripts.poll(session.run_id, offset, state.window))
        answer = scripts.parse_poll(done.stdout_bytes)
    except (Lost, ValueError) as e:
        session.screen.waiting(f"no connection ({e}); the training goes on without us")
    else:
        state.silent.renew()
        state.still.look()
        return answer
    online = raise_if_preempted(session, box)
    with suppress(NeverReady):
        box.connect(deadline_s=20 * session.clock.pace)
    state.silent.look(counts=online)
    state.still.look(counts=False)
    return None


def _record(session: Session, event: events.Event) -> None:
    """Show the event, and put what a later client needs of it into the journal."""
    session.screen.event(event, session.spent_usd(), session.plan.max_usd, session.dies_at())
    match event:
        case events.Started():
            session.note(
                "event",
                event="started",
                step=event.step,
                total_steps=event.total_steps,
                kernels=event.kernels,
                **_place(event),
            )
        case events.Warned():
            session.note("event", event="warning", message=event.message)
        case events.Failure():
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


def _place(event: events.Started) -> dict[str, Any]:
    """Of a stage of several, which one it is."""
    if event.stages < 2:
        return {}
    place = {"number": event.number, "stages": event.stages, "stage": event.stage[:20]}
    return place | {"weights_read": event.weights_read}


def mirror(session: Session, box: Box, checkpoint: events.Checkpoint) -> None:
    """Pull one checkpoint completely, then delete the older ones here. A failure only shows a
    message: the next checkpoint comes. Raises Lost where the link broke."""
    folder = chain.home_of(session, checkpoint.path)
    if folder is None or folder.name != str(checkpoint.step):
        message = f"the box calls a checkpoint {checkpoint.path!r:.80}: it is not taken home"
        session.screen.waiting(message)
        return
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
    except (BoxError, PreflightError, OSError, *BAD_MANIFEST) as e:
        session.screen.waiting(f"checkpoint {checkpoint.step} not mirrored: {e}")
        if isinstance(e, Lost):
            raise
        return
    session.note(
        "checkpoint",
        step=checkpoint.step,
        folder=str(folder),
        manifest_sha256=checkpoint.manifest_sha256,
        bytes_out=moved,
    )
    others = [session.journal.folder / f / "checkpoints" for f in chain.folders(session)]
    for older in [*folder.parent.iterdir(), *others]:
        if older not in (folder, folder.parent):
            shutil.rmtree(older, ignore_errors=True)


def pull_folder(
    box: Box,
    remote: str,
    local: Path,
    manifest_sha256: str | None,
    progress: Progress | None = None,
    *,
    max_bytes: int,
) -> int:
    """Pull the files that `remote`/manifest.json names into `local`, each by its sha256, the
    manifest last. Returns the bytes moved.

    Raises what `pull.pull` raises, and one of BAD_MANIFEST for a manifest that cannot be read
    or that names more than `max_bytes` or retrieve.MAX_FILES; `local` is removed then."""
    try:
        local.mkdir(parents=True, exist_ok=True)
        staged = local / "manifest.json.incoming"
        max_manifest_bytes = retrieve.CHECKPOINT_MANIFEST_BYTES
        pull.pull(
            box, f"{remote}/manifest.json", staged, manifest_sha256, max_bytes=max_manifest_bytes
        )
        files = _manifest_files(json.loads(staged.read_text("utf-8"))["files"], max_bytes)
        for name, (sha256, size) in files.items():
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            pull.pull(box, f"{remote}/{name}", local / name, sha256, progress, max_bytes=size)
        staged.rename(local / "manifest.json")
    except BaseException:
        shutil.rmtree(local, ignore_errors=True)
        raise
    return sum(size for _, size in files.values())


def _manifest_files(files: dict[str, Any], max_bytes: int) -> dict[str, tuple[str, int]]:
    """(sha256, bytes) by name. Raises one of BAD_MANIFEST for more than this job can have made, and
    for a name that leads out of the folder."""
    found = {name: (str(entry["sha256"]), int(entry["bytes"])) for name, entry in files.items()}
    sizes = [size for _, size in found.values()]
    negative = any(size < 0 for size in sizes)
    if len(found) > retrieve.MAX_FILES or negative or sum(sizes) > max_bytes:
        raise ValueError(
            f"the manifest names {len(found):,} files of {sum(sizes):,} bytes, this job can have "
            f"made at most {retrieve.MAX_FILES:,} of {max_bytes:,}"
        )
    for name in found:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"the manifest names {name!r:.80}, outside its folder")
    return found


def _record_end(session: Session, box: Box, code: int, failure: events.Failure | None) -> None:
    tail = box.run(scripts.log_tail(session.run_id)).stdout if code else ""
    session.note("ended", exit_code=code)
    if code == 0:
        return
    (session.journal.folder / "log.txt").write_text(tail, "utf-8")
    reason = failure.reason if failure else "\n".join(tail.strip().splitlines()[-8:])
    reason = reason or "it left no word of why, as on a disk that is full"
    if full := blame.disk_word(f"{reason}\n{tail}"):
        raise Unsuitable(f"its disk is full ({full}): the training ended with exit code {code}")
    if died := blame.gpu_word(f"{reason}\n{tail}"):
        raise Unsuitable(f"its GPU died ({died}): the training ended with exit code {code}")
    samples = f" (rows: {', '.join(failure.samples[:5])})" if failure and failure.samples else ""
    raise Failed(
        f"the training ended with exit code {code}: {reason}{samples}",
        hint=(failure.hint if failure else "")
        or f"`milktea logs {session.run_id}` shows its last lines",
    )


def _raise_gone(session: Session, box: Box) -> NoReturn:
    """The trainer neither ran nor had an exit code in two polls: it was killed (raises Failed), or
    the container restarted (raises Restarted)."""
    if box.run(scripts.restarted(session.run_id)).stdout.strip() == "yes":
        raise Restarted("the box was restarted in the middle of the training")
    tail = box.run(scripts.log_tail(session.run_id)).stdout
    raise Failed(
        "the trainer's processes are gone without an exit code: killed from outside, most often "
        f"for memory\n{tail[-800:]}",
        hint="lower data.max_length, or take a machine with more memory, "
        f"then `milktea resume {session.run_id}`",
    )


def _enforce_start(session: Session, state: _State) -> None:
    """Before the first step, patience is measured by the plan's prediction, and a machine that
    takes longer is at fault. Raises NoFirstStep."""
    predicted = session.predicted(session.offer())
    predicted_s = predicted.transfer_s + predicted.start_s
    patience_s = max(session.plan.stall_s, START_FACTOR * predicted_s)
    if state.still.seconds > patience_s:
        raise NoFirstStep(
            f"{blame.NO_STEP} {state.still.seconds / 60:.0f} minutes of silence; the plan foresaw "
            f"{predicted_s / 60:.0f} minutes to load"
        )


def _enforce(session: Session, state: _State) -> None:
    """Raises NoFirstStep, Stalled or OverBudget when a limit is reached."""
    if not state.stepped:
        _enforce_start(session, state)
    elif state.still.seconds > session.plan.stall_s:
        raise Stalled(
            f"no event for {state.still.seconds / 60:.0f} minutes (limits.stall_minutes)",
            hint=f"`milktea logs {session.run_id}` shows what it did last",
        )
    if session.left_s() < MARGIN_S:
        raise OverBudget(
            f"limits.max_usd = {session.plan.max_usd} or limits.max_hours is reached",
            hint=MORE.replace("RUN", session.run_id),
        )
