"""Talk to a result on a rented box."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ops.api.market import open_market
from ops.api.planning import Planned
from ops.api.reaping import finished
from ops.api.screen import Quiet
from ops.errors import PreflightError
from ops.job.plan import Plan
from ops.job.talk_plan import talk_plan
from ops.market.client import Vast
from ops.market.ranking import rank
from ops.run import journal, rent_and_chat, supervisor
from ops.run.choose import bad_machines, no_offer_error, search_offers
from ops.run.folders import runs_folder
from ops.run.journal import Journal
from ops.run.session import Screen, Session
from ops.run.view import Run
from ops.use.found import Found
from ops.use.results import (
    find_result,
)


def plan_chat(
    result: Found | str | Path,
    *,
    minutes: float = 60,
    max_usd: float = 1.0,
    vast: Vast | None = None,
    root: Path | None = None,
) -> Planned:
    """A box to talk to the result of a run on, for `minutes` once it is loaded and for at most
    `max_usd`, and what the market offers for it now. Rents nothing. Raises PreflightError for what
    is no run's archive, NoOffer, MarketError."""
    vast, root = vast or open_market(), root or runs_folder()
    finished(vast, root)
    found = result if isinstance(result, Found) else find_result(result, root=root)
    if not (root / found.name / journal.FILE).is_file() or not found.adapter.is_file():
        raise PreflightError(
            f"{found.name} is not the archive of a run here: image and base are not known",
            hint="talk to it on this machine: `milktea chat` without --remote",
        )
    run = Plan.from_line(journal.read(root / found.name)[0])
    made = talk_plan(run, found.adapter, time.time(), minutes, max_usd)
    offers = search_offers(vast, made.needs)
    ranking = rank(offers, made.needs, made.workload, bad_machines(root, time.time()))
    if not ranking.accepted:
        raise no_offer_error(ranking, 0, made.needs)
    return Planned(made, ranking, vast.credit_usd())


def rent_and_talk(
    planned: Planned,
    *,
    vast: Vast | None = None,
    root: Path | None = None,
    screen: Screen | None = None,
    terminal: Sequence[str] | None = None,
) -> Run:
    """Rent the box of `plan_chat`, serve the result there and keep it until its end, SIGINT, or
    `stop`: `screen.talking` hears the page's address, at a port of this machine's loopback. With
    `terminal` (options of trainer/serve/chat.py) the conversation is in this terminal instead.

    This process owns the run, and its end is the box's: by its own hand, or by the box's watchdog
    within ten minutes. Rows of votes come home beside the result. Raises as `rent_and_train`."""
    vast, root, screen = vast or open_market(), root or runs_folder(), screen or Quiet()
    made = planned.plan
    if made.trains:
        raise PreflightError("this plan trains", hint="plan_chat() makes one that talks")
    votes = Path(made.out) / str(made.wire_job["run_id"])
    use = rent_and_chat.in_browser(votes)
    if terminal is not None:
        use = rent_and_chat.in_terminal(terminal)
    with Journal(root / made.run_id) as held:
        screen.line(held.append("planned", began=round(time.time(), 3), **made.to_line()))
        session = Session(held, made, vast, screen)
        supervisor.supervise(
            session, talk=lambda s: rent_and_chat.rent_and_chat(s, use, planned.ranking)
        )
        return Run(held.folder)
