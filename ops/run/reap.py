"""What is left to be destroyed: every command begins with `finish_destroys`; `reap` ends everything
that no live client looks after."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ops.errors import BoxLeaked, JournalError
from ops.job.plan import Plan
from ops.market.client import Vast
from ops.run import journal
from ops.run.journal import Journal
from ops.run.rental import give_back, until_absent
from ops.run.session import Screen, Session, may_have_box

RUN_ID = re.compile(r"^[a-z0-9][a-z0-9-]*-\d{8}-\d{6}-[0-9a-f]{4}$")


@dataclass
class Reaped:
    destroyed: list[str] = field(default_factory=list)  # run ids, proven absent
    left: list[str] = field(default_factory=list)  # "label: why it was left alone"
    leaked: list[BoxLeaked] = field(default_factory=list)


def unfinished(lines: list[journal.Line]) -> bool:
    """A destroy was begun and not proven: it is finished before anything else is done."""
    line = journal.last(lines, "destroying", "leaked", "destroyed", "renting")
    return line is not None and line.kind in ("destroying", "leaked")


def finish_destroys(root: Path, vast: Vast, screen: Screen) -> Reaped:
    """Only what an earlier command began to destroy. Runs that another process acts on are left to
    it."""
    return _each(root, vast, screen, unfinished)


def reap(root: Path, vast: Vast, screen: Screen, *, foreign: bool = False) -> Reaped:
    """Destroy the boxes of all runs under `root` that no live client holds, and of damaged journals
    by their label. With `foreign`, also what is labelled like a run of ours but has no folder
    here."""
    reaped = _each(root, vast, screen, may_have_box)
    held = {line.split(":")[0] for line in reaped.left}
    here = {folder.name for folder in root.iterdir() if folder.is_dir()} if root.exists() else set()
    for instance in vast.instances():
        if not RUN_ID.match(instance.label) or instance.label in held:
            continue
        if instance.label not in here and not foreign:
            reaped.left.append(
                f"{instance.label}: instance {instance.id} has no run folder here; `milktea "
                "reap --foreign` destroys it"
            )
            continue
        _by_label(vast, instance.label, reaped)
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
                session = Session(held, Plan.from_line(held.lines[0]), vast, screen)
                give_back(session, why="reaped")
                reaped.destroyed.append(folder.name)
        except BoxLeaked as e:
            reaped.leaked.append(e)
        except JournalError as e:
            with suppress(OSError):
                reaped.left.append(f"{folder.name}: {e}") if _is_held(folder) else _by_label(
                    vast, folder.name, reaped
                )
    return reaped


def _is_held(folder: Path) -> bool:
    try:
        journal.hold(folder).close()
    except JournalError:
        return True
    return False


def _by_label(vast: Vast, label: str, reaped: Reaped) -> None:
    """Destroy by label alone, without a journal that could be written."""
    try:
        until_absent(vast, label)
        reaped.destroyed.append(label)
    except BoxLeaked as e:
        reaped.leaked.append(e)
