"""Visits to the box of a run: real SSH to the emulator's box, whose owner goes on meanwhile."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from owners import in_a_terminal, paused, planned
from typer.testing import CliRunner

import milktea
import rig
from ops.box.connection import Box
from ops.cli.app import app
from ops.errors import HostKeyChanged, JournalError, NeverReady
from ops.fakevast import FakeVast
from ops.market.provider import Provider
from ops.run import visit
from ops.wait import RealClock


@pytest.fixture
def vast(fake: FakeVast) -> milktea.Vast:
    return milktea.Vast(Provider(fake.url, fake.api_key), RealClock(rig.PACE))


@pytest.fixture
def run(own: rig.Rig, fake: FakeVast, vast: milktea.Vast) -> Iterator[milktea.Run]:
    """A run that trains, owned by a process of its own; it comes home whole after the test."""
    going = paused(own, vast)
    yield going
    (own.image / "pause").unlink()
    assert milktea.attach(going).adapter is not None


@contextmanager
def typed(data: bytes = b"") -> Iterator[None]:
    """`data` is what this process is given on stdin while the block runs."""
    with tempfile.TemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        file.write(data)
        file.seek(0)
        patch.setattr(sys, "stdin", file)
        yield


def owners_of(run: milktea.Run) -> list[milktea.Line]:
    """The journal, without what the trainer says meanwhile."""
    return [line for line in run.journal if line.kind != "event"]


def test_a_command_has_this_process_s_pipes_and_its_exit_code_and_leaves_no_trace(
    run: milktea.Run,
    fake: FakeVast,
    vast: milktea.Vast,
    own: rig.Rig,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    [instance] = fake.instances()
    lease = fake.home(instance["id"]) / "milktea/lease"
    before, owners = lease.read_bytes(), owners_of(run)
    every_byte = bytes(range(256)) * 300
    script = 'cat; printf "%s|" "$@" >&2; basename "$PWD" >&2; exit 7'
    with typed(every_byte):
        assert visit.execute(run, vast, ["sh", "-c", script, "x", "a b", "$HOME", "'"]) == 7
    out, err = capfdbinary.readouterr()
    assert out == every_byte
    assert err == f"a b|$HOME|'|{run.id}\n".encode(), "words arrive as they were typed"
    for words, code in ((["sh", "-c", "kill -9 $$"], 137), (["no-such-command"], 127)):
        with typed():
            assert visit.execute(run, vast, words) == code
    assert lease.read_bytes() == before and owners_of(run) == owners
    assert run.owner == "detached" and not list(run.folder.glob("wish*"))
    for name, value in (("VAST_URL", fake.url), ("VAST_API_KEY", fake.api_key)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MILKTEA_RUNS", str(own.runs))
    told = CliRunner().invoke(app, ["exec", run.id, "ls", "-d", "--", "/nowhere"])
    assert told.exit_code == 2, "options of the command are the command's"
    shell_in_a_terminal(run, fake, own)
    strangers_are_refused(run, vast)


def shell_in_a_terminal(run: milktea.Run, fake: FakeVast, own: rig.Rig) -> None:
    pid, master = in_a_terminal(fake, own, "ssh", run.id)
    os.write(master, b'echo "in-$(basename "$PWD")"; test -t 0 && exit 5\n')
    shown = b""
    with pytest.raises(OSError):  # the terminal's end
        while True:
            shown += os.read(master, 4096)
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    assert f"in-{run.id}".encode() in shown


def strangers_are_refused(run: milktea.Run, vast: milktea.Vast) -> None:
    """A visitor pins no key, and goes to no box that shows another one."""
    [pinned] = run.folder.glob("known_hosts.*")
    right = pinned.read_text()
    pinned.write_text(f"milktea-box {other_key(run.folder / 'other')}\n")
    with pytest.raises(HostKeyChanged):
        visit.execute(run, vast, ["true"])
    pinned.unlink()
    with pytest.raises(NeverReady, match="has not connected"):
        visit.execute(run, vast, ["true"])
    assert not pinned.exists()
    pinned.write_text(right)


def test_a_port_of_the_box_is_a_port_of_this_machine_until_the_box_is_gone(
    run: milktea.Run, vast: milktea.Vast, own: rig.Rig
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # the emulator's boxes are this machine
        port = server.getsockname()[1]
        assert visit.listens(run, vast, port)
        server.accept()[0].close()
        with visit.forwarded(run, vast, port) as opened:
            with socket.create_connection(("127.0.0.1", opened.port), 10) as client:
                there, _ = server.accept()
                client.sendall(b"up")
                assert there.recv(10) == b"up"
                there.sendall(b"down")
                assert client.recv(10) == b"down"
                there.close()
            ended = threading.Thread(target=visit.wait_for_end, args=(run,), daemon=True)
            ended.start()
            (own.image / "pause").unlink()
            milktea.attach(run)
            (own.image / "pause").touch()
            ended.join(60)
            assert not ended.is_alive()
    with pytest.raises(JournalError, match="has no box: done"):
        visit.listens(run, vast, port)
    with pytest.raises(JournalError, match="has no box: planned"):
        visit.execute(planned(own), vast, ["true"])


def other_key(path: Path) -> str:
    return " ".join(Box.make_key(path).split()[:2])
