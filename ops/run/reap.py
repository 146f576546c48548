"""Destroy what earlier commands left. Every command that acts begins with `finish_destroys`, which
ends what was decided, whoever decided it; `reap` destroys the boxes of all runs that no process
owns, and those of other people only where it is told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ops.errors import BoxLeaked, Elsewhere, Fenced, JournalError
from ops.job import label
from ops.job.label import Label, this_user
from ops.market.client import Vast
from ops.run import journal, merge, people, place
from ops.run.absence import until_absent
from ops.run.journal import Journal
from ops.run.kept import due, kept_on, words
from ops.run.meter import may_appear, may_have_box, plan_of
from ops.run.rental import destroy
from ops.run.session import Screen, Session


@dataclass
class Reaped:
    destroyed: list[str] = field(default_factory=list)  # run ids, proven absent
    left: list[str] = field(default_factory=list)  # "label: why it was left alone"
    leaked: list[BoxLeaked] = field(default_factory=list)
    # of `left`, labels without a run folder here, or of other people
    foreign: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)  # "run id: what was removed from this disk"


def unfinished(lines: list[journal.Line]) -> bool:
    """Whether a destroy was begun and is not proven yet."""
    line = journal.last(lines, "destroying", "leaked", "destroyed", "renting")
    return line is not None and line.kind in ("destroying", "leaked")


def finish_destroys(root: Path, vast: Vast, screen: Screen) -> Reaped:
    """Finish what an earlier command began to destroy or to stop, and destroy boxes that are kept
    past their date and those that appear late after a create without a clear answer; remove what
    killed merges left here. Runs that another process owns are left to it."""
    now = vast.clock.now()

    def wanted(lines: list[journal.Line]) -> bool:
        return unfinished(lines) or due(lines, now) or bool(merge.left_over(lines, now))

    reaped = _each(root, vast, screen, wanted)
    appearing = [
        f for f in journal.runs(root) if _may_appear(f, vast) and f.name not in _handled(reaped)
    ]
    if appearing:
        listed = {named.run_id for _, named in _named(vast)}
        for folder in appearing:
            if folder.name in listed and not journal.is_held(folder):
                _by_label(vast, folder, reaped)
    return reaped


def _named(vast: Vast) -> list[tuple[int, Label]]:
    """(instance id, label) of every instance that is labelled like a run."""
    parsed = [(number, label.parse(text)) for number, text in vast.labels()]
    return [(number, named) for number, named in parsed if named is not None]


def _may_appear(folder: Path, vast: Vast) -> bool:
    try:
        lines = journal.read(folder)
    except JournalError:
        return False
    return may_appear(lines, vast.clock.now()) and not may_have_box(lines)


def _handled(reaped: Reaped) -> set[str]:
    return {*reaped.destroyed, *(line.split(":")[0] for line in reaped.left)}


def reap(root: Path, vast: Vast, screen: Screen, *, foreign: bool = False) -> Reaped:
    """Destroy the boxes of all runs under `root` that no process owns; a run with a damaged journal
    by its label. A box that is stopped and kept is left alone until its date. With `foreign`, also
    instances that are labelled like a run but have no folder under `root`, and those of other
    people. A run that was rented at another place is left alone, and both places are named."""
    reaped = _each(root, vast, screen, may_have_box, theirs=foreign)
    held = {line.split(":")[0] for line in reaped.left}
    for number, named in _named(vast):
        if named.run_id in held:
            continue
        if not foreign and (why := _why_foreign(root / named.run_id, named)):
            reaped.foreign.append(str(named))
            reaped.left.append(_foreign(named.run_id, f"instance {number} {why}"))
            continue
        _by_label(vast, root / named.run_id, reaped)
    return reaped


def _why_foreign(folder: Path, named: Label) -> str:
    """Why this box is not for this user to destroy; "" where it is."""
    if named.user and named.user != this_user():
        return f"is a box of {named.user}"
    if not folder.is_dir():
        return "has no run folder here"
    return "" if named.user or people.is_mine(folder) else f"is a box of {people.user_of(folder)}"


def _foreign(run_id: str, why: str) -> str:
    return f"{run_id}: {why}; `milktea reap --foreign` asks, and destroys it"


def _each(
    root: Path,
    vast: Vast,
    screen: Screen,
    wanted: Callable[[list[journal.Line]], bool],
    *,
    theirs: bool = True,
) -> Reaped:
    """`theirs`: the runs of other people too, as far as their journals can be written."""
    reaped = Reaped()
    for folder in journal.runs(root):
        try:
            if not wanted(journal.read(folder)):
                continue
            if not theirs and not people.is_mine(folder):
                _leave_theirs(folder, reaped)
                continue
            with Journal(folder, vast.clock.now) as held:
                session = Session(held, plan_of(held.lines), vast, screen)
                if may_have_box(held.lines) or unfinished(held.lines):
                    _end(session, reaped)
                if people.is_mine(folder):
                    reaped.removed += merge.remove_left_over(session)
        except BoxLeaked as e:
            reaped.leaked.append(e)
        except (Fenced, Elsewhere) as e:
            reaped.left.append(str(e) if str(e).startswith(folder.name) else f"{folder.name}: {e}")
        except (JournalError, OSError, ValueError, KeyError, TypeError):
            # damaged, or a disk that takes nothing: the label is enough
            if people.is_mine(folder):
                _by_label(vast, folder, reaped)
    return reaped


def _end(session: Session, reaped: Reaped) -> None:
    """Destroy the run's box, unless it is stopped and kept."""
    line = kept_on(session)
    if line is None:
        destroy(session, why="reaped")
        reaped.destroyed.append(session.run_id)
    else:
        reaped.left.append(f"{session.run_id}: {_kept(session.run_id, line)}")


def _leave_theirs(folder: Path, reaped: Reaped) -> None:
    user = people.user_of(folder)
    if journal.is_held(folder):
        reaped.left.append(f"{folder.name}: a run of {user}, and a process looks after it")
        return
    reaped.foreign.append(str(Label(folder.name, user)))
    reaped.left.append(_foreign(folder.name, f"its box is one of {user}"))


def _kept(run_id: str, line: journal.Line) -> str:
    return f"its box is {words(line)}; `milktea destroy {run_id}` ends it now"


def _by_label(vast: Vast, folder: Path, reaped: Reaped) -> None:
    """Destroy by label alone, without a journal that could be written."""
    try:
        place.validate_same(folder.name, place.of_folder(folder), vast)
        until_absent(vast, folder.name)
        reaped.destroyed.append(folder.name)
    except BoxLeaked as e:
        reaped.leaked.append(e)
    except Elsewhere as e:
        reaped.left.append(str(e))
