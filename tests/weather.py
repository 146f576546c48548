"""Weather: the main job under bad days, at practice size and with its time scaled, and a person who
comes back.

    python tests/weather.py [SEEDS] [--workers 2] [--first 1] [--verbose]

A seed draws 3 to 8 events from every kind of ops/fakevast/weather.py, and up to two deaths of
supervisor, terminal or laptop (both), by SIGKILL or by a SIGSTOP for a while. The training is a
script that loads, steps, saves and goes on from its newest checkpoint (tests/weather-train.sh);
everything else is real. One second here stands for fifty: the client's patience runs by PACE, its
margins and the box's lease are shortened likewise; dollars are of real seconds. When no owner is
left, a person types `milktea resume`, a few times if need be, or `milktea reap` where a message
says so.

Each seed must end with no instance that bills, and with the verified adapter at home or an error
of ours and the newest checkpoint; a run may spend more than max_usd for OVER_S seconds at most,
and for as long as the API gave no answer. Exit code 0: no leak, no bug, no overspending, and
adapters at home in SHARE of the seeds. Last line: `N seeds, M adapters at home (P %), L leaks`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import milktea  # noqa: E402
import rig  # noqa: E402
from ops import wait  # noqa: E402
from ops.box import connection, scripts  # noqa: E402
from ops.box.transfer import sha256_of  # noqa: E402
from ops.errors import MilkteaError  # noqa: E402
from ops.fakevast import weather  # noqa: E402
from ops.fakevast.cloud.catalogue import machine  # noqa: E402
from ops.job.plan import Plan  # noqa: E402
from ops.market.client import Vast  # noqa: E402
from ops.market.provider import Provider  # noqa: E402
from ops.market.ranking import Needs  # noqa: E402
from ops.market.workload import Workload  # noqa: E402
from ops.run import (  # noqa: E402
    boot,
    follow,
    journal,
    keeper,
    on_rented_box,
    session,
    supervisor,
)
from ops.run.journal import Journal  # noqa: E402
from ops.run.meter import may_have_box  # noqa: E402
from ops.run.session import Detached, Interrupted  # noqa: E402
from ops.wait import RealClock  # noqa: E402
from trainer.wire import events as wire  # noqa: E402
from trainer.wire.job import WIRE  # noqa: E402

SCALE = 50  # seconds of a real run in one of ours
PACE = 1 / SCALE
STEPS, STEP_S, STATE_BYTES, DATA_BYTES = 12, 0.3, 200_000, 300_000
LEASE_S, WATCH_S = 600 // SCALE, 1  # of the box: its watch takes whole seconds
MARGIN_S, BOOT_S, STALL_S = 2.0, 15.0, 900.0 / SCALE
USD_PER_HOUR = 0.36
RICH_S, POOR_S = 400.0, 45.0  # that max_usd lasts
OVER_S = 60.0 / SCALE + WATCH_S  # of overspending, and of looking at this scale
RESUMES, ALARM_S = 5, 240
SHARE = 0.97
API = {"api_pause", "api_5xx", "api_403", "api_html"}
KINDS = [one.model_fields["kind"].default for one in weather.KINDS.__args__]


def hasten() -> None:
    """Shorten in this process what does not follow the clock's pace."""
    real = scripts.environment

    def environment(*words: Any) -> dict[str, str]:
        short = {"MILKTEA_LEASE_S": str(LEASE_S), "MILKTEA_WATCH_S": str(WATCH_S)}
        return real(*words) | short

    scripts.environment = environment
    for module in (session, follow, on_rented_box):
        vars(module)["MARGIN_S"] = MARGIN_S
    for name in ("LOOK_S", "RENEW_S", "PRICE_S", "STALL_GRACE_S", "ANSWER_S"):
        vars(keeper)[name] /= SCALE
    for module in (wait, keeper):
        vars(module)["ASLEEP_S"] = 2.0
    keeper.ANSWER_S = 5.0  # a shell's start takes no less here
    boot.boot_timeout_s = lambda predicted: BOOT_S  # type: ignore[attr-defined]
    session.WATCH_S = WATCH_S  # type: ignore[attr-defined]
    follow.POLL_S = 0.2 * SCALE
    connection.ANSWER_S, connection.IDLE_S = 6.0, 6.0


