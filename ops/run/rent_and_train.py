"""The story: rent, push, train, pull, destroy. Read `rent_and_train` first, then `on_rented_box`,
which guards the box and the money, and `train`.

To resume a run is to call the same function with its journal: each stage looks at what is done and
does the rest.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ops.box import scripts
from ops.box.connection import Box
from ops.errors import (
    AdapterError,
    BoxError,
    Failed,
    OverBudget,
    PreflightError,
    Stalled,
    TrainingError,
    Unsuitable,
)
from ops.job import tokens
from ops.market.ranking import Ranking
from ops.run import blame, chain, retrieve, sandbox
from ops.run.evaluate import evaluate_on_box
from ops.run.expected import ADAPTER, ExpectedResult
from ops.run.follow import EVENTS, NoFirstStep, Restarted, follow
from ops.run.interrupt import fetch_newest, stage
from ops.run.merge import give_up, merge_on_box
from ops.run.on_rented_box import on_rented_box
from ops.run.retry import retry_transfer
from ops.run.sandbox import Inspected
from ops.run.session import MARGIN_S, Detached, Interrupted, Session, metered
from ops.run.talk import then_chat
from ops.run.wishes import works_alone

MAX_RESTARTS = 3  # of one box, before it is given up
MAX_FETCHES = 3  # of a result that does not verify


@dataclass(frozen=True)
class RunResult:
    """The verified adapter here, its sha256, and the dollars of the whole run."""

    adapter_zip: Path
    sha256: str
    spent_usd: float


@metered
def rent_and_train(session: Session, seen: Ranking | None = None) -> RunResult:
    """Rent a machine, train on it, bring the adapter home and destroy the machine. `seen` is the
    market as the user has just seen it.

    Returns once a verified adapter is here and no box of this run exists: from then on nothing that
    ends the box makes the run fail. Raises otherwise, with the same guarantee about the box; only
    BoxLeaked and Detached leave one."""
    try:
        return on_rented_box(session, seen, train, "carried the run through")
    except (BoxError, TrainingError, Interrupted) as e:
        if (result := at_home(session)) is None:
            raise
        give_up(session, result.adapter_zip.parent, str(e) or "you ended it")
        return result


def train(session: Session, box: Box) -> RunResult:
    """Train on a box that has everything, bring the verified adapter home, and let the box do what
    the job asks for afterwards."""
    if (result := at_home(session)) is None:
        launch(session, box)
        watch(session, box)
        result = pull(session, box)
    out = result.adapter_zip.parent
    evaluate(session, box, out)
    merge(session, box, out)
    then_chat(session, box, out)
    return result


def at_home(session: Session) -> RunResult | None:
    """The verified result that this client, or an earlier one, brought home."""
    line = session.journal.last("pulled")
    if line is None:
        return None
    return RunResult(Path(line["adapter"]), line["sha256"], session.spent_usd())


@stage
def launch(session: Session, box: Box) -> None:
    """Start the training. Idempotent. The events of an earlier machine are renamed first, because
    the byte offsets of this one begin at 0."""
    before = session.journal.last("launched", "renting")
    events = session.journal.folder / "events.jsonl"
    if before and before.kind == "renting" and events.exists():
        events.rename(events.with_name(f"events.{len(session.journal.lines)}.jsonl"))
    _start(session, box)


def _start(session: Session, box: Box, more: tuple[tuple[str, str], ...] = ()) -> None:
    start = scripts.launch(session.run_id, session.plan.trainer)
    settings = "".join(f"{name}={value}\n" for name, value in more).encode()
    given = tokens.at_launch(session.plan.env) + settings
    answer = retry_transfer(session, box, lambda: box.run(start, input=given))
    if answer.exit_code != 0:
        raise Unsuitable(f"the training could not be started: {answer.stderr[-300:]}")
    session.note("launched", state=answer.stdout.strip().splitlines()[-1], settings=dict(more))


def _start_again(
    session: Session, box: Box, settings: tuple[tuple[str, str], ...], why: Restarted
) -> None:
    """Launch on the files that are on the box. Raises Unsuitable after MAX_RESTARTS restarts."""
    lines = session.journal.lines
    rent = session.journal.last("renting")
    since = lines[rent.n :] if rent else lines
    if sum(line.kind == "rebooted" for line in since) == MAX_RESTARTS:
        raise Unsuitable(f"{why}, for the {MAX_RESTARTS + 1}th time")
    session.screen.waiting(f"{why}: it goes on from its newest checkpoint")
    session.note("rebooted", instance_id=session.instance_id(), why=str(why))
    _start(session, box, settings)


@stage
def watch(session: Session, box: Box) -> None:
    """Follow the training to its end. Before a limit or a failure is raised, the newest checkpoint
    is fetched. Several consumer cards that hang before step 1 get one more start without
    peer-to-peer transfers; a box that was restarted is told to train again."""
    while True:
        launched = session.journal.last("launched")
        before = launched.get("settings", {}) if launched else {}
        try:
            return follow(session, box)
        except Restarted as e:
            _start_again(session, box, tuple(before.items()), e)
        except NoFirstStep:
            offer, tried = session.offer(), bool(before)
            if tried or not blame.p2p_may_hang(offer.gpu_name, offer.num_gpus):
                raise
            session.screen.waiting(
                f"{offer.num_gpus} x {offer.gpu_name} hang before the first step: once more with "
                f"{'='.join(blame.NO_P2P)}"
            )
            retry_transfer(session, box, lambda: box.run(scripts.kill_training(session.run_id)))
            _start(session, box, (blame.NO_P2P,))
        except OverBudget as e:
            fetch_newest(session, box)
            raise OverBudget(f"{e}; {chain.saved_words(session)}", hint=e.hint) from None
        except (Stalled, Failed, Unsuitable):
            fetch_newest(session, box)
            raise


@stage
def pull(session: Session, box: Box) -> RunResult:
    """Pull the result and verify it; only then may the box be destroyed. A result that does not
    verify is fetched again, MAX_FETCHES times in all. Raises AdapterError; Detached where this disk
    stays full, so that the box keeps the result as long as it keeps it for a silent client."""
    staging = _staging(session)
    staging.mkdir(exist_ok=True)
    for attempt in range(1, MAX_FETCHES + 1):
        try:
            inspected = retry_transfer(session, box, lambda: retrieve.fetch(session, box, staging))
            retry_transfer(session, box, lambda: chain.bring_home(session, box))
            break
        except AdapterError as e:
            session.note("bad_result", attempt=attempt, why=str(e))
            shutil.rmtree(staging)
            staging.mkdir()
            if attempt == MAX_FETCHES:
                raise
        except PreflightError as e:  # this disk is full
            may_stay = works_alone(session.journal.lines, session.plan)
            if not may_stay or session.left_s() < 2 * MARGIN_S:
                raise
            session.screen.waiting(f"{e}; the result waits on the box, and `milktea resume` asks")
            raise Detached from e
    out = _write_out(session, inspected)
    found = inspected.verified
    session.note(
        "pulled",
        sha256=found.sha256,
        bytes_out=found.size_bytes,
        tensors=found.tensors,
        adapter=str(out / ADAPTER),
    )
    return RunResult(out / ADAPTER, found.sha256, session.spent_usd())


def _staging(session: Session) -> Path:
    return session.journal.folder / "result"


def _write_out(session: Session, inspected: Inspected) -> Path:
    events_file, stages = session.journal.folder / EVENTS, chain.sections(session)
    return retrieve.write_out(session, _staging(session), inspected, events_file, stages)


@stage
def evaluate(session: Session, box: Box, out: Path) -> None:
    """Score the result beside its base, where the job asks for it; the report has the scores
    then."""
    staging = _staging(session)
    if evaluate_on_box(session, box, staging, out):
        expect = ExpectedResult.of(session.plan.wire_job)
        found = sandbox.verify(staging / retrieve.MANIFEST, staging / ADAPTER, expect)
        _write_out(session, found)


@stage
def merge(session: Session, box: Box, out: Path) -> None:
    """Bring the result merged into its base home, where the job asks for it."""
    merge_on_box(session, box, _staging(session), out)
