"""events.jsonl: one JSON object a line, appended and flushed by rank 0, followed home by byte
offset. stdlib + pydantic.

A line is a fact: ``{"t": unix seconds, "event": NAME, ...}``. A reader keeps unknown names and
fields (``extra="allow"``), so that a newer trainer does not break an older follower. A line without
its newline is not there yet.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# the largest step, row or byte count that an event may hold
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Event(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)
    t: float


class Loading(_Event):
    """Before the first step: what is done, and how many bytes of it are there (of `total_bytes`,
    where that is known)."""

    event: Literal["loading"] = "loading"
    what: str
    done_bytes: Count = 0
    total_bytes: Count = 0


class Started(_Event):
    event: Literal["started"] = "started"
    step: Count = 0  # the step that it continues from
    total_steps: Count
    processes: Count = 1
    device: str = "cpu"
    trainable_parameters: Count = 0
    stage: str = ""  # of a run of several, its name
    number: Count = 1  # from 1
    stages: Count = 1
    weights_read: Count = 1  # how often this process has read the base from its disk so far
    kernels: dict[str, str] = {}
    versions: dict[str, str] = {}


class Step(_Event):
    event: Literal["step"] = "step"
    step: Count
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float = 0.0
    gpu_memory_gib: float = 0.0
    eta_s: float = 0.0


class Checkpoint(_Event):
    """``path`` is relative to the run folder; its manifest.json is written last and names every
    file with its sha256."""

    event: Literal["checkpoint"] = "checkpoint"
    step: Count
    path: str
    manifest_sha256: str


class Sample(_Event):
    """One held-out question, answered by the base model and by the trained one."""

    event: Literal["sample"] = "sample"
    prompt: str
    expected: str = ""
    before: str = ""
    after: str = ""


class Score(_Event):
    """Exact match over the held-out rows whose answers are short, 0 to 1."""

    event: Literal["score"] = "score"
    rows: Count
    exact_match_before: float
    exact_match_after: float


class Measured(_Event):
    """What a stage measures on held-out rows: name -> (before, after) the training."""

    event: Literal["measured"] = "measured"
    rows: Count
    numbers: dict[str, tuple[float, float]]


class HeldOut(_Event):
    """Of held-out rows, after `step` steps: of target tokens, nats of one and the share that greedy
    guessing gets right; of pairs and judged answers, the loss of one and the share on its right
    side."""

    event: Literal["held_out"] = "held_out"
    step: Count
    rows: Count
    loss: float
    accuracy: float


class Warned(_Event):
    event: Literal["warning"] = "warning"
    message: str


class Failure(_Event):
    """The trainer stopped itself: what, the samples it saw (file:line), and what to do."""

    event: Literal["failed"] = "failed"
    reason: str
    samples: list[str] = []
    hint: str = ""


class StageEnded(_Event):
    """Stage `number` (from 1) of several is done. Its result is whole in `path`, relative to the
    run folder; `numbers` are what its held-out rows gave."""

    event: Literal["stage_ended"] = "stage_ended"
    stage: str
    number: Count
    stages: Count
    path: str
    manifest_sha256: str
    steps: Count
    final_loss: float
    numbers: dict[str, float] = {}


class Finished(_Event):
    event: Literal["finished"] = "finished"
    steps: Count
    final_loss: float
    seconds: float
    adapter_sha256: str


class Unknown(_Event):
    event: str


Event = (
    Loading
    | Started
    | Step
    | Checkpoint
    | Sample
    | Score
    | Measured
    | HeldOut
    | Warned
    | Failure
    | StageEnded
    | Finished
    | Unknown
)
_KNOWN = {
    c.model_fields["event"].default: c
    for c in (
        Loading,
        Started,
        Step,
        Checkpoint,
        Sample,
        Score,
        Measured,
        HeldOut,
        Warned,
        Failure,
        StageEnded,
        Finished,
    )
}


def parse(line: str) -> Event:
    """One line to its event. Raises ValueError, and nothing else, on a line that no trainer
    wrote."""
    try:
        row: dict[str, Any] = json.loads(line)
        return _KNOWN.get(row.get("event"), Unknown).model_validate(row)
    except (AttributeError, TypeError, RecursionError) as e:
        raise ValueError(f"not an event: {line[:80]!r}") from e


def readable(lines: list[str]) -> tuple[list[Event], int]:
    """The events of `lines`, and the number of lines that are no events: half written, or printed
    by a library."""
    found: list[Event] = []
    for line in lines:
        with suppress(ValueError):
            found.append(parse(line))
    return found, len(lines) - len(found)


def whole_lines(chunk: bytes) -> tuple[list[str], int]:
    """The complete lines of `chunk` and the number of bytes that they take, newline included. A
    line ends at the byte of a newline only: U+2028 and its like are text."""
    end = chunk.rfind(b"\n") + 1
    return [line.decode("utf-8", "replace") for line in chunk[:end].split(b"\n")[:-1]], end


def end_cut_line(path: Path) -> None:
    """Closes the half line that a run leaves when it is killed while it writes, so that the next
    line is one."""
    if path.is_file() and path.stat().st_size:
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


class Words:
    """The events of one run as lines of a log, each with this machine's time of day: few of them,
    and of a failure none, because the trainer says on stderr why it stopped."""

    EVERY_S = 10.0  # between the lines of two steps

    def __init__(self) -> None:
        self._total = 0
        self._next_t = 0.0
        self._loading = ""

    def line(self, event: _Event) -> str:
        """What to print of `event`; empty where that is nothing."""
        text = "".join(c if c.isprintable() else " " for c in self._text(event))
        return f"{time.strftime('%H:%M:%S', time.localtime(event.t))}  {text}" if text else ""

    def _text(self, event: _Event) -> str:
        match event:
            case Loading() if event.what != self._loading:
                self._loading = event.what
                return event.what
            case Started():
                self._total = event.total_steps
                stage = f"{event.number} of {event.stages}, {event.stage}: "
                on = f"{event.processes} x {event.device}"
                return f"{stage if event.stages > 1 else ''}{event.total_steps} steps on {on}"
            case Step() if event.t >= self._next_t or event.step == self._total:
                self._next_t = event.t + self.EVERY_S
                at = f"step {event.step} of {self._total}, loss {event.loss:.4f}"
                left = f"{event.eta_s // 3600:.0f} h {event.eta_s % 3600 / 60:.0f} min left"
                return f"{at}, {event.tokens_per_second:,.0f} tokens/s, {left}"
            case Checkpoint():
                return f"checkpoint of step {event.step}"
            case HeldOut():
                right = f"loss {event.loss:.4f}, {event.accuracy:.1%} right"
                return f"held-out rows after step {event.step}: {right}"
            case Score():
                before, after = event.exact_match_before, event.exact_match_after
                return f"exact match: {before:.1%} before, {after:.1%} after"
            case Measured():
                told = (
                    f"{n}: {a:.4g} before, {b:.4g} after" for n, (a, b) in event.numbers.items()
                )
                return "; ".join(told)
            case Warned():
                return f"warning: {event.message}"
            case Finished():
                return f"done: {event.steps} steps in {event.seconds:.0f} s"
            case _:
                return ""


class EventWriter:
    """Appends to events.jsonl; each line reaches the kernel before `write` returns. Used by rank 0
    only. Where nobody follows that file, MILKTEA_TELL=1 prints the same for people to read."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        self._words = Words() if os.environ.get("MILKTEA_TELL") == "1" else None

    def write(self, event: type[_Event], **fields: Any) -> None:
        happened = event(t=round(time.time(), 3), **fields)
        self._file.write(json.dumps(happened.model_dump(), ensure_ascii=False) + "\n")
        self._file.flush()
        if self._words is not None and (line := self._words.line(happened)):
            print(line, flush=True)

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
