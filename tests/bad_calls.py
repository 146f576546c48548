"""Bad days of an endpoint: `milktea data translate` against tests/fake_endpoint.py, seed by seed.

    python tests/bad_calls.py [SEEDS] [--first 1] [--kills 200] [--verbose]

A seed draws rows of every layout with code, links, numbers and placeholders in them, how many rows
go in a call, a cap, and how bad the day is. Half of the seeds are cut short by their cap and run
again with more. What each text must become is known (`chinese`, word by word), so a row that got
another's text, or a placeholder that changed, is seen. Then processes that translate are killed by
SIGKILL, again and again, until the rows are done.

Exit code 0: no row misaligned, no placeholder changed, never more charged than the cap, and no
call charged again whose answer was in the journal. Last line: `N seeds: R rows, M misaligned, P
placeholders changed, O over the cap, T paid twice; K kills`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fake_endpoint import USD_IN, USD_OUT, Fake, chinese  # noqa: E402

from ops.errors import PreflightError  # noqa: E402
from ops.prepare import translate  # noqa: E402
from ops.prepare.endpoint import Endpoint, endpoint_of  # noqa: E402
from ops.prepare.work import journal_of  # noqa: E402
from ops.wait import RealClock  # noqa: E402
from trainer.data.records import read  # noqa: E402

PACE = 0.001  # of waiting after a refusal
WORDS = (
    *("river", "garden", "morning", "bread", "window", "teacher", "mountain", "letter", "music"),
    *("winter", "kitchen", "yellow", "quiet", "people", "walking", "stories", "answer", "simple"),
    *("often", "between", "many", "small", "bright", "carefully", "remember"),
)
KEPT = [
    "`print(x)`", "https://example.com/a?b=1", "{name}", "%s", "<b>", "42", "3.14", "1,000", "10%",
    "me@example.com", "{{title}}", "```py\nfor i in range(3):\n    go(i)\n```", "$x^2 + y_1$",
    "snake_case", "⟦", "7/8",
]  # fmt: skip
LAYOUTS = ("alpaca", "sharegpt", "messages", "prompt", "text", "pairs", "tagged")
Told = tuple[str, str]  # a text, and what it must become


def text(rng: random.Random, number: int) -> Told:
    """A text that no other row has, and its translation."""
    parts: list[Told] = []
    unique = "".join("abcdefghij"[int(digit)] for digit in str(number))
    for word in ["Zq" + unique, *rng.choices(WORDS, k=rng.randint(4, 25))]:
        parts.append((word, chinese(word)))
        if rng.random() < 0.15:
            kept = rng.choice(KEPT)
            parts.append((kept, kept))
    end = rng.choice(["", ".", "?"])
    return " ".join(p[0] for p in parts) + end, " ".join(p[1] for p in parts) + end


def row(rng: random.Random, layout: str, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(a row of a layout, what it must become)."""
    (a, x), (b, y), (c, z) = (text(rng, 3 * number + n) for n in range(3))
    tag = {"id": number, "source": "the same words as they were"}
    match layout:
        case "alpaca":
            both = [
                {"instruction": one, "input": two, "output": three}
                for one, two, three in ((a, b, c), (x, y, z))
            ]
        case "sharegpt":
            call = {"from": "function_call", "value": '{"name": "look", "arguments": {}}'}
            seen = {"from": "observation", "value": "sunny and 21 degrees"}
            both = [
                {
                    "conversations": [
                        {"from": "human", "value": one},
                        call,
                        seen,
                        {"from": "gpt", "value": two},
                    ]
                }
                for one, two in ((a, b), (x, y))
            ]
        case "messages":
            both = [
                {
                    "messages": [
                        {"role": "system", "content": one},
                        {"role": "user", "content": [{"type": "text", "text": two}]},
                        {"role": "assistant", "content": three, "reasoning_content": one},
                    ]
                }
                for one, two, three in ((a, b, c), (x, y, z))
            ]
        case "prompt":
            both = [{"prompt": a, "completion": b}, {"prompt": x, "completion": y}]
        case "text":
            return {"text": a}, {"text": x}
        case "pairs":
            both = [
                {
                    "conversations": [{"from": "human", "value": one}],
                    "chosen": {"from": "gpt", "value": two},
                    "rejected": {"from": "gpt", "value": three},
                }
                for one, two, three in ((a, b, c), (x, y, z))
            ]
        case _:
            both = [
                {
                    "messages": [
                        {"role": "user", "content": one},
                        {"role": "assistant", "content": two},
                    ],
                    "label": number % 2 == 0,
                }
                for one, two in ((a, b), (x, y))
            ]
    return both[0] | tag, both[1] | tag


