"""One run from its beginning to its end: rent and train, resume, attach, stop, destroy."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

from ops.api.market import open_market, uses_vast_ai
from ops.api.planning import Job, Planned, plan
from ops.api.reaping import finished
from ops.api.screen import Quiet
from ops.errors import Failed, JournalError, PreflightError
from ops.job.plan import Plan
from ops.market.client import Vast
from ops.run import people, place, rental, supervisor, wishes
from ops.run.attach import Tail, raise_if_failed, watching
from ops.run.errands import undone
from ops.run.folders import runs_folder
from ops.run.journal import Journal
from ops.run.meter import may_have_box, plan_of
from ops.run.session import Interrupted, Screen, Session
from ops.run.view import Run, find_run

End = Literal["fetch", "keep", "destroy"]
DESTROYED = "destroyed"
WATCH_EVERY_S = 0.1  # between two looks at what the owner of a run tells


def rent_and_train(
    job: Job | Planned,
    *,
    vast: Vast | None = None,
    root: Path | None = None,
    screen: Screen | None = None,
    began_unix_s: float | None = None,
    foreground: bool = False,
    detach: bool = False,
) -> Run:
    """The main job: rent, push, train, pull, verify, destroy and prove.

    The run is owned by a process of its own, which outlives this one; this call watches it
    (`attach`), or returns at once with `detach`. With `foreground` this process owns it: SIGINT
    asks `screen` what to do, SIGTERM and SIGHUP leave a box that trains to itself
    (limits.when_silent) and destroy one that does not.

    Returns with `run.adapter` at home and no box left; `run.adapter` is None where the run, or its
    box, was left to itself. Raises any MilkteaError, with the same guarantee about the box, or
    BoxLeaked; Interrupted where the run was ended before its training, or where Ctrl-C was pressed
    and nobody could be asked. `began_unix_s` is when the user asked, for the record."""
    emulated = vast is None and not uses_vast_ai()
    vast, root, screen = vast or open_market(), root or runs_folder(), screen or Quiet()
    began = began_unix_s or time.time()
    if not isinstance(job, Planned):
        job = plan(job, vast=vast, root=root, on_cpu=emulated)
        screen.plan(job.plan, job.ranking, job.credit_usd)
    if job.plan.estimated:
        raise PreflightError(
            "this plan's tokens are an estimate: its rows were not checked with the tokenizer",
            hint="`milktea plan JOB` where the model's tokenizer can be had",
        )
    with Journal(root / job.plan.run_id) as held:
        line = held.append("planned", began=round(began, 3), **job.plan.to_line())
        if foreground:
            screen.line(line)
            supervisor.supervise(Session(held, job.plan, vast, screen), job.ranking)
            return Run(held.folder)
    supervisor.start(held.folder, vast, job.ranking)
    run = Run(held.folder)
    return run if detach else attach(run, screen=screen)


def resume(
    run: Run | str,
    *,
    vast: Vast | None = None,
    root: Path | None = None,
    screen: Screen | None = None,
    foreground: bool = False,
    detach: bool = False,
    max_usd: float | None = None,
    max_hours: float | None = None,
) -> Run:
    """Go on with a run whose owner died, that was interrupted, or whose box was taken away or left
    to itself; as `rent_and_train`. A run that has an owner is watched (`attach`). `max_usd` and
    `max_hours` are of the whole run and take the place of the job's; a box that it has keeps the
    deadline that it was given. Raises JournalError where it is done or never began, NotYours for a
    run of another person, whose key is theirs alone, PreflightError for limits of a run that has an
    owner."""
    vast, root, screen = vast or open_market(), root or runs_folder(), screen or Quiet()
    finished(vast, root, screen)
    run = run if isinstance(run, Run) else find_run(run, root)
    if run.is_owned:
        if max_usd is not None or max_hours is not None:
            people.validate_mine(run.folder, hint=f"`milktea attach {run.id}` watches it")
            raise PreflightError(
                f"{run.id} is owned by a process, which keeps the limits that it began with",
                money="nothing was changed",
                hint=f"`milktea attach {run.id}` watches it",
            )
        return run if detach else attach(run, screen=screen)
    people.validate_mine(
        run.folder, hint=f"only they can go on with it; `milktea stop {run.id}` can end it"
    )
    place.validate_same(run.id, place.remembered(run.journal), vast)
    with Journal(run.folder) as held:
        if not held.lines:
            raise JournalError(
                f"{run.id} has an empty journal", hint="start it anew with rent-and-train"
            )
        if not Plan.from_line(held.lines[0]).trains:
            raise JournalError(
                f"{run.id} was rented to talk, and nobody talks any more",
                hint=f"`milktea destroy {run.id}` if its box still stands",
            )
        left = may_have_box(held.lines) and undone(held.lines, plan_of(held.lines))
        if (pulled := held.last("pulled")) is not None and not left:
            raise JournalError(
                f"{run.id} is done: its adapter is {pulled['adapter']}",
                hint="`milktea reap` if its box still stands",
            )
        wishes.forget(run.folder)  # of an owner that is dead
        if max_usd is not None or max_hours is not None:
            made = plan_of(held.lines)
            max_s = made.max_s if max_hours is None else 3600 * max_hours
            held.append("limits", max_usd=max_usd or made.max_usd, max_s=max_s)
        if foreground:
            supervisor.supervise(Session(held, plan_of(held.lines), vast, screen))
            return run
    supervisor.start(run.folder, vast)
    return run if detach else attach(run, screen=screen)


def attach(run: Run | str, *, root: Path | None = None, screen: Screen | None = None) -> Run:
    """Watch a run that another process owns, from its beginning to its end; acts on nothing.

    Ctrl-C lets `screen` choose: to leave, after which this returns, or an end of the run; a run of
    another person it leaves. Returns
    and raises as `rent_and_train`, for a run that has ended as well; JournalError where its owner
    was killed."""
    run, screen = run if isinstance(run, Run) else find_run(run, root), screen or Quiet()
    with watching(run.folder), ctrl_c() as pressed:
        tail = Tail(run.folder, screen)
        while True:
            over = not run.is_owned  # looked at first: what it told last is told below
            tail.show_new()
            if over:
                break
            if pressed.is_set():
                pressed.clear()
                if not run.is_mine or _chosen(run, screen) == wishes.LEAVE:
                    return run
            time.sleep(WATCH_EVERY_S)
    raise_if_failed(run.folder)
    return run


def _chosen(run: Run, screen: Screen) -> str:
    """What the user wishes of a run that another process owns; its owner is told. Raises
    Interrupted where nobody can be asked."""
    wish = screen.choose([(c.wish, c.text) for c in run.choices()])
    if wish is None:
        raise Interrupted(
            f"the run goes on without this terminal: `milktea attach {run.id}` watches it, "
            f"`milktea stop {run.id}` ends it"
        )
    if wish in (wishes.FETCH, wishes.KEEP, wishes.DESTROY):
        holds = wishes.send(run.folder, wish)
        screen.waiting(f"the run's owner is told: {holds}")
    return wish


@contextmanager
def ctrl_c() -> Iterator[threading.Event]:
    """Set by SIGINT; nothing is cut in half by it. In another thread than the main one, where no
    signal arrives, nothing changes."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def stop(
    run: Run | str,
    wish: End = "fetch",
    *,
    vast: Vast | None = None,
    root: Path | None = None,
    screen: Screen | None = None,
    theirs: bool = False,
) -> Run:
    """End a run: `fetch` brings the newest checkpoint home first (a result that is on its way comes
    home whole), `destroy` nothing. Returns once no box of it is left. `keep` does as `fetch`, and
    then stops the box: its disk stays for a price a day (`run.kept`), and `resume` starts it.

    Where somebody wished another end before, that one holds. Raises as `rent_and_train`;
    JournalError for a run that has no box and no owner, PreflightError where `keep` is not worth
    it, or the box is stopped already; NotYours for a run of another person, unless `theirs` says
    that it is meant."""
    run = run if isinstance(run, Run) else find_run(run, root)
    before = len(run.journal)
    if wish_end(run, wish, vast=vast, screen=screen, theirs=theirs) == DESTROYED:
        return run
    try:
        return attach(run, screen=screen)
    except (Failed, Interrupted):
        if any(line.kind == "interrupted" for line in run.journal[before:]):
            return run  # as it was wished
        raise


