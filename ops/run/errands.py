"""One thing more that a box does after its training, followed to its end. It has a deadline of its
own, and takes nothing of the result."""

from __future__ import annotations

from collections.abc import Sequence

from ops.box import errand
from ops.box.connection import Box
from ops.errors import Failed
from ops.job import tokens
from ops.job.plan import Plan
from ops.run import wishes
from ops.run.journal import Line
from ops.run.retry import retry_transfer
from ops.run.session import MARGIN_S, Session

LOOK_S, TELL_S = 2.0, 5.0  # between two looks; between two words to whoever waits


def follow_errand(
    session: Session, box: Box, name: str, arguments: Sequence[str], seconds: float
) -> None:
    """Start `arguments` of the trainer under `name`, unless an earlier call did, and wait for its
    end. Raises Failed with its last words, or where `seconds`, or the box's, are over: it is killed
    then."""
    run_id, began, told_s = session.run_id, session.clock.steady(), 0.0
    start = errand.start(run_id, session.plan.trainer, name, arguments)
    given = tokens.at_launch(session.plan.env)
    if retry_transfer(session, box, lambda: box.run(start, input=given)).exit_code:
        raise Failed("it could not be started")
    while True:
        answer = retry_transfer(session, box, lambda: box.run(errand.look(run_id, name)))
        code, said = errand.parse_look(answer.stdout)
        took_s = session.clock.steady() - began
        if code is not None:
            break
        if took_s > seconds or session.left_s() < 2 * MARGIN_S:
            box.run(errand.stop(run_id, name))
            raise Failed(f"its {seconds / 60:.0f} minutes were over")
        if took_s - told_s > TELL_S:
            told_s, last = took_s, (said.splitlines() or ["loading"])[-1]
            session.screen.waiting(f"{name}: {last[-80:]} ({took_s:.0f} s)")
        session.clock.sleep(LOOK_S)
    if code:
        raise Failed(f"it ended with exit code {code}: {said[-400:]}")


def undone(lines: Sequence[Line], plan: Plan) -> bool:
    """Whether the result of this journal is at home, and its box was not told to end before it had
    done what the job asks for afterwards."""
    if not lines or lines[-1].kind == "destroying" or not wishes.at_home([*lines]):
        return False
    kinds = {line.kind for line in lines}
    asked = {"evaluated": plan.evaluate is not None, "merged": plan.merged}
    return any(wanted and kind not in kinds for kind, wanted in asked.items())
