"""The crash matrix: kill client, supervisor or both after every step of the main job, under every
fault of a reply, then let one later command run.

    python tests/crash_matrix.py [CASES] [--workers 4]     last line: `CASES cases, 0 leaks`

A case is a fault, a step and who dies: the fault is planted in the emulator; a client process runs
the whole story, or a supervisor does while a terminal watches it and wishes something; whoever is
to die does so by SIGKILL at its step-th effect (before or after a journal line, an HTTP call, an
SSH verb, a look, a wish); then `milktea reap`'s own code runs in another process. A leak is an
instance that the emulator still has. Steps that a fault's run does not reach end the run as it ends
by itself.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import rig  # noqa: E402
from ops.box import pull, push  # noqa: E402
from ops.box.connection import Box  # noqa: E402
from ops.errors import MilkteaError  # noqa: E402
from ops.market.client import Vast  # noqa: E402
from ops.market.provider import Provider  # noqa: E402
from ops.run import supervisor, wishes  # noqa: E402
from ops.run.attach import Tail, watching  # noqa: E402
from ops.run.journal import Journal  # noqa: E402
from ops.run.reap import reap  # noqa: E402
from ops.run.rent_and_train import rent_and_train  # noqa: E402
from ops.wait import RealClock  # noqa: E402

Fault = list[dict[str, Any]]

PROGRESS = 500  # cases between two lines of progress

FAULTS: dict[str, Fault] = {
    "none": [],
    "create: reply lost after commit": [{"where": "create", "what": "lost_reply"}],
    "create: request lost": [{"where": "create", "what": "lost_request"}],
    "create: late": [{"where": "create", "what": "late", "delay_s": 0.05}],
    "create: 429 text": [{"where": "create", "what": "429_text"}],
    "create: 429 JSON": [{"where": "create", "what": "429_json"}],
    "create: 502 before": [{"where": "create", "what": "502_before"}],
    "create: 502 after commit": [{"where": "create", "what": "502_after"}],
    "create: success false": [{"where": "create", "what": "success_false"}],
    "create: no_such_ask 404": [{"where": "create", "what": "no_such_ask", "status": 404}],
    "create: no_such_ask 410": [{"where": "create", "what": "no_such_ask", "status": 410}],
    "create: no_such_ask 400": [{"where": "create", "what": "no_such_ask", "status": 400}],
    "create: list lags": [
        {"where": "create", "what": "list_lag", "in": ["list", "show"], "reads": 2}
    ],
    "create: reply lost and list lags": [
        {"where": "create", "what": "list_lag", "in": ["list", "show"], "reads": 2},
        {"where": "create", "what": "lost_reply"},
    ],
    "create: not what was offered": [
        {"where": "create", "what": "wrong_fields", "fields": {"gpu_name": "GTX 1080"}}
    ],
    "destroy: reply lost": [{"where": "destroy", "what": "lost_reply"}],
    "destroy: 429 text": [{"where": "destroy", "what": "429_text", "times": 2}],
    "destroy: 429 JSON": [{"where": "destroy", "what": "429_json", "times": 2}],
    "destroy: 502 after": [{"where": "destroy", "what": "502_after"}],
    "destroy: success but still listed": [{"where": "destroy", "what": "still_listed", "reads": 2}],
    "destroy: success but ignored": [{"where": "destroy", "what": "ignored"}],
    "destroy: comes back": [{"where": "destroy", "what": "resurrect", "reads": 2}],
    "list: 502": [{"where": "list", "what": "502_before", "times": 2}],
    "show: reply lost": [{"where": "show", "what": "lost_reply"}],
    "boot: pull error": [{"where": "boot", "what": "pull_error"}],
    "boot: exited": [{"where": "boot", "what": "exited"}],
    "running: host dies": [{"where": "exec", "what": "host_death", "on_call": 3}],
    "running: outbid": [{"where": "exec", "what": "cut", "on_call": 4}],
    "ssh: new host key": [{"where": "ssh", "what": "new_host_key", "on_call": 2}],
    "ssh: refused, then denied": [
        {"where": "ssh", "what": "reset", "times": 2},
        {"where": "ssh", "what": "denied", "on_call": 3},
    ],
}


PATIENCE_S = 30
OVER = "over"  # of this name is a file beside the run once its supervisor has ended


class Steps:
    """Counts the effects of this process and dies at the chosen one. The wrapped calls do what they
    did before."""

    def __init__(self, die_at: int | None, count_file: Path | None = None) -> None:
        self.die_at, self.count, self.count_file = die_at, 0, count_file

    def step(self) -> None:
        self.count += 1
        if self.count == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def stepping(*args: Any, **kwargs: Any) -> Any:
            self.step()
            try:
                return real(*args, **kwargs)
            finally:
                self.step()

        setattr(owner, name, stepping)

    def arm(self) -> None:
        self.wrap(Journal, "append")
        self.wrap(Vast, "_call")
        for verb in ("connect", "run"):
            self.wrap(Box, verb)
        self.wrap(push, "push")
        self.wrap(pull, "pull")


def forked(act: Callable[[], None], *, name: str) -> int:
    """Start `act` in a process of its own, which ends within PATIENCE_S; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    signal.alarm(PATIENCE_S)  # its default action ends this process
    try:
        act()
        code = 0
    except BaseException:
        print(f"{name}:", file=sys.stderr)
        traceback.print_exc()
    finally:
        os._exit(code)


