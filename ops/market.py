"""Search, rank and choose: the cheapest finished run first, each time with the market as it is now."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ops import journal
from ops.errors import JournalError, NoOffer, OverBudget
from ops.offers import Offer, Ranking, query, rank
from ops.session import Session

HALF_LIFE_S = 7 * 86400.0  # of a machine's bad name


def choose(session: Session) -> Offer:
    """The best offer of this moment that was not tried in this run. Raises NoOffer naming the filter that removed most."""
    ranking = search(session)
    tried = {line["machine_id"] for line in session.journal.lines if line.kind == "bad_machine"}
    gone = {line["offer_id"] for line in session.journal.lines if line.kind == "missed"}
    fresh = [p for p in ranking.accepted if p.offer.machine_id not in tried and p.offer.id not in gone]
    if not fresh:
        raise none_left(session, ranking, len(ranking.accepted))
    affordable = [p for p in fresh if p.cost.usd <= session.plan.max_usd - session.spent_usd()]
    if not affordable:
        raise OverBudget(
            f"the cheapest of {len(fresh)} offers would finish this run for {fresh[0].cost.usd:.2f} $, and limits.max_usd leaves "
            f"{session.plan.max_usd - session.spent_usd():.2f} $",
            money=session.money(),
            hint="raise limits.max_usd, or shorten the training (num_train_epochs, max_steps)",
        )
    best = affordable[0]
    session.note(
        "offers", chosen=best.offer.id, why=best.why, predicted=asdict(best.cost), seen=len(ranking.accepted) + len(ranking.rejected),
        runners_up=[{"offer": asdict(p.offer), "usd": p.cost.usd, "why_not": p.why} for p in affordable[1:4]],
        rejected=[{"offer": o.id, "gpu": o.gpu_name, "why": why} for o, why, _ in ranking.rejected],
    )  # fmt: skip
    session.screen.renting(best)
    return best.offer


def search(session: Session) -> Ranking:
    needs = session.plan.needs
    found = session.vast.search(query(needs), interruptible=needs.interruptible, disk_gib=needs.disk_gib)
    return rank(found, needs, session.plan.workload, bad_machines(session.journal.folder.parent, session.clock.now()))


def none_left(session: Session, ranking: Ranking, accepted: int) -> NoOffer:
    if accepted:
        return NoOffer(f"all {accepted} offers that fit were tried", money=session.money())
    if not ranking.rejected:
        return NoOffer("the market has no offer for these needs at all", money=session.money(), hint="relax [offer]: gpu_name, countries, num_gpus")
    name, count = ranking.most_removed()
    return NoOffer(f"none of {len(ranking.rejected)} offers fits; {name} alone removes {count}", money=session.money())


def bad_machines(root: Path, now: float) -> dict[int, float]:
    """machine_id -> how often it failed us, each failure counting half after a week: one bad day is no ban for ever."""
    found: dict[int, float] = {}
    for folder in journal.runs(root):
        try:
            lines = journal.read(folder)
        except JournalError:
            continue
        for line in lines:
            if line.kind == "bad_machine":
                found[line["machine_id"]] = found.get(line["machine_id"], 0.0) + 0.5 ** ((now - line.t) / HALF_LIFE_S)
    return found
