"""The emulator as a process of its own, which comes when needed and goes when idle."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from fakevast.renter import Key, processes_of

from ops.fakevast.embedded import Server, ensure, lock_folder, running


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    if (tmp_path / "server.json").exists():
        stop(tmp_path)


def pid_of(state: Path) -> int:
    import json

    return int(json.loads((state / "server.json").read_text())["pid"])


def stop(state: Path, how: signal.Signals = signal.SIGTERM) -> None:
    pid = pid_of(state)
    os.kill(pid, how)
    for _ in range(6000):
        if running(state) is None:
            break
        time.sleep(0.01)
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass


def api(server: Server, method: str, path: str, body: dict | None = None) -> requests.Response:
    return requests.request(
        method,
        f"{server.url}/api/v0/{path}",
        json=body,
        headers={"Authorization": f"Bearer {server.api_key}"},
        timeout=60,
    )


def test_ensure_starts_one_emulator_however_often_and_from_however_many_it_is_called(
    state: Path,
) -> None:
    with ThreadPoolExecutor(4) as pool:
        servers = set(pool.map(lambda _: ensure(state, idle_exit_s=60), range(4)))
    assert len(servers) == 1
    assert api(servers.pop(), "GET", "users/current").json()["credit"] == 25.0


@pytest.mark.slow  # waits for an absence, seconds long
def test_no_other_user_of_this_machine_can_read_the_key(state: Path) -> None:
    folder = state / "new"
    ensure(folder)
    try:
        assert folder.stat().st_mode & 0o077 == 0
        files = [p for p in folder.rglob("*") if p.is_file()]
        assert {"server.json", "account.json"} <= {p.name for p in files}
        assert [p for p in files if p.stat().st_mode & 0o077] == []
    finally:
        stop(folder)


def test_it_ends_by_itself_when_idle_but_not_while_an_instance_exists(state: Path) -> None:
    server = ensure(state, idle_exit_s=2.0, options=("--boot-s", "0", "--no-rate-limits"))
    ask = api(server, "POST", "bundles/", {}).json()["offers"][0]["id"]
    number = api(server, "PUT", f"asks/{ask}/", {"image": "i", "onstart": "sleep 1000"}).json()[
        "new_contract"
    ]
    # longer than idle_exit_s and its one-second check: the absence of an exit has no event to wait
    # for
    time.sleep(3.5)
    assert running(state) == server
    assert api(server, "DELETE", f"instances/{number}/", {}).json() == {"success": True}
    deadline = time.monotonic() + 60
    while running(state) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (state / "server.json").exists() and processes_of(state) == []


def test_the_account_and_its_bills_outlive_the_emulator(state: Path, key: Key) -> None:
    first = ensure(state, options=("--boot-s", "0", "--no-rate-limits"))
    api(first, "POST", "ssh/", {"ssh_key": key.public})
    ask = api(first, "POST", "bundles/", {}).json()["offers"][0]["id"]
    number = api(first, "PUT", f"asks/{ask}/", {"image": "i", "label": "early"}).json()[
        "new_contract"
    ]
    stop(state)
    second = ensure(state, options=("--boot-s", "0", "--no-rate-limits"))
    assert (
        second.api_key == first.api_key
        and api(second, "GET", "ssh/").json()[0]["key"] == key.public
    )
    api(second, "POST", "ssh/", {"ssh_key": "ssh-ed25519 AAAA later"})
    assert len({row["id"] for row in api(second, "GET", "ssh/").json()}) == 2, (
        "a number means one key"
    )
    window = '{"day":{"gte":0,"lte":9999999999}}'
    row = api(second, "GET", f"charges/?select_filters={window}").json()["results"][0]
    assert row["source"] == f"instance-{number}" and row["amount"] > 0
    assert api(second, "GET", "users/current").json()["credit"] == pytest.approx(
        25.0 - row["amount"], abs=1e-6
    )
    ask = api(second, "POST", "bundles/", {}).json()["offers"][0]["id"]
    assert api(second, "PUT", f"asks/{ask}/", {"image": "i"}).json()["new_contract"] > number


def test_what_a_killed_emulator_left_is_swept_by_the_next(state: Path) -> None:
    first = ensure(state, options=("--boot-s", "0", "--no-rate-limits"))
    ask = api(first, "POST", "bundles/", {}).json()["offers"][0]["id"]
    api(first, "PUT", f"asks/{ask}/", {"image": "i", "onstart": "touch up; sleep 1000"})
    while not list(state.glob("boxes/*/root/up")):
        time.sleep(0.01)
    stop(state, signal.SIGKILL)
    assert len(processes_of(state)) >= 1 and not (state / "server.json").exists()
    second = ensure(state)
    api(second, "GET", "users/current")
    assert processes_of(state) == [] and list((state / "boxes").iterdir()) == []


def test_who_looks_whether_an_emulator_runs_keeps_none_from_starting(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(state / "lock", "w") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(look, fcntl.LOCK_UN))
        lock = lock_folder(state)
    assert lock is not None
    lock.close()


def test_a_server_that_cannot_start_says_why(state: Path) -> None:
    with pytest.raises(RuntimeError, match="no/such/market"):
        ensure(state, options=("--catalogue", "no/such/market.json"))


def test_faults_and_market_can_come_from_files(state: Path) -> None:
    (state / "market.json").write_text(
        '[{"machine_id": 7, "gpu_name": "H200", "usd_per_gpu_hour": 2.5}]'
    )
    (state / "faults.json").write_text('[{"where": "user", "what": "502_before"}]')
    server = ensure(
        state,
        options=("--catalogue", str(state / "market.json"), "--faults", str(state / "faults.json")),
    )
    assert [row["gpu_name"] for row in api(server, "POST", "bundles/", {}).json()["offers"]] == [
        "H200"
    ]
    assert [api(server, "GET", "users/current").status_code for _ in range(2)] == [502, 200]


def test_help_says_what_there_is() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "ops.fakevast", "--help"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    for option in (
        "--port",
        "--state",
        "--idle-exit-s",
        "--boot-s",
        "--catalogue",
        "--faults",
        "--rate-limits",
    ):
        assert option in done.stdout
