"""What the keeper of a box looks at, to the second and the cent: against the emulator, by a clock
that only sleeping moves."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from rented import Client, client_of

import rig
from ops.box.connection import Box
from ops.box.scripts import LEASE_S, NEVER
from ops.errors import Lost, MilkteaError, OverBudget, Stalled
from ops.run import keeper as keepers
from ops.run.keeper import Keeper, keeper_running
from ops.wait import until


@pytest.fixture
def client(own: rig.Rig) -> Iterator[Client]:
    with client_of(own) as made:
        made.rent()
        yield made


@pytest.fixture
def box(client: Client) -> Iterator[Box]:
    made = client.box()
    yield made
    made.end(Lost("the test has ended"))


@pytest.fixture
def keeper(client: Client, box: Box) -> Iterator[Keeper]:
    made = Keeper(client.session, box)
    client.fake.requests.clear()
    yield made
    made.stop()


def told(client: Client, words: str) -> list[str]:
    lines = client.session.screen.told  # type: ignore[attr-defined]
    return [str(said) for said in lines if words in str(said)]


def max_age(client: Client) -> int:
    """The age in seconds at which the box's watchdog is told to destroy it."""
    [row] = client.fake.instances()
    return int((client.fake.home(row["id"]) / "milktea/max_age").read_text().split()[0])


def ended(box: Box) -> MilkteaError | None:
    """What the story's next command raises; None where it goes on."""
    try:
        box.run("true")
    except MilkteaError as e:
        return e
    return None


# -- limits ----------------------------------------------------------------------------------------


def test_a_box_lives_to_its_last_second_and_not_longer(
    client: Client, keeper: Keeper, box: Box
) -> None:
    left_s = client.session.left_s()
    client.clock.slept_s += left_s - 0.5
    keeper._look()
    assert ended(box) is None and client.asked() == []
    client.clock.slept_s += 0.5
    assert client.session.left_s() == 0
    keeper._look()
    assert keepers.LOOK_S <= 1.0, "and no second longer"
    assert isinstance(ended(box), OverBudget)
    assert client.asked() == ["destroy", "list", "list", "list"]


def test_a_story_may_stand_still_for_the_stall_and_ninety_seconds(
    client: Client, keeper: Keeper, box: Box
) -> None:
    for _ in range(11):  # a look that is a minute late is no sleep yet
        client.clock.slept_s += 60.0
        keeper._look()
    client.clock.slept_s += 30.0
    keeper._look()
    assert client.clock.steady() - client.session.moved_t == 600.0 + 90.0
    assert ended(box) is None
    client.clock.slept_s += 0.5
    keeper._look()
    error = ended(box)
    assert isinstance(error, Stalled) and "nothing moved for 12 minutes" in str(error)


def test_what_ends_by_itself_is_no_stall(client: Client, keeper: Keeper, box: Box) -> None:
    with client.session.own_deadline():
        for _ in range(15):
            client.clock.slept_s += 60.0
            keeper._look()
        assert ended(box) is None
    for _ in range(9):
        client.clock.slept_s += 60.0
        keeper._look()
    assert ended(box) is None, "patience begins anew"


def test_a_laptop_that_slept_did_not_stall(client: Client, keeper: Keeper, box: Box) -> None:
    for _ in range(3):
        client.clock.slept_s += 900.0
        keeper._look()
    assert ended(box) is None


