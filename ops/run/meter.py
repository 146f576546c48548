"""Pure: what a run's journal says of its box, its money and its deadlines."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ops.box.scripts import LEASE_S, WATCH_S
from ops.job.plan import Plan
from ops.market import cost
from ops.market.cost import CostEstimate
from ops.market.models import Offer
from ops.market.ranking import Priced, bid_of
from ops.run.journal import Line, last

APPEARS_S = 600.0  # after an unclear create its instance may appear in the list for so long
_HALTS = ("stopping", "kept", "starting")


def plan_of(lines: list[Line]) -> Plan:
    """The plan in a journal's first line, with the limits that a later command gave the run."""
    plan, raised = Plan.from_line(lines[0]), last(lines, "limits")
    if raised is None:
        return plan
    return replace(plan, max_usd=float(raised["max_usd"]), max_s=float(raised["max_s"]))


def max_usd_of(lines: list[Line]) -> float:
    """limits.max_usd of a run, as it is now."""
    return float((last(lines, "limits") or lines[0])["max_usd"])


def burn_usd_per_hour(plan: Plan, offer: Offer, bid: float | None) -> float:
    """$/h of a running machine: GPUs (or the bid) and disk."""
    return (bid or offer.usd_per_hour) + cost.disk_usd_per_hour(offer, plan.needs.disk_gib)


def life_s(
    plan: Plan,
    offer: Offer,
    bid: float | None,
    predicted: CostEstimate,
    spent_usd: float,
    age_s: float,
) -> float:
    """Seconds that a machine rented now may live, in a run that began `age_s` ago and has spent
    `spent_usd`."""
    boot_h = boot_timeout_s(predicted) / 3600
    before_it_runs = (
        predicted.inet_down_usd
        + predicted.inet_up_usd
        + cost.disk_usd_per_hour(offer, plan.needs.disk_gib) * boot_h
    )
    left_usd = plan.max_usd - spent_usd - before_it_runs
    paid_s = left_usd / burn_usd_per_hour(plan, offer, bid) * 3600
    return min(paid_s, plan.max_s - age_s) - WATCH_S


@dataclass(frozen=True)
class Silence:
    """What a run costs at most when no client connects after the launch, and how many seconds after
    the rent its result is lost then."""

    usd: float
    lost_after_s: float


def dearest_silence(plan: Plan, priced: Priced) -> Silence:
    """The silence that costs the most, of a run that begins now on this offer."""
    bid, c = bid_of(priced.offer, plan.needs), priced.cost
    burn = burn_usd_per_hour(plan, priced.offer, bid)
    before_s = c.boot_s + c.pull_s
    if plan.when_silent == "destroy":
        return Silence(burn * (LEASE_S + WATCH_S) / 3600, before_s + LEASE_S)
    lives_s = life_s(plan, priced.offer, bid, c, 0.0, 0.0)
    ended_s = c.transfer_s + c.start_s + c.train_s
    lost_s = lives_s if plan.hold_s is None else min(lives_s, ended_s + plan.hold_s)
    max_cost_usd = burn * (lives_s + WATCH_S) / 3600 + c.inet_down_usd + c.inet_up_usd
    return Silence(min(plan.max_usd, max_cost_usd), before_s + lost_s)


def boot_timeout_s(predicted: CostEstimate) -> float:
    """Seconds to wait for a boot: ten minutes and three times the predicted image pull."""
    return 600.0 + 3.0 * predicted.pull_s


def may_have_box(lines: list[Line]) -> bool:
    """Whether an instance with this run's label may exist: one was asked for and not proven absent
    since."""
    line = last(lines, "renting", "rented", "absent", "destroyed")
    return line is not None and line.kind in ("renting", "rented")


def halted(lines: list[Line]) -> Line | None:
    """The newest line of a box that was stopped to be kept: "stopping" (begun), "kept" (stopped),
    or "starting" (again; not booted yet). None for any other box."""
    line = last(lines, *_HALTS, "booted", "renting", "destroyed", "absent")
    return line if line is not None and line.kind in _HALTS else None


def runs_since(lines: list[Line]) -> Line | None:
    """The line from which the newest machine's lifetime counts: its first boot, or its rent."""
    rent = last(lines, "renting")
    if rent is None:
        return None
    return next((line for line in lines[rent.n :] if line.kind == "booted"), rent)


