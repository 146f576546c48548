"""`results.merged` of a job: once the result is at home, its box merges it into its base, and the
verified folder comes home beside the adapter. What goes wrong takes nothing of the result.

The certificate's hashes are the box's own word: they prove that the folder came whole, and was made
of the adapter that is here. `milktea merge RUN` makes the same folder without the box."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ops.box import pull
from ops.box.connection import Box
from ops.box.scripts import run_folder
from ops.box.transfer import PART, sha256_of
from ops.errors import AdapterError, BoxError, Failed, PreflightError, TrainingError
from ops.market import cost
from ops.run import retrieve, sandbox
from ops.run.errands import follow_errand
from ops.run.journal import Line, is_locked, last
from ops.run.meter import may_have_box
from ops.run.retry import retry_transfer
from ops.run.session import MARGIN_S, Session
from trainer.wire.merged import CERTIFICATE, holds_weights, part_of

LEFT_S = 60.0  # for so long, a merge may have begun and not locked its folder yet
NAME, FOLDER = "merge", "merged-bf16"  # `milktea merge` calls it so
ROWS = 16  # of the held-out file, in the certificate
CERTIFICATE_BYTES = 4 << 20


def merge_on_box(session: Session, box: Box, staging: Path, out: Path) -> None:
    """Leave FOLDER in `out`; `staging` has the verified result and its manifest. Called again after
    an interrupt, it goes on where that came: in the merge, or in the file that came home."""
    if not session.plan.merged or (out / FOLDER).is_dir():
        return
    part = part_of(out / FOLDER)
    try:
        with session.own_deadline():
            if not part.is_dir():  # else it was begun, and is paid for
                _validate_reach(session, out)
                part.mkdir(parents=True)
            words = ["--out", f"{NAME}/model", "--dtype", "bf16", f"--rows={ROWS}"]
            seconds = cost.merge_s(session.offer(), session.plan.workload)
            follow_errand(session, box, NAME, [NAME, ".", *words], seconds)
            told = _brought_home(session, box, staging, part)
        part.rename(out / FOLDER)
    except (BoxError, TrainingError, AdapterError, PreflightError, ValueError, OSError) as e:
        give_up(session, out, str(e))
    else:
        session.note("merged", folder=str(out / FOLDER), **told)


def give_up(session: Session, out: Path, why: str) -> None:
    """Note why no merged model lies in `out`, where the job asks for one, and remove what came of
    it."""
    if not session.plan.merged or (out / FOLDER).is_dir():
        return
    part = part_of(out / FOLDER)
    session.screen.waiting(f"no merged model: {why}; the adapter is at home")
    session.note("merged", why_not=why[:500], bytes_out=_bytes_in(part))
    shutil.rmtree(part, ignore_errors=True)


def left_over(lines: list[Line], now: float) -> list[Path]:
    """Folders of killed merges beside the result of a run that has no box: nobody goes on with
    them."""
    pulled = last(lines, "pulled")
    if pulled is None or may_have_box(lines):
        return []
    parts = Path(pulled["adapter"]).parent.glob(part_of(Path("merged-*")).name)
    return [p for p in parts if _is_left(p, now)]


def _is_left(part: Path, now: float) -> bool:
    with suppress(OSError):  # gone meanwhile
        old = part.is_dir() and now - part.stat().st_mtime > LEFT_S
        return old and not is_locked(part, fcntl.LOCK_EX)
    return False


def remove_left_over(session: Session) -> list[str]:
    """Remove `left_over` of the session's run, and note that no merged model came where one was
    asked for. Returns a sentence for each folder that is gone."""
    told = []
    for part in left_over(session.journal.lines, session.clock.now()):
        size = _bytes_in(part)
        if session.plan.merged and session.journal.last("merged") is None:
            give_up(session, part.parent, "its process was killed, and nobody went on with it")
        shutil.rmtree(part, ignore_errors=True)
        if not part.exists():
            told.append(f"{session.run_id}: removed {size / 1e9:.2f} GB of a merge that was killed")
    return told


def _validate_reach(session: Session, out: Path) -> None:
    """Raises Failed where time, money or this disk do not reach to merge and to fetch it."""
    workload, offer = session.plan.workload, session.offer()
    fetch_s = sum(t.seconds for t in cost.transfers(offer, workload) if t.name == "merged")
    needs_s, left_s = cost.merge_s(offer, workload) + fetch_s, session.left_s() - 2 * MARGIN_S
    if left_s < needs_s:
        raise Failed(
            f"it takes up to {needs_s / 60:.0f} minutes, and the limits leave "
            f"{max(0.0, left_s) / 60:.0f}"
        )
    free = shutil.disk_usage(out).free - pull.reserve_bytes(out)
    if free < workload.merged_bytes:
        raise Failed(
            f"it has {workload.merged_bytes / 1e9:.1f} GB, and {out} room for {free / 1e9:.1f}"
        )


def _brought_home(session: Session, box: Box, staging: Path, part: Path) -> dict[str, Any]:
    """Pull the folder to `part` and verify it. Returns facts for the journal. Raises AdapterError,
    BoxError, Failed, PreflightError."""
    remote = f"{run_folder(session.run_id)}/{NAME}/model"
    certificate = part / CERTIFICATE
    certificate.unlink(missing_ok=True)
    _fetch(session, box, f"{remote}/{CERTIFICATE}", certificate, None, CERTIFICATE_BYTES)
    told = sandbox.merged_listing(certificate, staging / retrieve.MANIFEST)
    files: Mapping[str, Any] = told["files"]
    most = retrieve.merged_bytes(session.plan.workload)
    size = sum(size for name, (_, size) in files.items() if holds_weights(name))
    if size > most:
        raise AdapterError(f"it has {size:,} bytes, and this job's model at most {most:,}")
    for path in part.iterdir():
        if path.name.removesuffix(PART) not in (CERTIFICATE, *files):
            path.unlink()
    for name, (sha256, size_bytes) in files.items():
        if (part / name).is_file() and sha256_of(part / name) == sha256:
            continue  # by an earlier client
        _fetch(session, box, f"{remote}/{name}", part / name, sha256, size_bytes)
    found = sandbox.verify_merged(part, _bytes_in(part))
    return found | {"bytes_out": _bytes_in(part), "numbers": told["numbers"]}


def _fetch(
    session: Session, box: Box, remote: str, local: Path, sha256: str | None, most: int
) -> None:
    def moving(done_bytes: int, total_bytes: int) -> None:
        if session.left_s() < MARGIN_S:
            raise Failed("the limits of the run were reached while it came home")
        session.moving("merged", done_bytes, total_bytes)

    retry_transfer(
        session, box, lambda: pull.pull(box, remote, local, sha256, moving, max_bytes=most)
    )


def _bytes_in(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir()) if folder.is_dir() else 0
