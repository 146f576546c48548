"""What a rented machine and its API go through on bad days, as data.

    [{"kind": "reboot", "where": "exec", "on_call": 7},
     {"kind": "api_pause", "where": "running", "after_s": 2, "for_s": 10},
     {"kind": "price_increase", "factor": 3}]

An event waits for the `on_call`-th happening at a place of `cloud/faults.py`, then for `after_s`
real seconds; what lasts, lasts `for_s`. Where faults spoil one answer, weather changes the world:
each kind is one class with its `strike`.
"""

from __future__ import annotations

import asyncio
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ops.fakevast.boxes.box import Box
from ops.fakevast.boxes.boxes import Boxes
from ops.fakevast.cloud.cloud import Cloud
from ops.fakevast.cloud.faults import Fault
from ops.fakevast.cloud.instance import Instance

End = Callable[[], None]  # what ends that which lasts


class _Event(BaseModel):
    """`label` is a glob of the instances that it may strike: the newest of them is struck."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    needs_box: ClassVar[bool] = True
    where: str = "running"
    on_call: int = Field(1, ge=1)
    label: str = "*"
    after_s: float = Field(0.0, ge=0)
    for_s: float = Field(5.0, ge=0)

    def strike(self, cloud: Cloud, box: Box) -> End | None:
        """Make it so; returns what ends it, where it ends."""
        raise NotImplementedError


# -- what the API says -----------------------------------------------------------------------------


class _OfTheApi(_Event):
    needs_box: ClassVar[bool] = False

    def strike(self, cloud: Cloud, box: Box | None) -> End | None:
        return self.spoil(cloud)

    def spoil(self, cloud: Cloud) -> End | None:
        raise NotImplementedError


class LateList(_OfTheApi):
    """A new instance is missing from the next `reads` lists."""

    kind: Literal["late_list"] = "late_list"
    where: str = "create"
    reads: int = 2
    places: ClassVar[list[str]] = ["list"]

    def spoil(self, cloud: Cloud) -> None:
        lag: dict[str, Any] = {"in": self.places, "reads": self.reads}
        cloud.faults.add(where="create", what="list_lag", **lag)


class UnseenBox(LateList):
    """A new instance is missing from the lists, and asked for by its number it is null."""

    kind: Literal["unseen_box"] = "unseen_box"  # type: ignore[assignment]
    places: ClassVar[list[str]] = ["list", "show"]


class EmptyList(_OfTheApi):
    """The next `reads` lists are empty, whatever is rented."""

    kind: Literal["empty_list"] = "empty_list"
    reads: int = 2

    def spoil(self, cloud: Cloud) -> None:
        body: dict[str, Any] = {"success": True, "next_token": None, "instances": []}
        _answer(cloud, "list", times=self.reads, status=200, body=body)


class NullList(_OfTheApi):
    """The next `reads` lists, and the next `reads` looks at one instance, say null."""

    kind: Literal["null_list"] = "null_list"
    reads: int = 2

    def spoil(self, cloud: Cloud) -> None:
        for where in ("list", "show"):
            _answer(cloud, where, times=self.reads, status=200, body={"instances": None})


class ApiPause(_OfTheApi):
    """Nobody answers."""

    kind: Literal["api_pause"] = "api_pause"

    def spoil(self, cloud: Cloud) -> End:
        return _until(cloud, cloud.faults.add(where="*", what="lost_request", times=None))


class Api5xx(_OfTheApi):
    kind: Literal["api_5xx"] = "api_5xx"
    status: int = Field(503, ge=500, le=599)

    def spoil(self, cloud: Cloud) -> End:
        body = {"success": False, "error": "unavailable", "msg": "try again later"}
        return _until(cloud, _answer(cloud, "*", times=None, status=self.status, body=body))


class Api403(_OfTheApi):
    """A wall between us and the API says no, in JSON of its own."""

    kind: Literal["api_403"] = "api_403"

    def spoil(self, cloud: Cloud) -> End:
        body = {"message": "Forbidden"}
        return _until(cloud, _answer(cloud, "*", times=None, status=403, body=body))


class ApiHtml(_OfTheApi):
    """A page for people in place of each answer."""

    kind: Literal["api_html"] = "api_html"
    status: int = 200

    def spoil(self, cloud: Cloud) -> End:
        page = {"body": "<html><body>Just a moment...</body></html>", "content_type": "text/html"}
        return _until(cloud, _answer(cloud, "*", times=None, status=self.status, **page))


def _answer(cloud: Cloud, where: str, *, times: int | None, **reply: Any) -> Fault:
    return cloud.faults.add(where=where, what="reply", times=times, **reply)


def _until(cloud: Cloud, fault: Fault) -> End:
    def end() -> None:
        if fault in cloud.faults.planned:
            cloud.faults.planned.remove(fault)

    return end


# -- what becomes of the machine -------------------------------------------------------------------


class MovedPorts(_Event):
    """Its sshd is at other ports, as its record says."""

    kind: Literal["moved_ports"] = "moved_ports"

    def strike(self, cloud: Cloud, box: Box) -> None:
        box.move_ports()


class Reboot(_Event):
    """The host starts again: every process of the box ends, its files stay."""

    kind: Literal["reboot"] = "reboot"

    def strike(self, cloud: Cloud, box: Box) -> None:
        cloud.reboot(box.instance.id)


class ClockSkew(_Event):
    """The box's clock is wrong by `skew_s` until the box starts again."""

    kind: Literal["clock_skew"] = "clock_skew"
    skew_s: int = 10_800

    def strike(self, cloud: Cloud, box: Box) -> None:
        box.instance.box_faults["clock"] = {"skew_s": self.skew_s}
        box.tell_facts()