def ends_itself_at(lines: list[Line]) -> float | None:
    """Unix seconds at which the newest machine destroys itself at the latest; None before a rent,
    and for a box that is stopped: it has no watchdog."""
    since, begun, line = runs_since(lines), last(lines, "starting", "renting"), halted(lines)
    if since is None or begun is None or (line is not None and line.kind == "kept"):
        return None
    again = begun.kind == "starting"
    ends_at = float(begun["ends_at"]) if again else since.t + float(begun["max_s"])
    price = price_of(lines)
    return ends_at if price is None or price.n < begun.n else min(ends_at, float(price["ends_at"]))


def box_age_s(lines: list[Line], t: float) -> float:
    """Seconds that the newest box had run at unix second `t`, as its watchdog counts them: without
    the time for which it was stopped."""
    since = runs_since(lines)
    assert since is not None, "nothing was rented yet"
    age_s, stopped_t = t - since.t, 0.0
    for line in lines[since.n :]:
        if line.kind == "stopping":
            stopped_t = stopped_t or line.t
        elif line.kind == "booted" and stopped_t:
            age_s, stopped_t = age_s - (line.t - stopped_t), 0.0
    return age_s - (t - stopped_t if stopped_t else 0.0)


def age_s(lines: list[Line], now: float) -> float:
    """Seconds of the run that count for limits.max_hours: all since its plan, but for those in
    which it had neither an owner nor a box that runs."""
    idle_s = 0.0
    for line in lines[1:]:
        before = lines[: line.n]
        stopped = halted(before)
        if line.kind == "owned" and (
            not may_have_box(before) or (stopped is not None and stopped.kind == "kept")
        ):
            idle_s += line.t - before[-1].t
    return now - lines[0].t - idle_s


def price_of(lines: list[Line]) -> Line | None:
    """The line of the newest machine's price, where it rose since the rent."""
    line = last(lines, "price", "renting")
    return line if line is not None and line.kind == "price" else None


def may_appear(lines: list[Line], now: float) -> bool:
    """Whether a create without a clear answer is so recent that its instance may still appear in
    vast.ai's list."""
    return any(
        line.kind == "absent" and line.get("provisional") and now - line.t < APPEARS_S
        for line in reversed(lines)
    )


def spent_usd(lines: list[Line], now: float) -> float:
    """Dollars of every machine in the journal up to `now` (unix seconds): GPUs from the boot on,
    disk from the rent on, bytes in both directions."""
    total = 0.0
    offer: Offer | None = None
    rented_t = running_t = 0.0
    gb_in = gb_out = 0.0
    bid: float | None = None
    disk = price = 0.0
    rises: list[tuple[float, float]] = []  # since when, $/h more than before
    kept: float | None = None  # $/h of a box that is stopped

    def close(until: float) -> float:
        if offer is None or not rented_t:
            return 0.0
        if kept is not None:
            return max(0.0, until - rented_t) * kept / 3600
        paid = offer if bid is None else replace(offer, usd_per_hour=bid)
        running_s = max(0.0, until - running_t) if running_t else 0.0
        more = sum(max(0.0, until - t) * usd_per_hour / 3600 for t, usd_per_hour in rises)
        rented_s = max(0.0, until - rented_t)
        return (more if running_t else 0.0) + cost.burn_usd(
            paid, running_s, rented_s, gb_in, gb_out, disk
        )

    for line in lines:
        if line.kind == "renting":
            offer, bid, disk = Offer(**line["offer"]), line["bid_usd_per_hour"], line["disk_gib"]
            rented_t = running_t = gb_out = 0.0
            kept = None
            rises, price = [], (bid or offer.usd_per_hour) + cost.disk_usd_per_hour(offer, disk)
            gb_in = lines[0].get("workload", {}).get("image_bytes", 0.0) / 1e9  # pulled on our bill
        elif line.kind == "rented" and not rented_t:
            rented_t = line.t
        elif line.kind == "booted":
            more = sum(usd_per_hour for _, usd_per_hour in rises)
            rises = rises if running_t else [(line.t, more)]
            running_t = running_t or line.t
        elif line.kind in ("kept", "starting"):
            total += close(line.t)
            rented_t, running_t, gb_in, gb_out = line.t, 0.0, 0.0, 0.0
            kept = float(line["usd_per_hour"]) if line.kind == "kept" else None
        elif line.kind == "price":
            rises.append((line.t, line["usd_per_hour"] - price))
            price = line["usd_per_hour"]
        elif line.kind in ("pushed", "pulled", "merged", "checkpoint"):
            gb_in += line.get("bytes_in", 0) / 1e9
            gb_out += line.get("bytes_out", 0) / 1e9
        elif line.kind in ("destroyed", "absent"):
            total += close(line.t)
            offer, rented_t = None, 0.0
    return total + close(now)
