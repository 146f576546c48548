"""The API over real HTTP, mostly through vast.ai's own client."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from fakevast.renter import Key, call, client_of, rent
from vastai.api import billing as vast_billing
from vastai.api import instances as vast_instances
from vastai.api import keys as vast_keys
from vastai.api import offers as vast_offers
from vastai.api.client import VastClient

from ops.fakevast import FakeVast, ScaledClock, VirtualClock


def test_the_life_of_an_instance_through_vast_ais_own_client(
    fake: FakeVast, client: VastClient
) -> None:
    before = vast_billing.show_user(client)["credit"]
    number = rent(client, label="run-1", env="-e A=b -p 8080:8080", onstart_cmd="echo up")
    row = vast_instances.show_instance(client, number)
    assert row is not None
    assert (row["actual_status"], row["label"], row["extra_env"]) == (
        "running",
        "run-1",
        {"A": "b", "-p 8080:8080": "1"},
    )
    assert row["ssh_host"] == "127.0.0.1" and row["ports"]["22/tcp"][0]["HostPort"] != str(
        row["ssh_port"]
    )
    assert [one["id"] for one in vast_instances.show_instances(client)] == [number]
    assert vast_instances.destroy_instance(client, number) == {"success": True}
    assert (
        vast_instances.show_instance(client, number) is None
        and vast_instances.show_instances(client) == []
    )
    bill = vast_billing.show_invoices_v1(client, {"charges": True, "charge_type": ["instance"]})[
        "results"
    ]
    assert [(row["source"], row["metadata"]["label"]) for row in bill] == [
        (f"instance-{number}", "run-1")
    ]
    assert (
        before - vast_billing.show_user(client)["credit"]
        == pytest.approx(bill[0]["amount"], abs=1e-6)
        and bill[0]["amount"] > 0
    )


@pytest.mark.parametrize(
    "path",
    [
        "/v0/users/current",
        "/v0/users/current/",
        "/v1/instances",
        "/v1/instances/",
        "/v0/ssh",
        "/v0/ssh/",
    ],
)
def test_paths_are_accepted_with_and_without_a_trailing_slash(fake: FakeVast, path: str) -> None:
    assert call(fake, "GET", path).status_code == 200


def test_the_content_type_is_exactly_json(fake: FakeVast) -> None:
    assert call(fake, "POST", "/v0/bundles/", {}).headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("key", "status", "text"),
    [(None, 403, "This action requires login."), ("wrong", 404, "Invalid user key")],
)
def test_no_key_is_403_and_a_wrong_key_is_404(
    fake: FakeVast, key: str | None, status: int, text: str
) -> None:
    reply = call(fake, "GET", "/v1/instances/", key=key)
    assert reply.status_code == status and reply.json() == {
        "success": False,
        "error": "auth_error",
        "msg": text,
    }
    assert call(fake, "DELETE", "/v0/instances/1/", {}, key=key).json()["error"] == "auth_error"


def test_searching_needs_no_key(fake: FakeVast) -> None:
    assert call(fake, "POST", "/v0/bundles/", {"limit": 3}, key=None).json()["offers"]
    assert "RTX 4090" in call(fake, "GET", "/v0/gpu_names/unique/", key=None).json()["gpu_names"]


def test_an_unknown_route_answers_501_and_names_itself(fake: FakeVast) -> None:
    reply = call(fake, "POST", "/v0/network_volumes/search/", {})
    assert (
        reply.status_code == 501 and "POST /api/v0/network_volumes/search/" in reply.json()["msg"]
    )


def test_the_old_list_is_410_and_a_bad_body_is_400(fake: FakeVast) -> None:
    assert call(fake, "GET", "/v0/instances/").json()["error"] == "deprecated_endpoint"
    assert call(fake, "GET", "/v0/instances/").status_code == 410
    bad = requests.put(
        f"{fake.url}/api/v0/asks/1/",
        data=b"{no",
        headers={"Authorization": f"Bearer {fake.api_key}"},
        timeout=60,
    )
    assert bad.status_code == 400 and bad.json()["msg"] == "Invalid json body"


def test_the_old_list_answers_whole_where_the_switch_is_on(make: Callable[..., FakeVast]) -> None:
    fake = make(v0_list=True)
    numbers = [rent(client_of(fake), gpu=gpu) for gpu in ("RTX 3090", "RTX 4090")]
    reply = call(fake, "GET", "/v0/instances/?owner=me")
    assert reply.status_code == 200
    assert [row["id"] for row in reply.json()["instances"]] == numbers


@pytest.mark.parametrize(
    "path",
    ["machines", "users/me/machine-earnings", "endptjobs", "workergroups", "commands/schedule_job"]
    + ["tfa/status", "subaccounts", "audit_logs", "users/cloud_integrations"],
)
def test_calls_of_hosts_and_of_teams_are_not_emulated(fake: FakeVast, path: str) -> None:
    assert call(fake, "GET", f"/v0/{path}/").status_code == 501


def test_the_list_comes_in_pages_of_25_and_filters_by_label(make: Callable[..., FakeVast]) -> None:
    fake = make(market=[{"machine_id": 1000 + n} for n in range(61)])
    client = client_of(fake)
    for n, offer in enumerate(vast_offers.search_offers(client)):
        vast_instances.create_instance(
            client, offer["id"], image="i", label=f"run-{n % 3}", cancel_unavail=True
        )
    page = call(fake, "GET", "/v1/instances/?limit=100").json()
    assert (len(page["instances"]), page["total_instances"], page["label_counts"]["run-0"]) == (
        25,
        61,
        21,
    )
    assert len(vast_instances.show_instances(client)) == 61
    only = vast_instances.show_instances(client, select_filters={"label": {"eq": "run-1"}})
    assert {row["label"] for row in only} == {"run-1"} and len(only) == 20
    assert (
        len(
            vast_instances.show_instances(
                client, select_filters={"label": {"in": ["run-1", "run-2"]}}
            )
        )
        == 40
    )
    assert len(call(fake, "GET", "/v1/instances/?limit=0").json()["instances"]) == 5
    for wrong in (
        "select_filters=%7B%22dph_total%22%3A%7B%22lt%22%3A1%7D%7D",
        "after_token=nonsense",
    ):
        assert call(fake, "GET", f"/v1/instances/?{wrong}").status_code == 400
    chosen = call(fake, "GET", '/v1/instances/?select_cols=["id","nonsense"]&limit=1').json()[
        "instances"
    ][0]
    assert chosen == {"id": chosen["id"], "nonsense": None}


def test_a_destroyed_instance_shows_as_null_and_its_second_destroy_is_404(
    fake: FakeVast, client: VastClient
) -> None:
    number = rent(client)
    assert call(fake, "DELETE", f"/v0/instances/{number}/", {}).json() == {"success": True}
    reply = call(fake, "GET", f"/v0/instances/{number}/?owner=me")
    assert (reply.status_code, reply.json()) == (200, {"instances": None})
    again = call(fake, "DELETE", f"/v0/instances/{number}/", {})
    assert (again.status_code, again.json()["error"]) == (404, "no_such_instance")


def test_an_instances_own_key_reads_and_destroys_it_and_is_refused_elsewhere(
    fake: FakeVast, client: VastClient
) -> None:
    number, other = rent(client), rent(client)
    own = fake.cloud.instances[number].key
    assert (
        call(fake, "GET", f"/v0/instances/{number}/", key=own).json()["instances"]["id"] == number
    )
    refused = [
        ("GET", f"/v0/instances/{other}/"),
        ("DELETE", f"/v0/instances/{other}/"),
        ("GET", "/v1/instances/"),
        ("GET", "/v0/users/current"),
        ("PUT", "/v0/asks/1/"),
        ("POST", "/v0/ssh/"),
        ("GET", "/v0/charges/"),
        ("PUT", f"/v0/instances/command/{number}/"),
    ]
    assert {call(fake, method, path, {}, key=own).status_code for method, path in refused} == {401}
    assert call(fake, "DELETE", f"/v0/instances/{number}/", key=own).json() == {"success": True}
    assert [row["id"] for row in fake.instances()] == [other]


def test_account_keys_are_listed_with_both_names_of_the_text(
    fake: FakeVast, client: VastClient, key: Key
) -> None:
    made = vast_keys.create_ssh_key(client, key.public)["key"]
    listed = vast_keys.show_ssh_keys(client)
    assert (
        listed[0]["key"] == listed[0]["public_key"] == key.public and listed[0]["id"] == made["id"]
    )
    vast_keys.delete_ssh_key(client, made["id"])
    assert vast_keys.show_ssh_keys(client) == []
    assert call(fake, "POST", "/v0/ssh/", {"ssh_key": "not a key"}).json()["error"] == "no_ssh_key"


def test_charges_need_a_window_and_select_what_overlaps_it(
    fake: FakeVast, client: VastClient
) -> None:
    number = rent(client)
    fake.clock.advance(7200)
    vast_instances.destroy_instance(client, number)
    assert call(fake, "GET", "/v0/charges/").status_code == 400
    now = int(fake.clock.now())
    day = 86400
    for window, count in (
        ((now - 3600, now), 1),
        ((now - 9 * day, now - 2 * day), 0),
        ((now + day, now + 2 * day), 0),
    ):
        reply = vast_billing.show_invoices_v1(
            client, {"charges": True, "start_date": window[0], "end_date": window[1]}
        )
        assert reply["total"] == count
    assert {
        item["type"]
        for item in vast_billing.show_invoices_v1(client, {"charges": True, "end_date": now + 60})[
            "results"
        ][0]["items"]
    } == {
        "gpu",
        "disk",
        "bwd",
        "bwu",
    }


def test_logs_and_commands_arrive_by_a_url_that_answers_404_first(
    fake: FakeVast, client: VastClient
) -> None:
    number = rent(client, onstart_cmd="echo first; echo second; touch made")
    deadline = 50
    while "second" not in (text := vast_instances.logs(client, number, tail="2")) and deadline:
        deadline -= 1
    assert text == "first\nsecond\n"
    assert vast_instances.logs(client, number, filter="fir") == "first\n"
    assert "made" in vast_instances.execute(client, number, "ls /root")
    assert (
        call(fake, "PUT", f"/v0/instances/command/{number}/", {"command": "nvidia-smi"}).json()[
            "error"
        ]
        == "invalid_args"
    )
    url = call(fake, "PUT", f"/v0/instances/request_logs/{number}/", {}).json()["result_url"]
    assert [requests.get(url, timeout=60).status_code for _ in range(2)] == [404, 200]


@pytest.mark.slow  # seconds of imports at each of its six calls
def test_the_command_line_of_vastai_drives_the_emulator(fake: FakeVast, tmp_path: Path) -> None:
    env = {
        "HOME": str(tmp_path),
        "VAST_URL": fake.url,
        "VAST_API_KEY": fake.api_key,
        "PATH": "/usr/bin:/bin",
        "VASTAI_NO_UPDATE_CHECK": "1",
    }

    def cli(*words: str) -> str:
        line = [sys.executable, "-c", "from vastai.cli.main import main; main()", *words]
        done = subprocess.run(
            line, env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout

    offers = json.loads(
        cli("search", "offers", "gpu_name=RTX_3090 num_gpus=1 rentable=true", "-o", "dph", "--raw")
    )
    assert {row["gpu_name"] for row in offers} == {"RTX 3090"} and len(offers) >= 3
    made = json.loads(
        cli(
            "create",
            "instance",
            str(offers[0]["id"]),
            "--image",
            "i",
            "--disk",
            "20",
            "--ssh",
            "--direct",
            "--label",
            "cli",
            "--raw",
        )
    )
    number = str(made["new_contract"])
    assert json.loads(cli("show", "instance", number, "--raw"))["label"] == "cli" and "cli" in cli(
        "show", "instances", "--raw"
    )
    assert cli("ssh-url", number).startswith("ssh://root@127.0.0.1:")
    cli("destroy", "instance", number, "-y")
    assert fake.instances() == []


def test_everything_can_be_steered_over_http_from_another_process(
    fake: FakeVast, client: VastClient
) -> None:
    def control(method: str, what: str, body: Any = None) -> Any:
        key = {"Authorization": f"Bearer {fake.api_key}"}
        url = f"{fake.url}/_fake/{what}"
        reply = requests.request(method, url, json=body, headers=key, timeout=60)
        return reply.json() if reply.ok else reply.status_code

    assert control("POST", "faults", {"where": "show", "what": "502_before"}) == {"planned": 1}
    assert control("POST", "faults", {"where": "show", "what": "nonsense"}) == 400
    number = rent(client)
    assert call(fake, "GET", f"/v0/instances/{number}/").status_code == 502
    assert [row["id"] for row in control("GET", "instances")] == [number]
    assert control("GET", "requests")[-1]["fault"] == "502_before"
    before = fake.clock.now()
    assert control("POST", "clock", {"advance_s": 3600})["now"] >= before + 3600
    assert control("GET", "charges")[0]["amount"] > 0.1
    assert control("GET", "nonsense") == 404


@pytest.mark.parametrize("path", ["/_fake/instances", "/api/v0/users/current/"])
@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Authorization": ""}]
)
def test_a_web_page_or_a_stranger_steers_nothing(
    fake: FakeVast, path: str, headers: dict[str, str]
) -> None:
    ours = {"Authorization": f"Bearer {fake.api_key}"}
    assert requests.get(fake.url + path, headers=ours, timeout=60).status_code == 200
    reply = requests.get(fake.url + path, headers=ours | headers, timeout=60)
    assert reply.status_code == 403


def test_a_virtual_clock_stands_still_until_it_is_moved(make: Callable[..., FakeVast]) -> None:
    fake = make(clock=VirtualClock(), boot_s=60.0)
    client = client_of(fake)
    number = rent(client)
    assert fake.instances()[0]["actual_status"] is None
    fake.clock.advance(30)
    assert fake.instances()[0]["actual_status"] == "loading"
    fake.clock.advance(30)
    assert fake.instances()[0]["actual_status"] == "running"
    fake.clock.advance(3600)
    vast_instances.destroy_instance(client, number)
    # the 3090 of the old driver is the cheapest
    assert fake.charges()[0]["items"][0]["amount"] == pytest.approx(0.109, abs=1e-6)


def test_a_clock_may_run_faster_than_the_wall(make: Callable[..., FakeVast]) -> None:
    fake = make(clock=ScaledClock(scale=1000.0), boot_s=100.0)
    number = rent(client_of(fake), onstart_cmd="touch up")
    for _ in range(200):
        if (fake.home(number) / "up").exists():
            break
        time.sleep(0.02)
    assert fake.instances()[0]["actual_status"] == "running", (
        "nobody asked it to tick: its own alarm did"
    )


def test_several_emulators_live_side_by_side(make: Callable[..., FakeVast]) -> None:
    one, two = make(), make()
    rent(client_of(one), label="here")
    assert len(one.instances()) == 1 and two.instances() == []
