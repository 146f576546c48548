from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from machine import NOT_HERE, needs

from ops.box import scripts, serving
from rig import sh, watched

WATCHDOG_STARTS = "(setsid sh watchdog.sh </dev/null >/dev/null 2>&1 &)"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGp1c3QgYSB0ZXN0IGtleSBvZiB0aGlydHktdHdvIGJ5 milktea"


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)
    return path.read_text()


def test_onstart_stays_far_below_what_vast_accepts() -> None:
    assert len(scripts.onstart(KEY).encode()) < 4000


@pytest.mark.parametrize(
    "text",
    [
        scripts.onstart(KEY),
        scripts.WATCHDOG,
        scripts.poll("r", 0),
        scripts.launch("r", "push"),
        scripts.ready("r"),
        scripts.ready("r", since_0_1=True),
        serving.serve("r", "push", ["--base", "a b", "n=it's"]),
        serving.look("r"),
        serving.tell_meter("r"),
        serving.end_in(9.5),
        serving.keep_environment("r"),
        serving.terminal("r", "image", ["--system=it's $HOME"]),
    ],
)
def test_every_text_is_posix_sh(text: str) -> None:
    assert subprocess.run(["sh", "-n"], input=text, text=True, capture_output=True).stderr == ""


def started(home: Path) -> None:
    """onstart, but for the watchdog's own process."""
    assert WATCHDOG_STARTS in scripts.onstart(KEY)
    sh(scripts.onstart(KEY).replace(WATCHDOG_STARTS, ""), home)


def test_onstart_twice_keeps_the_lease_and_one_key(tmp_path: Path) -> None:
    started(tmp_path)
    (tmp_path / "milktea/lease").write_text("77\n")
    started(tmp_path)
    assert (tmp_path / "milktea/lease").read_text() == "77\n"
    assert (tmp_path / ".ssh/authorized_keys").read_text() == KEY + "\n"
    assert (tmp_path / ".ssh/authorized_keys").stat().st_mode & 0o077 == 0


def looks(home: Path, uptime: float, *, lease: str = "", key: str = "k") -> str:
    """One look of the real watchdog at that uptime; the file `age` after it."""
    folder = home / "milktea"
    (folder / "uptime").write_text(f"{uptime} 1.0\n")
    if lease:
        (folder / "lease").write_text(lease)
    stage = "curl() { echo 200; }; sleep() { exit 0; }\n"
    limits = {"MILKTEA_MAX_S": "5000", "MILKTEA_LEASE_S": "600", "MILKTEA_WATCH_S": "15"}
    place = {"MILKTEA_API": "http://127.0.0.1:9", "MILKTEA_UPTIME": "uptime"}
    done = sh(stage + scripts.WATCHDOG, home, CONTAINER_API_KEY=key, **limits, **place)
    assert done.returncode == 0, done.stderr
    return (folder / "age").read_text().strip()


def test_a_watchdogs_age_goes_on_over_restarts_of_container_and_host(tmp_path: Path) -> None:
    started(tmp_path)
    assert looks(tmp_path, 1000.9) == "0 1000"
    assert looks(tmp_path, 1300.2) == "300 1300", "the container was started again"
    assert looks(tmp_path, 40.0) == "340 40", "the host was started again"
    assert not (tmp_path / "milktea/watchdog.log").read_text().strip()
    assert looks(tmp_path, 340.0) == "640 340"
    assert "silence" in (tmp_path / "milktea/watchdog.log").read_text()


def test_a_date_that_jumps_moves_no_watchdog() -> None:
    assert "date" not in scripts.WATCHDOG


def proof(home: Path) -> str:
    return sh(scripts.ready("r", wait_s=0), home).stdout.strip()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("rm watchdog.pid", "it never started"),
        ("echo 999999 >watchdog.pid", "its process is gone"),
        ("echo $$ >watchdog.pid", "its process is gone"),
        ("echo '5 1' >age", "its heartbeat stands still"),
        ("rm armed", "CONTAINER_API_KEY is empty"),
        ("echo 404 >armed", "HTTP 404"),
        ("echo >armed", "its key cannot read"),
    ],
)
def test_a_watchdog_that_only_looks_armed_is_told_from_one_that_is(
    tmp_path: Path, spoil: str, said: str
) -> None:
    folder = tmp_path / "milktea"
    folder.mkdir()
    (folder / "watchdog.sh").write_text("sleep 30\n")
    with subprocess.Popen(["sh", "watchdog.sh"], cwd=folder) as process:
        try:
            (folder / "watchdog.pid").write_text(f"{process.pid}\n")
            uptime = Path("/proc/uptime").read_text().split(".")[0]
            (folder / "age").write_text(f"0 {uptime}\n")
            (folder / "armed").write_text("200\n")
            assert proof(tmp_path) == "armed"
            sh(spoil, folder)
            assert said in proof(tmp_path)
        finally:
            process.kill()


def fake_trainer(home: Path, script: str) -> None:
    (home / "bin").mkdir()
    (home / "bin/milktea-train").write_text("#!/bin/sh\n" + script)
    (home / "bin/milktea-train").chmod(0o755)
    (home / "milktea/r").mkdir(parents=True)