# -- what a seed draws -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Death:
    """`who` gets `how`, `delay_s` after the journal has its n-th line of `kind`; one that was
    stopped goes on after `for_s`."""

    who: str
    how: signal.Signals
    kind: str
    delay_s: float
    for_s: float

    def __str__(self) -> str:
        return f"{self.who} {self.how.name} {self.delay_s:.1f} s after {self.kind}"


@dataclass(frozen=True)
class Case:
    seed: int
    events: list[dict[str, Any]]
    deaths: list[Death]
    when_silent: str
    interruptible: bool
    lasts_s: float  # what max_usd pays for
    pauses_s: list[float]  # before each time that the person comes back


def drawn(seed: int) -> Case:
    rng = random.Random(seed)
    events = [event(rng, kind) for kind in rng.sample(KINDS, rng.randint(3, 8))]
    deaths = [death(rng) for _ in range(rng.choice([0, 1, 1, 2]))]
    return Case(
        seed,
        events,
        deaths,
        rng.choice(["finish", "finish", "destroy"]),
        rng.random() < 0.4,
        POOR_S if rng.random() < 0.1 else RICH_S,
        [rng.choice([0.3, 1.0, 3.0, 1.5 * LEASE_S]) for _ in range(RESUMES)],
    )


def event(rng: random.Random, kind: str) -> dict[str, Any]:
    """One of this kind, at some moment of the run and for as long as such a thing lasts: seconds
    or a minute, now and then for longer than a lease."""
    long_s = 1.2 * LEASE_S if rng.random() < 0.1 else rng.uniform(0.3, 4)
    found: dict[str, Any] = {"kind": kind, "for_s": round(long_s, 2)}
    if kind in ("late_list", "unseen_box"):
        return found | {"reads": rng.randint(1, 6 if kind == "unseen_box" else 2)}
    if kind in API | {"empty_list", "null_list"}:
        found |= {"where": "create", "after_s": round(rng.uniform(0, 12), 2)}
    else:
        found |= {"where": "running", "after_s": round(rng.uniform(0, 8), 2)}
    match kind:
        case "empty_list" | "null_list":
            found["reads"] = rng.randint(1, 2)
        case "api_5xx":
            found["status"] = rng.choice([500, 502, 503, 504])
        case "api_html":
            found["status"] = rng.choice([200, 403, 503])
        case "clock_skew" | "clock_jump":
            found["skew_s"] = rng.choice([-1, 1]) * rng.choice([60, 3600, 86400])
        case "slow_link":
            found["bytes_per_s"] = rng.choice([4_000, 20_000, 100_000])
        case "full_disk":
            found["free_bytes"] = rng.choice([0, 4096])
        case "slow_hub":
            found["after_s"] = 0.0
        case "price_increase":
            found["factor"] = round(rng.uniform(1.3, 5), 2)
    return found


STAGES = ("renting", "rented", "booted", "connected", "pushed", "launched", "checkpoint", "ended")


def death(rng: random.Random) -> Death:
    return Death(
        rng.choice(["supervisor", "supervisor", "terminal", "laptop"]),
        rng.choice([signal.SIGKILL, signal.SIGSTOP]),
        rng.choice(STAGES),
        rng.choice([0.0, rng.uniform(0, 2)]),
        rng.choice([2.0, 1.5 * LEASE_S]),
    )


# -- one seed --------------------------------------------------------------------------------------


@dataclass
class Place:
    """Where a seed's run is: folder of the rig, emulator, run."""

    own: rig.Rig
    url: str
    key: str
    run: milktea.Run

    def vast(self) -> Vast:
        return Vast(Provider(self.url, self.key), RealClock(PACE))


@dataclass
class Ended:
    """How a seed's run ended. `over_s` is how long max_usd was overspent at the last price."""

    said: str = ""
    words: list[str] = field(default_factory=list)  # of each owner
    home: bool = False
    left: list[str] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)
    struck: list[str] = field(default_factory=list)
    died: list[str] = field(default_factory=list)
    resumes: int = 0
    machines: int = 0
    usd: float = 0.0
    over_s: float = 0.0
    seconds: float = 0.0


