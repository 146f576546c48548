"""What people see of a run: the plan, a line for each stage, and a status line with the money.

`Terminal` draws with rich; `JsonLines` prints one object a line for programs. Both implement
`ops.run.session.Screen`.
"""

from __future__ import annotations

import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ops.api import Eta, Instance, Line, Plan, Ranking, dearest_silence, events, told_line
from ops.plain import json_line, plain, span

CHOOSE_S = 30.0  # to answer after Ctrl-C
QUIET_EVERY_S = 5.0  # between status lines where the output is not a terminal
# journal lines that the plan, `event`, `destroying` or the command's error shows
SHOWN_ELSEWHERE = ("offers", "event", "destroying", "failed", "attached", "detached")
ENDS = (
    "serving",  # until `talking` tells: a conversation may have this very terminal
    "destroyed",
    "bill",
    "failed",
    "left",
    "kept",
)  # journal lines after which no status is shown
REDRAW_S = 1.0  # after which an unchanged status line is drawn again
SPINNER = "|/-\\"


class Terminal:
    """A run on a terminal, or as plain lines where the output is none."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = console.is_terminal
        self._drawn = 0.0
        self._phase = ""  # the status line, with {money} for the meter and the time that is left
        self._money = ""
        self._eta = Eta()
        self._total_steps = 0
        self._stage = ""  # of a run of several, which one trains
        self._moving = ("", 0.0, 0)  # (what, since when, from which byte on) is transferred
        self._page = ""  # where people talk, once it was said
        self._spins = 0
        self._drawing = threading.RLock()  # `meter` is called by another thread
        self._began = time.time()
        self._shown = self._began  # of the last line that was printed
        self.samples: list[events.Sample] = []
        self.score: events.Score | None = None

    # -- ops.run.session.Screen --------------------------------------------------------------------

    def line(self, line: Line) -> None:
        if line.kind == "planned":
            self._began = float(line.get("began") or line.t)
        self._eta.line(line)
        if line.kind not in SHOWN_ELSEWHERE and (text := told_line(line)):
            style = "bold red" if line.kind in ("leaked", "bad_result") else ""
            self._say(text, style=style, t=line.t)
            stage, _, rest = plain(text).split("\n")[0].partition(" ")
            self._phase = f"{stage:<9} {{money}}{rest.strip()}"
        if line.kind in ENDS:
            self._stop_redrawing()

    def plan(self, plan: Plan, ranking: Ranking, credit_usd: float) -> None:
        draw_plan(self.console, plan, ranking, credit_usd)

    def booting(self, instance: Instance, waited_s: float) -> None:
        state = instance.status or "provisioning"
        bar = self._predicted_bar()
        self._status("boot", f"{bar}{state} {waited_s:.0f} s  {instance.status_msg.strip()[:60]}")

    def connecting(self, message: str) -> None:
        self._status("connect", message[:100])

    def moving(self, what: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if what != self._moving[0] or done_bytes < self._moving[2]:
            self._moving = (what, now, done_bytes)
        _, since, first = self._moving
        rate = (done_bytes - first) / (now - since) if now - since > 1 else 0.0
        speed = f"  {rate / 1e6:.1f} MB/s" if rate > 0 else ""
        share = done_bytes / total_bytes if total_bytes else 1.0
        self._status(what, f"{_bar(share)} {share:4.0%} of {total_bytes / 1e6:.1f} MB{speed}")

    def event(
        self, event: events.Event, spent_usd: float, max_usd: float, dies_at_unix_s: float
    ) -> None:
        match event:
            case events.Step():
                self._eta.step(event)
                self._money = _money(spent_usd, max_usd)
                done = event.step / self._total_steps if self._total_steps else 0.0
                steps = f"{_bar(done)} {event.step}/{self._total_steps}" if done else event.step
                steps = f"{self._stage}{steps}"
                self._status(
                    "train",
                    f"{steps}  loss {event.loss:.4f}  "
                    f"{event.tokens_per_second:,.0f} tok/s  ends itself "
                    f"{time.strftime('%H:%M', time.localtime(dies_at_unix_s))} at the latest",
                )
            case events.Started():
                self._eta.started(event)
                self._total_steps = event.total_steps
                if event.stages > 1:
                    self._stage = f"{event.number} of {event.stages}, {event.stage}  "
                    base = "base read" if event.weights_read == event.number else "base kept"
                    self._say(f"stage     {self._stage}{base}", t=self._when(event))
            case events.Loading():
                there = f"  {event.done_bytes / 1e9:.2f} GB there" if event.done_bytes else ""
                known = event.done_bytes / event.total_bytes if event.total_bytes else None
                bar = self._predicted_bar() if known is None else f"{_bar(known)} "
                self._money = _money(spent_usd, max_usd)
                self._status("load", f"{bar}{event.what}{there}")
            case events.Sample():
                self.samples.append(event)
            case events.Score():
                self.score = event
            case events.HeldOut():
                right = f"{event.accuracy:.1%} right"
                text = f"held out  step {event.step}: loss {event.loss:.4f}, {right}"
                self._say(text, t=self._when(event))
            case events.Measured():
                for name, (before, after) in event.numbers.items():
                    text = f"measured  {name}: {before:.4g} before, {after:.4g} after"
                    self._say(text, t=self._when(event))
            case events.Warned():
                self._say(f"warning   {event.message}", t=self._when(event))
            case _:
                pass

    def waiting(self, message: str) -> None:
        self._status("wait", message, force=True)

    def talking(self, page: str, ends_at_unix_s: float) -> None:
        at = time.strftime("%H:%M", time.localtime(ends_at_unix_s))
        if page != self._page:
            self._page = page
            self._say(f"talk      {page}")
        self._status("talk", f"until {at}; Ctrl-C to end it sooner")

    def destroying(self, why: str) -> None:
        self._status("destroy", "and prove absent in three spaced reads")

    def meter(self, spent_usd: float, max_usd: float) -> None:
        self._money = _money(spent_usd, max_usd)
        if self._live and self._phase and time.monotonic() - self._drawn > REDRAW_S:
            with self._drawing:
                self._draw(self._phase)

    def choose(self, choices: Sequence[tuple[str, str]]) -> str | None:
        """Enter and a second Ctrl-C choose the first; CHOOSE_S without an answer choose nothing."""
        if not sys.stdin.isatty():
            return None
        self._stop_redrawing()
        self._say("")
        for n, (_, text) in enumerate(choices, 1):
            self.console.print(f"  {n}  {text}", markup=False, highlight=False)
        numbers = [str(n + 1) for n in range(len(choices))]
        prompt = f"choose {' or '.join(numbers)} [1]; in {CHOOSE_S:.0f} s nothing changes: "
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ours from here on
        try:
            self.console.print(prompt, end="", markup=False, highlight=False)
            self.console.file.flush()
            if not select.select([sys.stdin], [], [], CHOOSE_S)[0]:
                self.console.print("nothing changes")
                return ""
            answer = sys.stdin.readline().strip()
        except KeyboardInterrupt:
            self.console.print()
            answer = ""
        finally:
            signal.signal(signal.SIGINT, before)
        return choices[numbers.index(answer) if answer in numbers else 0][0]

    # -- drawing -----------------------------------------------------------------------------------

    def _when(self, event: events.Event) -> float:
        """When it happened: the box's clock, as far as it fits what was shown and our own."""
        return min(max(event.t, self._shown), time.time())

    def _say(self, text: str, style: str = "", t: float | None = None) -> None:
        """Print a line after the seconds since the run began, now or at unix second `t`."""
        text = plain(text)
        at = t or time.time()
        if text:
            self._shown = at
        line = (
            Text.assemble((f"{at - self._began:6.1f} s  ", "dim"), (text, style))
            if text
            else Text()
        )
        with self._drawing:
            self._clear()
            self.console.print(line, soft_wrap=True)
            self._drawn = time.monotonic() if self._live else self._drawn

    def _status(self, phase: str, text: str, *, force: bool = False) -> None:
        """Show the status line: the phase, the money, then as much of `text` as fits."""
        now = time.monotonic()
        text = plain(f"{phase:<9} {{money}}{text}")
        if self._live:
            self._phase = " ".join(text.split("\n"))
            if force or now - self._drawn > 0.1:
                with self._drawing:
                    self._draw(self._phase)
        elif force or now - self._drawn > QUIET_EVERY_S:
            self._say(text.replace("{money}", self._meter(), 1))
            self._drawn = now

    def _meter(self) -> str:
        """The money, and in how many minutes the run is at home."""
        left_s = self._eta.left_s(time.time())
        return self._money + ("" if left_s is None else f"home in {span(left_s)}  ")

    def _predicted_bar(self) -> str:
        """The bar of a phase whose end only the plan predicts; "" without a prediction."""
        share = self._eta.share(time.time())
        return "" if share is None else f"{_bar(share)} "

    def _draw(self, phase: str) -> None:
        """Draw the status line with the next sign of the spinner."""
        self._spins += 1
        self._clear()
        text = f"{SPINNER[self._spins % len(SPINNER)]} {phase.replace('{money}', self._meter(), 1)}"
        self.console.file.write(text[: self.console.width - 1])
        self.console.file.flush()
        self._drawn = time.monotonic()

    def _stop_redrawing(self) -> None:
        """Remove the status line until the next one."""
        with self._drawing:
            self._phase = ""
            self._clear()

    def _clear(self) -> None:
        if self._live:
            self.console.file.write("\r\x1b[2K")