class ClockJump(ClockSkew):
    """The box's clock jumps, and is put right after `for_s`."""

    kind: Literal["clock_jump"] = "clock_jump"  # type: ignore[assignment]

    def strike(self, cloud: Cloud, box: Box) -> End:  # type: ignore[override]
        super().strike(cloud, box)
        return partial(_forget, box, "clock")


class SlowLink(_Event):
    """Each connection carries so many bytes a second each way."""

    kind: Literal["slow_link"] = "slow_link"
    bytes_per_s: float = Field(20_000, gt=0)

    def strike(self, cloud: Cloud, box: Box) -> End:
        box.bytes_per_s = self.bytes_per_s
        return partial(setattr, box, "bytes_per_s", None)


class CutLink(_Event):
    """Each connection breaks, and none is let in."""

    kind: Literal["cut_link"] = "cut_link"

    def strike(self, cloud: Cloud, box: Box) -> End:
        box.break_link("cut")
        shut = cloud.faults.add(where="ssh", what="reset", id=box.instance.id, times=None)
        return _until(cloud, shut)


class FullDisk(_Event):
    """A file on the box takes only `free_bytes`, also of programs that run."""

    kind: Literal["full_disk"] = "full_disk"
    free_bytes: int = Field(0, ge=0)

    def strike(self, cloud: Cloud, box: Box) -> End:
        box.fill_disk(self.free_bytes)
        return partial(box.fill_disk, None)


class SlowHub(_Event):
    """Downloads of models come at this share of their speed; images read HUB_SHARE in `facts`."""

    kind: Literal["slow_hub"] = "slow_hub"
    share: float = Field(0.1, gt=0, le=1)

    def strike(self, cloud: Cloud, box: Box) -> End:
        box.instance.box_faults["hub"] = {"share": self.share}
        box.tell_facts()
        return partial(_forget, box, "hub")


def _forget(box: Box, name: str) -> None:
    box.instance.box_faults.pop(name, None)
    box.tell_facts()


# -- what becomes of the contract ------------------------------------------------------------------


