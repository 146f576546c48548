"""A client of one run and the emulator that it rents from, for tests of what is done with a rented
box. Waiting costs nothing, and the box has no watchdog whose calls would be counted as ours."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import rig
from ops.box.connection import Box
from ops.fakevast import FakeVast, VirtualClock
from ops.market.models import Offer
from ops.run.absence import until_absent
from ops.run.journal import Journal
from ops.run.rental import endpoints, rent
from ops.run.session import Session


@dataclass
class Client:
    """`offer` and `other` are two machines of the market."""

    session: Session
    fake: FakeVast
    clock: rig.Jumping
    offer: Offer
    other: Offer

    def rent(self) -> int:
        return rent(self.session, self.offer)

    def box(self) -> Box:
        """A connection to the rented box, which opens with its first command."""
        session = self.session
        number = session.instance_id()
        assert number is not None, "nothing is rented"
        record = session.vast.instance(number)
        assert record is not None
        return Box(endpoints(record), "root", session.key_path, session.known_hosts, retry_s=0.1)

    def show(self, **fields: Any) -> None:
        """The record of every instance has these fields from now on."""
        for row in self.fake.instances():
            instance = self.fake.cloud.instances[row["id"]]
            self.fake.do(partial(instance.shown_as.update, fields))

    def shows(self, seconds: float, **fields: Any) -> None:
        """The same, after so many seconds."""
        self.clock.at[seconds] = partial(self.show, **fields)

    def asked(self, *routes: str) -> list[str]:
        """The requests so far, those to create, destroy and list unless `routes` are named."""
        wanted = routes or ("create", "destroy", "list")
        return [r["route"] for r in self.fake.requests if r["route"] in wanted]

    def kinds(self) -> list[str]:
        return [line.kind for line in self.session.journal.lines]


@contextmanager
def client_of(own: rig.Rig, pace: float = 1.0, **plan: Any) -> Iterator[Client]:
    """A client of a new run; `plan` has fields of its plan. Nothing that it rents survives."""
    made, clock = own.plan(**plan), rig.Jumping(pace)
    setsid = own.image / "bin/setsid"
    setsid.write_text("#!/bin/sh\nexit 1\n")
    setsid.chmod(0o755)
    with (
        own.emulator(clock=VirtualClock(time.time())) as fake,
        Journal(own.runs / made.run_id, now=clock.now) as journal,
    ):
        session = rig.client(made, journal, fake.url, fake.api_key, clock=clock)
        found, _ = session.vast.search({}, interruptible=False, disk_gib=16)
        clock.slept_s = 0.0
        yield Client(session, fake, clock, found[0], found[1])
        fake.faults.clear()
        until_absent(session.vast, made.run_id)
        assert fake.instances() == []
