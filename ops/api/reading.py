"""Runs as they are written down: nothing acts on them here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ops.api.market import open_market
from ops.market.client import Vast
from ops.run import boxes as listing
from ops.run import people
from ops.run.boxes import Rented
from ops.run.folders import runs_folder
from ops.run.view import Run, find_run
from ops.use import compare as comparing
from ops.use.compare import Comparison


def compare(named: Sequence[Run | str], *, root: Path | None = None) -> Comparison:
    """Runs side by side: the settings in which they differ, and what each came to. Reads only;
    raises JournalError for what is no run."""
    return comparing.compare([r if isinstance(r, Run) else find_run(r, root) for r in named])


def boxes(*, vast: Vast | None = None, root: Path | None = None) -> list[Rented]:
    """Every instance of the account, with whose it is by its label and what it costs an hour.
    Raises MarketError where vast.ai does not list them."""
    return listing.rented(vast or open_market(), root or runs_folder())


def closed_runs(root: Path | None = None) -> list[tuple[str, str]]:
    """(run id, user) of each run in `root` that other people closed to who asks."""
    return people.closed(root or runs_folder())
