"""Pure: when a run will be at home, by its plan's prediction and by what has happened since."""

from __future__ import annotations

from ops.run.journal import Line
from trainer.wire import events

PHASES = ("boot", "load", "train", "home")
# journal lines with which a phase begins; "" is none
_BEGINS = {
    "renting": "boot",
    "starting": "boot",
    "booted": "load",
    "ended": "home",
    "destroyed": "",
    "absent": "",
    "kept": "",
    "left": "",
    "failed": "",
}


class Eta:
    """Hears a run's journal lines and events, in their order. Times are unix seconds."""

    def __init__(self) -> None:
        self._takes: dict[str, float] = {}  # predicted seconds of each phase
        self._predicted_train_s = self._later_stages_s = 0.0
        self._phase, self._since = "", 0.0

    def line(self, line: Line) -> None:
        if line.kind == "offers":
            p = line.get("predicted", {})
            self._takes = {
                "boot": p.get("boot_s", 0.0) + p.get("pull_s", 0.0),
                "load": p.get("transfer_s", 0.0) + p.get("start_s", 0.0),
                "train": p.get("train_s", 0.0),
                "home": p.get("home_s", 0.0),
            }
            self._predicted_train_s = self._takes["train"]
        if line.kind in _BEGINS:
            self._phase, self._since = _BEGINS[line.kind], line.t

    def started(self, started: events.Started) -> None:
        """Of several stages the later ones take their share of the plan's time."""
        later = (started.stages - started.number) / started.stages if started.stages > 1 else 0.0
        self._later_stages_s = later * self._predicted_train_s

    def step(self, step: events.Step) -> None:
        """The trainer's own estimate takes the place of the plan's."""
        self._takes["train"] = step.eta_s + self._later_stages_s
        self._phase, self._since = "train", step.t

    def left_s(self, now: float) -> float | None:
        """Seconds until the run is at home; None where nothing is known of it."""
        if not self._phase or len(self._takes) < len(PHASES):
            return None
        later = PHASES[PHASES.index(self._phase) + 1 :]
        here = self._takes[self._phase] - (now - self._since)
        return max(0.0, here) + sum(self._takes[name] for name in later)

    def share(self, now: float) -> float | None:
        """How much of the present phase is over by its prediction (0 to 1); None without one."""
        takes = self._takes.get(self._phase, 0.0)
        return min(1.0, max(0.0, (now - self._since) / takes)) if takes > 0 else None
