"""A run's numbers in TensorBoard's own files, made from the events that are at home, so that they
are there for a run that goes on, for one that has ended, and without its box."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ops.errors import PreflightError
from ops.run.view import Run
from trainer.wire import events
from trainer.wire.events import Event

PORT = 6006  # TensorBoard's own
EVERY_S = 2.0  # between two looks for new events
UP_S = 60.0  # for TensorBoard to listen
_HELD_OUT = {"loss": "held_out_loss", "accuracy": "held_out_accuracy"}  # as on the box's own board


def validate() -> None:
    """Raises PreflightError where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise PreflightError(
            "TensorBoard is not installed beside milktea",
            hint=f"{sys.executable} -m pip install tensorboard",
        )


def scalars(event: Event) -> dict[str, float]:
    """The numbers of a step, or of a look at held-out rows, by name; {} for another event."""
    if not isinstance(event, events.Step | events.HeldOut):
        return {}
    told = {k: v for k, v in event.model_dump(exclude={"t", "event", "step"}).items() if _fine(v)}
    if isinstance(event, events.HeldOut):
        return {name: float(told[key]) for key, name in _HELD_OUT.items() if key in told}
    return {str(key)[:80]: float(value) for key, value in told.items()}


def _fine(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


class Board:
    """Writes what is new of each run to a folder of its name under `folder`. Use as a context
    manager."""

    def __init__(self, runs: Sequence[Run], folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writers = {run.id: EventFileWriter(str(folder / run.id)) for run in runs}
        self._runs, self._taken = runs, dict.fromkeys(self._writers, 0)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *rest: object) -> None:
        for writer in self._writers.values():
            writer.close()

    def write_new(self) -> None:
        """Write the events that came since the last call. A run that was begun again on another
        machine is written anew from its first event."""
        from tensorboard.compat.proto import event_pb2, summary_pb2

        for run in self._runs:
            told, writer = list(run.events()), self._writers[run.id]
            new = told[self._taken[run.id] if len(told) >= self._taken[run.id] else 0 :]
            self._taken[run.id] = len(told)
            for event in new:
                values = [
                    summary_pb2.Summary.Value(tag=tag, simple_value=value)
                    for tag, value in scalars(event).items()
                ]
                if values and isinstance(event, events.Step | events.HeldOut):
                    summary = summary_pb2.Summary(value=values)
                    row = event_pb2.Event(wall_time=event.t, step=event.step, summary=summary)
                    writer.add_event(row)
            writer.flush()


@contextlib.contextmanager
def served(runs: Sequence[Run], port: int | None = None) -> Iterator[tuple[str, Board]]:
    """TensorBoard over these runs at a port of this machine's loopback, and the board to which new
    events are to be written, while the block runs: (its address, the board). The port is 6006, or
    a free one where that is taken. Raises PreflightError where it does not start."""
    validate()
    with (
        tempfile.TemporaryDirectory(prefix="milktea-tensorboard-") as folder,
        Board(runs, Path(folder)) as board,
        tempfile.TemporaryFile() as log,
    ):
        board.write_new()
        chosen = _free_port(port)
        words = ["--logdir", folder, "--host", "127.0.0.1", "--port", str(chosen)]
        child = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", *words, "--reload_interval", "3"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            _wait_until_up(child, chosen)
            yield f"http://127.0.0.1:{chosen}/", board
        except ChildProcessError as e:
            log.seek(0)
            said = log.read().decode("utf-8", "replace")[-600:].strip()
            raise PreflightError(f"TensorBoard did not start: {said or 'it said nothing'}") from e
        finally:
            child.terminate()
            child.wait()


def _free_port(wished: int | None) -> int:
    """Raises PreflightError where the wished port is taken."""
    for port in [PORT, 0] if wished is None else [wished]:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise PreflightError(f"port {wished} is taken on this machine", hint="--port with another one")


def _wait_until_up(child: subprocess.Popen[bytes], port: int) -> None:
    """Raises ChildProcessError where it ended, or does not listen within UP_S."""
    ends = time.monotonic() + UP_S
    while child.poll() is None and time.monotonic() < ends:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise ChildProcessError
