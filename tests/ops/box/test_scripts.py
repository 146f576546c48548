from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ops.box import scripts
from rig import sh, watched

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGp1c3QgYSB0ZXN0IGtleSBvZiB0aGlydHktdHdvIGJ5 milktea"


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)
    return path.read_text()


def test_onstart_stays_far_below_what_vast_accepts() -> None:
    assert len(scripts.onstart(KEY).encode()) < 4000


@pytest.mark.parametrize(
    "text",
    [scripts.onstart(KEY), scripts.WATCHDOG, scripts.poll("r", 0), scripts.launch("r", "push")],
)
def test_every_text_is_posix_sh(text: str) -> None:
    assert subprocess.run(["sh", "-n"], input=text, text=True, capture_output=True).stderr == ""


def test_onstart_twice_keeps_the_birth_and_one_key(tmp_path: Path) -> None:
    started = []
    for _ in range(2):
        sh(
            scripts.onstart(KEY).replace(
                "(setsid sh watchdog.sh </dev/null >/dev/null 2>&1 &)", ""
            ),
            tmp_path,
        )
        started.append((tmp_path / "milktea/born").read_text())
    assert started[0] == started[1]
    assert (tmp_path / ".ssh/authorized_keys").read_text() == KEY + "\n"
    assert (tmp_path / ".ssh/authorized_keys").stat().st_mode & 0o077 == 0


def fake_trainer(home: Path, script: str) -> None:
    (home / "bin").mkdir()
    (home / "bin/milktea-train").write_text("#!/bin/sh\n" + script)
    (home / "bin/milktea-train").chmod(0o755)
    (home / "milktea/r").mkdir(parents=True)


def launched(home: Path) -> subprocess.CompletedProcess[str]:
    return sh(scripts.launch("r", "image"), home, PATH=f"{home}/bin:{os.environ['PATH']}")


def test_launching_twice_trains_once_and_the_exit_code_comes_last(tmp_path: Path) -> None:
    fake_trainer(tmp_path, "echo x >>starts; while [ ! -e go ]; do sleep 0.02; done; exit 3\n")
    assert launched(tmp_path).stdout.strip() == "started"
    assert launched(tmp_path).stdout.strip() == "running"
    (tmp_path / "milktea/r/go").touch()
    assert wait_for(tmp_path / "milktea/r/exit_code").strip() == "3"
    assert launched(tmp_path).stdout.strip() == "finished"
    assert (tmp_path / "milktea/r/starts").read_text() == "x\n"


def test_a_training_asked_to_stop_may_save_and_leaves_its_exit_code(tmp_path: Path) -> None:
    fake_trainer(
        tmp_path,
        "trap 'echo saved >saved; exit 143' TERM; echo x >starts; while :; do sleep 0.02; done\n",
    )
    assert launched(tmp_path).stdout.strip() == "started"
    wait_for(tmp_path / "milktea/r/starts")
    assert sh(scripts.stop_training("r"), tmp_path).returncode == 0
    assert wait_for(tmp_path / "milktea/r/exit_code").strip() == "143"
    assert (tmp_path / "milktea/r/saved").read_text() == "saved\n"


def kill_training(home: Path) -> int:
    """SIGKILL to the training's own process group, once it has one."""
    pid = int((home / "milktea/r/pid").read_text())
    while os.getpgid(pid) != pid:
        time.sleep(0.001)
    os.killpg(pid, signal.SIGKILL)
    return pid


def test_a_training_killed_whole_is_started_again(tmp_path: Path) -> None:
    fake_trainer(tmp_path, "echo x >>starts; exec sleep 30\n")
    launched(tmp_path)
    wait_for(tmp_path / "milktea/r/starts")
    first = kill_training(tmp_path)
    deadline = time.monotonic() + 5
    while launched(tmp_path).stdout.strip() != "started" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert kill_training(tmp_path) != first


def test_a_poll_renews_the_lease_and_delivers_exact_bytes_from_the_offset(tmp_path: Path) -> None:
    (tmp_path / "milktea/r").mkdir(parents=True)
    text = '{"a":"奶茶"}\n{"b":1}\n{"torn'
    (tmp_path / "milktea/r/events.jsonl").write_text(text)
    whole = scripts.parse_poll(sh(scripts.poll("r", 0), tmp_path).stdout.encode())
    assert whole == (None, False, len(text.encode()), text.encode())
    rest = scripts.parse_poll(
        sh(scripts.poll("r", len('{"a":"奶茶"}\n'.encode())), tmp_path).stdout.encode()
    )
    assert rest[3] == b'{"b":1}\n{"torn'
    assert abs(int((tmp_path / "milktea/lease").read_text()) - time.time()) < 5


def test_a_poll_without_its_header_is_no_answer() -> None:
    with pytest.raises(ValueError, match="not a poll answer"):
        scripts.parse_poll(b"Welcome to vast.ai\n")


def test_the_watchdog_ends_a_box_whose_client_fell_silent(tmp_path: Path) -> None:
    gone = watched(tmp_path, kill_at=1000, max_s=100_000, lease_s=600, renew_every_s=2)
    assert 1600 <= gone + 2 <= 1600 + 2 * scripts.WATCH_S


def test_the_watchdog_ends_a_box_at_its_deadline_with_the_client_alive(tmp_path: Path) -> None:
    assert (
        5000
        <= watched(tmp_path, kill_at=10**9, max_s=5000, lease_s=600, renew_every_s=2)
        <= 5000 + scripts.WATCH_S
    )
