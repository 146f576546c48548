"""What the page shows of the runs in a folder, read from what lies there. Nothing here acts. Texts
of machines and data are bounded, and made plain as for a terminal; the page takes them for text."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ops.errors import JournalError, MilkteaError
from ops.plain import plain
from ops.run import explain, journal, ledger
from ops.run.eta import Eta
from ops.run.journal import Line
from ops.run.supervisor import PROGRESS
from ops.run.view import Run, find_run, runs
from trainer.wire import events

MOST_POINTS = 800  # of a curve; beyond twice as many every second one is left out
MOST_SAMPLES, MOST_TEXT = 24, 4000  # answers shown; characters of one text
MOST_TOLD = 200  # lines of the journal
TAIL_BYTES = 16 << 10  # of a log, or of what the owner tells
KEPT_TRACES = 8  # runs whose events are kept in memory
LIVE_S = 15.0  # for which the last word of an owner is news
COSTS_S = 20.0  # between two sums of all journals
LOGS = ("log.txt", "container.log")
DAYS = 31


class Trace:
    """What a run's events came to, read on from where the last look ended."""

    def __init__(self, run: Run) -> None:
        self._path = run.folder / "events.jsonl"
        self._offset, self._inode = 0, -1
        self._forget()

    def _forget(self) -> None:
        self.curve: list[tuple[int, float]] = []
        self.held_out: list[tuple[int, float, float]] = []
        self.samples: list[dict[str, str]] = []
        self.step: events.Step | None = None
        self.started: events.Started | None = None
        self.score: events.Score | None = None
        self._stride = 1

    def read_new(self) -> None:
        try:
            with self._path.open("rb") as file:
                inode = self._path.stat().st_ino
                if inode != self._inode or self._path.stat().st_size < self._offset:
                    self._offset, self._inode = 0, inode
                    self._forget()
                file.seek(self._offset)
                texts, used = events.whole_lines(file.read())
        except OSError:
            return
        self._offset += used
        for event in events.readable(texts)[0]:
            self._hear(event)

    def _hear(self, event: events.Event) -> None:
        match event:
            case events.Step():
                self.step = event
                if event.step % self._stride == 0 and abs(event.loss) < 1e300:
                    self.curve.append((event.step, event.loss))
                if len(self.curve) > 2 * MOST_POINTS:
                    self.curve, self._stride = self.curve[::2], 2 * self._stride
            case events.HeldOut():
                if abs(event.loss) < 1e300 and len(self.held_out) < MOST_POINTS:
                    self.held_out.append((event.step, event.loss, event.accuracy))
            case events.Sample():
                if len(self.samples) < MOST_SAMPLES:
                    fields = {"prompt", "expected", "before", "after"}
                    told = event.model_dump(include=fields)
                    self.samples.append({k: _text(v) for k, v in told.items()})
            case events.Started():
                self.started = event
            case events.Score():
                self.score = event
            case _:
                pass