def live(case: Case, place: Place) -> Ended:
    """One run's life, and its person's."""
    found = Ended()
    deaths = list(case.deaths)
    watchers = [forked(lambda: milktea.attach(place.run) and None, place)]
    owner = forked(lambda: own_it(place), place)
    until_it_ends(place, owner, watchers, deaths, found)
    for attempt in range(4 * RESUMES):
        silent = found.said.startswith("NoAnswer")  # vast.ai's: it is asked again, as it says
        if attempt >= RESUMES and not silent:
            break
        pause_s = case.pauses_s[attempt] if attempt < RESUMES else LEASE_S / 4
        lines = journal.read(place.run.folder)
        if journal.last(lines, "pulled") and not may_have_box(lines):
            break
        if found.said.startswith(("OverBudget", "NoOffer")) and not may_have_box(lines):
            break  # as it says: not without another job file, or later
        time.sleep(pause_s)
        found.resumes += 1
        again = reap if journal.last(lines, "pulled") else resume
        owner = forked(lambda again=again: again(place), place)
        until_it_ends(place, owner, watchers, deaths, found)
    for pid in watchers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, signal.SIGTERM)
    for pid in watchers:
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
    found.home = adapter_is_whole(place)
    return found


def own_it(place: Place) -> None:
    os.setsid()
    supervisor.own(place.run.folder, place.vast())


def resume(place: Place) -> None:
    os.setsid()
    milktea.resume(place.run, vast=place.vast(), root=place.own.runs, foreground=True)


def reap(place: Place) -> None:
    reaped = milktea.reap(vast=place.vast(), root=place.own.runs)
    if reaped.leaked:
        raise reaped.leaked[0]


def forked(act: Callable[[], None], place: Place) -> int:
    """Start `act` in a process of its own; what it says last lies in the rig's `said` file."""
    child = os.fork()
    if child:
        return child
    signal.alarm(ALARM_S)  # its default action ends this process
    said = ""
    try:
        act()
    except MilkteaError as e:
        said = f"{type(e).__name__}: {e} | {e.money} | {e.hint}"
    except (Detached, Interrupted) as e:
        said = f"{type(e).__name__}: {e}"
    except BaseException:
        said = "BUG " + traceback.format_exc()
    finally:
        with suppress(BaseException):
            (place.own.folder / f"said.{os.getpid()}").write_text(said)
        os._exit(0)


def until_it_ends(
    place: Place, owner: int, watchers: list[int], deaths: list[Death], found: Ended
) -> None:
    """Wait for the owner's end and let the deaths strike meanwhile; what it said last is kept."""
    asleep: list[tuple[float, list[int]]] = []
    due: list[tuple[float, Death]] = []
    while os.waitpid(owner, os.WNOHANG) == (0, 0):
        now = time.monotonic()
        seen = Counter(line.kind for line in lines_of(place))
        for one in [d for d in deaths if seen[d.kind]]:
            deaths.remove(one)
            due.append((now + one.delay_s, one))
        for at, one in [d for d in due if d[0] <= now]:
            due.remove((at, one))
            found.died.append(str(one))
            struck = {"supervisor": [owner], "terminal": watchers, "laptop": [owner, *watchers]}
            signalled(struck[one.who], one.how)
            if one.how == signal.SIGSTOP:
                asleep.append((now + one.for_s, struck[one.who]))
        for at, sleepers in [a for a in asleep if a[0] <= now]:
            asleep.remove((at, sleepers))
            signalled(sleepers, signal.SIGCONT)
        time.sleep(0.02)
    for _, sleepers in asleep:
        signalled(sleepers, signal.SIGCONT)
    found.said = last_word(place, owner)
    found.words.append(found.said[:200] or "done")
    if found.said.startswith("BUG"):
        found.bugs.append(found.said)