class Day:
    """One seed: rows in a folder, and what each must become."""

    def __init__(self, seed: int, folder: Path, rows: int | None = None) -> None:
        self.rng = random.Random(seed)
        layout = LAYOUTS[seed % len(LAYOUTS)]
        count = rows or self.rng.randint(3, 30)
        made = [row(self.rng, layout, n) for n in range(count)]
        self.layout, self.wanted = layout, [w for _, w in made]
        self.path, self.out = folder / "rows.jsonl", folder / "out.jsonl"
        lines = (json.dumps(r, ensure_ascii=False) + "\n" for r, _ in made)
        self.path.write_text("".join(lines), "utf-8")
        self.how = translate.how(
            "zh",
            rows_per_call=self.rng.choice([1, 4, 10, 20]),
            chars_per_call=self.rng.choice([1000, 8000]),
            calls_at_once=self.rng.choice([1, 1, 3]),
            about="translate",
        )

    def run(self, endpoint: Endpoint, max_usd: float) -> None:
        translate.translate(
            [self.path], self.out, endpoint, self.how, max_usd=max_usd, clock=RealClock(PACE)
        )

    def judged(self) -> tuple[int, int, int]:
        """(rows that came, of them misaligned, of them with a placeholder that changed)."""
        came = [json.loads(line) for line in self.out.read_text("utf-8").splitlines()]
        report = json.loads(Path(f"{self.out}.report.json").read_text("utf-8"))
        left_out = {int(r["row"].rpartition(":")[2]) - 1 for r in report["removed"]}
        wanted = [w for n, w in enumerate(self.wanted) if n not in left_out]
        assert len(came) == len(wanted), f"{len(came)} rows came, {len(wanted)} are not listed"
        if came:
            assert not read([self.out]).defects, "the trainer refuses what was written"
        both = list(zip(came, wanted, strict=True))
        changed = sum(kept_of(c) != kept_of(w) for c, w in both)
        return len(came), sum(c != w for c, w in both), changed


def kept_of(made: dict[str, Any]) -> Counter[str]:
    said = json.dumps(made, ensure_ascii=False)
    return Counter({kept: said.count(json.dumps(kept)[1:-1]) for kept in KEPT})


def answered(journal: Path) -> set[str]:
    """The calls whose answers are in a journal, whole lines of it."""
    told = journal.read_bytes() if journal.exists() else b""
    lines = told[: told.rfind(b"\n") + 1].splitlines()
    return {r["answer"] for r in map(json.loads, lines) if "answer" in r}


def at(fake: Fake) -> Endpoint:
    return endpoint_of(fake.url, "fake", USD_IN, USD_OUT, None)


def play(seed: int, sums: Counter[str], verbose: bool = False) -> None:
    """One seed from its rows to its end, and what was seen added to `sums`."""
    with tempfile.TemporaryDirectory() as folder:
        day = Day(seed, Path(folder))
        bad = day.rng.choice([0.0, 0.1, 0.3, 0.6])
        with Fake(seed=seed, bad=bad) as fake:
            endpoint = at(fake)
            price = translate.price([day.path], endpoint, day.how)
            cap = price.worst_usd * day.rng.choice([0.2, 0.5, 3, 30])
            ended = ""
            for _ in range(8):
                try:
                    day.run(endpoint, cap)
                    break
                except PreflightError as e:
                    ended = str(e)
                    sums["over"] += fake.usd > cap
                    fake.keep(answered(journal_of(day.out)))
                    cap = cap * 2 + price.worst_usd
            sums["over"] += fake.usd > cap
            sums["twice"] += len(fake.twice)
            if day.out.exists():
                rows, misaligned, changed = day.judged()
                sums.update(rows=rows, misaligned=misaligned, changed=changed, done=1)
                sums["left_out"] += len(day.wanted) - rows
            if verbose:
                print(seed, day.layout, bad, dict(fake.seen), ended, dict(sums), flush=True)
    sums["seeds"] += 1


def child(seed: int, folder: str, url: str, rows: int) -> None:
    day = Day(seed, Path(folder), rows)
    try:
        day.run(endpoint_of(url, "fake", USD_IN, USD_OUT, None), 100.0)
    except PreflightError:
        sys.exit(3)


def kill(kills: int, sums: Counter[str], seed: int = 1, rows: int = 600) -> None:
    """Kills processes that translate one file until there were so many; a file that is done is
    followed by another."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["ops.prepare.translate"])
    rng = random.Random(seed)
    while sums["kills"] < kills:
        with tempfile.TemporaryDirectory() as folder, Fake(seed=seed, bad=0.1) as fake:
            day = Day(seed, Path(folder), rows)
            while not day.out.exists():
                one = processes.Process(target=child, args=(seed, folder, fake.url, rows))
                before = fake.requests
                one.start()
                while one.is_alive() and fake.requests == before and sums["kills"] < kills:
                    time.sleep(0.005)
                one.join(rng.uniform(0, 0.3) if sums["kills"] < kills else None)
                if one.is_alive():
                    one.kill()
                    sums["kills"] += 1
                one.join()
                fake.keep(answered(journal_of(day.out)))
            sums["twice"] += len(fake.twice)
            sums["over"] += fake.usd > 100.0
            sums["asked_again"] += sum(n - 1 for n in fake.charged.values())
            came, misaligned, changed = day.judged()
            sums.update(rows=came, misaligned=misaligned, changed=changed)
        seed += 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Bad days of an endpoint")
    parser.add_argument("seeds", nargs="?", type=int, default=1000)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--verbose", action="store_true")
    told = parser.parse_args()
    sums: Counter[str] = Counter()
    for seed in range(told.first, told.first + told.seeds):
        play(seed, sums, told.verbose)
        if seed % 100 == 0:
            print(dict(sums), flush=True)
    kill(told.kills, sums)
    print(dict(sums))
    print(
        f"{sums['seeds']} seeds: {sums['rows']:,} rows, {sums['misaligned']} misaligned, "
        f"{sums['changed']} placeholders changed, {sums['over']} over the cap, {sums['twice']} "
        f"paid twice; {sums['kills']} kills"
    )
    bad = ("misaligned", "changed", "over", "twice")
    return int(any(sums[name] for name in bad))


if __name__ == "__main__":
    sys.exit(main())
