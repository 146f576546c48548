"""Two users of one server do not get the same GPU, also when both start in one moment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from image_shell import jail, script

SCRIPT = Path(__file__).parents[2] / "ops/image/server/milktea-run.sh"


@dataclass(frozen=True)
class Busy:
    """A server on which several begin to train: its engine shows a container half a second after
    it was asked for it."""

    folder: Path
    path: str
    job: Path

    def train(self, name: str, **env: str) -> subprocess.Popen[str]:
        command = ["sh", str(self.folder / "prefix/bin/milktea-run"), "train", str(self.job)]
        return subprocess.Popen(
            [*command, "--run", name, "--gpus", "1", "--detach"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env={
                "PATH": self.path,
                "HOME": str(self.folder),
                "MILKTEA_TURN": str(self.folder / "turn"),
            }
            | env,
            start_new_session=True,
        )

    def given(self) -> list[str]:
        """The GPUs of the containers that were started, one word a container."""
        return sorted(p.read_text().split()[1] for p in (self.folder / "shown").iterdir())


@pytest.fixture
def busy(tmp_path: Path) -> Callable[[str, int], Busy]:
    def make(locks_by: str, gpus: int) -> Busy:
        tools = ["basename", "readlink", "rmdir", "sed", "seq", "sleep"]
        programs = jail(tmp_path / "jail", *tools, *(["flock"] if locks_by == "flock" else []))
        for name in ("shown", "prefix/bin", "prefix/state", "prefix/tools", "prefix/models"):
            (tmp_path / name).mkdir(parents=True)
        shutil.copy(SCRIPT, tmp_path / "prefix/bin/milktea-run")
        (tmp_path / "prefix/state/default").write_text("tiny\n")
        (tmp_path / "prefix/state/tiny").write_text("current milktea/tiny:abc\n")
        (tmp_path / "job.toml").touch()
        docker = f"""for a; do case $a in milktea.run=*) name=${{a#*=}} ;; milktea.gpus=*) \
    gpus=${{a#*=}} ;; esac; done
case "$*" in *Runtimes*) echo '{{"nvidia":{{}}}}' ;;
    "ps "*|"container inspect"*) cat {tmp_path}/shown/* ;;
    *" -d "*) echo >{tmp_path}/asked; while [ -e {tmp_path}/hangs ]; do sleep 0.1; done
        sleep 0.5; echo "$name $gpus" >{tmp_path}/shown/$name ;; esac"""
        script(tmp_path / "engine", "docker", docker)
        script(tmp_path / "engine", "nvidia-smi", f"seq 0 {gpus - 1}")
        return Busy(tmp_path, f"{tmp_path / 'engine'}:{programs}", tmp_path / "job.toml")

    return make


@pytest.mark.parametrize(("locks_by", "users"), [("flock", 4), ("a folder", 2)])
def test_users_who_start_in_one_moment_do_not_get_the_same_gpu(
    busy: Callable, locks_by: str, users: int
) -> None:
    server = busy(locks_by, users)
    started = [server.train(f"mine-{n}") for n in range(users)]
    assert [(p.communicate()[0], p.returncode)[1] for p in started] == [0] * users
    assert server.given() == [str(n) for n in range(users)]
    one_more = server.train("mine-more")
    assert "1 GPUs are wanted, free are: none" in one_more.communicate()[0]
    assert one_more.returncode == 2


def test_one_run_that_two_terminals_begin_in_one_moment_is_begun_once(
    busy: Callable, tmp_path: Path
) -> None:
    server = busy("flock", 2)
    (tmp_path / "hangs").touch()
    first = server.train("mine-1")
    while not (tmp_path / "asked").exists():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.02)
    second = server.train("mine-1")
    assert "run mine-1 is being begun by another terminal" in second.communicate()[0]
    (tmp_path / "hangs").unlink()
    assert "run mine-1: " in first.communicate()[0] and server.given() == ["0"]
    assert "run mine-1 trains already" in server.train("mine-1").communicate()[0]
    assert second.returncode == 2


@pytest.mark.parametrize("locks_by", ["flock", "a folder"])
def test_a_start_that_was_killed_keeps_nobody_waiting_for_ever(
    busy: Callable, tmp_path: Path, locks_by: str
) -> None:
    server = busy(locks_by, 1)
    (tmp_path / "hangs").touch()
    killed = server.train("mine-1")
    while not (tmp_path / "asked").exists():
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    (tmp_path / "hangs").unlink()
    if locks_by == "a folder":
        long_ago = time.time() - 301
        os.utime(tmp_path / "turn/taken", (long_ago, long_ago))
    second = server.train("mine-2")
    assert "run mine-2: " in second.communicate()[0]
    assert server.given() == ["0"] and not (tmp_path / "turn/taken").exists()


def test_an_nvidia_smi_that_fails_or_hangs_is_told_and_no_gpu_is_guessed(
    busy: Callable, tmp_path: Path
) -> None:
    server = busy("flock", 1)
    for answer, words in (
        ("echo 'NVIDIA-SMI has failed'; exit 9", "NVIDIA-SMI has failed exit code 9"),
        ("echo 'No devices were found'", "No devices were found"),
        ("exec sleep 600", "no answer within 1 s"),
    ):
        script(tmp_path / "engine", "nvidia-smi", answer)
        done = server.train("mine-1", MILKTEA_PATIENCE_S="1")
        said = done.communicate()[0]
        assert done.returncode == 2 and words in said and "do this: " in said
    assert server.given() == []