def signalled(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def lines_of(place: Place) -> list[journal.Line]:
    with suppress(MilkteaError):
        return journal.read(place.run.folder)
    return []


def last_word(place: Place, owner: int) -> str:
    """What the owner said, as its user would read it; "killed" where it said nothing."""
    said = place.own.folder / f"said.{owner}"
    words = said.read_text() if said.exists() else "killed"
    failed = journal.last(lines_of(place), "failed", "owned")
    if not words and failed is not None and failed.kind == "failed":
        words = (
            f"{failed['error']}: {failed['what']} | {failed.get('money')} | {failed.get('hint')}"
        )
        if failed["exit_code"] == 1:
            words = f"BUG {words}"
    return words


def adapter_is_whole(place: Place) -> bool:
    path = place.run.adapter
    whole = sha256_of(place.own.image / "result/adapter.zip")
    return path is not None and path.is_file() and sha256_of(path) == whole


def checkpoint_is_behind(place: Place) -> str:
    """ "" where the newest checkpoint that the run's client was told of is at home."""
    told = 0
    for path in place.run.folder.glob("events*.jsonl"):
        found, _ = wire.readable(wire.whole_lines(path.read_bytes())[0])
        told = max([told, *(e.step for e in found if isinstance(e, wire.Checkpoint))])
    home = [int(p.parent.name) for p in place.run.folder.glob("checkpoints/*/manifest.json")]
    return "" if max(home, default=0) >= told else f"checkpoint {told} told, {home} at home"


# -- workers ---------------------------------------------------------------------------------------


def rigged(folder: Path) -> rig.Rig:
    """A rig whose image trains for some seconds, on data that take a moment to push."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": "q", "input": "", "output": random.Random(1).randbytes(60).hex()}]
    (folder / "rows.json").write_text(json.dumps(rows * (DATA_BYTES // 120)))
    own = rig.Rig(folder)
    values = {
        "WIRE": WIRE,
        "STATE": STATE_BYTES,
        "STEPS": STEPS,
        "STEP_S": STEP_S,
        "FOLDER": own.image,
        "ADAPTER": sha256_of(own.image / "result/adapter.zip"),
    }
    text = (ROOT / "tests/weather-train.sh").read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    (own.image / "bin/milktea-train").write_text(text)
    return own


def planned(own: rig.Rig, case: Case) -> Plan:
    workload = Workload(1e5, 1e6, cpu_practice=True, disk_gib=16, image_bytes=0.0)
    return own.plan(
        max_usd=case.lasts_s / 3600 * USD_PER_HOUR,
        stall_s=STALL_S,
        when_silent=case.when_silent,
        workload=workload,
        needs=Needs(min_reliability=0.9, hours=2, disk_gib=16, interruptible=case.interruptible),
    )


def work(worker: int, workers: int, seeds: range, results: Any, keep: Path | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hasten()
    with tempfile.TemporaryDirectory(prefix="weather-") as name:
        commands, server = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        own = rigged(Path(name) / "rig")
        spawn.Process(target=serve, args=(own.folder, server), daemon=True).start()
        url, key = commands.recv()
        for seed in seeds:
            if seed % workers != worker:
                continue
            case, began = drawn(seed), time.monotonic()
            own.runs = Path(name) / f"runs{seed}"
            plan = planned(own, case)
            with Journal(own.runs / plan.run_id) as held:
                held.append("planned", **plan.to_line())
                place = Place(own, url, key, milktea.Run(held.folder))
            commands.send([one | {"label": plan.label} for one in case.events])
            commands.recv()
            found = live(case, place)
            commands.send(plan.label)
            asked = commands.recv()
            for key_ in ("left", "struck", "machines", "usd"):
                setattr(found, key_, asked[key_])
            found.over_s = (found.usd - plan.max_usd) / asked["usd_per_s"]
            found.seconds = time.monotonic() - began
            behind = "" if found.home else checkpoint_is_behind(place)
            if keep and (found.resumes or not found.home or found.left):
                shutil.copytree(place.run.folder, keep / f"seed{seed}", dirs_exist_ok=True)
            results.put((case, found, behind))
        commands.send(None)


def serve(folder: Path, pipe: Any) -> None:
    """The emulator in a process of its own, so that clients can be forked from one without
    threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: who began it ends it
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of links cut in the middle
    free = {"inet_down_cost": 0.0, "inet_up_cost": 0.0, "storage_cost": 0.01}
    market = [
        machine(machine_id=500 + n, host_id=n, usd_per_gpu_hour=USD_PER_HOUR + n / 1e4, **free)
        for n in range(16)
    ]
    with rig.Rig(folder).emulator(credit_usd=1e6, market=market, boot_s=0.3) as fake:
        pipe.send((fake.url, fake.api_key))
        while (asked := pipe.recv()) is not None:
            if isinstance(asked, str):
                pipe.send(fake.do(lambda label=asked: what_is_left(fake, label)))
                continue
            events = weather.parse(json.dumps(asked))
            fake.requests.clear()
            fake.forecast(events)
            pipe.send(True)


def what_is_left(fake: Any, label: str) -> dict[str, Any]:
    """What still exists, which is removed, and what it all cost; the weather is fair again."""
    cloud, seen = fake.cloud, list(fake.emulator.weather.struck)
    fake.emulator.weather.clear()
    fake.faults.clear()
    cloud.tick()
    left = [f"{one.id} {one.label}" for one in cloud.instances.values()]
    both = [*cloud.instances.values(), *cloud.destroyed.values()]
    mine = [one for one in both if one.label == label]
    rate = max((one.gpu_usd_per_hour + one.disk_usd_per_hour for one in mine), default=1.0)
    for instance_id in list(cloud.instances):
        cloud.destroy(instance_id, fake.api_key)
    for host in cloud.machines.values():
        host["min_bid_share"] = 0.5  # nobody bids more any more
    return {
        "left": left,
        "struck": seen,
        "machines": len(mine),
        "usd": sum(one.meter.usd for one in mine),
        "usd_per_s": rate / 3600,
    }


# -- the table -------------------------------------------------------------------------------------


@dataclass
class Table:
    """How many seeds each kind struck, and how they ended."""

    struck: Counter[str] = field(default_factory=Counter)
    home: Counter[str] = field(default_factory=Counter)
    seeds: int = 0
    at_home: int = 0
    leaks: int = 0
    bugs: int = 0
    dear: int = 0
    seconds: list[float] = field(default_factory=list)

    def add(self, case: Case, found: Ended, behind: str, verbose: bool) -> None:
        kinds = {*found.struck, *(f"death of {d.split()[0]}" for d in found.died)}
        self.seeds += 1
        self.at_home += found.home
        self.leaks += bool(found.left)
        self.bugs += bool(found.bugs)
        silent_s = sum(e["for_s"] for e in case.events if e["kind"] in API and e["kind"] in kinds)
        dear = found.over_s > OVER_S + silent_s
        self.dear += dear
        self.seconds.append(found.seconds)
        self.struck.update(kinds)
        self.home.update(kinds if found.home else [])
        if verbose or not found.home or found.left or found.bugs or dear:
            told(case, found, behind, dear)

    def print(self) -> None:
        print(f"{'kind':24} {'seeds':>6} {'adapter at home':>16}")
        for kind in sorted({*KINDS, *self.struck}):
            print(f"{kind:24} {self.struck[kind]:6} {self.home[kind]:16}")
        middle = sorted(self.seconds)[len(self.seconds) // 2]
        print(f"{self.bugs} bugs, {self.dear} overspent, {middle:.0f} s a seed in the middle")
        share = 100 * self.at_home / self.seeds
        print(
            f"{self.seeds} seeds, {self.at_home} adapters at home ({share:.1f} %), "
            f"{self.leaks} leaks"
        )


def told(case: Case, found: Ended, behind: str, dear: bool) -> None:
    ended = "home" if found.home else "NOT AT HOME"
    print(
        f"seed {case.seed}: {ended}, {found.seconds:.0f} s, {found.resumes} resumes, "
        f"{found.machines} machines, {found.usd:.4f} $ ({found.over_s:+.1f} s), "
        f"{case.when_silent}{' bid' if case.interruptible else ''}; {', '.join(found.struck)}"
    )
    for line in (*found.words, *found.died, *(f"LEAK {one}" for one in found.left), *found.bugs):
        print(f"    {line}")
    if dear:
        print("    OVERSPENT")
    if not found.home:
        print(f"    {found.said} {behind}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="?", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--first", type=int, default=1, help="the first seed (default 1)")
    parser.add_argument("--keep", type=Path, help="a folder for what is left of odd runs")
    parser.add_argument("--verbose", action="store_true", help="a line for each seed")
    options = parser.parse_args()
    context = multiprocessing.get_context("fork")
    results, table = context.Queue(), Table()
    seeds = range(options.first, options.first + options.seeds)
    workers = [
        context.Process(target=work, args=(w, options.workers, seeds, results, options.keep))
        for w in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    try:
        for _ in seeds:
            table.add(*results.get(), options.verbose)
    except KeyboardInterrupt:  # the table of what is done
        for worker in workers:
            worker.terminate()
    for worker in workers:
        worker.join()
    table.print()
    enough = table.at_home >= math.floor(SHARE * table.seeds)
    return 0 if enough and not (table.leaks or table.bugs or table.dear) else 1


if __name__ == "__main__":
    sys.exit(main())
