"""Destroy what earlier commands left. Every command that acts begins with `finish_destroys`; `reap`
destroys the boxes of all runs that no process owns."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ops.errors import BoxLeaked, Elsewhere, Fenced, JournalError
from ops.market.client import Vast
from ops.run import journal, place
from ops.run.absence import until_absent
from ops.run.journal import Journal
from ops.run.kept import due, kept_on, words
from ops.run.meter import may_appear, may_have_box, plan_of
from ops.run.rental import destroy
from ops.run.session import Screen, Session

RUN_ID = re.compile(r"^[a-z0-9][a-z0-9-]*-\d{8}-\d{6}-[0-9a-f]{4}$")


@dataclass
class Reaped:
    destroyed: list[str] = field(default_factory=list)  # run ids, proven absent
    left: list[str] = field(default_factory=list)  # "label: why it was left alone"
    leaked: list[BoxLeaked] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)  # of `left`, labels without a run folder here


def unfinished(lines: list[journal.Line]) -> bool:
    """Whether a destroy was begun and is not proven yet."""
    line = journal.last(lines, "destroying", "leaked", "destroyed", "renting")
    return line is not None and line.kind in ("destroying", "leaked")


def finish_destroys(root: Path, vast: Vast, screen: Screen) -> Reaped:
    """Finish what an earlier command began to destroy or to stop, and destroy boxes that are kept
    past their date and those that appear late after a create without a clear answer. Runs that
    another process owns are left to it."""
    now = vast.clock.now()
    reaped = _each(root, vast, screen, lambda lines: unfinished(lines) or due(lines, now))
    appearing = [
        f for f in journal.runs(root) if _may_appear(f, vast) and f.name not in _handled(reaped)
    ]
    if appearing:
        listed = {label for _, label in vast.labels()}
        for folder in appearing:
            if folder.name in listed and not journal.is_held(folder):
                _by_label(vast, folder, reaped)
    return reaped


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
    instances that are labelled like a run but have no folder under `root`. A run that was rented at
    another place is left alone, and both places are named."""
    reaped = _each(root, vast, screen, may_have_box)
    held = {line.split(":")[0] for line in reaped.left}
    here = {folder.name for folder in root.iterdir() if folder.is_dir()} if root.exists() else set()
    for number, label in vast.labels():
        if not RUN_ID.match(label) or label in held:
            continue
        if label not in here and not foreign:
            reaped.foreign.append(label)
            reaped.left.append(
                f"{label}: instance {number} has no run folder here; `milktea "
                "reap --foreign` asks, and destroys it"
            )
            continue
        _by_label(vast, root / label, reaped)
    return reaped


def _each(
    root: Path, vast: Vast, screen: Screen, wanted: Callable[[list[journal.Line]], bool]
) -> Reaped:
    reaped = Reaped()
    for folder in journal.runs(root):
        try:
            if not wanted(journal.read(folder)):
                continue
            with Journal(folder, vast.clock.now) as held:
                session = Session(held, plan_of(held.lines), vast, screen)
                line = kept_on(session)
                if line is None:
                    destroy(session, why="reaped")
                    reaped.destroyed.append(folder.name)
                else:
                    reaped.left.append(f"{folder.name}: {_kept(folder.name, line)}")
        except BoxLeaked as e:
            reaped.leaked.append(e)
        except (Fenced, Elsewhere) as e:
            reaped.left.append(str(e) if str(e).startswith(folder.name) else f"{folder.name}: {e}")
        except (JournalError, OSError, ValueError, KeyError, TypeError):
            # damaged, or a disk that takes nothing: the label is enough
            _by_label(vast, folder, reaped)
    return reaped


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