def wish_end(
    run: Run,
    wish: End,
    *,
    vast: Vast | None = None,
    screen: Screen | None = None,
    theirs: bool = False,
) -> str:
    """As `stop`, without waiting for the end: returns the wish that holds, an earlier one where
    there was one, once the run's owner has it; DESTROYED for a box that is destroyed here: one that
    is stopped, or another person's that no process owns. Raises as `stop` does before it waits."""
    _validate_may_end(run, theirs)
    here = not run.is_owned and may_have_box(run.journal) and (run.kept or not run.is_mine)
    if wish == "destroy" and here:
        destroy(run, vast=vast, root=run.folder.parent, screen=screen, theirs=theirs)
        return DESTROYED
    _validate_end(run, wish)
    if run.is_owned:
        return wishes.send(run.folder, wish)
    if wish != wishes.DESTROY:
        hint = f"nobody acts on it, and its key is theirs alone; `milktea destroy {run.id}` ends it"
        people.validate_mine(run.folder, hint=hint)
    if not may_have_box(run.journal):
        raise JournalError(f"{run.id} has no box, and nothing acts on it", hint="")
    vast = vast or open_market()
    finished(vast, run.folder.parent, screen)
    place.validate_same(run.id, place.remembered(run.journal), vast)
    wishes.forget(run.folder)  # of an owner that is dead
    holds = wishes.send(run.folder, wish)
    supervisor.start(run.folder, vast)
    return holds


