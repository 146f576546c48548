"""Weather changes the world of a box, as its renter sees it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from fakevast.renter import Key, Reach, client_of, reach, rent
from vastai.api import price_increase
from vastai.api.client import VastClient

from ops.fakevast import FakeVast, weather
from ops.fakevast.boxes import sshd


def come(fake: FakeVast, **event: Any) -> None:
    """This event, at once."""
    fake.forecast(weather.parse(json.dumps([{"where": "search", **event}])))
    fake.do(lambda: fake.cloud.faults.take("search"))


def came(holds: Callable[[], Any]) -> Any:
    for _ in range(6000):
        if found := holds():
            return found
        time.sleep(0.01)
    raise AssertionError("it never came")


def over(fake: FakeVast) -> None:
    """What lasts ends now, as it does after `for_s`."""
    fake.do(fake.emulator.weather.clear)


def api(fake: FakeVast, path: str, method: str = "GET", **more: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {fake.api_key}"}
    return requests.request(method, f"{fake.url}{path}", headers=headers, timeout=60, **more)


def test_every_kind_has_a_name_of_its_own_and_is_read_from_data() -> None:
    kinds = [one.model_fields["kind"].default for one in weather.KINDS.__args__]
    assert len(set(kinds)) == len(kinds) == 18
    text = json.dumps([{"kind": kind} for kind in kinds])
    assert [event.kind for event in weather.parse(text)] == kinds
    for wrong in ('[{"kind": "frogs"}]', '[{"kind": "reboot", "of": 3}]', '[{"for_s": 3}]'):
        with pytest.raises(ValueError, match=r"kind|of"):
            weather.parse(wrong)


def test_an_event_waits_for_its_place_its_count_and_its_label(fake: FakeVast) -> None:
    events = [{"kind": "empty_list", "where": "boot", "on_call": 2, "label": "run-*"}]
    fake.forecast(weather.parse(json.dumps(events)))
    for label, struck in (("run-1", 0), ("mine", 0), ("run-2", 1), ("run-3", 1)):
        fake.do(lambda label=label: fake.cloud.faults.take("boot", label=label))
        came(lambda struck=struck: len(fake.emulator.weather.struck) == struck)


@pytest.mark.parametrize("kind", ["api_pause", "api_5xx", "api_403", "api_html"])
def test_the_api_says_nothing_of_use_for_a_while(fake: FakeVast, kind: str) -> None:
    come(fake, kind=kind, for_s=3600)
    came(lambda: fake.emulator.weather.struck)
    assert not says_credit(fake)
    over(fake)
    assert says_credit(fake)


def says_credit(fake: FakeVast) -> bool:
    try:
        return "credit" in api(fake, "/api/v0/users/current/").json()
    except (requests.RequestException, ValueError):
        return False


def test_what_lasts_ends_by_itself(fake: FakeVast) -> None:
    come(fake, kind="api_5xx", for_s=0.1)
    came(lambda: fake.emulator.weather.struck)
    came(lambda: says_credit(fake))


@pytest.mark.parametrize(("kind", "said"), [("empty_list", []), ("null_list", None)])
def test_lists_show_nothing_for_some_reads(fake: FakeVast, kind: str, said: Any) -> None:
    with_box = rent_one(fake)
    come(fake, kind=kind, reads=2)
    came(lambda: fake.emulator.weather.struck)
    lists = [api(fake, "/api/v1/instances/").json()["instances"] for _ in range(3)]
    assert lists[:2] == [said, said] and lists[2][0]["id"] == with_box


def rent_one(fake: FakeVast) -> int:
    return rent(client_of(fake), label="run-1")


@pytest.mark.parametrize(("kind", "shown"), [("late_list", True), ("unseen_box", False)])
def test_a_new_box_is_missing_from_its_first_reads(fake: FakeVast, kind: str, shown: bool) -> None:
    fake.forecast(weather.parse(json.dumps([{"kind": kind, "reads": 1}])))
    [ask, *_] = fake.do(lambda: fake.cloud.search({}))
    body = {"image": "x", "disk": 10, "label": "run-1", "runtype": "ssh"}
    number = api(fake, f"/api/v0/asks/{ask['id']}/", "PUT", json=body).json()["new_contract"]
    assert api(fake, "/api/v1/instances/").json()["instances"] == []
    row = api(fake, f"/api/v0/instances/{number}/").json()["instances"]
    assert (row is not None) is shown
    assert api(fake, "/api/v1/instances/").json()["instances"][0]["id"] == number


@pytest.mark.usefixtures("box")
def test_ports_move_and_the_record_says_where(fake: FakeVast) -> None:
    before = fake.instances()[0]["ssh_port"]
    come(fake, kind="moved_ports")
    assert came(lambda: fake.instances()[0]["ssh_port"] != before)


def test_a_reboot_ends_every_process_and_keeps_the_files(
    fake: FakeVast, client: VastClient, box: tuple[int, Reach], key: Key
) -> None:
    number, way = box
    assert way.run("echo kept >note; setsid sleep 100 >/dev/null 2>&1 & echo $! >pid").stdout == ""
    come(fake, kind="reboot")
    came(lambda: fake.emulator.weather.struck)
    way = reach(client, number, key)  # docker gave it another port
    done = came(lambda: (said := way.run("cat note; cat /proc/$(cat pid)/status")).stdout and said)
    assert done.stdout.startswith("kept\n")
    assert "State:" not in done.stdout or "State:\tZ" in done.stdout  # dead, if not yet buried


def test_a_boxs_clock_is_wrong_and_is_put_right(fake: FakeVast, box: tuple[int, Reach]) -> None:
    _, way = box

    def off_s() -> float:
        return float(way.run("date +%s").stdout) - time.time()

    come(fake, kind="clock_jump", skew_s=7200, for_s=3600)
    came(lambda: fake.emulator.weather.struck)
    assert 7100 < off_s() < 7300
    over(fake)
    assert abs(off_s()) < 60


def test_bytes_of_a_slow_link_keep_their_order_on_a_machine_that_is_late() -> None:
    sent = bytearray()
    wire = SimpleNamespace(write=sent.extend)
    link = SimpleNamespace(
        box=SimpleNamespace(bytes_per_s=1000.0), broken=False, count=lambda out: None
    )

    async def write() -> None:
        metered: Any = sshd._Metered(wire, link)  # type: ignore[arg-type]
        metered.write(b"a" * 10)  # takes 10 ms
        time.sleep(0.05)
        link.box.bytes_per_s = None
        metered.write(b"b")
        await asyncio.sleep(0.05)

    asyncio.run(write())
    assert sent == b"a" * 10 + b"b"


def test_a_slow_link_carries_so_many_bytes_a_second(fake: FakeVast, box: tuple[int, Reach]) -> None:
    _, way = box
    come(fake, kind="slow_link", bytes_per_s=40_000, for_s=60)
    came(lambda: fake.emulator.weather.struck)
    began = time.monotonic()
    assert len(way.run("head -c 40000 /dev/zero").stdout) == 40_000
    assert 0.9 < time.monotonic() - began < 60


def test_a_full_disk_takes_nothing_also_of_programs_that_run(
    fake: FakeVast, box: tuple[int, Reach]
) -> None:
    number, way = box
    way.run("setsid sh -c 'while :; do echo more >>log; sleep 0.05; done' >/dev/null 2>&1 &")
    log = fake.home(number) / "log"
    came(log.exists)
    come(fake, kind="full_disk", for_s=3600)
    came(lambda: fake.emulator.weather.struck)
    size = log.stat().st_size
    done = way.run("echo x >new; echo $?")
    assert done.stdout != "0\n" and log.stat().st_size == size
    over(fake)
    came(lambda: log.stat().st_size > size)


def test_an_outbid_box_is_stopped_and_a_cut_link_lets_nobody_in_for_a_while(
    fake: FakeVast, box: tuple[int, Reach]
) -> None:
    _, way = box
    come(fake, kind="cut_link", for_s=0.3)
    came(lambda: fake.emulator.weather.struck)
    came(lambda: way.run("true").returncode == 0)
    come(fake, kind="outbid")
    came(lambda: fake.instances()[0]["cur_state"] == "stopped")


def test_a_higher_price_is_told_first_and_holds_later_unless_it_is_rejected(
    fake: FakeVast, client: VastClient
) -> None:
    number = rent(client, label="run-1")
    before = fake.instances()[0]["dph_base"]
    for answer, times in ((None, 3), (price_increase.reject, 3), (price_increase.accept, 9)):
        come(fake, kind="price_increase", factor=3, for_s=3600)
        row = came(lambda: price_increase.pending_rows(price_increase.list_pending(client)))[0]
        assert row["contract_id"] == number
        if answer:
            answer(client, row["pending_price_increase_id"])
        over(fake)  # from that moment on it holds
        assert not price_increase.pending_rows(price_increase.list_pending(client))
        assert fake.instances()[0]["dph_base"] == pytest.approx(before * times)
