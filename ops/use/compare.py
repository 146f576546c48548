"""Runs side by side: in which settings they differ, and what each came to. Reads what lies in their
folders, acts on nothing."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ops.errors import JournalError
from ops.job.plan import Plan
from ops.market.models import Offer
from ops.run.evaluate import FILE as EVALUATION
from ops.run.evaluate import score_rows
from ops.run.journal import Line, last
from ops.run.meter import may_have_box
from ops.run.view import Run
from trainer.wire import events
from trainer.wire.events import Event

EVALUATION_BYTES = 16 << 20
# of a job on the wire, what says nothing of how it trains
_NOT_SETTINGS = ("wire", "run_id", "model.path", "environment", "data.template_text")


@dataclass(frozen=True)
class Outcome:
    """What one run came to. Losses are nats per target token; None where nobody measured."""

    run_id: str
    stage: str  # where it stands, as `status` says
    adapter: str | None
    steps: int
    loss_first: float | None
    loss_last: float | None
    held_out_before: float | None  # the look before the first step
    held_out: float | None  # of the parameters that the result is made of
    accuracy: float | None  # of held-out target tokens by greedy guessing, 0 to 1
    exact_match: float | None  # of held-out rows, 0 to 1
    tokens_per_second: float | None  # the median of all steps
    gpu: str
    hours: float  # from the plan to the end of its last box
    spent_usd: float
    billed_usd: float | None
    scores: dict[str, str]  # of `evaluate`: the value beside that of the base

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """`differ` has for each setting that is not the same in all runs its value in each of them, in
    the order of `outcomes`; None where a run has no such setting."""

    outcomes: list[Outcome]
    differ: dict[str, list[Any]]

    def as_dict(self) -> dict[str, Any]:
        return {"runs": [o.as_dict() for o in self.outcomes], "differ": self.differ}


def compare(runs: Sequence[Run]) -> Comparison:
    """Raises JournalError for a run whose journal cannot be read, or is empty."""
    plans = [_plan(run) for run in runs]
    return Comparison(
        [outcome(run) for run in runs], differences([settings(plan) for plan in plans])
    )


def _plan(run: Run) -> Plan:
    if not (lines := run.journal):
        raise JournalError(f"{run.id} has an empty journal", hint="`milktea status` lists the runs")
    return Plan.from_line(lines[0])


def settings(plan: Plan) -> dict[str, Any]:
    """Every setting of a run by its dotted name. A data file is told by its name and hash."""
    told = plan.wire_job | {"image": plan.image}
    data = dict(told.get("data", {}))
    data["files"] = [_file(f) for f in data.get("files", [])]
    data["held_out"] = _file(data["held_out"]) if data.get("held_out") else None
    flat = flattened(told | {"data": data})
    return {k: v for k, v in flat.items() if k not in _NOT_SETTINGS}


def _file(told: Mapping[str, Any]) -> str:
    return f"{told.get('name')} ({str(told.get('sha256', ''))[:8]})"


def flattened(value: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """Tables within tables as one, by dotted names; an empty table is a value."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        path = f"{name}.{key}" if name else str(key)
        flat |= flattened(inner, path) if isinstance(inner, dict) and inner else {path: inner}
    return flat


def differences(each: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The settings that are not equal in all of `each`, with the value of each."""
    names = dict.fromkeys(name for one in each for name in one)
    found = {name: [one.get(name) for one in each] for name in names}
    return {name: values for name, values in found.items() if any(v != values[0] for v in values)}


def outcome(run: Run) -> Outcome:
    """What this run came to so far. Raises JournalError."""
    lines, told = run.journal, list(run.events())
    steps = [e for e in told if isinstance(e, events.Step)]
    looks = looks_of(told)
    speeds = [s.tokens_per_second for s in steps if s.tokens_per_second > 0]
    score = next((e for e in reversed(told) if isinstance(e, events.Score)), None)
    chosen = _kept_look(looks, _keeps_best(lines))
    rent, cost, status, adapter = last(lines, "renting"), run.cost(), run.status(), run.adapter
    return Outcome(
        run.id,
        status.stage,
        None if adapter is None else str(adapter),
        steps[-1].step if steps else 0,
        steps[0].loss if steps else None,
        steps[-1].loss if steps else None,
        looks[0].loss if looks and looks[0].step == 0 else None,
        chosen.loss if chosen else None,
        chosen.accuracy if chosen else None,
        score.exact_match_after if score else None,
        statistics.median(speeds) if speeds else None,
        _gpu(rent),
        round(_seconds(lines) / 3600, 4),
        round(cost.spent_usd, 6),
        cost.billed_usd,
        {} if adapter is None else _scores(adapter.parent / EVALUATION),
    )


def looks_of(told: Sequence[Event]) -> list[events.HeldOut]:
    """The looks at the held-out rows, one for each step, in the order of steps: what was computed
    again after a checkpoint counts as it came last."""
    found = {e.step: e for e in told if isinstance(e, events.HeldOut)}
    return [found[step] for step in sorted(found)]


def _kept_look(looks: Sequence[events.HeldOut], best: bool) -> events.HeldOut | None:
    """The look at the parameters that the result is made of; none before the first step."""
    after = [look for look in looks if look.step > 0]
    if not after:
        return None
    return min(after, key=lambda look: look.loss) if best else after[-1]


def held_out_loss(run: Run) -> float | None:
    """Nats per target token of held-out rows, of the parameters that the result is made of."""
    found = _kept_look(looks_of(list(run.events())), _keeps_best(run.journal))
    return found.loss if found else None


def _keeps_best(lines: Sequence[Line]) -> bool:
    training = lines[0].get("wire_job", {}).get("training", {}) if lines else {}
    return bool(training.get("load_best_model_at_end"))


def _gpu(rent: Line | None) -> str:
    if rent is None:
        return ""
    offer = Offer(**rent["offer"])
    return f"{offer.num_gpus} x {offer.gpu_name}"


def _seconds(lines: list[Line]) -> float:
    gone = last(lines, "destroyed", "absent")
    end = time.time() if may_have_box(lines) else (gone or lines[-1]).t
    return max(0.0, end - lines[0].t)


def _scores(path: Path) -> dict[str, str]:
    with suppress(OSError, ValueError, RecursionError):
        if path.stat().st_size <= EVALUATION_BYTES:
            told = json.loads(path.read_text("utf-8"))
            return score_rows(told) if isinstance(told, dict) else {}
    return {}
