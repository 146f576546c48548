"""Watch a run that another process owns, by reading its journal, its events and its progress file,
and say how it ended. Nothing here acts on the run."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ops import errors
from ops.errors import JournalError, MilkteaError
from ops.market.models import Instance
from ops.run import journal, wishes
from ops.run.folders import ours
from ops.run.follow import EVENTS
from ops.run.journal import Line, last
from ops.run.meter import ends_itself_at, max_usd_of, may_have_box, plan_of, spent_usd
from ops.run.session import Interrupted, Screen
from ops.run.supervisor import PROGRESS, WATCHED
from trainer.wire import events

# Journal lines before which the events of until then are shown, and those before which all are.
_AMONG_EVENTS = ("checkpoint", "event")
_AFTER_EVENTS = ("ended", "failed", "interrupted", "preempted")


@contextmanager
def watching(folder: Path) -> Iterator[None]:
    """While the block runs, the owner can see that a terminal watches."""
    with open(folder / WATCHED, "a", opener=ours) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


class Tail:
    """Follows the files of a run and shows what is new on a screen."""

    def __init__(self, folder: Path, screen: Screen) -> None:
        self._folder, self._screen = folder, screen
        self.lines: list[Line] = []
        self._journal_size = 0
        self._events, self._progress = _File(folder / EVENTS), _File(folder / PROGRESS)
        self._to_show: list[events.Event] = []
        self._began = time.time()

    def show_new(self) -> None:
        """Show what is new: each journal line after the events that came before it."""
        before = len(self.lines)
        for line in self._read_journal()[before:]:
            if line.kind in _AMONG_EVENTS:
                self._show_events(until=line.t)
            elif line.kind in _AFTER_EVENTS:
                self._show_events()
            self._screen.line(line)
        self._show_events()
        for row in self._progress.new_lines():
            with suppress(ValueError, KeyError, TypeError):
                self._show_row(json.loads(row))
        if self.lines:
            spent = spent_usd(self.lines, time.time())
            self._screen.meter(spent, max_usd_of(self.lines))

    def _read_journal(self) -> list[Line]:
        size = (self._folder / journal.FILE).stat().st_size
        if size != self._journal_size:
            self._journal_size = size
            self.lines = journal.read(self._folder)
        return self.lines

    def _show_events(self, until: float = math.inf) -> None:
        """Show the events up to the unix second `until` by the box's clock, in their order."""
        self._to_show += events.readable(self._events.new_lines())[0]
        if not self._to_show or not self.lines:
            return
        lines, max_usd = self.lines, max_usd_of(self.lines)
        spent, dies_at = spent_usd(lines, time.time()), ends_itself_at(lines) or time.time()
        while self._to_show and self._to_show[0].t <= until:
            self._screen.event(self._to_show.pop(0), spent, max_usd, dies_at)

    def _show_row(self, row: dict[str, Any]) -> None:
        if row["t"] < self._began - 1:  # progress of before this terminal attached
            return
        match row["kind"]:
            case "booting":
                self._screen.booting(Instance(**row["instance"]), row["waited_s"])
            case "connecting":
                self._screen.connecting(row["message"])
            case "moving":
                self._screen.moving(row["what"], row["done"], row["total"])
            case "waiting":
                self._screen.waiting(row["message"])
            case "talking":
                self._screen.talking(row["page"], float(row["ends_at"]))
            case "destroying":
                self._screen.destroying(row["why"])


class _File:
    """Reads the complete new lines of a growing file; begins again where the file was replaced."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._inode = path, 0, -1

    def new_lines(self) -> list[str]:
        try:
            with open(self._path, "rb") as file:
                now = os.fstat(file.fileno())
                if now.st_ino != self._inode or now.st_size < self._offset:
                    self._inode, self._offset = now.st_ino, 0
                file.seek(self._offset)
                texts, used = events.whole_lines(file.read())
        except OSError:
            return []
        self._offset += used
        return texts


def raise_if_failed(folder: Path) -> None:
    """Raise the error with which the run's last owner ended, by its journal; Interrupted where the
    user ended it, JournalError where it was killed and left no error. Returns where the adapter is
    here, or the box was left."""
    lines = journal.read(folder)
    owned = last(lines, "owned")
    since = lines[owned.n :] if owned else lines
    if (failed := last(since, "failed")) is not None:
        raise _error(failed)
    over = last(lines, "pulled", "talked") and not may_have_box(lines)
    if last(since, "left", "kept") is not None or over:
        return
    plan = plan_of(lines)
    ends_at = ends_itself_at(lines)
    box = "no box of it is known"
    if may_have_box(lines) and ends_at is not None:
        when = time.strftime("%a %H:%M", time.localtime(ends_at))
        alone = wishes.works_alone(lines, plan)
        box = f"its box ends itself {f'at {when}' if alone else 'within ten minutes'}"
    raise JournalError(
        f"{folder.name}: the process that owned this run was killed",
        money=f"{box}; spent {spent_usd(lines, time.time()):.4f} $ of {plan.max_usd:.2f} $",
        hint=f"`milktea resume {folder.name}` goes on where it stood",
    )


def _error(failed: Line) -> BaseException:
    """The error of a journal line that `supervisor.error_facts` made, of its own class."""
    what = str(failed.get("said") or failed["what"])
    if failed.get("error") == "Interrupted":
        return Interrupted(what.removeprefix("interrupted: "))
    kind = getattr(errors, str(failed.get("error")), None)
    known = isinstance(kind, type) and issubclass(kind, MilkteaError)
    error: MilkteaError = (kind if known else MilkteaError)(what)  # type: ignore[misc]
    error.exit_code = int(failed["exit_code"])
    error.fill_in_money(str(failed.get("money") or "see `milktea cost`"))
    error.hint = str(failed.get("hint") or error.hint)
    return error
