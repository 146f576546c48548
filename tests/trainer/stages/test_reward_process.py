"""A user's reward function: what it returns, and every way in which it does not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from trainer.stages.reward_process import RewardFault, RewardProcess

ASKED = [("Say 3", "three", "three"), ("Say 4", "five", "four")]


def function(tmp_path: Path, text: str, seconds: float = 5.0) -> RewardProcess:
    file = tmp_path / "reward.py"
    file.write_text(text)
    return RewardProcess(file, seconds)


def test_a_function_gives_each_answer_its_number(tmp_path: Path) -> None:
    one = function(
        tmp_path,
        "print('noise')\n"
        "def reward(prompt, answer, expected):\n"
        "    print('more noise')\n"
        "    return (answer == expected) + len(prompt) / 10\n",
    )
    assert one.ask(ASKED) == [1.5, 0.5]
    assert one.ask(ASKED[1:]) == [0.5], "the process is asked again"


@pytest.mark.parametrize(
    "body, said",
    [
        ("return answer.nothing", "AttributeError: 'str' object has no attribute 'nothing'"),
        ("return 'many'", "ValueError: could not convert"),
        ("return float('nan')", "it returned nan"),
        ("import time; time.sleep(9)", "it took more than 0.5 s"),
        ("while True: pass", "it took more than 0.5 s"),
        ("return len(bytearray(1 << 40))", "MemoryError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_what_fails_on_one_answer_is_told_and_the_others_count(
    body: str, said: str, tmp_path: Path
) -> None:
    text = (
        f"def reward(prompt, answer, expected):\n    if answer == 'three': return 1\n    {body}\n"
    )
    first, second = function(tmp_path, text, seconds=0.5).ask(ASKED)
    assert first == 1.0 and said in str(second)


def test_a_function_that_ends_just_as_its_time_is_up_is_told_too(tmp_path: Path) -> None:
    late = (
        "import signal, time\n"
        "real = signal.setitimer\n"
        "signal.setitimer = lambda which, s: (s or time.sleep(0.2), real(which, s))\n"
        "def reward(prompt, answer, expected): return 1\n"
    )
    told = function(tmp_path, late, seconds=0.1).ask(ASKED)
    assert told == ["it took more than 0.1 s"] * len(ASKED)


def test_a_file_that_cannot_be_run_is_told_with_the_answers(tmp_path: Path) -> None:
    [told] = function(tmp_path, "import nothing_like_this\n").ask(ASKED[:1])
    assert "No module named 'nothing_like_this'" in str(told)
    [told] = function(tmp_path, "x = 1\n").ask(ASKED[:1])
    assert "KeyError: 'reward'" in str(told)


def test_a_process_that_ends_is_a_fault_and_is_started_again(tmp_path: Path) -> None:
    one = function(
        tmp_path,
        "import os\n"
        "def reward(prompt, answer, expected):\n"
        "    if answer == 'five': os._exit(1)\n"
        "    return 1\n",
    )
    with pytest.raises(RewardFault, match="ended or hung"):
        one.ask(ASKED)
    assert one.ask(ASKED[:1]) == [1.0]


def test_a_function_that_forks_and_reads_shifts_no_number_and_leaves_no_process(
    tmp_path: Path,
) -> None:
    one = function(
        tmp_path,
        "import os, sys, time\n"
        "def reward(prompt, answer, expected):\n"
        "    if answer == 'five': os.fork()\n"
        "    if answer == 'stay':\n"
        "        pid = os.fork()\n"
        "        return pid or time.sleep(99)\n"
        "    return 2.0 if answer == expected and not sys.stdin.read() else 1.0\n",
    )
    for _ in range(3):
        assert one.ask(ASKED) == [2.0, 1.0]
        assert one.ask(ASKED[:1]) == [2.0], "of this answer, and not of the one before"
    [child] = one.ask([("q", "stay", "")])
    one.close()
    for _ in range(3000):  # until init has reaped it
        try:
            os.kill(int(child), 0)
            state = Path(f"/proc/{int(child)}/stat").read_text("utf-8").rsplit(")", 1)[1]
        except (ProcessLookupError, FileNotFoundError):
            return
        if "Z" in state:
            return
        time.sleep(0.01)
    raise AssertionError("what the function started goes on")


def test_it_has_nothing_of_ours_and_ends_with_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    one = function(
        tmp_path,
        "import os, sys\n"
        "def reward(prompt, answer, expected):\n"
        "    assert not os.listdir('.') and 'HF_TOKEN' not in os.environ\n"
        "    assert 'trainer' not in sys.modules\n"
        "    return os.getpid()\n",
    )
    [pid] = one.ask(ASKED[:1])
    one.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(float(pid)), 0)