def launched(home: Path) -> subprocess.CompletedProcess[str]:
    needs("setsid")  # as every image of a box has
    return sh(scripts.launch("r", "image"), home, PATH=f"{home}/bin:{os.environ['PATH']}")


def test_launching_twice_trains_once_and_the_exit_code_comes_last(tmp_path: Path) -> None:
    fake_trainer(tmp_path, "echo x >>starts; while [ ! -e go ]; do sleep 0.02; done; exit 3\n")
    assert launched(tmp_path).stdout.strip() == "started"
    assert launched(tmp_path).stdout.strip() == "running"
    (tmp_path / "milktea/r/go").touch()
    assert wait_for(tmp_path / "milktea/r/exit_code").strip() == "3"
    assert launched(tmp_path).stdout.strip() == "finished"
    assert (tmp_path / "milktea/r/starts").read_text() == "x\n"


def test_a_training_whose_number_cannot_be_written_is_not_left_running(tmp_path: Path) -> None:
    fake_trainer(tmp_path, "echo $$ >trains; exec sleep 30\n")
    (tmp_path / "milktea/r/pid").mkdir()  # takes no file, as a full disk does
    assert launched(tmp_path).returncode == 8
    if (tmp_path / "milktea/r/trains").exists():
        state = Path(f"/proc/{(tmp_path / 'milktea/r/trains').read_text().strip()}/status")
        assert not state.exists() or "State:\tZ" in state.read_text()


def test_a_training_asked_to_stop_may_save_and_leaves_its_exit_code(tmp_path: Path) -> None:
    fake_trainer(
        tmp_path,
        "trap 'sleep 0.5; echo saved >saved; exit 143' TERM; echo x >starts\n"
        "while :; do sleep 0.02; done\n",
    )
    assert launched(tmp_path).stdout.strip() == "started"
    wait_for(tmp_path / "milktea/r/starts")
    assert sh(scripts.stop_training("r", 20), tmp_path).stdout == "ended\n"
    assert (tmp_path / "milktea/r/exit_code").read_text().strip() == "143", "it waits for the save"
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
    deadline = time.monotonic() + 60
    while launched(tmp_path).stdout.strip() != "started" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert kill_training(tmp_path) != first


def test_a_poll_renews_the_lease_and_delivers_exact_bytes_from_the_offset(tmp_path: Path) -> None:
    (tmp_path / "milktea/r").mkdir(parents=True)
    (tmp_path / "milktea/age").write_text("123 456\n")
    text = '{"a":"奶茶"}\n{"b":1}\n{"torn'
    (tmp_path / "milktea/r/events.jsonl").write_text(text)
    whole = scripts.parse_poll(sh(scripts.poll("r", 0), tmp_path).stdout.encode())
    assert whole == (None, False, len(text.encode()), text.encode())
    rest = scripts.parse_poll(
        sh(scripts.poll("r", len('{"a":"奶茶"}\n'.encode())), tmp_path).stdout.encode()
    )
    assert rest[3] == b'{"b":1}\n{"torn'
    assert (tmp_path / "milktea/lease").read_text().split() == ["123", "456"]


def test_of_a_log_in_one_endless_line_the_end_alone_is_sent(tmp_path: Path) -> None:
    """As progress bars make it: each carriage return begins no line."""
    (tmp_path / "milktea/r").mkdir(parents=True)
    (tmp_path / "milktea/r/log.txt").write_text("50 %\r" * 1_000_000 + "CUDA error")
    said = sh(scripts.log_tail("r"), tmp_path).stdout
    assert len(said) <= scripts.LOG_BYTES and said.endswith("CUDA error")


def test_a_box_of_0_1_counts_its_lease_by_dates(tmp_path: Path) -> None:
    (tmp_path / "milktea").mkdir()
    sh(scripts.RENEW, tmp_path)
    assert abs(int((tmp_path / "milktea/lease").read_text()) - time.time()) < 60


FULL = """\
mkdir -p milktea && mount -t tmpfs -o size=128k none milktea || exit 77
{begin}
look 100; look 400
dd if=/dev/zero of=milktea/fill bs=1k 2>/dev/null; echo x >milktea/more 2>/dev/null
[ -s milktea/more ] && exit 66
look 600; {renew}; look 1100
[ -e gone ] && exit 65
{cap}; look 1150; [ -e gone ] && exit 64
cat milktea/age milktea/lease milktea/max_age
look 1160; [ -e gone ] || exit 63
"""


