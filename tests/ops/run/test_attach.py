"""What a terminal that attaches late is shown of what came before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import rig
from ops.run.attach import Tail
from ops.run.follow import EVENTS
from ops.run.journal import Journal, Line


class Heard(rig.Silent):
    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []

    def line(self, line: Line) -> None:
        self.order.append(f"{line.t:.0f} {line.kind}")

    def event(self, event: Any, *more: Any) -> None:
        self.order.append(f"{event.t:.0f} step {event.step}")


def step(t: float, number: int) -> dict[str, Any]:
    more = {"learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_second": 1e3, "eta_s": 1.0}
    return {"t": t, "event": "step", "step": number, "loss": 2.0, **more}


def test_events_and_the_lines_of_the_journal_are_shown_in_the_order_in_which_they_came(
    tmp_path: Path,
) -> None:
    own = rig.Rig(tmp_path)
    plan, clock = own.plan(), iter([1.0, 2.0, 20.0, 40.0, 41.0])
    with Journal(own.runs / plan.run_id, now=lambda: next(clock)) as journal:
        journal.append("planned", **plan.to_line())
        journal.append("launched")
        journal.append("checkpoint", step=1, folder="a")
        journal.append("checkpoint", step=2)
        journal.append("ended", code=0)
        folder = journal.folder
    told = [step(10.0, 1), step(30.0, 2), step(99.0, 3)]  # the box's clock is ahead at last
    (folder / EVENTS).write_text("".join(json.dumps(one) + "\n" for one in told))
    heard = Heard()
    tail = Tail(folder, heard)
    tail.show_new()
    assert heard.order == [
        *("1 planned", "2 launched", "10 step 1", "20 checkpoint", "30 step 2", "40 checkpoint"),
        *("99 step 3", "41 ended"),
    ]
    with (folder / EVENTS).open("a") as file:
        file.write(json.dumps(step(5.0, 4)) + "\n")
    tail.show_new()
    assert heard.order[-1] == "5 step 4"