def buried(child: int, name: str) -> None:
    """Wait for the end of a process; raises RuntimeError where it died of a bug."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        print(f"slow: {name} did not end within {PATIENCE_S} s", flush=True)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"{name} died of a bug, see above")


def live(case: Case, folder: Path, runs: Path, url: str, key: str) -> None:
    """One run's life: of a client that is its owner, or of a terminal and a supervisor."""
    own = rig.Rig(folder)
    own.runs = runs
    plan = own.plan(max_usd=5.0, when_silent=case.when_silent)
    steps = {who: case.step if who in case.dying else None for who in ("client", "supervisor")}

    def alone() -> None:
        Steps(steps["client"]).arm()
        with Journal(runs / plan.run_id) as journal, suppress(MilkteaError):
            rent_and_train(rig.client(plan, journal, url, key))

    if case.supervisor is False:
        return buried(forked(alone, name="the client"), f"the client of {runs.name}")
    asks, asked = os.pipe()

    def terminal() -> None:
        """Writes the plan, asks for a supervisor, watches it, and wishes something."""
        mine = Steps(steps["client"])
        mine.arm()
        mine.wrap(Tail, "show_new")
        mine.wrap(wishes, "send")
        with Journal(runs / plan.run_id) as journal:
            journal.append("planned", **plan.to_line())
        os.write(asked, b"start")
        watch(runs / plan.run_id, case.wish)

    def supervise() -> None:
        Steps(steps["supervisor"]).arm()
        os.setsid()
        supervisor.own(runs / plan.run_id, Vast(Provider(url, key), RealClock(rig.PACE)))

    client = forked(terminal, name="the terminal")
    os.close(asked)
    with open(asks, "rb") as pipe:
        began = pipe.read(5) == b"start"
    if began:
        owner = forked(supervise, name="the supervisor")
        buried(owner, f"the supervisor of {runs.name}")
    (runs / OVER).touch()
    buried(client, f"the terminal of {runs.name}")


def watch(run: Path, wish: str) -> None:
    """As `milktea attach` does, until no supervisor is left; the wish after a few looks."""
    tail = Tail(run, rig.Silent())
    with watching(run):
        for look in range(10 * PATIENCE_S):
            over = (run.parent / OVER).exists()
            tail.show_new()
            if wish and look == 5:
                wishes.send(run, wish)
            if over:
                return
            time.sleep(0.05)


def later_command(runs: Path, url: str, key: str) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        signal.alarm(PATIENCE_S)
        try:
            reaped = reap(runs, Vast(Provider(url, key), RealClock(rig.PACE)), rig.Silent())
            code = 0 if not reaped.leaked else 70
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.waitpid(child, 0)


