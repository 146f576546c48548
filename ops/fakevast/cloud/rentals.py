"""What is rented and what becomes of it: GPUs taken and given back, boots, ends, the bill. Pure.

Every public method of the cloud first brings the state up to the clock's now (`tick`), so that a
virtual clock may leap by days: all that would have happened on the way happens at its exact time
and is billed to the second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ops.fakevast.cloud.account import Account
from ops.fakevast.cloud.agenda import next_due
from ops.fakevast.cloud.clock import Clock
from ops.fakevast.cloud.faults import Fault
from ops.fakevast.cloud.instance import Instance
from ops.fakevast.cloud.lifecycle import plan_boot
from ops.fakevast.cloud.market import Market
from ops.fakevast.cloud.settings import Settings

Listener = Callable[[Instance], None]


class Rentals(Market):
    """Instances by id, live and destroyed, and who wants to know when one comes up or ends."""

    def __init__(
        self,
        clock: Clock,
        settings: Settings,
        account: Account,
        market: list[dict[str, Any]] | None,
    ) -> None:
        super().__init__(clock, market)
        self.settings = settings
        self.account = account
        self.instances: dict[int, Instance] = {}
        self.destroyed: dict[int, Instance] = {}
        self.on_create: list[Listener] = []
        self.on_start: list[Listener] = []  # a box comes up (first boot, restart, reboot)
        self.on_stop: list[Listener] = []  # its processes end, its files stay
        self.on_destroy: list[Listener] = []
        self._at = 0.0  # the moment that `tick` is at, which lags the clock while it catches up

    def fault(self, where: str, instance: Instance) -> Fault | None:
        """The fault that spoils this event in the instance's life, if any."""
        known = {"label": instance.label, "id": instance.id, "machine_id": instance.machine_id}
        return self.faults.take(where, **known)

    # ---- GPUs ----

    def _take_gpus(self, instance: Instance) -> None:
        instance.holds_gpus = True
        free = self._free.get(instance.machine_id, 0)
        self._free[instance.machine_id] = free - instance.num_gpus
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
        """Gives free GPUs to stopped instances that wait for one, before they are offered again.

        A bid has to reach the minimum.
        """
        for waiting in list(self.instances.values()):
            if waiting.machine_id == machine_id and waiting.queued and self._affordable(waiting):
                if self._free[machine_id] >= waiting.num_gpus:
                    self._start(waiting)

    def _affordable(self, instance: Instance) -> bool:
        return instance.bid is None or instance.bid >= self.min_bid(instance)

    def min_bid(self, instance: Instance) -> float:
        """$/h that a bid for this instance has to reach now."""
        host = self.machines.get(instance.machine_id)
        if host is None:
            return float(instance.offer["min_bid"])
        return float(host["usd_per_gpu_hour"] * instance.num_gpus * host["min_bid_share"])

    # ---- starting and stopping ----

    def _start(self, instance: Instance) -> None:
        instance.settle(max(self._at, instance.settled_at))
        instance.queued = False
        instance.storage_factor = 1.0
        instance.cur_state = instance.next_state = instance.intended_status = "running"
        self._take_gpus(instance)
        self._boot(instance)

    def _boot(self, instance: Instance, first_status: str | None = None) -> None:
        fault = self.fault("boot", instance)
        instance.boots += 1
        instance.actual_status = first_status
        instance.status_msg = None
        broken = (self.machines.get(instance.machine_id) or {}).get("broken")
        instance.agenda = plan_boot(instance, self._at, self.settings, fault, broken)

    def stop(self, instance: Instance, status: str = "stopped") -> None:
        """Processes end, the GPU goes back to the market, the disk stays and is billed."""
        instance.settle(max(self._at, instance.settled_at))
        instance.storage_factor = self.settings.stopped_storage_factor
        was_up = instance.running_since is not None
        instance.agenda.clear()
        instance.cur_state = instance.next_state = instance.intended_status = "stopped"
        instance.actual_status, instance.running_since = status, None
        if was_up:
            for tell in self.on_stop:
                tell(instance)
        self._give_gpus_back(instance)

    def _preempt(self, instance: Instance) -> None:
        """Stops it for a higher bid; it resumes when its own suffices again."""
        self.stop(instance)
        instance.queued = True

    def _destroy(self, instance: Instance) -> None:
        instance.settle(max(self._at, instance.settled_at))
        for tell in self.on_destroy:
            tell(instance)
        instance.destroyed_at = instance.settled_at
        instance.agenda.clear()
        instance.cur_state = instance.next_state = "unloaded"
        self.destroyed[instance.id] = self.instances.pop(instance.id)
        self.account.closed_usd += instance.meter.usd
        self._give_gpus_back(instance)

    # ---- time ----

    def tick(self) -> None:
        """Lets everything happen that was due by now, each at its own time, and charges for it."""
        now = self.clock.now()
        while (due := self._next_due(now)) is not None:
            self._at, instance = due
            self._settle_all(self._at)
            if instance is not None:
                self._act(instance, *instance.agenda.pop(0)[1:])
                continue
            for running in list(self.instances.values()):
                if running.cur_state == "running":  # the credit is used up
                    self.stop(running)
        self._at = now
        self._settle_all(now)

    def next_event(self) -> float | None:
        """When something will next happen by itself (epoch seconds)."""
        due = self._next_due(float("inf"))
        return None if due is None else due[0]

    def _next_due(self, limit: float) -> tuple[float, Instance | None] | None:
        return next_due(self.instances.values(), self._settled_credit(), limit)

    def _settle_all(self, now: float) -> None:
        for instance in self.instances.values():
            instance.settle(max(now, instance.settled_at))

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
        elif action == "down":  # exited, offline, unknown: out of reach, the contract goes on
            self._down(instance, *argument)
        elif action == "outbid":
            self._preempt(instance)
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
        fault = self.fault("running", instance)
        if fault is None:
            return
        when = self._at + float(fault.args.get("after_s", 0.0))
        if fault.what == "outbid":
            instance.agenda.append((when, "outbid", None))
        else:
            instance.agenda.append((when, "down", (fault.what, fault.args.get("msg"))))
        instance.agenda.sort(key=lambda item: item[0])

    def _down(self, instance: Instance, status: str, message: str | None) -> None:
        if instance.running_since is not None:
            instance.running_since = None
            for tell in self.on_stop:
                tell(instance)
        if status == "host_death":  # says nothing: the record goes on claiming that all is well
            return
        instance.actual_status = status
        instance.status_msg = message or (
            "Container exited with code 1" if status == "exited" else instance.status_msg
        )

    # ---- money ----

    def _settled_spending(self) -> float:
        live = sum(instance.meter.usd for instance in self.instances.values())
        return self.account.spent_before_usd + self.account.closed_usd + live

    def _settled_credit(self) -> float:
        return self.settings.credit_usd - self._settled_spending()