def test_on_a_disk_that_is_full_the_lease_is_renewed_and_the_age_goes_on(tmp_path: Path) -> None:
    """At 1100 its client was heard 500 s ago; without the renewal at 600 the box would be gone."""
    needs("unshare")
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip(f"a namespace of mounts: {NOT_HERE}")
    asks = 'curl() { case "$*" in *DELETE*) : >"$HOME/gone" ;; esac; echo 200; }; '
    look = 'look() { echo "$1.5 0" >uptime; (sleep() { exit 0; }; ' + asks
    begin = look + scripts.WATCHDOG + "); }\n"
    begin += scripts.onstart(KEY).replace(WATCHDOG_STARTS, "") + '\ncd "$HOME"'
    text = FULL.format(begin=begin, renew=scripts.RENEW, cap=scripts.end_at(1060))
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "CONTAINER_API_KEY": "k"}
    env |= {"MILKTEA_MAX_S": "5000", "MILKTEA_LEASE_S": "600", "MILKTEA_WATCH_S": "15"}
    env |= {"MILKTEA_API": "http://127.0.0.1:9", "MILKTEA_UPTIME": str(tmp_path / "uptime")}
    words = ["unshare", "-m", "sh", "-c", text]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    if done.returncode == 77:
        pytest.skip(f"a mount of its own: {NOT_HERE}")
    assert done.returncode == 0, done.stderr
    age, lease, cap = (row.split() for row in done.stdout.splitlines())
    assert (age, lease, cap) == (["1050", "1150"], ["500", "600"], ["1060"])


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


def gone_at(home: Path, when_silent: str, **more: Any) -> int:
    """The second at which a box is gone whose client is last heard at second 1000."""
    limits = {"kill_at": 1000, "max_s": 6000, "lease_s": 600, "renew_every_s": 2}
    return watched(home, **limits | {"when_silent": when_silent} | more) - 1000


def test_before_the_launch_ten_silent_minutes_end_a_box_whatever_the_job_says(
    tmp_path: Path,
) -> None:
    for when_silent in ("finish", "destroy"):
        assert 600 <= gone_at(tmp_path, when_silent) <= 600 + 2 * scripts.WATCH_S


def test_a_launched_box_finishes_alone_and_keeps_the_result_to_its_deadline(tmp_path: Path) -> None:
    for ended_at in (None, 900):
        lives_s = gone_at(tmp_path, "finish", launched_at=100, ended_at=ended_at)
        assert 5000 <= lives_s <= 5000 + scripts.WATCH_S


def test_an_ended_training_is_held_without_a_client_for_the_minutes_of_the_job(
    tmp_path: Path,
) -> None:
    more = {"launched_at": 100, "hold_s": 1800}
    assert 1800 <= gone_at(tmp_path, "finish", ended_at=500, **more) <= 1800 + 2 * scripts.WATCH_S
    assert 3800 <= gone_at(tmp_path, "finish", ended_at=3000, **more) <= 3800 + 3 * scripts.WATCH_S
    assert gone_at(tmp_path, "finish", **more) >= 5000, "it trains still"


def test_a_box_told_to_destroy_itself_does_so_while_it_trains_and_after(tmp_path: Path) -> None:
    for ended_at in (None, 500):
        lives_s = gone_at(tmp_path, "destroy", launched_at=100, ended_at=ended_at)
        assert 600 <= lives_s <= 600 + 2 * scripts.WATCH_S


def test_a_server_s_box_answers_in_three_states_and_nothing_else() -> None:
    assert serving.parse_look("=talk= loading\n") == ("loading", "")
    assert serving.parse_look('=talk= up\n{"api": 1}\n') == ("up", '{"api": 1}')
    for lie in ("", "=talk= gone\n", "up\n", "\x00" * 99):
        with pytest.raises(ValueError, match="not an answer"):
            serving.parse_look(lie)


@pytest.mark.parametrize(
    "line", ["", "[]", "{}", '{"api": "http://127.0.0.1:0/v1"}', '{"api": "http://h:99999/v1"}']
)
def test_a_port_that_is_none_is_refused(line: str) -> None:
    assert serving.port_of('{"api": "http://127.0.0.1:8014/v1"}') == 8014
    with pytest.raises(ValueError):
        serving.port_of(line)


@pytest.mark.slow
def test_a_pushed_trainer_finds_the_image_s_torch_in_a_venv_and_the_packages_of_the_job(
    tmp_path: Path,
) -> None:
    image, run = tmp_path / "image", tmp_path / "box/run"
    (run / "trainer").mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", image], check=True)
    (packages,) = image.glob("lib/python3*/site-packages")
    (packages / "torch.py").write_text("")
    (run / "trainer/launch.py").write_text("import torch, tea; print(torch.__file__, tea.cups)")
    (run / "trainer-requirements.txt").write_text("# nothing more\n")
    (run / "packages").mkdir()
    (run / "packages/requirements.txt").write_text("tea==1.5\n")
    with zipfile.ZipFile(tmp_path / "tea-1.5-py3-none-any.whl", "w") as wheel:
        about = "tea-1.5.dist-info"
        wheel.writestr("tea.py", "cups = 3\n")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tea\nVersion: 1.5\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    start = Path(scripts.__file__).parent / "bootstrap/trainer-start.sh"
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    done = subprocess.run(
        ["sh", start], cwd=run, env={"PATH": f"{image}/bin:{os.environ['PATH']}"} | pip,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == [str(packages / "torch.py"), "3"], done.stderr
