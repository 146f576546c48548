"""What runs a user's reward function, in a process of its own: `python -I` starts this file by its
path, so nothing of ours is imported.

    python -I reward_runner.py FILE SECONDS MEMORY_BYTES

Each line on standard input is a list of [prompt, answer, expected]; the line that comes back is a
list of [number, fault], one of which is null. What the function prints is thrown away, and it has
nothing to read. It has SECONDS for an answer and MEMORY_BYTES in all.
"""

from __future__ import annotations

import json
import math
import os
import resource
import runpy
import signal
import sys
from typing import Any

MOST_FAULT = 300  # characters of what is told of a fault


class TimeUp(Exception):
    pass


def main(file: str, seconds: float, memory: int) -> None:
    asked, replies, own = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w"), os.getpid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, too_long)
    try:
        function = runpy.run_path(file)["reward"]
    except BaseException as why:  # told with the first answers
        function = failing(why)
    for line in asked:
        told = [judged(function, one, seconds) for one in json.loads(line)]
        if os.getpid() != own:  # a copy that the function forked, and let return
            os._exit(1)
        replies.write(json.dumps(told) + "\n")
        replies.flush()


def judged(function: Any, asked: list[str], seconds: float) -> list[Any]:
    try:
        return timed(function, asked, seconds)
    except TimeUp:  # also one that comes just when the function has ended
        return [None, f"it took more than {seconds:g} s"]


def timed(function: Any, asked: list[str], seconds: float) -> list[Any]:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        number = float(function(*asked))
        if not math.isfinite(number):
            return [None, f"it returned {number}"]
        return [number, None]
    except TimeUp:
        raise
    except BaseException as why:
        return [None, f"{type(why).__name__}: {why}"[:MOST_FAULT]]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def failing(why: BaseException) -> Any:
    def reward(*_: str) -> float:
        raise why

    return reward


def too_long(*_: Any) -> None:
    raise TimeUp


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