def test_a_limit_is_kept_by_a_thread_of_its_own(
    client: Client, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ops.run.keeper.LOOK_S", 0.01)
    with keeper_running(client.session, box):
        time.sleep(0.1)
        assert client.fake.instances()
        client.session.shorten(0.0)
        assert until(lambda: ended(box), every_s=0.02, timeout_s=60)
        assert until(lambda: not client.fake.instances() or None, every_s=0.02, timeout_s=60)


def test_a_keeper_that_cannot_destroy_says_so_and_ends_the_story(
    client: Client, keeper: Keeper, box: Box
) -> None:
    account = client.fake.cloud.account
    key, account.key = account.key, "revoked"
    client.session.shorten(0.0)
    keeper._look()
    account.key = key
    assert isinstance(ended(box), OverBudget)
    assert told(client, "not destroyed yet: the box of")


# -- lease and price -------------------------------------------------------------------------------


def test_nine_renewals_in_a_row_may_be_lost_before_the_lease_ends() -> None:
    assert 10 * keepers.RENEW_S <= LEASE_S
    assert keepers.ANSWER_S < keepers.RENEW_S, "one that hangs is over before the next is due"


def test_each_renewal_writes_the_lease_and_reads_the_price(client: Client, keeper: Keeper) -> None:
    [row] = client.fake.instances()
    home = client.fake.home(row["id"])
    (home / "milktea").mkdir(exist_ok=True)
    (home / "milktea/lease").unlink(missing_ok=True)
    keeper._renew()
    assert (home / "milktea/lease").read_text().strip()
    assert max_age(client) == NEVER
    assert client.asked("show") == []
    client.clock.slept_s += 44.0
    keeper._renew()
    assert client.asked("show") == []
    client.clock.slept_s += 1.0
    keeper._renew()
    assert client.asked("show") == ["show"]
    for n in range(2, 4):
        client.clock.slept_s += keepers.RENEW_S
        keeper._renew()
        assert client.asked("show") == ["show"] * n


def test_a_price_that_rises_by_more_than_rounding_moves_the_deadline(
    client: Client, keeper: Keeper
) -> None:
    session, before = client.session, client.session.usd_per_hour()
    [row] = client.fake.instances()
    home = client.fake.home(row["id"])
    (home / "milktea").mkdir(exist_ok=True)
    client.show(dph_total=before * 1.02 + 1e-4)
    client.clock.slept_s += 60.0
    keeper._renew()
    assert "price" not in client.kinds()
    after = before * 1.03 + 2e-4
    client.show(dph_total=after)
    client.clock.slept_s += 60.0
    left_s = session.left_s()
    keeper._renew()
    # the minute since the price was read last was perhaps paid at the new one
    left_s = left_s * before / after - 60.0 * (after - before) / after
    assert session.left_s() == pytest.approx(left_s, abs=0.01)
    line = session.journal.last("price")
    assert line is not None and line["usd_per_hour"] == after
    assert line["ends_at"] == pytest.approx(client.clock.now() + left_s, abs=0.01)
    assert told(client, f"the price rose from {before:.3f} to {after:.3f} $/h")
    rent = session.journal.last("renting")
    assert rent is not None
    client.clock.slept_s += 60.0
    keeper._renew()
    assert max_age(client) == pytest.approx(120.0 + left_s, abs=1.01)
    (home / "milktea/max_age").write_text(f"{NEVER}\n")
    client.clock.slept_s += 60.0
    keeper._renew()
    assert max_age(client) == NEVER, "it is told once"
    assert client.kinds().count("price") == 1


@pytest.mark.parametrize(("more", "risen"), [(0.0, False), (1e-7, True)])
def test_a_rise_within_two_percent_is_rounding(
    client: Client, keeper: Keeper, more: float, risen: bool
) -> None:
    client.show(dph_total=client.session.usd_per_hour() * 1.02 + 1e-4 + more)
    keeper._read_price()
    assert ("price" in client.kinds()) is risen


def test_the_hours_in_which_nobody_read_the_price_are_paid_at_the_new_one(
    client: Client, box: Box
) -> None:
    client.clock.slept_s += 1000.0
    session = client.session
    session.note("owned", pid=1)
    keeper, before = Keeper(session, box), session.usd_per_hour()
    client.show(dph_total=2 * before)
    left_s = session.left_s()
    keeper._read_price()
    assert session.left_s() == pytest.approx(left_s / 2 - 1000.0 / 2, abs=0.01)
    keeper.stop()


def test_the_watchdog_of_a_box_that_was_kept_is_told_its_new_end(client: Client, box: Box) -> None:
    session, number = client.session, client.session.instance_id()
    session.note("booted", instance_id=number)
    client.clock.slept_s += 100.0
    session.note("stopping", instance_id=number)
    client.clock.slept_s += 5000.0
    session.note("starting", instance_id=number, ends_at=client.clock.now() + 700.0)
    session.note("booted", instance_id=number)
    keeper = Keeper(session, box)
    keeper._renew()
    assert max_age(client) == 800, "without the time for which it was stopped"
    keeper.stop()


def test_a_price_that_the_host_asks_is_told_once(client: Client, keeper: Keeper) -> None:
    [row] = client.fake.instances()
    number = client.fake.do(lambda: client.fake.cloud.ask_more(row["id"], 4.0))
    asked = client.fake.cloud.price_increases[number].new_usd_per_hour
    for _ in range(3):
        keeper._read_price()
    assert len(told(client, f"the host asks {asked:.3f} $/h")) == 1


def test_credit_for_less_than_half_an_hour_is_told_each_time_it_is_less(
    client: Client, keeper: Keeper
) -> None:
    half_an_hour, said = client.session.usd_per_hour() / 2, []
    for credit in (100.0, half_an_hour, *(half_an_hour * x for x in (0.9999, 0.9999, 0.9, 1e-6))):
        client.fake.faults.clear()
        body = {"id": 1, "credit": credit}
        client.fake.faults.add(where="user", what="reply", status=200, body=body)
        keeper._read_price()
        said.append(len(told(client, "$ of credit are left")))
    assert said == [0, 0, 1, 1, 2, 3]
