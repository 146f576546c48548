"""Pure: when a run will be at home, by its plan's prediction and by what has happened since."""

from __future__ import annotations

from collections import defaultdict

from ops.run.journal import Line
from trainer.wire import events

PHASES = ("boot", "load", "train", "pull", "evaluate", "merge", "home")
# journal lines with which a phase begins; "" is none
_BEGINS = {
    "renting": "boot",
    "starting": "boot",
    "booted": "load",
    "ended": "pull",
    "pulled": "evaluate",
    "evaluated": "merge",
    "merged": "home",
    "destroying": "home",
    "serving": "",
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
        self._stages_s: list[float] = []
        self._later_stages_s = 0.0
        self._phase, self._since = "", 0.0

    def line(self, line: Line) -> None:
        if line.kind == "offers":
            p: defaultdict[str, float] = defaultdict(float, line.get("predicted", {}))
            moved_s = p["transfer_s"] - p["result_s"] - p["merged_s"]
            self._takes = {
                "boot": p["boot_s"] + p["pull_s"],
                "load": moved_s + p["start_s"],
                "train": p["train_s"],
                "pull": p["result_s"],
                "evaluate": p["evaluate_s"],
                "merge": p["merge_s"] + p["merged_s"],
                "home": p["home_s"],
            }
            self._stages_s = list(line.get("predicted", {}).get("stages_s", []))
        if line.kind in _BEGINS:
            self._phase, self._since = _BEGINS[line.kind], line.t
            if self._phase == "evaluate" and not self._takes.get("evaluate"):
                self._phase = "merge"

    def started(self, started: events.Started) -> None:
        """Of several stages the later ones take the plan's time."""
        later = started.stages - started.number  # the plan of a second machine has these at its end
        self._later_stages_s = sum(self._stages_s[-later:]) if later else 0.0

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
