"""The `[evaluate]` of a job: once the result is at home, its box scores it beside its base, within
the minutes that the plan priced. What goes wrong there takes nothing of the result."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ops.box import errand
from ops.box.connection import Box
from ops.box.scripts import run_folder
from ops.errors import BoxError, Failed
from ops.job import tokens
from ops.run import wishes
from ops.run.retry import retry_transfer
from ops.run.session import MARGIN_S, Interrupted, Session

NAME, FILE = "evaluate", "evaluation.json"
LOOK_S, TELL_S = 2.0, 5.0  # between two looks; between two words to whoever waits
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
    except Interrupted:
        box.close()  # a command may be half sent
        session.note("interrupted", chosen=session.wish or wishes.DESTROY)
        session.wish = ""
        wishes.forget(session.journal.folder)
        return False
    except (BoxError, Failed, ValueError, OSError) as e:
        session.screen.waiting(f"no evaluation: {e}")
        session.note("evaluated", why_not=str(e)[:500])
        return False
    session.note("evaluated", scores=score_rows(told))
    return True


def _evaluated(session: Session, box: Box, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation's JSON. Raises Failed with its last words, or where its minutes are over."""
    run_id, began, told_s = session.run_id, session.clock.steady(), 0.0
    words = ["evaluate", ".", f"--rows={asked['rows']}", f"--new-tokens={asked['new_tokens']}"]
    words += ["--to", f"{NAME}/{FILE}"]
    start = errand.start(run_id, session.plan.trainer, NAME, words)
    given = tokens.at_launch(session.plan.env)
    if retry_transfer(session, box, lambda: box.run(start, input=given)).exit_code:
        raise Failed("it could not be started")
    while True:
        answer = retry_transfer(session, box, lambda: box.run(errand.look(run_id, NAME)))
        code, said = errand.parse_look(answer.stdout)
        took_s = session.clock.steady() - began
        if code is not None:
            break
        if took_s > asked["seconds"] or session.left_s() < 2 * MARGIN_S:
            box.run(errand.stop(run_id, NAME))
            raise Failed(f"its {asked['seconds'] / 60:.0f} minutes were over")
        if took_s - told_s > TELL_S:
            told_s, last = took_s, (said.splitlines() or ["loading"])[-1]
            session.screen.waiting(f"evaluate: {last[-80:]} ({took_s:.0f} s)")
        session.clock.sleep(LOOK_S)
    if code:
        raise Failed(f"it ended with exit code {code}: {said[-400:]}")
    read = box.read_from(f"{run_folder(run_id)}/{NAME}/{FILE}", 0, FILE_BYTES)
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