class Runs:
    """The runs in one folder. Not for several threads at once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._journals: dict[str, tuple[tuple[int, int], list[Line]]] = {}
        self._traces: OrderedDict[str, Trace] = OrderedDict()
        self._costs: tuple[float, dict[str, Any]] | None = None

    def listed(self) -> list[dict[str, Any]]:
        """A summary of each run, the newest first; of a journal that cannot be read, why."""
        found = []
        for run in runs(self._root):
            try:
                if lines := self._lines(run):
                    found.append(self._summary(run, lines))
            except (JournalError, OSError) as e:
                found.append({"id": run.id, "error": _text(str(e)), "began": 0.0})
        return sorted(found, key=lambda row: -row["began"])

    def one(self, run_id: str) -> dict[str, Any]:
        """All that is shown of one run. Raises JournalError where there is none of this id."""
        run = self.find(run_id)
        lines, now = self._lines(run), time.time()
        trace = self._trace(run)
        told = [(line.t, text) for line in lines if (text := explain.told_line(line))]
        step = trace.step
        return self._summary(run, lines) | {
            "choices": [asdict(c) for c in run.choices()] if run.owner and run.is_mine else [],
            "curve": trace.curve[:: max(1, len(trace.curve) // MOST_POINTS)],
            "held_out": trace.held_out,
            "samples": trace.samples,
            "score": None if trace.score is None else _score(trace.score),
            "speed": None if step is None else _fine(step.tokens_per_second),
            "memory_gib": None if step is None else _fine(step.gpu_memory_gib),
            "told": [[t, _text(text, 600)] for t, text in told[-MOST_TOLD:]],
            "log": _tail(run.folder),
            "cost": [_text(text) for text in explain.cost_lines(lines, now)],
            "machine": _machine(lines),
        }

    def find(self, run_id: str) -> Run:
        """The run of exactly this id. Raises JournalError."""
        run = find_run(run_id, self._root)
        if run.id != run_id:
            raise JournalError(f"there is no run {run_id[:100]!r} here")
        return run

    def costs(self) -> dict[str, Any]:
        """Dollars by month, and by day of the last DAYS that cost something."""
        now = time.time()
        if self._costs is None or not 0 <= now - self._costs[0] < COSTS_S:
            journals = []
            for run in runs(self._root):
                with suppress(MilkteaError, OSError):
                    journals.append(self._lines(run))
            told = {
                "days": [asdict(t) for t in ledger.totals(journals, now, "day")][-DAYS:],
                "months": [asdict(t) for t in ledger.totals(journals, now, "month")],
                "today": time.strftime("%Y-%m-%d", time.localtime(now)),
            }
            self._costs = (now, told)
        return self._costs[1]

    def _lines(self, run: Run) -> list[Line]:
        path = run.folder / journal.FILE
        state = (path.stat().st_mtime_ns, path.stat().st_size)
        known = self._journals.get(run.id)
        if known is None or known[0] != state:
            known = self._journals[run.id] = (state, run.journal)
        return known[1]

    def _trace(self, run: Run) -> Trace:
        trace = self._traces.pop(run.id, None) or Trace(run)
        self._traces[run.id] = trace
        while len(self._traces) > KEPT_TRACES:
            self._traces.popitem(last=False)
        trace.read_new()
        return trace

    def _summary(self, run: Run, lines: list[Line]) -> dict[str, Any]:
        now = time.time()
        owner = run.owner
        told = explain.status(run.id, lines, now, owner, run.user).as_dict()
        ended = journal.last(lines, "failed", "pulled", "talked", "owned")
        failed = ended is not None and ended.kind == "failed"
        row = {k: v for k, v in told.items() if k not in ("run_id", "adapter")}
        row |= {"id": run.id, "mine": run.is_mine, "done": told["adapter"] is not None, "error": ""}
        if failed and not owner and ended is not None:
            row["error"] = _text(str(ended.get("said") or ended.get("what", "")), 800)
        if not owner:
            return row | {"step": told["step"], "total_steps": None, "left_s": None, "live": ""}
        trace = self._trace(run)
        step, started = trace.step, trace.started
        return row | {
            "step": told["step"] if step is None else step.step,
            "total_steps": None if started is None else started.total_steps,
            "left_s": _left_s(lines, trace, now),
            "live": _live(run.folder, now),
        }


def _left_s(lines: list[Line], trace: Trace, now: float) -> float | None:
    """Seconds until the run is at home."""
    eta = Eta()
    marks: list[tuple[float, Any]] = [(line.t, line) for line in lines]
    marks += [(e.t, e) for e in (trace.started, trace.step) if e is not None]
    for _, mark in sorted(marks, key=lambda pair: pair[0]):
        match mark:
            case Line():
                eta.line(mark)
            case events.Started():
                eta.started(mark)
            case events.Step():
                eta.step(mark)
    left_s = eta.left_s(now)
    return None if left_s is None else round(left_s)


def _live(folder: Path, now: float) -> str:
    """The owner's last word, while it is news: what is waited for, or how much has moved."""
    with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        row = json.loads(_last_bytes(folder / PROGRESS).strip().splitlines()[-1])
        if now - float(row["t"]) > LIVE_S:
            return ""
        match row["kind"]:
            case "moving":
                share = row["done"] / row["total"] if row["total"] else 1.0
                return f"{_text(row['what'], 20)} {share:.0%} of {row['total'] / 1e6:.1f} MB"
            case "booting":
                return f"boots for {row['waited_s']:.0f} s"
            case "connecting" | "waiting":
                return _text(row["message"], 200)
    return ""


def _machine(lines: list[Line]) -> str:
    rent = journal.last(lines, "renting")
    if rent is None:
        return ""
    offer = rent["offer"]
    return _text(f"{offer['num_gpus']} x {offer['gpu_name']}, {offer['country']}", 80)


def _tail(folder: Path) -> str:
    for name in LOGS:
        with suppress(OSError):
            return _text(_last_bytes(folder / name).decode("utf-8", "replace"), TAIL_BYTES)
    return ""


def _last_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        return file.read()


def _score(score: events.Score) -> list[float | None]:
    return [_fine(score.exact_match_before), _fine(score.exact_match_after), score.rows]


def _fine(value: float) -> float | None:
    return value if abs(value) < 1e300 else None  # NaN is not below either


def _text(text: str, most: int = MOST_TEXT) -> str:
    return plain(str(text)[:most])
