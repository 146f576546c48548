"""Runs as they are written down: nothing acts on them here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ops.run.view import Run, find_run
from ops.use import compare as comparing
from ops.use.compare import Comparison


def compare(named: Sequence[Run | str], *, root: Path | None = None) -> Comparison:
    """Runs side by side: the settings in which they differ, and what each came to. Reads only;
    raises JournalError for what is no run."""
    return comparing.compare([r if isinstance(r, Run) else find_run(r, root) for r in named])