class Outbid(_Event):
    kind: Literal["outbid"] = "outbid"

    def strike(self, cloud: Cloud, box: Box) -> None:
        cloud.outbid(box.instance.id)


class PriceRise(_Event):
    """The host asks `factor` times the price; it holds after `for_s` unless it was rejected."""

    kind: Literal["price_increase"] = "price_increase"
    factor: float = Field(2.0, gt=1)

    def strike(self, cloud: Cloud, box: Box) -> End:
        return partial(cloud.raise_price, cloud.ask_more(box.instance.id, self.factor))


KINDS = (
    LateList | UnseenBox | EmptyList | NullList | ApiPause | Api5xx | Api403 | ApiHtml
    | MovedPorts | Reboot | ClockSkew | ClockJump | SlowLink | CutLink | FullDisk | SlowHub
    | Outbid | PriceRise
)  # fmt: skip
Event = Annotated[KINDS, Field(discriminator="kind")]
_events: TypeAdapter[list[Event]] = TypeAdapter(list[Event])


def parse(text: str | bytes) -> list[Event]:
    """A list of events in JSON. Raises ValueError with the place of each mistake."""
    return _events.validate_json(text)


def load(path: Path) -> list[Event]:
    return parse(path.read_bytes())


@dataclass
class _Waiting:
    event: Event
    seen: int = 0

    def is_due(self, where: str, label: str) -> bool:
        """Whether this happening, which is counted where it matches, is the one waited for."""
        there = where == self.event.where and fnmatch.fnmatchcase(label, self.event.label)
        self.seen += there
        return there and self.seen == self.event.on_call


@dataclass
class Weather:
    """The events to come over one cloud, on its loop. `struck` names the kinds that came, in their
    order; one that finds no instance does not come."""

    cloud: Cloud
    boxes: Boxes
    waiting: list[_Waiting] = field(default_factory=list)
    struck: list[str] = field(default_factory=list)
    _timers: set[asyncio.TimerHandle] = field(default_factory=set)
    _ends: list[End] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cloud.faults.on_event.append(self._happened)

    def add(self, events: list[Event]) -> None:
        self.waiting += [_Waiting(event) for event in events]

    def clear(self) -> None:
        """Fair weather: nothing comes any more, what lasts ends."""
        for timer in self._timers:
            timer.cancel()
        for end in self._ends:
            end()
        self.waiting, self.struck, self._ends = [], [], []
        self._timers.clear()

    def _happened(self, where: str, context: dict[str, Any]) -> None:
        label = str(context.get("label") or "")
        for one in [one for one in self.waiting if one.is_due(where, label)]:
            if isinstance(one.event, LateList):  # it spoils the very call that it waited for
                self._strike(one.event)
            else:
                self._later(one.event.after_s, partial(self._strike, one.event))

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        def due() -> None:
            self._timers.discard(timer)
            act()

        timer = asyncio.get_running_loop().call_later(seconds, due)
        self._timers.add(timer)

    def _strike(self, event: Event) -> None:
        if event.needs_box:
            box = self._newest(event.label)
            if box is None:
                return
            end = event.strike(self.cloud, box)
            end = end and partial(self._while_it_lives, box, end)
        else:
            assert isinstance(event, _OfTheApi)
            end = event.spoil(self.cloud)
        self.struck.append(event.kind)
        if end is not None:
            self._ends.append(end)
            self._later(event.for_s, partial(self._end, end))

    def _end(self, end: End) -> None:
        if end in self._ends:
            self._ends.remove(end)
            end()

    def _while_it_lives(self, box: Box, end: End) -> None:
        if self.boxes.live.get(box.instance.id) is box:
            end()

    def _newest(self, label: str) -> Box | None:
        """The box of the newest running instance that has such a label."""
        found: list[Instance] = [
            one
            for one in self.cloud.instances.values()
            if one.running_since is not None and fnmatch.fnmatchcase(one.label or "", label)
        ]
        return self.boxes.live[max(found, key=lambda one: one.id).id] if found else None
