"""The market that all renters share: machines, their free cards, and the offers that stand for
them. Pure."""

from __future__ import annotations

from typing import Any

from ops.fakevast.cloud.catalogue import default_market, machine, offer_row
from ops.fakevast.cloud.clock import Clock
from ops.fakevast.cloud.faults import Faults

DAY_S = 86400.0


class Market:
    """Offers are single-use: each is a number under which so many cards of a machine can be taken
    once.

    `asks` are the live offers (number -> machine id, cards), `gone_asks` those that were taken;
    `machines` the records behind them, which may be changed in place.
    """

    def __init__(self, clock: Clock, market: list[dict[str, Any]] | None) -> None:
        self.clock = clock
        self.faults = Faults()
        self.machines: dict[int, dict[str, Any]] = {}
        self.asks: dict[int, tuple[int, int]] = {}
        self.gone_asks: dict[int, tuple[int, int]] = {}
        self.next_ask = 27_000_000
        self._free: dict[int, int] = {}
        self._ends: dict[int, float] = {}
        for row in default_market() if market is None else market:
            self.add_machine(**row)

    def add_machine(self, **fields: Any) -> int:
        """Puts a machine on the market (see catalogue.machine for the fields); returns its id."""
        fields.setdefault("machine_id", 19_000 + len(self.machines))
        record = machine(**fields)
        self.machines[record["machine_id"]] = record
        self._free[record["machine_id"]] = record["gpus"]
        self._ends[record["machine_id"]] = self.clock.now() + record["days"] * DAY_S
        self._relist(record["machine_id"])
        return int(record["machine_id"])

    def _relist(self, machine_id: int) -> None:
        """Offers are single-use: what no longer fits is withdrawn, what fits again comes back under
        a new number."""
        listed = {size: ask for ask, (owner, size) in self.asks.items() if owner == machine_id}
        for size in self.machines[machine_id]["slices"]:
            fits = size <= self._free[machine_id]
            if fits and size not in listed:
                self.next_ask += 7
                self.asks[self.next_ask] = (machine_id, size)
            elif not fits and size in listed:
                self.gone_asks[listed[size]] = self.asks.pop(listed[size])

    def _row(self, ask_id: int, machine_id: int, size: int) -> dict[str, Any]:
        return offer_row(
            self.machines[machine_id], size, ask_id, self.clock.now(), self._ends[machine_id]
        )

    def offers(self) -> list[dict[str, Any]]:
        """Every live offer, unpriced for storage, unfiltered."""
        return [self._row(ask, *slot) for ask, slot in self.asks.items()]
