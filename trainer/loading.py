"""Reports what a box does before its first step, so that a download of minutes does not look like a
hang.

No torch. The launcher uses this, before there is a training process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.wire.events import EventWriter, Loading

EVERY_S = 10.0  # between two looks at what has arrived


@contextmanager
def told(run: Path, what: str, folder: Path | None = None) -> Iterator[None]:
    """Writes a Loading event when the block begins, and one after each EVERY_S in which bytes were
    added under `folder`; a download that stands still writes none."""
    writer = EventWriter(run / "events.jsonl")
    first = _bytes(folder)
    writer.write(Loading, what=what, done_bytes=first)
    ended = threading.Event()

    def look() -> None:
        seen = first
        while not ended.wait(EVERY_S):
            now = _bytes(folder)
            if now > seen:
                writer.write(Loading, what=what, done_bytes=now)
            seen = max(seen, now)

    thread = threading.Thread(target=look, name="loading", daemon=True)
    if folder is not None:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if folder is not None:
            thread.join()
        writer.close()


def cache_of(base: str) -> Path:
    """Where the hub's files of a model gather while they come."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return (
        Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=base, repo_type="model") / "blobs"
    )


def _bytes(folder: Path | None) -> int:
    total = 0
    for path in folder.iterdir() if folder is not None and folder.is_dir() else ():
        with suppress(OSError):  # renamed meanwhile
            total += path.stat().st_size
    return total
