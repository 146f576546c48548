"""Search the market, rank the offers by what the finished run is expected to cost, and choose
one."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from ops.errors import JournalError, NoOffer, OverBudget
from ops.hardware import gpus
from ops.market.client import Vast
from ops.market.models import Offer
from ops.market.ranking import Needs, Ranking, penalty, query, rank
from ops.market.workload import Workload
from ops.run import chain, journal
from ops.run.session import Session

ANYTHING = Needs(  # every offer of the market
    min_reliability=0,
    min_inet_down_mbps=0,
    min_cuda=0,
    disk_gib=8,
    hours=0,
    min_compute_capability=0,
    verified_only=False,
)


def choose(session: Session, ranking: Ranking) -> Offer:
    """The best offer that was not tried in this run; writes the choice into the journal. Raises
    NoOffer naming the filter that removed the largest number of offers, OverBudget when none is
    affordable."""
    tried = {line["machine_id"] for line in session.journal.lines if line.kind == "bad_machine"}
    gone = {line["offer_id"] for line in session.journal.lines if line.kind == "missed"}
    fresh = [
        p for p in ranking.accepted if p.offer.machine_id not in tried and p.offer.id not in gone
    ]
    if not fresh:
        raise no_offer_error(ranking, len(ranking.accepted), session.plan.needs)
    affordable = [
        p for p in fresh if p.cost.expected_usd <= session.plan.max_usd - session.spent_usd()
    ]
    if not affordable:
        raise OverBudget(
            f"the cheapest of {len(fresh)} offers would finish this run for "
            f"{fresh[0].cost.expected_usd:.4f} $, and limits.max_usd leaves "
            f"{session.plan.max_usd - session.spent_usd():.4f} $",
            hint="raise limits.max_usd, or shorten the training (num_train_epochs, max_steps)",
        )
    best = affordable[0]
    session.note(
        "offers",
        chosen=best.offer.id,
        why=best.why,
        predicted=asdict(best.cost),
        seen=len(ranking.accepted) + len(ranking.rejected),
        runners_up=[
            {"offer": asdict(p.offer), "usd": p.cost.usd, "why_not": p.why} for p in affordable[1:4]
        ],
        rejected=[{"offer": o.id, "gpu": o.gpu_name, "why": why} for o, why, _ in ranking.rejected],
    )
    return best.offer


def search(session: Session) -> Ranking:
    """The market's offers now, ranked for this run; machines that failed earlier runs rank
    lower."""
    needs = session.plan.needs
    bad = bad_machines(session.journal.folder.parent, session.clock.now())
    return rank(search_offers(session.vast, needs), needs, remaining_workload(session), bad)


def search_offers(vast: Vast, needs: Needs) -> list[Offer]:
    """The offers that fit `needs`: those with the best speed per dollar, and, where one search does
    not show the whole market, the cheapest by the hour. When none fits, any offers: `rank` says
    which filter removes them."""
    found: list[Offer] = []
    for order in ("dlperf_per_dphtotal", "dph_total"):
        offers, more = vast.search(
            query(needs, order), interruptible=needs.interruptible, disk_gib=needs.disk_gib
        )
        found += offers
        if not more:
            break
    if not found:
        anything = query(ANYTHING, "dph_total") | {"num_gpus": {"gte": 1}}
        found, _ = vast.search(
            anything, interruptible=needs.interruptible, disk_gib=ANYTHING.disk_gib
        )
    return found


def remaining_workload(session: Session) -> Workload:
    """The plan's workload, less the stages whose results are here, and the tokens of the steps
    before the newest checkpoint here."""
    each = session.plan.workload.each
    left = [one for n, one in enumerate(each) if chain.result_at_home(session, n) is None]
    left = left or [each[-1]]
    checkpoint = chain.newest_checkpoint(session)
    totals = [line["total_steps"] for line in session.journal.lines if line.get("total_steps")]
    if checkpoint is not None and totals:
        share = max(0.0, 1 - int(checkpoint.name) / totals[-1])
        left[0] = replace(left[0], tokens=left[0].tokens * share)
    return replace(left[-1], before=tuple(left[:-1]))


def no_offer_error(ranking: Ranking, tried: int, needs: Needs) -> NoOffer:
    """The error for a market without an offer left: all `tried` offers were tried, or which filter
    removes the largest number."""
    if tried:
        return NoOffer(f"all {tried} offers that fit were tried")
    if not ranking.rejected:
        return NoOffer(
            "the market has no offer at all now", hint="run `milktea plan` again in a few minutes"
        )
    unknown = [name for name in needs.gpu_names if gpus.find(name) is None]
    near = [other for name in unknown for other in gpus.like(name)]
    advice = ranking.advice() + (f"; did you mean {' or '.join(near)}?" if near else "")
    limit, _ = ranking.strictest_filter()
    hint = None
    if limit.startswith("limits."):
        hint = f"raise {limit}, or shorten the training (num_train_epochs, max_steps)"
    return NoOffer(f"none of {len(ranking.rejected)} offers fits: {advice}", hint=hint)


def bad_machines(root: Path, now: float) -> dict[int, float]:
    """machine_id -> the chance (0 to 1) that it fails again, from every journal under `root`."""
    ages: dict[int, list[float]] = {}
    for folder in journal.runs(root):
        try:
            lines = journal.read(folder)
        except JournalError:
            continue
        for line in lines:
            if line.kind == "bad_machine":
                ages.setdefault(line["machine_id"], []).append(now - line.t)
    return {machine_id: penalty(seen) for machine_id, seen in ages.items()}
