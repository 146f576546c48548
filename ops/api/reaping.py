"""Boxes that nobody looks after: find them, destroy them, prove it."""

from __future__ import annotations

from pathlib import Path

from ops.api.market import open_market
from ops.api.screen import Quiet
from ops.market.client import Vast
from ops.run import reap as reaping
from ops.run.folders import runs_folder
from ops.run.reap import Reaped
from ops.run.session import Screen


def reap(
    *,
    foreign: bool = False,
    vast: Vast | None = None,
    root: Path | None = None,
    screen: Screen | None = None,
) -> Reaped:
    """Destroy every box of the runs in `root` that no live client looks after, and prove it; with
    `foreign`, also those labelled like a run that has no folder there, and those of other people's
    runs. What could not be proven absent is in `leaked`; nothing is raised for it."""
    vast, root = vast or open_market(), root or runs_folder()
    return reaping.reap(root, vast, screen or Quiet(), foreign=foreign)


def finish_destroys(
    *, vast: Vast | None = None, root: Path | None = None, screen: Screen | None = None
) -> Reaped:
    """Finish every destroy that an earlier client began and could not prove; what still could not
    be proven is in `leaked`."""
    vast, root = vast or open_market(), root or runs_folder()
    return reaping.finish_destroys(root, vast, screen or Quiet())


def finished(vast: Vast, root: Path, screen: Screen | None = None) -> None:
    """`finish_destroys`; raises BoxLeaked for what is left."""
    reaped = finish_destroys(vast=vast, root=root, screen=screen)
    if reaped.leaked:
        raise reaped.leaked[0]