class JsonLines:
    """A run for a program: every journal line and every training event, one JSON object a line."""

    def __init__(self) -> None:
        self._page = ""
        self.samples: list[events.Sample] = []  # stay empty: each is printed as it comes
        self.score: events.Score | None = None

    def _out(self, kind: str, **data: Any) -> None:
        sys.stdout.write(json_line({"kind": kind, **data}) + "\n")
        sys.stdout.flush()

    def line(self, line: Line) -> None:
        self._out(line.kind, t=line.t, **line.data)

    def plan(self, plan: Plan, ranking: Ranking, credit_usd: float) -> None:
        self._out("plan", **plan_facts(plan, ranking, credit_usd))

    def booting(self, instance: Instance, waited_s: float) -> None:
        pass

    def connecting(self, message: str) -> None:
        pass

    def moving(self, what: str, done_bytes: int, total_bytes: int) -> None:
        pass

    def event(
        self, event: events.Event, spent_usd: float, max_usd: float, dies_at_unix_s: float
    ) -> None:
        self._out(
            "training", **event.model_dump(), spent_usd=round(spent_usd, 5), dies_at=dies_at_unix_s
        )

    def waiting(self, message: str) -> None:
        self._out("waiting", message=message)

    def talking(self, page: str, ends_at_unix_s: float) -> None:
        if page != self._page:
            self._page = page
            self._out("talking", page=page, ends_at=round(ends_at_unix_s, 3))

    def destroying(self, why: str) -> None:
        pass

    def meter(self, spent_usd: float, max_usd: float) -> None:
        pass

    def choose(self, choices: Sequence[tuple[str, str]]) -> str | None:
        return None


