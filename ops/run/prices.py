"""What the cards cost now: the cheapest offer of each, from few searches."""

from __future__ import annotations

from dataclasses import replace

from ops.hardware import gpus
from ops.hardware.gpus import Gpu
from ops.job.cards import Price
from ops.market.client import Vast
from ops.market.ranking import query
from ops.run.choose import ANYTHING

MOST_SEARCHES = 12


def now(vast: Vast) -> dict[Gpu, Price]:
    """Card -> its price as one GPU on demand; a card without an offer is left out. One search shows
    64 offers at most, so cards that were seen are not asked for again; with `offers` at that limit
    there may be more. Raises MarketError."""
    missing = list(dict.fromkeys(g.name for g in gpus.GPUS))
    found: dict[Gpu, Price] = {}
    for _ in range(MOST_SEARCHES):
        needs = replace(ANYTHING, gpu_names=tuple(missing))
        offers, more = vast.search(
            query(needs, "dph_total"), interruptible=False, disk_gib=needs.disk_gib
        )
        seen = set()
        for offer in offers:
            gpu = gpus.find(offer.gpu_name, offer.gpu_memory_gib)
            if gpu is None or gpu.name not in missing:
                continue
            seen.add(gpu.name)
            usd = min(offer.usd_per_hour, found[gpu].usd_per_hour if gpu in found else 1e9)
            found[gpu] = Price(round(usd, 4), 1 + (found[gpu].offers if gpu in found else 0))
        missing = [name for name in missing if name not in seen]
        if not more or not missing or not seen:
            break
    return found
