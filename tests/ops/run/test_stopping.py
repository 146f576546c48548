"""What happens while the trainer of a run that ends saves, and its checkpoint comes home."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rented import Client, client_of

import rig
from ops.box.connection import Box
from ops.errors import Failed, Lost, OverBudget
from ops.market.client import Vast
from ops.run import interrupt, supervisor, wishes
from ops.run.chain import newest_checkpoint
from ops.run.interrupt import fetch_newest, obey
from ops.wait import until

LONG_S = 50.0


@pytest.fixture(autouse=True)
def a_save_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "MIN_SAVE_S", LONG_S)


@pytest.fixture
def client(own: rig.Rig) -> Iterator[Client]:
    with client_of(own, pace=1 / 512, max_usd=9.0) as made:
        number = made.rent()
        made.session.note("launched", state="started", settings={})
        (made.fake.home(number) / "milktea" / made.session.run_id / "checkpoints").mkdir(
            parents=True
        )
        yield made


@pytest.fixture
def box(client: Client) -> Iterator[Box]:
    made = client.box()
    yield made
    made.end(Lost("the test has ended"))


def home(client: Client) -> Path:
    """The run's folder on the box."""
    [row] = client.fake.instances()
    return client.fake.home(row["id"]) / "milktea" / client.session.run_id


def screen_of(client: Client) -> rig.Silent:
    screen = client.session.screen
    assert isinstance(screen, rig.Silent)
    return screen


@pytest.fixture
def trainer(client: Client) -> Iterator[None]:
    """A trainer that takes a second to save once it is asked to, unless `never` is there."""
    folder = home(client)
    state = hashlib.sha256(b"state").hexdigest()
    manifest = {"step": 1, "files": {"state": {"sha256": state, "bytes": 5}}}
    (folder / "manifest").write_text(json.dumps(manifest))
    script = f"""cd {folder}
trap 'asked=1' TERM
until [ $asked ] && [ ! -e never ]; do sleep 0.02; done
sleep 1; mkdir checkpoints/1; printf state >checkpoints/1/state
cp manifest checkpoints/1/manifest.json; echo 143 >exit_code.new; mv exit_code.new exit_code
"""
    with subprocess.Popen(["sh", "-c", script], start_new_session=True) as process:
        (folder / "pid").write_text(f"{process.pid}\n")
        yield
        process.kill()


def once_it_saves(client: Client, act: Callable[[], object]) -> None:
    """Do this in another thread, once the trainer is asked to save."""

    def wait() -> None:
        if until(lambda: saving(client) or None, every_s=0.02, timeout_s=60):
            act()

    threading.Thread(target=wait, daemon=True).start()


def saving(client: Client) -> int:
    """How often the trainer was asked to save."""
    return screen_of(client).told.count("the trainer saves a checkpoint")


def wish(client: Client, what: str) -> None:
    """As the listener does it."""
    client.session.wish = what
    os.kill(os.getpid(), signal.SIGUSR1)


def test_a_link_that_is_cut_while_the_trainer_saves_costs_no_checkpoint(
    client: Client, box: Box, trainer: None
) -> None:
    client.fake.faults.add(where="exec", what="cut", times=1)
    assert fetch_newest(client.session, box)
    told = "\n".join(map(str, screen_of(client).told))
    assert "the link broke" in told, told
    found = newest_checkpoint(client.session)
    assert found is not None and (found / "state").read_bytes() == b"state"


@pytest.mark.parametrize("first", [wishes.FETCH, wishes.KEEP])
def test_who_wishes_to_destroy_does_not_wait_for_the_save_and_keeps_nothing(
    client: Client, box: Box, trainer: None, first: str
) -> None:
    (home(client) / "never").touch()
    client.session.wish = first
    began = time.monotonic()
    with supervisor._signals(client.session), pytest.raises(Failed, match="is destroyed"):
        once_it_saves(client, lambda: wish(client, wishes.DESTROY))
        obey(client.session, box)
    assert time.monotonic() - began < LONG_S / 2
    chosen = [n["chosen"] for n in client.session.journal.lines if n.kind == "interrupted"]
    assert chosen == [first, "destroy"] and "stopping" not in client.kinds()


def test_ctrl_c_twice_while_the_trainer_saves_takes_nothing_of_it(
    client: Client, box: Box, trainer: None
) -> None:
    screen_of(client).choice = wishes.GO_ON
    (home(client) / "never").touch()

    def press() -> None:
        for times in (2, 3):
            os.kill(os.getpid(), signal.SIGINT)
            until(lambda times=times: saving(client) == times or None, every_s=0.02, timeout_s=60)
        (home(client) / "never").unlink()

    with supervisor._signals(client.session):
        once_it_saves(client, press)
        assert fetch_newest(client.session, box)
    assert screen_of(client).told.count(["go on", "destroy"]) == 2
    assert newest_checkpoint(client.session) is not None
    assert "interrupted" not in client.kinds()


def test_a_save_that_is_not_done_when_the_limit_comes_ends_with_the_box(
    client: Client, box: Box, trainer: None
) -> None:
    (home(client) / "never").touch()
    once_it_saves(client, lambda: box.end(OverBudget("the limit")))  # as the keeper does it
    began = time.monotonic()
    assert fetch_newest(client.session, box)
    assert time.monotonic() - began < LONG_S / 2
    assert any("the limit" in text for text in screen_of(client).told)


def test_a_save_leaves_time_to_fetch_before_the_box_ends_itself(
    client: Client, box: Box, trainer: None
) -> None:
    (home(client) / "never").touch()
    client.session._deadline = None
    client.clock.slept_s += client.session.left_s() - 1.0
    began = time.monotonic()
    assert fetch_newest(client.session, box)
    assert 1 <= time.monotonic() - began < LONG_S / 2


def test_a_box_that_was_to_be_kept_is_destroyed_where_that_is_wished_while_it_stops(
    client: Client, box: Box, trainer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Vast.set_running

    def stop(vast: Vast, number: int, running: bool) -> None:
        real(vast, number, running)
        wish(client, wishes.DESTROY)

    monkeypatch.setattr(Vast, "set_running", stop)
    monkeypatch.setattr("ops.run.kept.MIN_KEPT_S", 0.0)
    client.session.wish = wishes.KEEP
    with supervisor._signals(client.session), pytest.raises(Failed, match="is destroyed"):
        obey(client.session, box)
    assert "kept" in client.kinds()