def plan_facts(plan: Plan, ranking: Ranking, credit_usd: float) -> dict[str, Any]:
    """The facts of the plan screen, for --json."""
    best = ranking.accepted[0] if ranking.accepted else None
    return {
        "run_id": plan.run_id,
        "image": plan.image,
        "workload": asdict(plan.workload),
        "limits": {
            "max_usd": plan.max_usd,
            "max_hours": plan.max_s / 3600,
            "stall_minutes": plan.stall_s / 60,
            "when_silent": plan.when_silent,
            "hold_minutes": None if plan.hold_s is None else plan.hold_s / 60,
        },
        "silence": None if best is None else asdict(dearest_silence(plan, best)),
        "credit_usd": credit_usd,
        "chosen": None
        if best is None
        else {"offer": asdict(best.offer), "cost": asdict(best.cost), "why": best.why},
        "runners_up": [
            {"offer": asdict(p.offer), "usd": p.cost.usd, "why_not": p.why}
            for p in ranking.accepted[1:4]
        ],
        "rejected": len(ranking.rejected),
        "notes": plan.notes,
    }


def draw_plan(console: Console, plan: Plan, ranking: Ranking, credit_usd: float) -> None:
    """The chosen offer, three runners-up with why not, the arithmetic of the price, and the
    limits."""
    best = ranking.accepted[0]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (
        ("", "left"),
        ("offer", "right"),
        ("machine", "left"),
        ("$/h", "right"),
        ("this run", "right"),
        ("why", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=name != "why")  # type: ignore[arg-type]
    for n, priced in enumerate(ranking.accepted[:4]):
        o = priced.offer
        machine = f"{o.num_gpus} x {o.gpu_name} {o.country}"
        table.add_row(
            "✓" if n == 0 else "",
            str(o.id),
            machine,
            f"{o.usd_per_hour:.3f}",
            f"{priced.cost.usd:.4f} $",
            Text(priced.why),
        )
    console.print(table, highlight=False)
    for text in best.cost.lines:
        console.print(f"  {text}", style="dim", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"guards    at most {plan.max_usd:.2f} $ and {plan.max_s / 3600:.1f} h, kept by this "
        f"machine and by a watchdog on the box; no event for {plan.stall_s / 60:.0f} min "
        f"ends it; credit {credit_usd:.2f} $",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"silence   {_silence(plan, ranking)}", highlight=False, soft_wrap=True)
    for note in plan.notes:
        console.print(f"note      {note}", markup=False, highlight=False, soft_wrap=True)


def _silence(plan: Plan, ranking: Ranking) -> str:
    """What a laptop that stays closed costs at most, and when the result is lost then."""
    silence = dearest_silence(plan, ranking.accepted[0])
    if plan.when_silent == "destroy":
        return (
            f"ten minutes without this machine end the box, for {silence.usd:.4f} $; what is not "
            "at home by then is lost (limits.when_silent)"
        )
    lost_at = time.strftime("%a %H:%M", time.localtime(time.time() + silence.lost_after_s))
    held = "" if plan.hold_s is None else f", {plan.hold_s / 60:.0f} min after its training"
    return (
        f"once it trains, the box goes on without this machine, for {silence.usd:.2f} $ in all at "
        f"most; it keeps the result for `milktea resume` until {lost_at}{held}; before that, ten "
        "silent minutes end it"
    )


def _bar(share: float, cells: int = 8) -> str:
    full = round(cells * min(1.0, max(0.0, share)))
    return "█" * full + "─" * (cells - full)


def _money(spent_usd: float, max_usd: float) -> str:
    return f"{spent_usd:.4f} of {max_usd:.2f} $  "
