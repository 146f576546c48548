"""The state machine behind the API: what a customer may ask of the market, instances and credit.

No socket, no process, no thread; time comes from its clock. A lifetime: `search` -> `create` (the
offer is gone for everybody) -> null, created, loading, running -> `destroy`.
"""

from __future__ import annotations

import hashlib
from typing import Any

from ops.fakevast.cloud import search as market_search
from ops.fakevast.cloud.account import Account
from ops.fakevast.cloud.clock import Clock, ScaledClock
from ops.fakevast.cloud.create import CreateRequest, new_instance, parse_order
from ops.fakevast.cloud.errors import ApiError, no_such_ask, no_such_instance, wrong_key
from ops.fakevast.cloud.instance import Instance
from ops.fakevast.cloud.prices import PriceIncrease
from ops.fakevast.cloud.record import charge, record
from ops.fakevast.cloud.rentals import Rentals
from ops.fakevast.cloud.settings import Settings


class Cloud(Rentals):
    """Keys: the account's (`account.key`) may do everything.

    An instance's own may look at, start, stop and destroy that instance.
    """

    def __init__(
        self,
        clock: Clock | None = None,
        *,
        settings: Settings | None = None,
        market: list[dict[str, Any]] | None = None,
        api_key: str | None = None,
    ) -> None:
        clock = clock or ScaledClock()
        key = api_key or hashlib.sha256(b"fakevast account").hexdigest()
        number = int(hashlib.sha256(key.encode()).hexdigest()[:7], 16)
        account = Account(id=number, key=key, opened_at=clock.now())
        super().__init__(clock, settings or Settings(), account, market)
        self.ghosts: dict[int, dict[str, int]] = {}  # destroyed, yet still read so many times
        self.next_instance = 33_400_000
        self.price_increases: dict[int, PriceIncrease] = {}
        self._owners: dict[str, int] = {}  # instance keys

    def search(self, query: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Rows of `POST /bundles/` for this query (at most 64). Raises ApiError for a bad one."""
        self.tick()
        return market_search.find(self.offers(), query or {})

    # ---- who asks ----

    def who(self, key: str | None) -> int | None:
        """None for the account, an instance id for that instance's own key.

        Raises ApiError for a key that nobody has.
        """
        if key == self.account.key or any(key == extra["key"] for extra in self.account.api_keys):
            return None
        if key is None or key not in self._owners:
            raise wrong_key()
        return self._owners[key]

    def get(self, instance_id: int, key: str | None = None) -> Instance:
        """The live instance. Raises ApiError 404 when there is none."""
        self.tick()
        owner = None if key is None else self.who(key)
        if owner is not None and owner != instance_id:
            text = f"This key can only be used for instance {owner}."
            raise ApiError(401, "not_authorized", text)
        if instance_id not in self.instances:
            raise no_such_instance(instance_id)
        return self.instances[instance_id]

    # ---- renting ----

    def create(self, ask_id: int, body: dict[str, Any], key: str | None = None) -> dict[str, Any]:
        """Rents an offer: {"success", "new_contract", "instance_api_key"}.

        Raises ApiError, which for too low a bid carries the `new_contract` of a stopped instance
        that is billed for its disk all the same.
        """
        self.tick()
        if key is not None and self.who(key) is not None:
            raise ApiError(401, "not_authorized", "An instance's key cannot rent.")
        slot = self.asks.get(ask_id) or self.gone_asks.get(ask_id)
        if slot is None or slot[0] not in self.machines:
            raise no_such_ask(ask_id)
        row = self._row(ask_id, *slot)
        order = parse_order(body, row)
        if self.credit() <= 0:
            text = "insufficient_credit Your account lacks credit; see the billing page."
            raise ApiError(400, "insufficient_credit", f"error 400/3580: {text}")
        taken = ask_id not in self.asks
        if taken and order.cancel_unavail:
            raise no_such_ask(ask_id, 410)
        outbid = order.bid is not None and order.bid < row["min_bid"]
        instance = self._rent(row, order, runs=not taken and not outbid)
        if outbid:
            text = f"bid {order.bid} is below the minimum {row['min_bid']}"
            text = f"error 400/3461: {text}; the instance was created stopped."
            more = {"ask_id": ask_id, "new_contract": instance.id}
            raise ApiError(400, "invalid_price", text, **more)
        return {"success": True, "new_contract": instance.id, "instance_api_key": instance.key}

    def _rent(self, row: dict[str, Any], order: CreateRequest, runs: bool) -> Instance:
        self.next_instance += 1
        number, now = self.next_instance, self._at
        key = hashlib.sha256(f"instance {number} of {self.account.key}".encode()).hexdigest()
        keys = [dict(item, since=now) for item in self.account.ssh_keys]
        instance = new_instance(number, key, row, order, now, keys)
        self.instances[number] = instance
        self._owners[key] = number
        for tell in self.on_create:
            tell(instance)
        if runs and order.target_state == "running":
            self._take_gpus(instance)
            self._boot(instance)
        else:
            instance.holds_gpus = False
            instance.queued = runs is False
            instance.cur_state = instance.next_state = instance.intended_status = "stopped"
            instance.actual_status = "stopped"
        self.tick()
        return instance

    def destroy(self, instance_id: int, key: str | None = None) -> dict[str, Any]:
        """Ends it and its bill. Raises ApiError 404 no_such_instance the second time."""
        self._destroy(self.get(instance_id, key))
        return {"success": True}

    # ---- starting and stopping ----

    def set_state(self, instance_id: int, state: str, key: str | None = None) -> dict[str, Any]:
        """`running` or `stopped`.

        A start whose GPU is taken is queued and answers success False with HTTP 200.
        """
        instance = self.get(instance_id, key)
        if state == "stopped":
            instance.queued = False
            self.stop(instance)
            return {"success": True}
        if state != "running":
            raise ApiError(400, "invalid_args", f"error 400/3311: Invalid args: state {state!r}")
        if self.credit() <= 0:
            text = "error 400/3312: missing_billing Your account lacks credit."
            raise ApiError(400, "missing_billing", text)
        if instance.cur_state == "running":
            return {"success": True}
        instance.intended_status = "running"
        free = self._free.get(instance.machine_id, 0)
        if free < instance.num_gpus or not self._affordable(instance):
            instance.queued = True
            text = "Required resources are currently unavailable, state change queued."
            return {"success": False, "error": "resources_unavailable", "msg": text}
        self._start(instance)
        return {"success": True}

    def outbid(self, instance_id: int, min_bid_per_gpu: float | None = None) -> None:
        """Somebody bids more: all states become `stopped`, disk and its bill stay."""
        instance = self.get(instance_id)
        host = self.machines.get(instance.machine_id)
        if host is not None:
            dearer = instance.gpu_usd_per_hour / instance.num_gpus * 1.1
            wanted = dearer if min_bid_per_gpu is None else min_bid_per_gpu
            host["min_bid_share"] = wanted / host["usd_per_gpu_hour"]
        self._preempt(instance)

    def change_bid(self, instance_id: int, price: float | None) -> dict[str, Any]:
        """Pays `price` $/h from now on (None: the price on demand)."""
        instance = self.get(instance_id)
        if price is not None and price < 0.001:
            raise ApiError(400, "invalid_price", "Please set a bid price >= 0.001.")
        instance.settle(self._at)
        instance.bid = price
        if instance.cur_state == "running" and not self._affordable(instance):
            self._preempt(instance)
        elif instance.queued:
            self._serve_queue(instance.machine_id)
        return {"success": True}

    def ask_more(self, instance_id: int, factor: float) -> int:
        """The host asks `factor` times the present price; the number of what is pending. It is
        charged from `raise_price` on, unless it was rejected."""
        instance = self.get(instance_id)
        number = len(self.price_increases) + 1
        self.price_increases[number] = PriceIncrease(
            number,
            instance.id,
            instance.gpu_usd_per_hour,
            instance.gpu_usd_per_hour * factor,
            self.clock.now(),
        )
        return number

    def raise_price(self, number: int) -> None:
        """The price that is pending holds from now on; nothing where it was rejected or is in
        force, or its instance gone."""
        asked = self.price_increases[number]
        instance = self.instances.get(asked.instance_id)
        if asked.status != "pending" or instance is None:
            return
        self.tick()
        asked.status = "in force"
        instance.offer["dph_base"] = asked.new_usd_per_hour
        if instance.bid is not None:
            instance.bid = asked.new_usd_per_hour

    def reboot(self, instance_id: int, status: str = "rebooting") -> dict[str, Any]:
        """Stops and starts the container in place, its GPU kept.

        `recycling` also makes it anew (the caller clears the files).
        """
        instance = self.get(instance_id)
        if instance.cur_state != "running":
            raise ApiError(400, "invalid_args", "error 400/3320: instance is not running")
        instance.settle(self._at)
        if instance.running_since is not None:
            instance.running_since = None
            for tell in self.on_stop:
                tell(instance)
        instance.box_faults.pop("tunnel_stuck", None)
        self._boot(instance, status)
        self.tick()
        return {"success": True}

    def lose_host(self, instance_id: int, status: str = "host_death") -> None:
        """The machine goes away: `offline` and `unknown` show.

        `host_death` is noticed by nobody but who talks to the box.
        """
        self._down(self.get(instance_id), status, None)

    def container_exited(self, instance: Instance, code: int) -> None:
        """An `args` container's program ended."""
        if instance.id in self.instances and instance.running_since is not None:
            self.tick()
            self._down(instance, "exited", f"Container exited with code {code}")

    # ---- books ----

    def rows(self) -> list[dict[str, Any]]:
        """The records of what exists now."""
        self.tick()
        return [record(instance, self.clock.now()) for instance in self.instances.values()]

    def spent_usd(self) -> float:
        """Metered dollars of every instance that ever was."""
        self.tick()
        return self._settled_spending()

    def credit(self) -> float:
        """Dollars left."""
        self.tick()
        return self._settled_credit()

    def charges(self) -> list[dict[str, Any]]:
        """One row an instance, oldest first, those of earlier lives of this emulator included."""
        self.tick()
        now = self.clock.now()
        both = [*self.instances.values(), *self.destroyed.values()]
        rows = [charge(one, now) for one in sorted(both, key=lambda one: one.id)]
        return [*self.account.old_charges, *rows]