def web(told: Callable[[str], None], *, root: Path | None = None, port: int | None = None) -> None:
    """Serve the page of the runs in `root` at a port of this machine's loopback until SIGINT: 8015,
    or a free one. `told` hears its address, which holds the token; whoever has it may end runs.
    Raises PreflightError where `port` is taken."""
    from ops.web.app import serve  # aiohttp, which the other commands do without

    def end(run: Run, wish: str) -> str:
        return wish_end(run, cast(End, wish))

    serve(root or runs_folder(), end, told, port)


def _validate_may_end(run: Run, theirs: bool) -> None:
    """Raises NotYours for a run of another person that is not meant to be ended."""
    if not theirs:
        people.validate_mine(
            run.folder,
            hint=f"`milktea stop {run.id}` asks whether it is meant, and --yes says so",
        )


def _validate_end(run: Run, wish: str) -> None:
    """Raises PreflightError for an end that this run cannot have now; nothing is changed then."""
    if run.kept and not run.is_owned:
        raise PreflightError(
            f"the box of {run.id} is {run.kept}",
            money="nothing was changed",
            hint=f"`milktea resume {run.id}` starts it, `milktea stop {run.id} --destroy` ends it",
        )
    if wish == wishes.KEEP and wishes.KEEP not in [c.wish for c in run.choices()]:
        raise PreflightError(
            f"the box of {run.id} is not worth keeping: {wishes.why_not_kept(run.journal)}",
            money="nothing was changed",
            hint=f"`milktea stop {run.id} --fetch` brings the newest checkpoint home",
        )


def destroy(
    run: Run | str,
    *,
    vast: Vast | None = None,
    root: Path | None = None,
    screen: Screen | None = None,
    theirs: bool = False,
) -> bool:
    """Destroy the box of one run now, and prove it absent; a run that has an owner is ended by it.
    Returns whether it may have had one. Raises BoxLeaked without that proof, NotYours for a run of
    another person, unless `theirs` says that it is meant."""
    vast, root = vast or open_market(), root or runs_folder()
    finished(vast, root, screen)
    run = run if isinstance(run, Run) else find_run(run, root)
    _validate_may_end(run, theirs)
    if run.is_owned:
        had = may_have_box(run.journal)
        stop(run, "destroy", vast=vast, screen=screen, theirs=theirs)
        return had
    with Journal(run.folder) as held:
        had = may_have_box(held.lines)
        if had:
            made = plan_of(held.lines)
            rental.destroy(Session(held, made, vast, screen or Quiet()), why="asked for")
        return had
