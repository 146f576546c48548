"""Take the runs of a sweep to their ends under one purse.

The sum of what ended runs have spent and of the caps of those that may still spend is never above
the purse. A run is owned by its own process, as every run; this one watches, begins the next and
ends the worse ones. Killed, it leaves runs that end by themselves within their caps, and the same
call goes on from the journal. Every intent stands there before it is acted on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from ops.errors import BoxLeaked, Fenced, JournalError, MarketError, MilkteaError
from ops.job.config import with_max_usd
from ops.job.job_file import JobFile
from ops.job.plan import Plan
from ops.run import wishes
from ops.run.journal import FILE, Journal, Line, last
from ops.run.meter import may_have_box
from ops.run.view import Run
from ops.sweep import decide
from ops.sweep.plan import PlannedSweep
from ops.sweep.state import (
    DONE,
    ENDED,
    FAILED,
    LIVE,
    SKIPPED,
    STOPPED,
    WAITING,
    Trial,
    told,
)
from ops.use.compare import held_out_loss, looks_of
from trainer.wire import events

LOOK_S = 1.0  # between two looks at the runs
MOST_RESUMED = 3  # times that a run is taken up again whose owner died


class Begins(Protocol):
    """A checked plan that can be begun."""

    @property
    def plan(self) -> Plan: ...


class Acts(Protocol):
    """What is done with a run; ops/api/ gives its own functions."""

    def plan(self, job: JobFile) -> Begins: ...
    def begin(self, planned: Any) -> Run:
        """Returns once a process owns the run."""

    def resume(self, run: Run) -> None:
        """Returns once a process owns the run again."""

    def destroy(self, run: Run) -> None:
        """Returns once its box is proven absent. Raises BoxLeaked."""


class Watcher(Protocol):
    """Hears what happens in a sweep. Every method returns at once and never raises."""

    def line(self, line: Line, trials: Sequence[Trial]) -> None:
        """A line was written to the sweep's journal."""

    def meter(self, trials: Sequence[Trial], spent_usd: float, max_usd: float) -> None:
        """After each look at the runs."""

    def choose(self, choices: Sequence[tuple[str, str]]) -> str | None:
        """After Ctrl-C: the key of a choice, "" to go on, None where nobody can be asked."""


