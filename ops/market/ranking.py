"""Pure: turn what a job needs into a query for vast.ai, and rank its offers by the dollars of a
finished run.

The server's filters only reduce the number of rows. The server ignores some of them
(skypilot#9733), so every need is compared again with every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ops.hardware import gpus
from ops.market import cost
from ops.market.cost import CostEstimate
from ops.market.models import ROWS, Offer
from ops.market.workload import DoesNotFit, Workload

_MEMORY_SLACK = 0.99  # an "80 GB" H100 reports 79.6 GiB, a "24 GB" RTX 4090 reports 23.99
_SERVER_SLACK = 0.95  # the query asks for less, so that rounding at the server loses no offer
_BAD_ABOVE = 0.5  # a machine is not rented above this chance to fail again
_BAD_AT_FIRST = 0.9  # chance right after a failure
_BAD_HALF_LIFE_S = 7 * 86400.0

Reason = tuple[str, str]  # (the filter's name in the job file, why this offer does not pass)


@dataclass(frozen=True)
class Needs:
    """What an offer must have. `hours` is how long the machine must stay rentable;
    `min_compute_capability` follows from the precision (`gpus.MIN_COMPUTE_CAPABILITY`); `max_usd`
    limits the expected cost of the whole run."""

    gpu_names: tuple[str, ...] = ()
    min_gpu_memory_gib: float = 0.0
    num_gpus: int = 1
    max_usd_per_hour: float | None = None
    min_reliability: float = 0.95
    countries: tuple[str, ...] = ()
    min_inet_down_mbps: float = 100.0
    min_cuda: float = 12.8
    interruptible: bool = False
    bid_usd_per_hour: float | None = None
    disk_gib: float = 40.0
    hours: float = 6.0
    min_compute_capability: float = 8.0
    min_direct_ports: int = 0
    verified_only: bool = True
    max_usd: float | None = None
    min_cpu_ram_gib: float = 0.0
    min_cpu_cores: float = 0.0


@dataclass(frozen=True)
class Priced:
    """An offer that passes, what the run costs on it, and why it is or is not the choice."""

    offer: Offer
    cost: CostEstimate
    why: str


@dataclass(frozen=True)
class Ranking:
    """`accepted` with the cheapest run first; `rejected` as (offer, reason, the filter's name).
    `obstacles` has every filter that each rejected offer fails."""

    accepted: list[Priced]
    rejected: list[tuple[Offer, str, str]]
    obstacles: list[tuple[Offer, tuple[Reason, ...]]]

    def strictest_filter(self) -> tuple[str, int]:
        """(the filter that removed the largest number of offers, that number); ("", 0) when none
        was removed."""
        counts = Counter(name for _, reasons in self.obstacles for name, _ in reasons)
        return counts.most_common(1)[0] if counts else ("", 0)

    def advice(self) -> str:
        """Which filter to relax: the one that alone removes the largest number of offers, with the
        first of them as an example."""
        alone = [(offer, reasons[0]) for offer, reasons in self.obstacles if len(reasons) == 1]
        if not alone:
            name, count = self.strictest_filter()
            return (
                f"{name} removed {count} of {len(self.obstacles)} offers, each of which "
                "fails another filter too"
                if count
                else ""
            )
        name, count = Counter(reason[0] for _, reason in alone).most_common(1)[0]
        example = next(reason[1] for _, reason in alone if reason[0] == name)
        return (
            f"{name} alone keeps {count} of {len(self.obstacles)} offers out; the first: {example}"
        )


def query(needs: Needs, order: str = "dlperf_per_dphtotal") -> dict[str, Any]:
    """The body of a search, in vast.ai's units: MB, seconds, compute_cap x 100. It is a dict,
    because vast.ai's parser of query strings drops filters.

    It is never stricter than `rank`. Prices come back for `allocated_storage`, the disk that will
    be rented. At most 64 rows come back, so the order matters: speed per dollar, or with
    "dph_total" the cheapest by the hour. vastai's `search_offers` overwrites type, order, limit and
    allocated_storage: give them to it as arguments as well.
    """
    body: dict[str, Any] = {
        "rentable": {"eq": True},
        "rented": {"eq": False},
        "external": {"eq": False},
        "num_gpus": {"eq": needs.num_gpus},
        "gpu_ram": {"gte": round(needs.min_gpu_memory_gib * 1000 * _SERVER_SLACK)},
        "compute_cap": {"gte": round(needs.min_compute_capability * 100)},
        "cuda_max_good": {"gte": needs.min_cuda},
        "disk_space": {"gte": needs.disk_gib},
        "reliability": {"gte": round(needs.min_reliability - 0.005, 3)},
        "inet_down": {"gte": needs.min_inet_down_mbps * _SERVER_SLACK},
        "duration": {"gte": round(needs.hours * 3600)},
    }
    if needs.min_cpu_ram_gib:  # of the whole machine; `rank` compares our share of it
        body["cpu_ram"] = {"gte": round(needs.min_cpu_ram_gib * 1000 * _SERVER_SLACK)}
    if needs.verified_only:
        body["verified"] = {"eq": True}
    if needs.min_direct_ports:
        body["direct_port_count"] = {"gte": needs.min_direct_ports}
    if needs.gpu_names:
        body["gpu_name"] = {"in": [vast_gpu_name(n) for n in needs.gpu_names]}
    if needs.countries:
        body["geolocation"] = {"in": list(needs.countries)}
    if needs.max_usd_per_hour is not None and not needs.interruptible:
        body["dph_total"] = {"lte": round(needs.max_usd_per_hour / _SERVER_SLACK + 0.05, 4)}
    body["type"] = "bid" if needs.interruptible else "on-demand"
    body["order"] = [[order, "asc" if order == "dph_total" else "desc"]]
    body["limit"] = ROWS
    body["allocated_storage"] = needs.disk_gib
    return body


def vast_gpu_name(name: str) -> str:
    """vast.ai's spelling of a GPU's name: "RTX 4090" for "rtx_4090"; in an unknown name,
    underscores become spaces."""
    known = gpus.find(name)
    return known.name if known else name.replace("_", " ").strip()


def rank(
    offers: Iterable[Offer],
    needs: Needs,
    workload: Workload,
    bad_machines: Mapping[int, float] | None = None,
) -> Ranking:
    """Compare every offer with every need, and sort those that pass by the expected dollars of a
    finished run.

    `bad_machines` maps a machine_id to `penalty`: above _BAD_ABOVE it is rejected, below it adds to
    the chance of a failure. Of offers of equal cost the one that finishes sooner comes first. A
    machine with several offers (slices of it) keeps all of them.
    """
    bad = bad_machines or {}
    priced: list[tuple[Offer, CostEstimate]] = []
    obstacles: list[tuple[Offer, tuple[Reason, ...]]] = []
    for offer in {o.id: o for o in offers}.values():
        reasons, predicted = _judge(offer, needs, workload, bad.get(offer.machine_id, 0.0))
        if reasons or predicted is None:
            obstacles.append((offer, reasons))
        else:
            priced.append((offer, predicted))
    priced.sort(key=lambda p: (p[1].expected_usd, p[1].hours, p[0].id))
    accepted = [Priced(o, c, _why(o, c, *priced[0], rank_=i)) for i, (o, c) in enumerate(priced)]
    return Ranking(accepted, [(o, r[0][1], r[0][0]) for o, r in obstacles], obstacles)


def penalty(failures_age_s: Iterable[float]) -> float:
    """The chance (0 to 1) that a machine fails again, from the ages of its failures in seconds: 0.9
    at once, half of that after a week; several failures count more than one."""
    good = 1.0
    for age in failures_age_s:
        good *= 1 - _BAD_AT_FIRST * 0.5 ** (max(age, 0.0) / _BAD_HALF_LIFE_S)
    return 1 - good


def bid_of(offer: Offer, needs: Needs) -> float | None:
    """$/h to bid on it; None for on-demand."""
    return cost.bid_for(offer, needs.bid_usd_per_hour) if needs.interruptible else None


def _judge(
    offer: Offer, needs: Needs, workload: Workload, bad: float
) -> tuple[tuple[Reason, ...], CostEstimate | None]:
    reasons = [(name, why) for name, check in _FILTERS.items() if (why := check(offer, needs))]
    if bad > _BAD_ABOVE:
        reasons.append(
            (
                "bad_machine",
                f"machine {offer.machine_id} failed us before (remembered {bad:.0%}, halves "
                "in a week)",
            )
        )
    try:
        predicted = cost.predict(
            offer, replace(workload, num_gpus=offer.num_gpus), bid_of(offer, needs), bad
        )
    except DoesNotFit as e:
        return (*reasons, (e.filter_name, str(e))), None
    if predicted.hours > needs.hours:
        reasons.append(
            (
                "limits.max_hours",
                f"would take {predicted.hours:.3g} h on {offer.gpu_name}, "
                f"{predicted.transfer_s / 3600:.2g} h of them to move files; the limit is "
                f"{needs.hours:g} h",
            )
        )
    if needs.max_usd is not None and predicted.expected_usd > needs.max_usd:
        reasons.append(
            (
                "limits.max_usd",
                f"would cost {predicted.expected_usd:.4g} $ on {offer.gpu_name}, the limit is "
                f"{needs.max_usd:.4g} $",
            )
        )
    return tuple(reasons), predicted


def _gpu_name(o: Offer, n: Needs) -> str:
    wanted = {gpus.plain(name) for name in n.gpu_names}
    return (
        f"{o.gpu_name} is none of {', '.join(n.gpu_names)}"
        if wanted and gpus.plain(o.gpu_name) not in wanted
        else ""
    )


def _price(o: Offer, n: Needs) -> str:
    price = bid_of(o, n) or o.usd_per_hour
    if n.max_usd_per_hour is None or price <= n.max_usd_per_hour:
        return ""
    return f"${price:.3f}/h is over ${n.max_usd_per_hour:.3f}/h"


def _bid(o: Offer, n: Needs) -> str:
    if not n.interruptible or (bid_of(o, n) or 0.0) >= max(o.min_bid_usd_per_hour, 0.001):
        return ""
    return (
        f"a bid of ${bid_of(o, n) or 0:.3f}/h is under the minimum of "
        f"${o.min_bid_usd_per_hour:.3f}/h"
    )


def _minimum(
    value: Callable[[Offer], float], need: Callable[[Needs], float], text: str
) -> Callable[[Offer, Needs], str]:
    def check(o: Offer, n: Needs) -> str:
        return text.format(value(o), need(n)) if value(o) < need(n) else ""

    return check


# Named as the job file's [offer] section names them, so that an error can say what to edit.
_FILTERS: dict[str, Callable[[Offer, Needs], str]] = {
    "rentable": lambda o, n: "" if o.rentable else "is rented by somebody else",
    "gpu_name": _gpu_name,
    "num_gpus": lambda o, n: (
        "" if o.num_gpus == n.num_gpus else f"has {o.num_gpus} GPUs, not {n.num_gpus}"
    ),
    "min_gpu_memory_gib": _minimum(
        lambda o: o.gpu_memory_gib,
        lambda n: n.min_gpu_memory_gib * _MEMORY_SLACK,
        "has {:.2f} GiB a GPU, under {:.2f} GiB",
    ),
    "compute_capability": _minimum(
        lambda o: o.compute_capability,
        lambda n: n.min_compute_capability,
        "has compute capability {:.1f}, under {:.1f}",
    ),
    "min_cuda": _minimum(
        lambda o: o.cuda_max, lambda n: n.min_cuda, "its driver supports CUDA {:.1f}, under {:.1f}"
    ),
    "disk_gib": _minimum(
        lambda o: o.disk_gib, lambda n: n.disk_gib, "has {:.0f} GB of disk, under {:.0f} GB"
    ),
    "max_usd_per_hour": _price,
    "bid_usd_per_hour": _bid,
    "min_reliability": _minimum(
        lambda o: o.reliability, lambda n: n.min_reliability, "has reliability {:.3f}, under {:.3f}"
    ),
    "verified": lambda o, n: (
        "is not verified by vast.ai" if n.verified_only and not o.verified else ""
    ),
    "countries": lambda o, n: (
        f"is in {o.country or 'an unknown country'}, not in {', '.join(n.countries)}"
        if n.countries and o.country not in n.countries
        else ""
    ),
    "min_cpu_ram_gib": _minimum(
        lambda o: o.cpu_ram_gib,
        lambda n: n.min_cpu_ram_gib * _SERVER_SLACK,
        "our share of its memory is {:.0f} GiB, under {:.0f} GiB",
    ),
    "cpu_cores": lambda o, n: (
        f"our share of its cores is {o.cpu_cores:g}, under {n.min_cpu_cores:g}"
        if 0 < o.cpu_cores < n.min_cpu_cores
        else ""
    ),
    "min_inet_down_mbps": _minimum(
        lambda o: o.inet_down_mbps,
        lambda n: n.min_inet_down_mbps,
        "downloads at {:.0f} Mb/s, under {:.0f} Mb/s",
    ),
    "duration": _minimum(
        lambda o: o.duration_s / 3600, lambda n: n.hours, "is rentable for {:.1f} h, under {:.1f} h"
    ),
    "direct_ports": _minimum(
        lambda o: o.direct_ports,
        lambda n: n.min_direct_ports,
        "has {:.0f} direct ports, under {:.0f}",
    ),
}


def _why(
    offer: Offer, predicted: CostEstimate, best: Offer, best_cost: CostEstimate, rank_: int
) -> str:
    if rank_ == 0:
        return (
            f"the cheapest finished run: ${predicted.expected_usd:.3f} expected in "
            f"{predicted.hours:.2f} h"
        )
    parts = sorted(_differences(offer, predicted, best, best_cost), reverse=True)
    more = ", ".join(f"{text} (+${usd:.3f})" for usd, text in parts[:3] if usd >= 0.0005)
    return f"+${predicted.expected_usd - best_cost.expected_usd:.3f}" + (
        f": {more}" if more else ": as good within a tenth of a cent"
    )


def _differences(
    offer: Offer, here: CostEstimate, best: Offer, best_cost: CostEstimate
) -> list[tuple[float, str]]:
    """(dollars, cause) of each part of the difference to the best offer: the hours at its price,
    the price for our hours, and the rest."""
    hours, best_hours = (
        here.gpu_usd / max(here.usd_per_hour, 1e-9),
        best_cost.gpu_usd / max(best_cost.usd_per_hour, 1e-9),
    )
    slower = f"{hours / max(best_hours, 1e-9) - 1:.0%} more GPU time on {offer.gpu_name}"
    return [
        ((hours - best_hours) * best_cost.usd_per_hour, slower),
        (
            (here.usd_per_hour - best_cost.usd_per_hour) * hours,
            f"${here.usd_per_hour:.3f}/h against ${best_cost.usd_per_hour:.3f}/h",
        ),
        (
            here.disk_usd - best_cost.disk_usd,
            f"disk at ${offer.storage_usd_per_gib_month:.2f}/GB/month",
        ),
        (
            here.inet_down_usd - best_cost.inet_down_usd,
            f"download at ${offer.inet_down_usd_per_gb:.3f}/GB",
        ),
        (here.inet_up_usd - best_cost.inet_up_usd, f"upload at ${offer.inet_up_usd_per_gb:.3f}/GB"),
        (
            here.risk_usd - best_cost.risk_usd,
            f"reliability {offer.reliability:.3f} against {best.reliability:.3f}",
        ),
    ]
