"""What of a run comes home, and what is made here of it: the archive and the picture by name, the
report from facts. A box sends no page that a browser here would open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ops.run.result import ADAPTER
from trainer.wire import events
from trainer.wire.page import page

PICTURE, REPORT = "loss.png", "report.html"
COMES_HOME = (ADAPTER, PICTURE)  # of the files that a manifest lists; others stay on the box
MAX_SAMPLES = 100  # in a report


def report(
    job: Mapping[str, Any], manifest: Mapping[str, Any], told: Path, beside: Mapping[str, str]
) -> bytes:
    """report.html of job.json's object, a verified manifest, the events in the file `told`, and
    rows of our own."""
    samples: list[Mapping[str, str]] = []
    score = None
    for event in _events(told):
        if isinstance(event, events.Score):
            score = (event.exact_match_before, event.exact_match_after)
        if isinstance(event, events.Sample) and len(samples) < MAX_SAMPLES:
            samples.append(event.model_dump(include={"prompt", "expected", "before", "after"}))
    return page(job, manifest, samples, score, beside)


def _events(told: Path) -> Iterator[events.Event]:
    """Line by line: the file is as long as the box made it."""
    if not told.is_file():
        return
    with told.open("rb") as file:
        for line in file:
            yield from events.readable(events.whole_lines(line)[0])[0]