class Sweep:
    """`max_usd` is the purse, of which at most `at_once` runs take at a time; `halves`: whether the
    worse half ends early."""

    def __init__(
        self,
        held: Journal,
        trials: Sequence[Trial],
        acts: Acts,
        watcher: Watcher,
        *,
        max_usd: float,
        at_once: int,
        halves: bool = True,
    ) -> None:
        self._journal, self.trials, self._acts, self._watcher = held, list(trials), acts, watcher
        self.max_usd, self._at_once, self._halves = max_usd, at_once, halves
        self._seen: dict[int, int] = {}  # trial -> bytes of its events that were read
        self.leaked: BoxLeaked | None = None
        self.ending = False  # the user ends it: nothing is begun any more
        for trial in self._of(LIVE):
            if not (trial.run and (trial.run.folder / FILE).is_file()):
                self._note("unbegun", trial)  # killed between the intent and the run
                trial.state, trial.run = WAITING, None

    # -- the loop ----------------------------------------------------------------------------------

    def run(self, pressed: Callable[[], bool], look_s: float = LOOK_S) -> bool:
        """Until every trial has ended; False where the user left it. Raises BoxLeaked, once no run
        is live, where a box could not be proven absent."""
        while True:
            for trial in self._of(LIVE):
                self._look(trial)
            if self._halves:
                self._end_worse()
            while not self.ending and len(self._of(LIVE)) < self._at_once and self._begin_next():
                pass
            self._watcher.meter(self.trials, self.spent_usd(), self.max_usd)
            if not self._of(LIVE) and (self.ending or not self._of(WAITING)):
                break
            if pressed() and not self._goes_on():
                return False
            time.sleep(look_s)
        if self.leaked is not None:
            raise self.leaked
        self._note("over")
        return True

    def _of(self, state: str) -> list[Trial]:
        return [t for t in self.trials if t.state == state]

    def _note(self, kind: str, trial: Trial | None = None, **data: Any) -> None:
        data = data if trial is None else {"trial": trial.number, **data}
        self._watcher.line(self._journal.append(kind, **data), self.trials)

    # -- money -------------------------------------------------------------------------------------

    def spent_usd(self) -> float:
        """Dollars of all runs so far, by our own meter or the bill, whichever is more."""
        return sum(_spent(t) if t.state == LIVE else t.spent_usd for t in self.trials)

    def reserved_usd(self) -> float:
        """Dollars that are spent or that a live run may still spend."""
        return sum(
            max(t.cap_usd, _spent(t)) if t.state == LIVE else t.spent_usd for t in self.trials
        )

    # -- begin -------------------------------------------------------------------------------------

    def _begin_next(self) -> bool:
        """Begin the next trial that the purse can pay; whether it is worth trying another."""
        waiting = self._of(WAITING)
        if not waiting or self.leaked is not None:
            return self._skip(waiting, "a box of another run may still be billing")
        trial, live = waiting[0], len(self._of(LIVE))
        free = self.max_usd - self.reserved_usd()
        most = trial.job.limits.max_usd
        cap = decide.cap_usd(free, trial.enough_usd, most, len(waiting), live)
        if cap is None:
            if live:
                return False
            need = min(trial.enough_usd, most)
            return self._skip([trial], f"{free:.4f} $ are left, and it needs about {need:.4f} $")
        try:
            planned = self._acts.plan(with_max_usd(trial.job, cap))
        except BoxLeaked as e:
            self.leaked = e
            return True
        except MilkteaError as e:
            self._ended(trial, FAILED, f"{type(e).__name__}: {e}")
            return True
        self._note("began", trial, run_id=planned.plan.run_id, cap_usd=cap)
        trial.state, trial.cap_usd = LIVE, cap
        trial.run = Run(self._journal.folder.parents[1] / planned.plan.run_id)
        try:
            self._acts.begin(planned)
        except MilkteaError as e:
            self._settle_failed(trial, e)
        return True

    def _skip(self, trials: Sequence[Trial], why: str) -> bool:
        for trial in trials:
            self._ended(trial, SKIPPED, why)
        return bool(trials)

    def _settle_failed(self, trial: Trial, error: MilkteaError) -> None:
        """A run whose owner did not come up: nothing was rented by it."""
        if isinstance(error, Fenced):  # somebody resumed it by hand: it is watched
            return
        self._ended(trial, FAILED, f"{type(error).__name__}: {error}")

    # -- look --------------------------------------------------------------------------------------

    def _look(self, trial: Trial) -> None:
        run = trial.run
        assert run is not None, "a live trial has a run"
        owned = run.is_owned  # looked at first: what it told last is read below
        try:
            lines = run.journal
            self._look_at_rungs(trial, run)
            if not owned:
                self._settle(trial, run, lines)
        except BoxLeaked as e:
            self.leaked = e
            self._ended(trial, FAILED, f"BoxLeaked: {e}")
        except JournalError as e:
            if not isinstance(e, Fenced):  # another client acts on it: it is watched
                self._ended(trial, FAILED, f"{type(e).__name__}: {e}")
        except MarketError:
            pass  # vast.ai does not answer: the run is live until the next look

    def _look_at_rungs(self, trial: Trial, run: Run) -> None:
        if not decide.comparable(trial.settings):
            return
        path = run.folder / "events.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size == self._seen.get(trial.number, 0):
            return
        self._seen[trial.number] = size
        said = list(run.events())
        total = next((e.total_steps for e in said if isinstance(e, events.Started)), 0)
        looks = [(look.step, look.loss) for look in looks_of(said)]
        for share, loss in decide.reached(looks, total).items():
            if share not in trial.rungs:
                self._note("rung", trial, share=share, loss=loss)
                trial.rungs[share] = loss

    def _end_worse(self) -> None:
        live = [t for t in self._of(LIVE) if not t.stopping]
        rungs = {t.number: t.rungs for t in self.trials}
        for number, rung in decide.to_end(rungs, [t.number for t in live]).items():
            trial = next(t for t in live if t.number == number)
            if trial.run is not None and not wishes.coming_home(trial.run.journal):
                self._end(trial, f"in the worse half after {rung:.0%} of its steps")

    def _end(self, trial: Trial, why: str) -> None:
        assert trial.run is not None, "a live trial has a run"
        self._note("stopping", trial, why=why)
        trial.stopping = why
        wishes.send(trial.run.folder, wishes.DESTROY)

    def _settle(self, trial: Trial, run: Run, lines: list[Line]) -> None:
        """A run that no process owns: it has ended, or is taken up again."""
        since = last(lines, "owned")
        failed = last(lines[since.n :] if since else lines, "failed")
        over = run.adapter is not None or failed is not None or bool(trial.stopping)
        if run.kept:
            self._ended(trial, ENDED, f"stopped by hand: its box is {run.kept}")
        elif over or trial.resumed >= MOST_RESUMED:
            if may_have_box(lines):
                self._acts.destroy(run)
            self._ended(trial, *self._how(trial, run, failed))
        else:
            self._note("resumed", trial)
            trial.resumed += 1
            self._acts.resume(run)

    def _how(self, trial: Trial, run: Run, failed: Line | None) -> tuple[str, str]:
        """(state, why) of a run that is over."""
        if run.adapter is not None:
            return DONE, ""
        if trial.stopping:
            return ENDED if self.ending else STOPPED, trial.stopping
        if failed is None:
            return FAILED, f"its owner died {trial.resumed + 1} times"
        return FAILED, str(failed.get("said") or failed.get("what") or "")

    def _ended(self, trial: Trial, state: str, why: str) -> None:
        spent, loss = 0.0, None
        if trial.run is not None:
            spent = trial.cap_usd  # for a journal that cannot be read
            with suppress(MilkteaError):
                spent = _spent(trial)
                loss = held_out_loss(trial.run)
                if may_have_box(trial.run.journal):
                    spent = max(spent, trial.cap_usd)  # nobody knows when it stops billing
        self._note(
            "ended", trial, state=state, why=why[:500], spent_usd=round(spent, 6), held_out=loss
        )
        trial.state, trial.why, trial.spent_usd, trial.held_out = state, why, spent, loss

    # -- the user ----------------------------------------------------------------------------------

    def _goes_on(self) -> bool:
        """After Ctrl-C: False where the user leaves. Where nobody can be asked, all are ended."""
        live, spent = self._of(LIVE), self.spent_usd()
        most, n = self.reserved_usd(), len(live)
        wish = self._watcher.choose(
            [
                (wishes.GO_ON, f"go on: {spent:.3f} $ are spent, at most {self.max_usd:.2f} $"),
                (wishes.DESTROY, f"end all {n} runs now: about {spent:.3f} $ in all"),
                (
                    wishes.LEAVE,
                    f"leave: {n} runs go on by themselves, at most {most:.3f} $ in all; the same "
                    "command goes on with the rest",
                ),
            ]
        )
        if wish == wishes.LEAVE:
            return False
        if wish is None or wish == wishes.DESTROY:
            self.ending = True
            for trial in live:
                if not trial.stopping:
                    self._end(trial, "ended by you")
            self._skip(self._of(WAITING), "ended by you")
        return True


def _spent(trial: Trial) -> float:
    """Dollars of its run so far; 0 before there is one."""
    if trial.run is None or not (trial.run.folder / FILE).is_file():
        return 0.0
    cost = trial.run.cost()
    return max(cost.spent_usd, cost.billed_usd or 0.0)


def begin(held: Journal, planned: PlannedSweep) -> Line:
    """Write the first line of a new sweep, or that an old one goes on."""
    facts = {"max_usd": planned.max_usd, "at_once": planned.at_once}
    if held.lines:
        return held.append("goes_on", **facts)
    return held.append("sweep", digest=planned.digest, **facts, trials=told(planned.trials))
