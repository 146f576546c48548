"""The state machine behind the API: market, instances, keys, credit. No socket, no process, no thread; time comes from its clock.

A lifetime: `search` -> `create` (the offer is gone for everybody) -> null, created, loading, running -> `destroy`. Every public
method first brings the state up to the clock's now (`tick`), so that a virtual clock may leap by days: all that would have happened
on the way (boots, end dates, credit running out) happens at its exact time and is billed to the second.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ops.fakevast.cloud import search as market_search
from ops.fakevast.cloud.clock import Clock, RealClock
from ops.fakevast.cloud.create import Order, parse_order
from ops.fakevast.cloud.errors import Refusal, no_such_ask, no_such_instance, wrong_key
from ops.fakevast.cloud.instance import Instance
from ops.fakevast.cloud.lifecycle import plan_boot
from ops.fakevast.cloud.market import Exchange

DELETED_AFTER_END_S = 48 * 3600.0


@dataclass
class Settings:
    """How the emulated cloud behaves.

    `boot_s` None models it: 15 s plus the pull of the image over the machine's link.
    `v0_list`: `GET /api/v0/instances/` lists as it used to, where it is False it answers 410.
    """

    boot_s: float | None = 2.0
    credit_usd: float = 25.0
    bill_image_pull: bool = True
    image_bytes: dict[str, int] = field(default_factory=dict)
    default_image_bytes: int = 3_500_000_000
    key_delay_s: float = 0.0
    v0_list: bool = False


@dataclass
class Account:
    """The one customer. Extra API keys have the same rights; instance keys are another matter (Cloud.who)."""

    id: int = 4711
    key: str = ""
    ssh_keys: list[dict[str, Any]] = field(default_factory=list)
    api_keys: list[dict[str, Any]] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=dict)
    spent_before_usd: float = 0.0
    old_charges: list[dict[str, Any]] = field(default_factory=list)


class Cloud(Exchange):
    """Keys: the account's (`account.key`) may do everything; an instance's own may look at, start, stop and destroy that instance."""

    def __init__(
        self, clock: Clock | None = None, *, settings: Settings | None = None, market: list[dict[str, Any]] | None = None, api_key: str | None = None
    ) -> None:
        super().__init__(clock or RealClock(), market)
        self.settings = settings or Settings()
        self.account = Account(key=api_key or hashlib.sha256(b"fakevast account").hexdigest())
        self.instances: dict[int, Instance] = {}
        self.destroyed: dict[int, Instance] = {}
        self.ghosts: dict[int, dict[str, int]] = {}  # destroyed, yet still read so many times
        self.on_start: list[Callable[[Instance], None]] = []  # a box comes up (first boot, restart, reboot)
        self.on_stop: list[Callable[[Instance], None]] = []  # its processes end, its files stay
        self.on_destroy: list[Callable[[Instance], None]] = []
        self.on_create: list[Callable[[Instance], None]] = []
        self.next_instance = 33_400_000
        self._owners: dict[str, int] = {}  # instance keys
        self._closed_usd = 0.0  # what destroyed instances cost

    def search(self, query: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Rows of `POST /bundles/` for this query (at most 64). Raises Refusal for a bad one."""
        self.tick()
        return market_search.find(self.offers(), query or {})

    # ---- who asks ---------------------------------------------------------------------------------------------------

    def who(self, key: str | None) -> int | None:
        """None for the account, an instance id for that instance's own key. Raises Refusal for a key that nobody has."""
        if key == self.account.key or any(key == extra["key"] for extra in self.account.api_keys):
            return None
        if key is None or key not in self._owners:
            raise wrong_key()
        return self._owners[key]

    def _may_touch(self, key: str | None, instance_id: int) -> None:
        owner = None if key is None else self.who(key)
        if owner is not None and owner != instance_id:
            raise Refusal(401, "not_authorized", f"This key can only be used for instance {owner}.")

    # ---- renting ----------------------------------------------------------------------------------------------------

    def create(self, ask_id: int, body: dict[str, Any], key: str | None = None) -> dict[str, Any]:
        """Rents an offer: {"success", "new_contract", "instance_api_key"}. Raises Refusal, which for too low a bid carries the
        `new_contract` of a stopped instance that is billed for its disk all the same."""
        self.tick()
        if key is not None and self.who(key) is not None:
            raise Refusal(401, "not_authorized", "An instance's key cannot rent.")
        slot = self.asks.get(ask_id) or self.gone_asks.get(ask_id)
        if slot is None or slot[0] not in self.machines:
            raise no_such_ask(ask_id)
        row = self._row(ask_id, *slot)
        order = parse_order(body, row)
        if self.credit() <= 0:
            raise Refusal(400, "insufficient_credit", "error 400/3580: insufficient_credit Your account lacks credit; see the billing page.")
        taken = ask_id not in self.asks
        if taken and order.cancel_unavail:
            raise no_such_ask(ask_id, 410)
        outbid = order.bid is not None and order.bid < row["min_bid"]
        instance = self._rent(row, order, runs=not taken and not outbid)
        if outbid:
            text = f"error 400/3461: bid {order.bid} is below the minimum {row['min_bid']}; the instance was created stopped."
            raise Refusal(400, "invalid_price", text, ask_id=ask_id, new_contract=instance.id)
        return {"success": True, "new_contract": instance.id, "instance_api_key": instance.key}

    def _rent(self, row: dict[str, Any], order: Order, runs: bool) -> Instance:
        now = self._at
        self.next_instance += 1
        number = self.next_instance
        instance = Instance(
            id=number, ask_id=row["id"], offer=market_search.price(row, order.disk_gb, order.bid is not None), created_at=now, settled_at=now,
            end_date=row["end_date"], key=hashlib.sha256(f"instance {number} of {self.account.key}".encode()).hexdigest(), image=order.image,
            disk_gb=order.disk_gb, label=order.label, env=order.env, onstart=order.onstart, args=order.args, runtype=order.runtype,
            bid=order.bid, volume_info=order.volume_info, template_hash_id=order.template_hash_id,
            ssh_keys=[dict(item, since=now) for item in self.account.ssh_keys],
        )  # fmt: skip
        self.instances[number] = instance
        self._owners[instance.key] = number
        for tell in self.on_create:
            tell(instance)
        if runs and order.target_state == "running":
            self._take_gpus(instance)
            self._boot(instance)
        else:
            instance.holds_gpus = False
            instance.stopped_by_market = instance.queued = runs is False
            instance.cur_state = instance.next_state = instance.intended_status = "stopped"
            instance.actual_status = "stopped"
        self.tick()
        return instance

    def _take_gpus(self, instance: Instance) -> None:
        instance.holds_gpus = True
        self._free[instance.machine_id] = self._free.get(instance.machine_id, 0) - instance.num_gpus
        if slot := self.asks.pop(instance.ask_id, None):
            self.gone_asks[instance.ask_id] = slot
        if instance.machine_id in self.machines:
            self._relist(instance.machine_id)

    def _give_gpus_back(self, instance: Instance) -> None:
        if not instance.holds_gpus:
            return
        instance.holds_gpus = False
        if instance.machine_id in self.machines:
            self._free[instance.machine_id] += instance.num_gpus
            self._serve_queue(instance.machine_id)
            self._relist(instance.machine_id)

    def _serve_queue(self, machine_id: int) -> None:
        """Stopped instances whose start waits for a GPU get it before it is offered again; bids only while they reach the minimum."""
        for waiting in list(self.instances.values()):
            if waiting.machine_id == machine_id and waiting.queued and self._affordable(waiting):
                if self._free[machine_id] >= waiting.num_gpus:
                    self._start(waiting)

    def _affordable(self, instance: Instance) -> bool:
        return instance.bid is None or instance.bid >= self.min_bid(instance)

    def min_bid(self, instance: Instance) -> float:
        host = self.machines.get(instance.machine_id)
        return float(instance.offer["min_bid"]) if host is None else host["usd_per_gpu_hour"] * instance.num_gpus * host["min_bid_share"]

    def get(self, instance_id: int, key: str | None = None) -> Instance:
        """The live instance. Raises Refusal 404 when there is none."""
        self.tick()
        self._may_touch(key, instance_id)
        if instance_id not in self.instances:
            raise no_such_instance(instance_id)
        return self.instances[instance_id]

    def destroy(self, instance_id: int, key: str | None = None) -> dict[str, Any]:
        """Ends it and its bill. Raises Refusal 404 no_such_instance the second time."""
        instance = self.get(instance_id, key)
        self._destroy(instance)
        return {"success": True}

    def _destroy(self, instance: Instance) -> None:
        instance.settle(max(self._at, instance.settled_at))
        for tell in self.on_destroy:
            tell(instance)
        instance.destroyed_at = instance.settled_at
        instance.agenda.clear()
        instance.cur_state = instance.next_state = "unloaded"
        self.destroyed[instance.id] = self.instances.pop(instance.id)
        self._closed_usd += instance.meter.usd
        self._give_gpus_back(instance)

    # ---- starting and stopping --------------------------------------------------------------------------------------

    def set_state(self, instance_id: int, state: str, key: str | None = None) -> dict[str, Any]:
        """`running` or `stopped`. A start whose GPU is taken is queued and answers success False with HTTP 200."""
        instance = self.get(instance_id, key)
        if state == "stopped":
            instance.queued = instance.stopped_by_market = False
            self.stop(instance)
            return {"success": True}
        if state != "running":
            raise Refusal(400, "invalid_args", f"error 400/3311: Invalid args: state {state!r}")
        if self.credit() <= 0:
            raise Refusal(400, "missing_billing", "error 400/3312: missing_billing Your account lacks credit.")
        if instance.cur_state == "running":
            return {"success": True}
        instance.intended_status = "running"
        if self._free.get(instance.machine_id, 0) < instance.num_gpus or not self._affordable(instance):
            instance.queued = True
            return {"success": False, "error": "resources_unavailable",
                    "msg": "Required resources are currently unavailable, state change queued."}  # fmt: skip
        self._start(instance)
        return {"success": True}

    def _start(self, instance: Instance) -> None:
        instance.queued = instance.stopped_by_market = False
        instance.cur_state = instance.next_state = instance.intended_status = "running"
        self._take_gpus(instance)
        self._boot(instance)

    def stop(self, instance: Instance, status: str = "stopped") -> None:
        """Processes end, the GPU goes back to the market, the disk stays and is billed."""
        instance.settle(max(self._at, instance.settled_at))
        was_up = instance.running_since is not None
        instance.agenda.clear()
        instance.cur_state = instance.next_state = instance.intended_status = "stopped"
        instance.actual_status, instance.running_since = status, None
        if was_up:
            for tell in self.on_stop:
                tell(instance)
        self._give_gpus_back(instance)

    def outbid(self, instance_id: int, min_bid_per_gpu: float | None = None) -> None:
        """Somebody bids more: all states become `stopped`, disk and its bill stay. It resumes when the bid suffices again."""
        instance = self.get(instance_id)
        host = self.machines.get(instance.machine_id)
        if host is not None:
            wanted = min_bid_per_gpu if min_bid_per_gpu is not None else instance.gpu_usd_per_hour / instance.num_gpus * 1.1
            host["min_bid_share"] = wanted / host["usd_per_gpu_hour"]
        self.stop(instance)
        instance.stopped_by_market = instance.queued = True

    def change_bid(self, instance_id: int, price: float | None) -> dict[str, Any]:
        instance = self.get(instance_id)
        if price is not None and price < 0.001:
            raise Refusal(400, "invalid_price", "Please set a bid price >= 0.001.")
        instance.settle(self._at)
        instance.bid = price
        if instance.cur_state == "running" and not self._affordable(instance):
            self.stop(instance)
            instance.stopped_by_market = instance.queued = True
        elif instance.queued:
            self._serve_queue(instance.machine_id)
        return {"success": True}

    def reboot(self, instance_id: int, status: str = "rebooting") -> dict[str, Any]:
        """Stops and starts the container in place, its GPU kept; `recycling` also makes it anew (the caller clears the files)."""
        instance = self.get(instance_id)
        if instance.cur_state != "running":
            raise Refusal(400, "invalid_args", "error 400/3320: instance is not running")
        instance.settle(self._at)
        if instance.running_since is not None:
            instance.running_since = None
            for tell in self.on_stop:
                tell(instance)
        instance.box_faults.pop("tunnel_stuck", None)
        self._boot(instance, status)
        self.tick()
        return {"success": True}

    def _boot(self, instance: Instance, first_status: str | None = None) -> None:
        fault = self.faults.take("boot", label=instance.label, id=instance.id, machine_id=instance.machine_id)
        instance.boots += 1
        instance.actual_status = first_status
        instance.status_msg = None
        instance.agenda = plan_boot(instance, self._at, self.settings, fault, (self.machines.get(instance.machine_id) or {}).get("broken"))

    # ---- time -------------------------------------------------------------------------------------------------------

    _at = 0.0  # the moment that tick is at, which lags the clock while it catches up

    def tick(self) -> None:
        """Lets everything happen that was due by now, each at its own time, and charges for it. Cheap when nothing is due."""
        now = self.clock.now()
        while (due := self._next_due(now)) is not None:
            when, instance = due
            self._at = when
            self._settle_all(when)
            if instance is None:
                self._out_of_credit()
            else:
                self._act(instance, *instance.agenda.pop(0)[1:])
        self._at = now
        self._settle_all(now)

    def next_event(self) -> float | None:
        """When something will next happen by itself (epoch seconds), for those who wait on a real clock."""
        due = self._next_due(float("inf"))
        return None if due is None else due[0]

    def _next_due(self, limit: float) -> tuple[float, Instance | None] | None:
        first: tuple[float, Instance | None] | None = None
        for instance in self.instances.values():
            end = instance.end_date if instance.cur_state == "running" else instance.end_date + DELETED_AFTER_END_S
            if not instance.agenda or end < instance.agenda[0][0]:
                if end <= limit and (first is None or end < first[0]):
                    action = "contract_ended" if instance.cur_state == "running" else "delete"
                    instance.agenda.insert(0, (end, action, None))
            if instance.agenda and instance.agenda[0][0] <= limit and (first is None or instance.agenda[0][0] < first[0]):
                first = (instance.agenda[0][0], instance)
        empty = self._broke_at()
        if empty is not None and empty <= limit and (first is None or empty < first[0]):
            first = (empty, None)
        return first

    def _broke_at(self) -> float | None:
        """When the credit reaches zero at the present rate; None when it does not, or did and all is stopped."""
        running = [instance for instance in self.instances.values() if instance.cur_state == "running"]
        if not running:
            return None
        burn = sum(instance.burn_usd_per_s() for instance in self.instances.values())
        settled = max(instance.settled_at for instance in self.instances.values())
        left = self._credit_as_settled()
        if left <= 1e-9:
            return settled
        return settled + left / burn if burn > 0 else None

    def _settle_all(self, now: float) -> None:
        for instance in self.instances.values():
            instance.settle(max(now, instance.settled_at))

    def _out_of_credit(self) -> None:
        for instance in list(self.instances.values()):
            if instance.cur_state == "running":
                self.stop(instance)

    def _act(self, instance: Instance, action: str, argument: Any) -> None:
        if action == "status":
            instance.actual_status, instance.status_msg = argument
        elif action == "message":
            instance.status_msg = argument
        elif action == "pulled":
            if self.settings.bill_image_pull and not instance.pulled:
                instance.carry(bytes_in=argument)
            instance.pulled = True
        elif action == "up":
            self._up(instance)
        elif action == "host_failed":
            instance.actual_status, instance.status_msg = "created", argument
            instance.cur_state = "stopped"
            self._give_gpus_back(instance)
        elif action == "down":  # exited, offline, unknown: the box is out of reach, the contract goes on
            self._down(instance, *argument)
        elif action == "outbid":
            self.stop(instance)
            instance.stopped_by_market = instance.queued = True
        elif action == "contract_ended":
            self.stop(instance)
        elif action == "delete":
            self._destroy(instance)

    def _up(self, instance: Instance) -> None:
        instance.actual_status, instance.running_since = "running", self._at
        instance.first_running_at = instance.first_running_at or self._at
        kind = instance.runtype.split()[0].split("_")[0]
        instance.status_msg = f"success, running {instance.image}/{kind}"
        for tell in self.on_start:
            tell(instance)
        fault = self.faults.take("running", label=instance.label, id=instance.id, machine_id=instance.machine_id)
        if fault is None:
            return
        when = self._at + float(fault.args.get("after_s", 0.0))
        action = ("outbid", None) if fault.what == "outbid" else ("down", (fault.what, fault.args.get("msg")))
        instance.agenda.append((when, *action))
        instance.agenda.sort(key=lambda item: item[0])

    def _down(self, instance: Instance, status: str, message: str | None) -> None:
        if instance.running_since is not None:
            instance.running_since = None
            for tell in self.on_stop:
                tell(instance)
        if status != "host_death":  # a host that dies says nothing: the record goes on claiming that all is well
            instance.actual_status = status
            instance.status_msg = message or {"exited": "Container exited with code 1"}.get(status, instance.status_msg)

    def lose_host(self, instance_id: int, status: str = "host_death") -> None:
        """The machine goes away: `offline` and `unknown` show, `host_death` is noticed by nobody but who talks to the box."""
        self._down(self.get(instance_id), status, None)

    def container_exited(self, instance: Instance, code: int) -> None:
        """An `args` container's program ended."""
        if instance.id in self.instances and instance.running_since is not None:
            self.tick()
            self._down(instance, "exited", f"Container exited with code {code}")

    # ---- money ------------------------------------------------------------------------------------------------------

    def carry(self, instance: Instance, bytes_in: int = 0, bytes_out: int = 0) -> None:
        """Bytes that crossed the box's link, as the box sees them."""
        instance.carry(bytes_in, bytes_out)

    def spent_usd(self) -> float:
        """Metered dollars of every instance that ever was."""
        self.tick()
        return self._spent_as_settled()

    def _spent_as_settled(self) -> float:
        return self.account.spent_before_usd + self._closed_usd + sum(instance.meter.usd for instance in self.instances.values())

    def _credit_as_settled(self) -> float:
        return self.settings.credit_usd - self._spent_as_settled()

    def credit(self) -> float:
        return self.settings.credit_usd - self.spent_usd()

    def charges(self) -> list[dict[str, Any]]:
        """One row an instance, oldest first, those of earlier lives of this emulator included."""
        self.tick()
        now = self.clock.now()
        both = sorted((*self.instances.values(), *self.destroyed.values()), key=lambda instance: instance.id)
        return [*self.account.old_charges, *(instance.charge(now) for instance in both)]
