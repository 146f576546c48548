"""A folder of runs as the page of runs shows them, and its server."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import rig
from ops.market.cost import CostEstimate
from ops.market.models import Offer
from ops.run.journal import Journal
from ops.run.view import Run
from ops.web.app import application, listening

HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    "\x1b[2J\u202e"
)
TOKEN = "a-token-of-forty-three-characters-or-so-000"


class Told:
    """A journal that is written at times of the test's choice."""

    def __init__(self, own: rig.Rig, name: str, began: float, **plan: Any) -> None:
        made = own.plan(**plan)
        self.now = began
        run_id = f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(began))}-ab12"
        self.journal = Journal(own.runs / run_id, now=lambda: self.now)
        self.journal.__enter__()
        self.add("planned", 0, began=began, **made.to_line() | {"run_id": run_id})
        self.run = Run(self.journal.folder)

    def add(self, kind: str, after_s: float, **data: Any) -> None:
        self.now += after_s
        self.journal.append(kind, **data)

    def rent(self, usd_per_hour: float = 0.40) -> None:
        zero: dict[str, Any] = {f.name: 0.0 for f in fields(Offer)}
        offer = zero | {
            "gpu_name": "RTX 4090",
            "num_gpus": 1,
            "country": "DE",
            "id": 7,
            "machine_id": 9,
        }
        offer |= {"usd_per_hour": usd_per_hour, "verified": True, "rentable": True}
        predicted: dict[str, Any] = {f.name: 0.0 for f in fields(CostEstimate)} | {"lines": []}
        predicted |= {"boot_s": 30, "pull_s": 60, "transfer_s": 40, "start_s": 40, "train_s": 1200}
        predicted |= {"stages_s": (1200,)}
        why = "cheapest finished run"
        self.add("offers", 2, chosen=7, seen=412, why=why, predicted=predicted | {"usd": 0.18})
        self.add("renting", 1, offer=offer, bid_usd_per_hour=None, disk_gib=16, max_s=7200)
        self.add("rented", 3, instance_id=31337)
        self.add("booted", 70, instance_id=31337, seconds=70.1)
        self.add("connected", 4, instance_id=31337, via="direct", seconds=3.9)
        self.add("pushed", 20, files=4, bytes_in=2_400_000, seconds=19.0)
        self.add("launched", 2, state="started")

    def event(self, event: str, t: float | None = None, **more: Any) -> None:
        with (self.run.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"t": t or self.now, "event": event, **more}) + "\n")

    def train(self, steps: int, of: int) -> None:
        self.event("started", total_steps=of, step=0)
        rest = {"learning_rate": 2e-4, "grad_norm": 0.9, "tokens_per_second": 8123.0}
        for n in range(1, steps + 1):
            loss = (
                1.1 + 1.3 * math.exp(-n / 60) + 0.12 * math.sin(n * 12.9898) * math.cos(n * 78.233)
            )
            more = rest | {"eta_s": 3.0 * (of - n), "gpu_memory_gib": 17.3}
            self.event("step", step=n, loss=round(loss, 4), **more)
            if n % 40 == 0:
                held = round(1.2 + 1.2 * math.exp(-n / 70), 4)
                self.event("held_out", step=n, rows=64, loss=held, accuracy=0.5 + n / 2000)

    def end(self) -> None:
        """Another process, or nobody, owns it from now on."""
        self.journal.__exit__()


def going(own: rig.Rig, name: str = "insurance-zh") -> Told:
    """A run in the middle of its training; it is owned until `end`."""
    told = Told(own, name, time.time() - 900, max_usd=1.0)
    told.rent()
    told.train(240, 400)
    told.now = time.time()
    told.event("step", step=241, loss=1.12, learning_rate=1e-4, grad_norm=1.0, eta_s=480.0)
    return told


def done(
    own: rig.Rig, name: str, days_ago: float, hours: float, sample: str = "什么是免赔额？"
) -> Told:
    told = Told(own, name, time.time() - 86400 * days_ago, max_usd=2.0)
    told.rent()
    told.train(200, 200)
    after = "免赔额是保险公司开始赔付之前，由您自己承担的那部分金额。"
    answer = {
        "expected": "由被保险人自己承担的金额",
        "before": "I am not sure what you mean.",
        "after": after,
    }
    told.event("sample", prompt=sample, **answer)
    told.event("score", rows=64, exact_match_before=0.02, exact_match_after=0.61)
    told.add("ended", 3600 * hours, exit_code=0)
    told.add("pulled", 9, adapter="/out/adapter.zip", sha256="0" * 64, tensors=64, bytes_out=9e6)
    told.add("destroyed", 12, reads=[1, 2, 3], instance_id=31337)
    usd = round(0.4 * hours + 0.01, 4)
    told.add("bill", 1, instance_id=31337, usd=usd, items=[{"kind": "gpu", "usd": usd}])
    told.end()
    return told


class Served:
    """The page of a folder of runs, in a thread. `ended` keeps what was wished."""

    def __init__(self, root: Path, end: Callable[[Run, str], str] | None = None) -> None:
        self.ended: list[tuple[str, str]] = []
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()

        def keep(run: Run, wish: str) -> str:
            self.ended.append((run.id, wish))
            return end(run, wish) if end else wish

        async def begin() -> None:
            self._runner, self.port = await listening(application(root, TOKEN, keep), 0)
            ready.set()

        def serve() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(begin())
            self._loop.run_forever()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        assert ready.wait(60)
        self.url = f"http://127.0.0.1:{self.port}"
        self.page = f"{self.url}/#{TOKEN}"

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()