@dataclass(frozen=True)
class Case:
    """`dying` die at their own step number `step`; a supervisor of its own, or none."""

    fault: str
    step: int | None
    supervisor: bool
    dying: tuple[str, ...]
    wish: str = ""
    when_silent: str = "finish"

    def __str__(self) -> str:
        wished = f", {self.wish} wished" if self.wish else ""
        return f"{self.fault}, {' and '.join(self.dying)} killed at step {self.step}{wished}"


LIVES = [
    (False, ("client",)),
    (True, ("supervisor",)),
    (True, ("client",)),
    (True, ("client", "supervisor")),
]


def cases(total: int) -> Iterator[Case]:
    """All steps of every fault first, round by round; then pairs of fault and step at random,
    seeded. Who dies, and what is wished, goes round too."""
    rng = random.Random(7)
    names = list(FAULTS)
    pairs = [(name, step) for step in [None, *range(1, 90)] for name in names]
    for n in range(total):
        name, step = pairs[n] if n < len(pairs) else (rng.choice(names), rng.randrange(1, 120))
        with_supervisor, dying = LIVES[(n + n // len(names)) % len(LIVES)]
        wish = ("", "", "fetch", "destroy")[rng.randrange(4)] if with_supervisor else ""
        yield Case(name, step, with_supervisor, dying, wish, rng.choice(["finish", "destroy"]))


def work(worker: int, workers: int, total: int, verbose: bool, results: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="crash-matrix-") as name:
        folder = Path(name)
        rig.Rig(folder)  # its files, once
        commands, server = multiprocessing.Pipe()
        emulator = multiprocessing.get_context("spawn").Process(
            target=serve, args=(folder, server), daemon=True
        )
        emulator.start()
        url, key = commands.recv()
        for n, case in enumerate(cases(total)):
            if n % workers != worker:
                continue
            commands.send(FAULTS[case.fault])
            commands.recv()
            began = time.monotonic()
            runs = folder / f"runs{n}"
            runs.mkdir()
            live(case, folder, runs, url, key)
            later_command(runs, url, key)
            commands.send("what is left")
            left = commands.recv()
            results.put((str(case), left))
            if verbose:
                print(f"{time.monotonic() - began:6.2f} s  {case}", flush=True)
        commands.send(None)
        emulator.join(60)


def serve(folder: Path, pipe: Any) -> None:
    """The emulator in a process of its own, so that clients can be forked from one without
    threads."""
    with rig.Rig(folder).emulator(credit_usd=1e6) as fake:
        pipe.send((fake.url, fake.api_key))
        while (asked := pipe.recv()) is not None:
            if asked == "what is left":
                pipe.send(fake.do(lambda: _left(fake)))
            else:
                fake.do(lambda wanted=asked: _plant(fake, wanted))
                pipe.send(True)


def _plant(fake: Any, faults: Fault) -> None:
    fake.faults.clear()
    fake.requests.clear()
    for fault in faults:
        fake.faults.add(fault)


def _left(fake: Any) -> list[str]:
    """What still exists; it is removed, so that a leak of one case does not count in the next."""
    fake.cloud.tick()
    left = [f"{i.id} {i.label} {i.cur_state}" for i in fake.cloud.instances.values()]
    fake.faults.clear()
    for instance_id in list(fake.cloud.instances):
        fake.cloud.destroy(instance_id, fake.api_key)
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="?", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--verbose", action="store_true", help="each case with its seconds")
    options = parser.parse_args()
    began = time.monotonic()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(
            target=work, args=(w, options.workers, options.cases, options.verbose, results)
        )
        for w in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    leaks = 0
    for done in range(1, options.cases + 1):
        case, left = results.get()
        if left:
            leaks += 1
            print(f"leak: {case}: {left}", flush=True)
        if done % PROGRESS == 0 and done < options.cases:
            print(
                f"{done} of {options.cases} cases, {leaks} leaks, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    for worker in workers:
        worker.join()
    print(f"{len(FAULTS)} faults, {time.monotonic() - began:.0f} s")
    print(f"{options.cases} cases, {leaks} leaks")
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.exit(main())
