"""The `[evaluate]` of a job: once the result is at home, its box scores it beside its base, within
the minutes that the plan priced. What goes wrong there takes nothing of the result."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ops.box.connection import Box
from ops.box.scripts import run_folder
from ops.errors import BoxError, TrainingError
from ops.run.errands import follow_errand
from ops.run.session import Session

NAME, FILE = "evaluate", "evaluation.json"
FILE_BYTES = 4 << 20
MAX_ROWS = 40  # of a report's table


def evaluate_on_box(session: Session, box: Box, staging: Path, out: Path) -> bool:
    """Whether FILE was made; it lies in `staging` and, beside the adapter, in `out` then."""
    asked = session.plan.evaluate
    if asked is None or (staging / FILE).is_file():
        return False
    try:
        with session.own_deadline():
            told = _evaluated(session, box, asked)
        text = json.dumps(told, ensure_ascii=False, indent=1) + "\n"
        for folder in {staging, out}:
            part = folder / f".{FILE}.{os.getpid()}"
            part.write_text(text, "utf-8")
            part.replace(folder / FILE)
    except (BoxError, TrainingError, ValueError, OSError) as e:
        session.screen.waiting(f"no evaluation: {e}")
        session.note("evaluated", why_not=str(e)[:500])
        return False
    session.note("evaluated", scores=score_rows(told))
    return True


def _evaluated(session: Session, box: Box, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation's JSON. Raises Failed with its last words, or where its minutes are over."""
    words = ["evaluate", ".", f"--rows={asked['rows']}", f"--new-tokens={asked['new_tokens']}"]
    follow_errand(session, box, NAME, [*words, "--to", f"{NAME}/{FILE}"], asked["seconds"])
    read = box.read_from(f"{run_folder(session.run_id)}/{NAME}/{FILE}", 0, FILE_BYTES)
    told = json.loads(read)
    if not isinstance(told, dict) or not score_rows(told):
        raise ValueError("the box's evaluation holds no scores")
    return told


def score_rows(told: Mapping[str, Any]) -> dict[str, str]:
    """Score -> the result's value beside the other side's, for a report; what is no number of an
    evaluation is left out."""
    scores: Any = told.get("scores")
    sides = list(scores) if isinstance(scores, Mapping) else []
    if not sides or not all(isinstance(scores[side], Mapping) for side in sides):
        return {}
    tuned, others = scores[sides[-1]], sides[:-1]
    rows = {}
    for name in list(tuned)[:MAX_ROWS]:
        if (value := _value(tuned, name)) is None:
            continue
        beside = [(side, _value(scores[side], name)) for side in others]
        more = ", ".join(f"{side} {found:.4g}" for side, found in beside if found is not None)
        rows[f"{name}"[:60]] = f"{value:.4g}" + (f" ({more})" if more else "")
    return rows


def _value(scores: Mapping[str, Any], name: str) -> float | None:
    told = scores.get(name)
    value = told.get("value") if isinstance(told, Mapping) else told
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else None
