"""The machines: real SSH, real processes, and nothing left of them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import asyncssh
import paramiko
import pytest
from fakevast.renter import Key, Reach, client_of, processes_of, reach, rent
from machine import needs
from vastai.api import instances as vast_instances
from vastai.api import keys as vast_keys
from vastai.api.client import VastClient

from ops.fakevast import FakeVast
from trainer.wire.job import WIRE


def until(holds: Callable[[], bool], what: str) -> None:
    """Waits for a fact, 30 seconds at most."""
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError(f"never happened: {what}")


def test_a_command_runs_in_the_boxs_home_with_a_minimal_environment(
    fake: FakeVast, box: tuple[int, Reach]
) -> None:
    number, way = box
    done = way.run("pwd; echo $HOME; echo $PATH; env; echo oops >&2; exit 7")
    home = str(fake.home(number))
    assert done.returncode == 7 and done.stderr.endswith("oops\n")
    assert done.stdout.splitlines()[:2] == [home, home]
    path = done.stdout.splitlines()[2].split(":")
    assert path[0] == f"{fake.home(number).parent}/bin" and path[-6:] == [
        "/usr/local/sbin",
        "/usr/local/bin",
        "/usr/sbin",
        "/usr/bin",
        "/sbin",
        "/bin",
    ]
    assert "CONTAINER_API_KEY" not in done.stdout and "CONTAINER_ID" not in done.stdout


def test_onstart_sees_the_containers_environment_and_runs_at_every_start(
    fake: FakeVast, client: VastClient
) -> None:
    number = rent(
        client, onstart_cmd="env >>seen; echo --- >>seen", env={"MINE": "a b", "-p 8080:8080": "1"}
    )
    seen = fake.home(number) / "seen"
    until(lambda: seen.exists() and "---" in seen.read_text(), "onstart ran")
    text = seen.read_text()
    instance = fake.cloud.instances[number]
    port = instance.ports["22/tcp"][0]["HostPort"]
    for line in (
        f"CONTAINER_ID={number}",
        f"CONTAINER_API_KEY={instance.key}",
        f"VAST_CONTAINERLABEL=C.{number}",
        "PUBLIC_IPADDR=127.0.0.1",
        "GPU_COUNT=1",
        f"VAST_TCP_PORT_22={port}",
        "VAST_TCP_PORT_8080=8080",
        "DATA_DIRECTORY=/workspace",
        "MINE=a b",
    ):
        assert line in text.splitlines()
    vast_instances.stop_instance(client, number)
    vast_instances.start_instance(client, number)
    until(lambda: seen.read_text().count("---") == 2, "onstart ran again")


def test_a_box_can_destroy_itself_with_its_own_key_from_onstart(
    fake: FakeVast, client: VastClient
) -> None:
    command = (
        'curl -s -X DELETE -H "Authorization: Bearer $CONTAINER_API_KEY" '
        '"$MY_URL/api/v0/instances/$CONTAINER_ID/"'
    )
    rent(client, onstart_cmd=command, env={"MY_URL": fake.url})
    until(lambda: fake.instances() == [], "the box destroyed itself")


@pytest.mark.parametrize("size", [0, 1, 65_537, 3_000_000])
def test_bytes_go_through_a_command_unchanged_both_ways(box: tuple[int, Reach], size: int) -> None:
    data = os.urandom(size)
    done = subprocess.run(
        [*box[1].ssh, "root@127.0.0.1", "tee copy; sha256sum copy >&2"],
        input=data,
        capture_output=True,
        timeout=30,
    )
    assert done.stdout == data and hashlib.sha256(data).hexdigest() in done.stderr.decode()


@pytest.mark.parametrize("size", [1_500_000, 3_000_000, 3_100_000, 6_000_000])
def test_a_command_that_reads_slowly_gets_every_byte_although_the_end_was_told_long_before(
    box: tuple[int, Reach], size: int
) -> None:
    data = os.urandom(size)
    slowly = (
        "while head -c 700000 >part && [ -s part ]; do cat part >>copy; sleep 0.02; done; wc "
        "-c <copy; sha256sum <copy"
    )
    done = subprocess.run(
        [*box[1].ssh, "root@127.0.0.1", slowly], input=data, capture_output=True, timeout=30
    )
    assert done.stdout.decode().split()[:2] == [str(size), hashlib.sha256(data).hexdigest()]


def test_a_hundred_megabytes_go_in_and_come_out_while_the_exit_code_waits_for_them(
    box: tuple[int, Reach], tmp_path: Path
) -> None:
    data = os.urandom(1_000_000) * 100
    command = [*box[1].ssh, "root@127.0.0.1", "tee >(sha256sum >&2); exit 9"]
    with open(tmp_path / "out", "wb") as out:
        done = subprocess.run(command, input=data, stdout=out, stderr=subprocess.PIPE, timeout=120)
    assert (
        done.returncode == 9 and done.stderr.decode().split()[0] == hashlib.sha256(data).hexdigest()
    )
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize("rest", ["exit 4", "exec 0</dev/null; sleep 0.5; exit 4"])
def test_a_command_may_read_a_part_of_its_input_and_end_or_go_on(
    box: tuple[int, Reach], rest: str
) -> None:
    command = [*box[1].ssh, "root@127.0.0.1", f"head -c 5; {rest}"]
    done = subprocess.run(command, input=b"12345" * 4_000_000, capture_output=True, timeout=60)
    assert (done.stdout, done.returncode) == (b"12345", 4)


@pytest.mark.parametrize(
    ("terminal", "command", "ends"),
    [
        ([], "cat; date >read-to-the-end", "read-to-the-end"),
        ([], "while echo; do sleep 0.05; done", "broken-pipe"),
        (["-tt"], "while :; do sleep 0.05; done", "hung-up"),
    ],
)
def test_a_lost_connection_ends_the_input_breaks_the_output_and_hangs_up_a_terminal(
    fake: FakeVast, box: tuple[int, Reach], terminal: list[str], command: str, ends: str
) -> None:
    number, way = box
    traps = "trap 'date >broken-pipe' PIPE; trap 'date >hung-up; exit' HUP; date >began"
    words = [*way.ssh, *terminal, "root@127.0.0.1", f"{traps}; {command}"]
    client = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    until((fake.home(number) / "began").exists, "the command runs")
    client.kill()
    client.communicate()
    until((fake.home(number) / ends).exists, ends)


def test_a_signal_reaches_the_whole_process_group_of_a_command(
    fake: FakeVast, box: tuple[int, Reach], key: Key
) -> None:
    number, _ = box

    async def send() -> str:
        async with asyncssh.connect(
            "127.0.0.1",
            fake.cloud.instances[number].ssh_port,
            username="root",
            client_keys=[str(key.path)],
            known_hosts=None,
            config=None,
        ) as connection:
            process = await connection.create_process("sleep 60 & echo ready; wait; sleep 60")
            assert await process.stdout.readline() == "ready\n"
            process.send_signal("TERM")
            await process.wait()
            return str(process.exit_signal[0])

    assert asyncio.run(send()) == "TERM"
    until(lambda: processes_of(fake.home(number).parent) == [], "the background one has ended too")


def test_a_reader_that_does_not_read_makes_the_writer_wait(box: tuple[int, Reach]) -> None:
    """Without back-pressure the emulator would hold all of it in memory; with it, the command is
    blocked."""
    process = subprocess.Popen(
        [*box[1].ssh, "root@127.0.0.1", "head -c 500000000 /dev/zero; date >done"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.read(1)
    assert box[1].run("test -e done").returncode == 1
    process.kill()
    process.communicate()


def test_openssh_sftp_and_scp_work(fake: FakeVast, box: tuple[int, Reach], tmp_path: Path) -> None:
    number, way = box
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    for n in range(20):
        (tree / "sub" / f"{n}.bin").write_bytes(os.urandom(10_000 * n))
    home, run = (
        fake.home(number),
        lambda *words: subprocess.run(
            words, capture_output=True, text=True, timeout=60, check=True
        ),
    )
    run("scp", *way.scp, "-r", str(tree), "root@127.0.0.1:by-scp")
    run("scp", *way.scp, "-O", "-r", str(tree), "root@127.0.0.1:by-old-scp")
    batch = (
        f"mkdir by-sftp\nput -r {tree}/sub by-sftp/\nls -l by-sftp\nrename by-sftp/sub "
        f"by-sftp/moved\nget -r by-sftp/moved {tmp_path}/again\n"
    )
    subprocess.run(
        ["sftp", *way.scp, "-b", "-", "root@127.0.0.1"],
        input=batch,
        text=True,
        capture_output=True,
        check=True,
        timeout=60,
    )
    wanted = {path.name: path.read_bytes() for path in (tree / "sub").iterdir()}
    for copy in (
        home / "by-scp/sub",
        home / "by-old-scp/sub",
        home / "by-sftp/moved",
        tmp_path / "again",
    ):
        assert {path.name: path.read_bytes() for path in copy.iterdir()} == wanted, copy


def test_rsync_works_both_ways(fake: FakeVast, box: tuple[int, Reach], tmp_path: Path) -> None:
    needs("rsync")
    tree, back, way = tmp_path / "tree", tmp_path / "back", box[1]
    tree.mkdir()
    wanted = {f"{n}.bin": os.urandom(10_000 * n) for n in range(20)}
    for name, content in wanted.items():
        (tree / name).write_bytes(content)
    for pair in ((f"{tree}/", "root@127.0.0.1:there/"), ("root@127.0.0.1:there/", f"{back}/")):
        words = ["rsync", "-a", "-e", " ".join(way.ssh), *pair]
        subprocess.run(words, check=True, capture_output=True, timeout=60)
    for copy in (fake.home(box[0]) / "there", back):
        assert {path.name: path.read_bytes() for path in copy.iterdir()} == wanted


def test_sftp_cannot_leave_the_box(fake: FakeVast, box: tuple[int, Reach], key: Key) -> None:
    number, _ = box
    (fake.state_dir / "secret").write_text("outside")
    with paramiko.SSHClient() as ssh:
        ssh.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        port = int(fake.cloud.instances[number].ports["22/tcp"][0]["HostPort"])
        ssh.connect(
            "127.0.0.1",
            port,
            "root",
            key_filename=str(key.path),
            allow_agent=False,
            look_for_keys=False,
        )
        sftp = ssh.open_sftp()
        assert sftp.normalize(".") == str(fake.home(number))
        for path in (
            "../../../secret",
            "/../../../secret",
            f"{fake.home(number)}/../../../secret",
            str(fake.state_dir / "secret"),
        ):
            with pytest.raises(FileNotFoundError):
                sftp.stat(path)
        with sftp.open("/workspace.txt", "w") as file:
            file.write("x")
        assert (fake.home(number) / "workspace.txt").read_text() == "x"


def test_paramiko_runs_commands_and_sees_their_exit_codes(
    fake: FakeVast, box: tuple[int, Reach], key: Key
) -> None:
    with paramiko.SSHClient() as ssh:
        ssh.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        ssh.connect(
            "127.0.0.1",
            fake.cloud.instances[box[0]].ssh_port,
            "root",
            key_filename=str(key.path),
            allow_agent=False,
            look_for_keys=False,
        )
        stdin, stdout, stderr = ssh.exec_command("cat; echo err >&2; exit 3")
        stdin.write(b"hello")
        stdin.channel.shutdown_write()
        assert (stdout.read(), stderr.read(), stdout.channel.recv_exit_status()) == (
            b"hello",
            b"err\n",
            3,
        )
        _, stdout, _ = ssh.exec_command("kill -9 $$")
        assert stdout.channel.recv_exit_status() == -1, "a signal is not an exit code"


def test_a_terminal_works_for_people(box: tuple[int, Reach]) -> None:
    words = [*box[1].ssh, "-tt", "root@127.0.0.1", "tty; stty size; echo $TERM"]
    done = subprocess.run(
        words, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )
    assert done.returncode == 0 and done.stdout.startswith("/dev/pts/")


def test_only_known_keys_open_a_box_and_attaching_reaches_a_live_one(
    make: Callable[..., FakeVast], key: Key
) -> None:
    fake = make(key_delay_s=30.0)
    client = client_of(fake)
    number = rent(client)
    way = reach(client, number, key)
    assert way.run("true").returncode == 255
    vast_keys.create_ssh_key(client, key.public)
    assert way.run("true").returncode == 255, "an account key is for instances made later"
    vast_keys.attach_ssh(client, number, key.public)
    assert way.run("true").returncode == 255, "it is on its way"
    fake.clock.advance(31)
    assert way.run("true").returncode == 0
    port = way.ssh[2]
    assert (
        subprocess.run(
            ["ssh", "-p", port, *way.scp[2:], "nobody@127.0.0.1", "true"],
            capture_output=True,
            timeout=60,
        ).returncode
        == 255
    )


def test_a_lost_connection_kills_nothing_that_was_detached(
    fake: FakeVast, box: tuple[int, Reach]
) -> None:
    number, way = box
    fake.faults.add(where="ssh", what="cut", every_s=0.3)
    assert (
        way.run(
            "setsid nohup sh -c 'sleep 0.6; date >survived' >/dev/null 2>&1 </dev/null & sleep 30"
        ).returncode
        == 255
    )
    until((fake.home(number) / "survived").exists, "the detached process went on")


def test_a_link_that_breaks_while_a_command_does_not_read_leaves_no_traceback_and_no_task(
    fake: FakeVast, box: tuple[int, Reach], caplog: pytest.LogCaptureFixture
) -> None:
    number, way = box
    sent, home = b"x" * 2_000_000, fake.home(number)
    command = "until [ -e go ]; do sleep 0.05; done; cat > heard; touch over"
    with subprocess.Popen([*way.ssh, "root@127.0.0.1", command], stdin=subprocess.PIPE) as ssh:
        assert ssh.stdin is not None
        ssh.stdin.write(sent)
        ssh.stdin.close()
        [at] = fake.emulator.boxes.live.values()

        def all_sent() -> bool:
            channels = [c for link in at.connections for c in link._channels.values()]
            return any(c._recv_state == "eof_pending" for c in channels)

        until(lambda: fake.do(all_sent), "the end of what it sends has arrived")
        fake.do(lambda: at.break_link("cut"))
        assert ssh.wait(30) == 255
    (home / "go").touch()
    until((home / "over").exists, "the command has read and ended")
    left = lambda: any("_run()" in repr(task) for task in asyncio.all_tasks())  # noqa: E731
    until(lambda: not fake.do(left), "nobody waits for the connection any more")
    assert [r for r in caplog.records if r.name.startswith("async") and r.levelno > 30] == []


def test_destroy_ends_every_process_however_detached_and_removes_the_folder(
    fake: FakeVast, client: VastClient, box: tuple[int, Reach]
) -> None:
    number, way = box
    way.run(
        "setsid nohup sleep 1000 >/dev/null 2>&1 </dev/null & (setsid setsid sleep 1000 "
        ">/dev/null 2>&1 </dev/null &) ; sleep 0.1"
    )
    folder = fake.home(number).parent
    assert len(processes_of(folder)) >= 2
    port = int(way.ssh[2])
    vast_instances.destroy_instance(client, number)
    until(lambda: processes_of(folder) == [] and not folder.exists(), "all is gone")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=60)


def test_a_box_that_is_not_up_refuses_connections_and_a_stopped_one_keeps_its_files(
    make: Callable[..., FakeVast], key: Key
) -> None:
    fake = make(boot_s=100.0)
    client = client_of(fake)
    vast_keys.create_ssh_key(client, key.public)
    number = rent(client)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", fake.instances()[0]["ssh_port"]), timeout=60)
    fake.clock.advance(101)
    assert reach(client, number, key).run("echo kept >file").returncode == 0
    vast_instances.stop_instance(client, number)
    there = ("127.0.0.1", fake.instances()[0]["ssh_port"])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(there, timeout=60)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(there)
    vast_instances.start_instance(client, number)
    fake.clock.advance(101)
    assert reach(client, number, key).run("cat file").stdout == "kept\n"
    assert reach(client, number, key, proxy=True).run("cat file").stdout == "kept\n"
    vast_instances.recycle_instance(client, number)
    fake.clock.advance(101)
    assert reach(client, number, key).run("cat file").returncode == 1, "recycled: a new container"


def test_bytes_over_ssh_are_billed_both_ways(make: Callable[..., FakeVast], key: Key) -> None:
    fake = make(bill_image_pull=False)
    client = client_of(fake)
    vast_keys.create_ssh_key(client, key.public)
    number = rent(client)
    way = reach(client, number, key)
    meter = fake.cloud.instances[number].meter
    subprocess.run(
        [*way.ssh, "root@127.0.0.1", "cat >/dev/null"],
        input=os.urandom(4_000_000),
        check=True,
        timeout=30,
    )
    assert 4_000_000 < meter.bytes_in < 4_100_000 and meter.bytes_out < 100_000
    sent_in = meter.bytes_in
    assert (
        len(
            subprocess.run(
                [*way.ssh, "root@127.0.0.1", "head -c 3000000 /dev/zero"],
                capture_output=True,
                timeout=30,
            ).stdout
        )
        == 3_000_000
    )
    assert 3_000_000 < meter.bytes_out < 3_200_000 and meter.bytes_in - sent_in < 100_000
    offer = fake.cloud.instances[number].offer
    items = {item["type"]: item["amount"] for item in fake.charges()[0]["items"]}
    assert items["bwd"] == pytest.approx(meter.bytes_in / 1e9 * offer["inet_down_cost"], abs=1e-6)
    assert items["bwu"] == pytest.approx(meter.bytes_out / 1e9 * offer["inet_up_cost"], abs=1e-6)


def test_nvidia_smi_and_df_answer_for_the_rented_machine(
    fake: FakeVast, client: VastClient, key: Key
) -> None:
    vast_keys.create_ssh_key(client, key.public)
    offers = [
        row for row in fake.cloud.offers() if row["machine_id"] == 11021 and row["num_gpus"] == 2
    ]
    number = vast_instances.create_instance(
        client, offers[0]["id"], image="i", disk=100, ssh=True, direct=True
    )["new_contract"]
    way = reach(client, number, key)
    query = way.run(
        "nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap "
        "--format=csv,noheader,nounits"
    ).stdout
    assert query == "NVIDIA A100-SXM4-80GB, 81920, 580.65.06, 8.0\n" * 2
    assert way.run("nvidia-smi -L").stdout.count("A100-SXM4-80GB (UUID: GPU-") == 2
    table = way.run("nvidia-smi").stdout
    assert "CUDA Version: 13.0" in table and table.count("81920MiB") == 2
    assert way.run("nvidia-smi --query-gpu=colour --format=csv").returncode != 0
    for command, total, free in (
        ("df -Pk .", 97656250, 97000000),
        ("df -BG .", 94, 93),
        ("df -B1 .", 100_000_000_000, 99_000_000_000),
    ):
        words = way.run(command).stdout.splitlines()[1].replace("G", "").split()
        assert int(words[1]) == total and free <= int(words[3]) <= total, command
    assert way.run("python3 -c 'import paramiko; print(1)'").stdout == "1\n"


def test_a_milktea_image_brings_the_trainer_and_others_what_was_registered(
    fake: FakeVast, client: VastClient, key: Key, tmp_path: Path
) -> None:
    vast_keys.create_ssh_key(client, key.public)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "special").write_text("#!/bin/sh\necho here\n")
    (tmp_path / "bin" / "special").chmod(0o755)
    fake.register_image("mine/*", tmp_path / "bin")
    ours = reach(client, rent(client, image="ghcr.io/someone/milktea-train:2"), key)
    assert ours.run("milktea-train --wire").stdout.strip() == str(WIRE)
    other = reach(client, rent(client, image="mine/thing:latest"), key)
    assert other.run("special").stdout == "here\n" and other.run("milktea-train").returncode == 127


def test_a_container_of_arguments_runs_them_and_exits(fake: FakeVast, client: VastClient) -> None:
    number = rent(client, ssh=False, direct=False, args=["sh", "-c", "echo working; exit 3"])
    until(lambda: fake.instances()[0]["actual_status"] == "exited", "it ended")
    assert "code 3" in fake.instances()[0]["status_msg"]
    assert "working" in vast_instances.logs(client, number)


def test_a_life_without_ssh_costs_under_a_tenth_of_a_second_of_cpu(
    fake: FakeVast, client: VastClient
) -> None:
    """Create to running to gone, over HTTP, without SSH: the emulator's own share of it in CPU time
    per life."""
    start = time.process_time()
    for _ in range(50):
        ask = next(iter(fake.cloud.asks))
        number = vast_instances.create_instance(
            client, ask, image="i", label="x", cancel_unavail=True
        )["new_contract"]
        vast_instances.destroy_instance(client, number)
    assert fake.instances() == []
    assert (time.process_time() - start) / 50 < 0.1
