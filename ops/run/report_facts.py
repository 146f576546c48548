"""What the report at home tells beside the manifest's facts: money, machine, time, and how the
result is used. Everything is of this machine's journal, but the speed, which the trainer said."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from ops.plain import span
from ops.run.journal import last
from ops.run.session import Session
from trainer.wire import events

Card = tuple[str, str, str]  # name, value, more
MOST_SPEEDS = 100_000  # steps whose speed counts


def rows(session: Session) -> dict[str, str]:
    """Rows of the report's table: cost and its parts, machine, scores."""
    offer, lines = session.offer(), session.journal.lines
    told = {"cost": f"{session.spent_usd():.4f} $ by our meter, until the result was at home"}
    offers = last(lines, "offers")
    predicted = dict((offers.get("predicted") if offers else None) or {})
    parts = {
        "GPUs": predicted.get("gpu_usd"),
        "disk": predicted.get("disk_usd"),
        "traffic": (predicted.get("inet_down_usd") or 0) + (predicted.get("inet_up_usd") or 0),
    }
    if predicted.get("usd"):
        words = ", ".join(f"{name} {usd:.4f} $" for name, usd in parts.items() if usd)
        told["predicted cost"] = f"{predicted['usd']:.4f} ${': ' if words else ''}{words}"
    told["machine"] = f"{offer.num_gpus} x {offer.gpu_name}, {offer.usd_per_hour:.3f} $/h"
    if offer.country:
        told["machine"] += f", {offer.country}"
    taken = sum(line.kind == "rented" for line in lines)
    if taken > 1:
        told["machines"] = f"{taken}, one after another"
    evaluated = last(lines, "evaluated")
    return told | dict((evaluated.get("scores") if evaluated else None) or {})


def cards(session: Session, told: Iterable[events.Event]) -> list[Card]:
    """The numbers at the top of the report."""
    plan, offer, lines = session.plan, session.offer(), session.journal.lines
    found: list[Card] = [
        ("cost", f"{session.spent_usd():.4f} $", f"of at most {plan.max_usd:.2f} $"),
        ("GPU", f"{offer.num_gpus} x {offer.gpu_name}", f"{offer.usd_per_hour:.3f} $/h"),
    ]
    rent = next((line for line in lines if line.kind == "renting"), None)
    launched, ended = last(lines, "launched"), last(lines, "ended")
    if rent is not None:
        trained = ended.t - launched.t if launched and ended and ended.n > launched.n else None
        more = "" if trained is None else f"{span(trained)} of training"
        found.append(("from rent to home", span(session.clock.now() - rent.t), more))
    speeds = [
        e.tokens_per_second
        for e, _ in zip(told, range(MOST_SPEEDS), strict=False)
        if isinstance(e, events.Step) and 0 < e.tokens_per_second < 1e12
    ]
    speed = f"{median(speeds):,.0f} a second in the median step" if speeds else ""
    found.append(("tokens", f"{plan.workload.tokens:,.0f}", speed))
    return found


def commands(run_id: str) -> list[tuple[str, str]]:
    """Three commands that use the result."""
    return [
        (f"milktea chat {run_id}", "talk to it in this terminal; --web in the browser"),
        (f"milktea serve {run_id}", "an OpenAI-compatible API and a page, on this machine"),
        (f"milktea adapter check {run_id}", "how PEFT, vLLM, llama.cpp and Ollama load it"),
    ]
