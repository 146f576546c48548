"""ops/box/connection.py against a real SSH server on loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
import time

import fabric
import pytest
from machine import free_port

from ops.box.connection import MAX_OUTPUT, Box, Endpoint
from ops.errors import BoxError, HostKeyChanged, Lost, NeverReady, OverBudget, Unsuitable
from ops.wait import until


def test_construction_opens_nothing_and_writes_nothing(tmp_path):
    Box([Endpoint("192.0.2.1", 22)], "root", tmp_path / "no-key", tmp_path / "known_hosts")
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_private_and_a_second_call_keeps_it(tmp_path):
    first = Box.make_key(tmp_path / "id")
    assert first.startswith("ssh-ed25519 ")
    assert Box.make_key(tmp_path / "id") == first
    assert stat.S_IMODE(os.stat(tmp_path / "id").st_mode) == 0o600
    assert (tmp_path / "id").read_text().startswith("-----BEGIN OPENSSH PRIVATE KEY-----")


def test_a_client_killed_while_it_writes_the_key_leaves_none(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda fd: 1 / 0)  # the client ends here
        with pytest.raises(ZeroDivisionError):
            Box.make_key(tmp_path / "id")
    assert not (tmp_path / "id").exists()
    assert Box.make_key(tmp_path / "id") == Box.make_key(tmp_path / "id")


def test_a_non_zero_exit_is_a_result_with_both_streams(box):
    result = box.run("echo out; echo err >&2; exit 3")
    assert (result.exit_code, result.stdout, result.stderr) == (3, "out\n", "err\n")


def test_a_script_killed_by_a_signal_has_an_exit_code_and_the_link_lives(box, server):
    assert box.run("sh -c 'kill -9 $$'; exit $?").exit_code == 137
    assert box.run("exec sh -c 'kill -9 $$'").exit_code == 137
    assert server.logins == 1


def test_quotes_newlines_and_dollars_arrive_as_written(box):
    assert (
        box.run("printf '%s|' 'a  b' \"it's\" '$HOME;`x`'\n# a comment at the end").stdout
        == "a  b|it's|$HOME;`x`|"
    )


def test_input_reaches_the_script_whole_and_fast(box):
    data = os.urandom(3 << 20)
    began = time.monotonic()
    assert box.run("wc -c", input=data).stdout.strip() == str(len(data))
    assert time.monotonic() - began < 100  # fabric's own run would take hours


def test_a_script_that_does_not_read_its_input_still_ends(box):
    assert box.run("exit 4", input=bytes(8 << 20)).exit_code == 4


def test_what_rc_files_print_is_not_output(server, make_box):
    server.noise = "echo Welcome to the box; echo tmux >&2; "
    box = make_box(server.port)
    box.connect(10)
    result = box.run("echo x")
    assert (result.stdout, result.stderr) == ("x\n", "")


@pytest.mark.parametrize("to", ["", " >&2"])
def test_a_box_that_answers_without_end_is_stopped_in_words_and_the_next_call_works(box, to):
    assert len(box.run(f"head -c {MAX_OUTPUT} /dev/zero{to}").stdout) == (0 if to else MAX_OUTPUT)
    with pytest.raises(Unsuitable, match=r"more than 8,388,608 bytes to: cat /dev/zero"):
        box.run(f"cat /dev/zero{to}")
    with pytest.raises(Unsuitable, match="more than"):  # which has no limit on its seconds
        box.stream(f"cat /dev/zero{to}")
    assert box.run("echo alive").stdout == "alive\n"


def test_a_command_that_is_closed_while_its_output_comes_leaves_the_link_alone(
    box, server, monkeypatch
):
    close = os.close

    def slowly(descriptor: int) -> None:
        close(descriptor)
        time.sleep(0.05)

    def full(data: bytes) -> None:
        raise OSError("no space left on this disk")

    monkeypatch.setattr(os, "close", slowly)  # paramiko's reader goes on meanwhile
    with pytest.raises(OSError, match="no space left"):
        box.stream("while :; do echo x; done", receive=full)
    assert box.run("echo alive").stdout == "alive\n"
    assert server.logins == 1


def test_bytes_that_are_changed_on_their_way_break_the_link_and_the_next_call_works(
    server, make_proxy, make_box
):
    proxy = make_proxy(server.port)
    box = make_box(proxy.port)
    box.connect(10)
    for call in (box.run, lambda script: box.terminal(script, "dumb", 80, 24)):
        proxy.spoils = True
        with pytest.raises(Lost):
            call("echo x")
        assert box.run("echo alive").stdout == "alive\n"


def test_a_packet_of_gigabytes_is_refused_before_it_is_read(make_box):
    sent = 0

    def flood(listener):
        nonlocal sent
        with listener.accept()[0] as there, contextlib.suppress(OSError):
            there.sendall(b"SSH-2.0-box\r\n" + (0x7FFFFFF4).to_bytes(4, "big") + bytes(4))
            while sent < 1 << 30:
                there.sendall(bytes(1 << 20))
                sent += 1 << 20

    with socket.create_server(("127.0.0.1", 0)) as listener:
        flooding = threading.Thread(target=flood, args=(listener,), daemon=True)
        flooding.start()
        with pytest.raises(Lost, match="cannot be reached"):
            make_box(listener.getsockname()[1]).reconnect()
        flooding.join(60)
    assert not flooding.is_alive() and sent < 64 << 20


def test_noise_without_end_before_a_command_is_stopped_too(server, make_box):
    server.noise = "head -c 3000000 /dev/zero; "
    box = make_box(server.port)
    box.connect(10)
    with pytest.raises(Unsuitable, match="before a command began"):
        box.stream("echo x")


def test_a_script_that_does_not_end_in_time_is_lost_and_the_next_call_works(box):
    began = time.monotonic()
    with pytest.raises(Lost, match=r"no end within 1 s of: sleep 600"):
        box.run("sleep 600", timeout_s=1)
    assert time.monotonic() - began < 60
    assert box.run("echo alive").stdout == "alive\n"


def test_a_job_left_in_the_background_does_not_hold_the_call(box, server):
    began = time.monotonic()
    leaves_one = "sleep 600 >/dev/null 2>&1 </dev/null & echo started"
    assert box.run(leaves_one, timeout_s=60).stdout == "started\n"
    assert time.monotonic() - began < 50


def test_a_link_cut_in_mid_command_is_lost_not_an_exit_code(box, server):
    said: list[BaseException] = []

    def work() -> None:
        try:
            box.run("touch begun; sleep 60")
        except Lost as error:
            said.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert until(lambda: (server.home / "begun").exists() or None, every_s=0.02, timeout_s=60)
    server.cut()
    thread.join(60)
    assert len(said) == 1
    assert "the link broke during: touch begun" in str(said[0])


def test_after_a_cut_the_next_call_reconnects_by_itself(box, server):
    server.cut()
    assert until(lambda: not box._fabric.is_connected or None, every_s=0.02, timeout_s=60)
    assert box.run("echo again").stdout == "again\n"
    assert box.read_from("nothing", 0) == b""
    assert server.logins == 2


def test_read_from_follows_a_growing_file_by_byte_offset(box, server):
    assert box.read_from("milktea/r/events.jsonl", 0) == b""
    (server.home / "milktea/r").mkdir(parents=True)
    events = server.home / "milktea/r/events.jsonl"
    events.write_bytes(b"\x00\xffone\n")
    assert box.read_from("milktea/r/events.jsonl", 0) == b"\x00\xffone\n"
    assert box.read_from("milktea/r/events.jsonl", 2) == b"one\n"
    assert box.read_from("milktea/r/events.jsonl", 6) == b""
    assert box.read_from("milktea/r/events.jsonl", 99) == b""
    events.write_bytes(bytes(range(256)) * 20000)
    assert (
        box.read_from("milktea/r/events.jsonl", 256, max_bytes=3 << 20)
        == (bytes(range(256)) * 20000)[256 : 256 + (3 << 20)]
    )


def test_a_file_that_cannot_be_read_is_an_error_not_an_empty_file(box, server):
    (server.home / "folder").mkdir()
    with pytest.raises(BoxError, match="cannot read folder"):
        box.read_from("folder", 0)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "~root/x", "", "a\nb", "-rf", "a\\b"]
)
def test_a_path_outside_the_home_is_refused_before_any_byte(path, make_box):
    with pytest.raises(ValueError, match="not a path under the login's home"):
        make_box(free_port()).read_from(path, 0)


# -- connecting ------------------------------------------------------------------------------------


def test_the_direct_port_is_preferred_and_the_proxy_serves_when_it_is_closed(
    server, make_box, make_proxy
):
    proxy = make_proxy(server.port)
    both = make_box(server.port, proxy.port)
    assert both.connect(10).kind == "direct"
    closed = make_box(free_port(), proxy.port)
    assert closed.connect(10) == Endpoint("127.0.0.1", proxy.port, "proxy")
    assert closed.run("echo through").stdout == "through\n"


def test_the_direct_port_and_the_proxy_share_one_pinned_key(server, make_box, make_proxy, tmp_path):
    make_box(server.port).connect(10)
    make_box(free_port(), make_proxy(server.port).port).connect(10)
    lines = (tmp_path / "known_hosts").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("milktea-box ssh-ed25519 ")


def test_a_changed_host_key_stops_at_once_and_sends_nothing(
    server, make_server, make_box, public_line
):
    make_box(server.port).connect(10)
    other = make_server(allowed=[public_line])
    tries = []
    with pytest.raises(HostKeyChanged, match="somebody else answers") as stopped:
        make_box(other.port).connect(60, on_try=lambda *seen: tries.append(seen))
    assert "SHA256:" in str(stopped.value)
    assert (tries, other.logins) == ([], 0)


def test_a_host_key_of_another_kind_is_a_changed_key_too(
    server, make_server, make_box, public_line
):
    import asyncssh

    make_box(server.port).connect(10)
    other = make_server(
        allowed=[public_line], host_key=asyncssh.generate_private_key("ecdsa-sha2-nistp256")
    )
    with pytest.raises(HostKeyChanged):
        make_box(other.port).connect(60)


def test_a_host_key_changed_between_two_calls_stops_too(box, server, make_server, public_line):
    server.stop()
    imposter = make_server(allowed=[public_line], port=server.port)
    with pytest.raises(HostKeyChanged):
        box.run("echo secret")
    assert imposter.logins == 0


def test_refusals_and_denied_keys_are_tried_again_until_the_box_is_ready(
    make_server, make_box, public_line
):
    server = make_server()
    port = server.port
    server.stop()
    seen: list[str] = []

    def boot(endpoint: Endpoint, why: str) -> None:
        seen.append(why)
        if seen == ["refused"]:
            server.start()
        if "publickey denied" in seen:
            server.allowed = [public_line]

    assert make_box(port).connect(30, on_try=boot).port == port
    assert seen[0] == "refused"
    assert seen[-1] == "publickey denied"


def test_never_ready_says_what_each_endpoint_said(make_server, make_box):
    deaf = make_server()
    dead = free_port()
    with pytest.raises(NeverReady) as error:
        make_box(dead, deaf.port).connect(0.5)
    assert f"direct 127.0.0.1:{dead}: refused" in str(error.value)
    assert f"proxy 127.0.0.1:{deaf.port}: publickey denied" in str(error.value)
    assert error.value.money == "the box is still rented"


def test_a_box_that_is_ended_while_it_connects_is_ended(server, make_box, monkeypatch):
    real, box = fabric.Connection.open, make_box(server.port)

    def opened(connection) -> None:
        real(connection)
        if box._fabric is None:
            box.end(OverBudget("the limit"))

    monkeypatch.setattr(fabric.Connection, "open", opened)
    with pytest.raises(OverBudget, match="the limit"):
        box.run("echo x")
    assert box._fabric is None


def test_a_port_that_accepts_and_says_nothing_does_not_hold_connect(make_box):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        began = time.monotonic()
        with pytest.raises(NeverReady):
            make_box(mute.getsockname()[1], connect_timeout_s=1.0).connect(1.0)
        assert time.monotonic() - began < 60


def test_nothing_of_the_users_ssh_set_up_is_read(server, make_box, tmp_path, monkeypatch):
    home = tmp_path / "laptop"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh/config").write_text(
        "Host *\n  Port 1\n  ProxyCommand false\n  IdentityFile /nowhere\n"
    )
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "no-agent"))
    box = make_box(server.port)
    box.connect(10)
    assert box.run("echo fine").stdout == "fine\n"


def test_a_link_that_takes_nothing_more_is_lost_and_nothing_else(server, box):
    """The far end is gone and only writing shows it; what closes the channel after the time is up
    writes."""

    def breaking():
        server._loop.call_soon_threadsafe(time.sleep, 0.6)  # the server answers nothing meanwhile
        box._fabric.transport.sock.shutdown(socket.SHUT_WR)
        yield from ()

    with pytest.raises(Lost):
        box.run("sleep 2", timeout_s=0.3, input=breaking())
    assert box.run("echo again").stdout == "again\n"
