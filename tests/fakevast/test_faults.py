"""What goes wrong on purpose, as the client sees it and as the books have it."""

from __future__ import annotations

from typing import Any

import pytest
import requests
from fakevast.renter import Key, call, reach, rent
from vastai.api import instances as vast_instances
from vastai.api import keys as vast_keys
from vastai.api.client import VastClient

from ops.fakevast import FakeVast
from ops.fakevast.cloud.faults import Faults


def create(fake: FakeVast, label: str = "run") -> requests.Response:
    ask = next(iter(fake.cloud.asks))
    return call(
        fake, "PUT", f"/v0/asks/{ask}/", {"image": "i", "label": label, "cancel_unavail": True}
    )


@pytest.mark.parametrize(
    ("fault", "exists"),
    [
        ({"what": "lost_reply"}, True),
        ({"what": "lost_request"}, False),
        ({"what": "502_before"}, False),
        ({"what": "502_after"}, True),
        ({"what": "429_text"}, False),
        ({"what": "429_json"}, False),
        ({"what": "success_false"}, False),
        ({"what": "no_such_ask", "status": 404}, False),
        ({"what": "no_such_ask", "status": 410}, False),
        ({"what": "no_such_ask", "status": 400}, False),
        ({"what": "insufficient_credit"}, False),
        ({"what": "spend_rate_limit"}, False),
        ({"what": "reply", "status": 200, "body": "<html>"}, False),
        ({"what": "reply", "status": 500, "body": {"error": "x"}, "commit": True}, True),
        ({"what": "late", "delay_s": 0.05}, True),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_create_that_goes_wrong_leaves_an_instance_only_where_it_had_committed(
    fake: FakeVast, fault: dict[str, Any], exists: bool
) -> None:
    fake.faults.add({"where": "create", **fault})
    try:
        reply = create(fake)
        assert reply.status_code != 200 or fault["what"] in ("late", "success_false", "reply")
        if fault["what"] == "no_such_ask":
            assert reply.status_code == fault["status"] and "no_such_ask" in reply.text
        if fault["what"] == "429_text":
            assert reply.text == "API requests too frequent"
    except requests.ConnectionError:
        assert fault["what"] in ("lost_reply", "lost_request")
    assert len(fake.instances()) == int(exists)
    assert create(fake).json()["success"] is True, "a fault strikes once unless told otherwise"


def test_a_fault_counts_the_calls_that_match_it_and_strikes_the_nth(fake: FakeVast) -> None:
    fake.faults.add(where="create", what="502_before", label="bad-*", on_call=2, times=2)
    codes = [
        create(fake, label).status_code
        for label in ("bad-1", "good", "bad-2", "bad-3", "good", "bad-4")
    ]
    assert codes == [200, 200, 502, 502, 200, 200]


def test_a_fault_that_does_not_exist_is_refused_with_the_ones_that_do() -> None:
    with pytest.raises(ValueError, match="stuck_loading"):
        Faults().add(where="boot", what="explodes")


def test_a_new_instance_may_be_absent_from_the_first_reads(
    fake: FakeVast, client: VastClient
) -> None:
    fake.faults.add(where="create", what="list_lag", reads=2)
    number = rent(client)
    assert [vast_instances.show_instance(client, number) is None for _ in range(3)] == [
        True,
        True,
        False,
    ]
    assert [len(vast_instances.show_instances(client)) for _ in range(3)] == [0, 0, 1]


def test_a_destroyed_instance_may_still_be_listed_and_bills_nothing_meanwhile(
    fake: FakeVast, client: VastClient
) -> None:
    fake.faults.add(where="destroy", what="still_listed", reads=2)
    number = rent(client)
    vast_instances.destroy_instance(client, number)
    assert [len(vast_instances.show_instances(client)) for _ in range(3)] == [1, 1, 0]
    assert vast_instances.show_instance(client, number) is not None
    amount = fake.charges()[0]["amount"]
    fake.clock.advance(3600)
    assert fake.charges()[0]["amount"] == amount and fake.instances() == []


@pytest.mark.parametrize(("what", "seen"), [("ignored", [1, 1, 1]), ("resurrect", [0, 0, 1])])
def test_a_destroy_may_be_confirmed_and_not_done(
    fake: FakeVast, client: VastClient, what: str, seen: list[int]
) -> None:
    fake.faults.add(where="destroy", what=what, reads=2)
    number = rent(client)
    assert vast_instances.destroy_instance(client, number) == {"success": True}
    fake.clock.advance(3600)
    assert [len(vast_instances.show_instances(client)) for _ in range(3)] == seen
    assert fake.charges()[0]["items"][0]["amount"] > 0.1, "it bills all the while"
    vast_instances.destroy_instance(client, number)
    assert fake.instances() == [] and vast_instances.show_instances(client) == []


def test_the_record_may_differ_from_the_offer(fake: FakeVast, client: VastClient) -> None:
    fake.faults.add(
        where="create",
        what="wrong_fields",
        fields={"gpu_name": "GTX 1080", "dph_total": 9.9, "disk_space": 8, "num_gpus": 3},
    )
    row = vast_instances.show_instance(client, rent(client))
    assert row is not None and (
        row["gpu_name"],
        row["dph_total"],
        row["disk_space"],
        row["num_gpus"],
    ) == ("GTX 1080", 9.9, 8, 3)


@pytest.mark.parametrize("what", ["reset", "denied", "hang"])
def test_ssh_may_be_refused_k_times(
    fake: FakeVast, client: VastClient, key: Key, what: str
) -> None:
    vast_keys.create_ssh_key(client, key.public)
    fake.faults.add(where="ssh", what=what, times=2 if what != "hang" else 1)
    way = reach(client, rent(client), key)
    if what == "hang":
        way.ssh[3:3] = ["-o", "ConnectTimeout=1"]
        codes = [way.run("true").returncode]
        del way.ssh[3:5]
    else:
        codes = [way.run("true").returncode for _ in range(2)]
    assert set(codes) == {255} and way.run("true").returncode == 0


def test_the_host_key_may_change(
    fake: FakeVast, client: VastClient, key: Key, tmp_path: Any
) -> None:
    vast_keys.create_ssh_key(client, key.public)
    way = reach(client, rent(client), key)
    pin = [
        "-o",
        "StrictHostKeyChecking=accept-new",
        "-o",
        f"UserKnownHostsFile={tmp_path / 'known'}",
    ]
    way.ssh[3:3] = pin
    fake.faults.add(where="ssh", what="new_host_key", on_call=3)
    assert [way.run("true").returncode for _ in range(3)] == [0, 0, 255]


def test_the_link_may_break_every_so_many_bytes(
    fake: FakeVast, client: VastClient, key: Key
) -> None:
    vast_keys.create_ssh_key(client, key.public)
    number = rent(client)
    way = reach(client, number, key)
    fake.faults.add(where="ssh", what="cut", every_bytes=300_000, times=None)
    assert way.run("head -c 100000 /dev/zero").returncode == 0
    done = way.run("head -c 5000000 /dev/zero")
    assert done.returncode == 255 and 0 < len(done.stdout) <= 300_000


def test_a_host_may_die_in_the_middle_and_its_record_goes_on_saying_running(
    fake: FakeVast, client: VastClient, key: Key
) -> None:
    vast_keys.create_ssh_key(client, key.public)
    number = rent(client)
    way = reach(client, number, key)
    fake.faults.add(where="exec", what="host_death", on_call=2)
    assert way.run("true").returncode == 0
    assert way.run("sleep 60").returncode == 255
    assert way.run("true").returncode == 255, "its port is closed"
    assert fake.instances()[0]["actual_status"] == "running"


def test_a_running_box_may_exit_go_offline_or_fall_silent(
    fake: FakeVast, client: VastClient
) -> None:
    for what in ("exited", "offline", "unknown", "outbid"):
        fake.faults.add(where="running", what=what)
        number = rent(client)
        row = vast_instances.show_instance(client, number)
        assert row is not None
        assert (
            row["actual_status"] == what
            if what != "outbid"
            else row["cur_state"] == row["intended_status"] == "stopped"
        )
        vast_instances.destroy_instance(client, number)


def test_the_proxy_tunnel_may_stick_until_a_reboot(
    fake: FakeVast, client: VastClient, key: Key
) -> None:
    vast_keys.create_ssh_key(client, key.public)
    fake.faults.add(where="boot", what="tunnel_stuck")
    number = rent(client)
    assert reach(client, number, key).run("true").returncode == 0
    assert reach(client, number, key, proxy=True).run("true").returncode == 255
    assert "port forwarding failed" in vast_instances.logs(client, number)
    vast_instances.reboot_instance(client, number)
    assert reach(client, number, key, proxy=True).run("true").returncode == 0


def test_the_box_may_hold_another_card_than_was_rented(
    fake: FakeVast, client: VastClient, key: Key
) -> None:
    vast_keys.create_ssh_key(client, key.public)
    fake.faults.add(
        where="boot",
        what="wrong_gpu",
        gpu_name="GTX 1080",
        gpu_ram=8192,
        num_gpus=1,
        compute_cap=610,
    )
    way = reach(client, rent(client, gpu="RTX 4090"), key)
    assert (
        way.run("nvidia-smi --query-gpu=name,memory.total --format=csv,noheader").stdout
        == "NVIDIA GTX 1080, 8192 MiB\n"
    )


def test_a_full_disk_refuses_bytes_over_ssh_and_sftp(
    fake: FakeVast, client: VastClient, key: Key, tmp_path: Any
) -> None:
    import subprocess

    vast_keys.create_ssh_key(client, key.public)
    fake.faults.add(where="boot", what="disk_full", free_bytes=100_000)
    number = rent(client)
    way = reach(client, number, key)
    assert way.run("head -c 50000 /dev/zero >small").returncode == 0
    assert way.run("head -c 5000000 /dev/zero >large").returncode != 0
    assert (fake.home(number) / "large").stat().st_size <= 100_000
    assert way.run("df -B1 --output=avail . | tail -1").stdout.strip() == "100000"
    (tmp_path / "big").write_bytes(b"x" * 400_000)
    done = subprocess.run(
        ["scp", *way.scp, str(tmp_path / "big"), "root@127.0.0.1:big"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0


def test_a_command_may_fail_or_its_link_break_as_it_begins(
    fake: FakeVast, client: VastClient, key: Key
) -> None:
    vast_keys.create_ssh_key(client, key.public)
    number = rent(client)
    way = reach(client, number, key)
    fake.faults.add(where="exec", what="fail", code=17, stderr="no luck\n")
    fake.faults.add(where="exec", what="cut", on_call=2)
    done = way.run("touch never")
    assert (done.returncode, done.stderr) == (17, "no luck\n") and not (
        fake.home(number) / "never"
    ).exists()
    assert way.run("sleep 5").returncode == 255
    assert way.run("true").returncode == 0


def test_a_host_may_be_slow_to_boot(fake: FakeVast, client: VastClient) -> None:
    fake.faults.add(where="boot", what="slow", boot_s=600)
    number = rent(client)
    fake.clock.advance(590)
    assert fake.instances()[0]["actual_status"] == "loading"
    fake.clock.advance(11)
    assert vast_instances.show_instance(client, number)["actual_status"] == "running"
