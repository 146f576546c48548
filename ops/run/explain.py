"""Pure: status, cost and explanation of a run from its journal, without network or clock."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ops.market.cost import compare
from ops.market.models import Offer
from ops.run.journal import Line, last
from ops.run.kept import kept, words
from ops.run.meter import (
    burn_usd_per_hour,
    ends_itself_at,
    max_usd_of,
    may_have_box,
    plan_of,
    spent_usd,
)

STAGES = {
    "planned": "planned",
    "offers": "offer chosen",
    "renting": "renting",
    "rented": "rented",
    "booted": "booted",
    "connected": "connected",
    "pushed": "pushed",
    "launched": "training",
    "event": "training",
    "checkpoint": "training",
    "stage_ended": "training",
    "stage_pulled": "training",
    "ended": "training ended",
    "pulled": "adapter at home",
    "serving": "talking",
    "talked": "talked",
    "destroying": "destroying",
    "destroyed": "destroyed",
    "leaked": "LEAKED",
    "absent": "nothing rented",
    "preempted": "taken away",
    "left": "box alone",
    "stopping": "stopping",
    "kept": "stopped, disk kept",
    "starting": "starting again",
}


@dataclass(frozen=True)
class Status:
    """Where a run stands. Times are unix seconds; `box` is the id of the instance that it may
    have."""

    run_id: str
    stage: str
    began: float
    spent_usd: float
    max_usd: float
    box: int | None
    adapter: str | None
    step: int | None
    owner: str = ""  # live, detached, alone, or nobody
    usd_per_hour: float | None = None  # of the box, while it has one
    ends_itself_at: float | None = None  # unix seconds, at the latest
    kept_until: float | None = None  # unix seconds, of a box that is stopped; else None
    training: str = ""  # of a run of several stages, which one was begun last
    user: str = ""  # who rented; `owner` is what process looks after it

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def status(run_id: str, lines: list[Line], now: float, owner: str = "", user: str = "") -> Status:
    """The status at `now` (unix seconds) of a run with this journal."""
    newest = next((line for line in reversed(lines) if line.kind in STAGES), lines[0])
    pulled, rented, checkpoint = (
        last(lines, "pulled"),
        last(lines, "rented"),
        last(lines, "checkpoint"),
    )
    stage = STAGES[newest.kind]
    if newest.kind == "destroyed" and pulled:
        stage = "done"
    return Status(
        run_id,
        stage,
        lines[0].t,
        round(spent_usd(lines, now), 4),
        max_usd_of(lines),
        rented["instance_id"] if rented and may_have_box(lines) else None,
        pulled["adapter"] if pulled else None,
        checkpoint["step"] if checkpoint else None,
        owner,
        _usd_per_hour(lines) if may_have_box(lines) else None,
        ends_itself_at(lines) if may_have_box(lines) else None,
        float(line["until"]) if (line := kept(lines)) is not None else None,
        _training(lines),
        user,
    )


def _training(lines: list[Line]) -> str:
    begun = next((k for k in reversed(lines) if k.kind == "event" and k.get("stages")), None)
    return f"stage {begun['number']} of {begun['stages']}, {begun['stage']}" if begun else ""


def _usd_per_hour(lines: list[Line]) -> float | None:
    if (line := kept(lines)) is not None:
        return float(line["usd_per_hour"])
    rent = last(lines, "renting")
    if rent is None:
        return None
    plan, offer = plan_of(lines), Offer(**rent["offer"])
    return round(burn_usd_per_hour(plan, offer, rent["bid_usd_per_hour"]), 4)


def explain(lines: list[Line], now: float) -> list[str]:
    """The run's journal as lines for a person, then its costs: why this offer, why it stopped, what
    it cost."""
    shown = [f"{_at(line.t)}  {text}" for line in lines if (text := told_line(line))]
    return [*shown, "", *cost_lines(lines, now)]


def told_line(line: Line) -> str:
    """A journal line for a person, on the screen and in `explain`: the stage and what happened; ""
    for lines that are not shown."""
    stage, text = _stage_and_text(line)
    return f"{stage:<9} {text}" if stage else ""


def _stage_and_text(line: Line) -> tuple[str, str]:
    d = line.get
    match line.kind:
        case "planned":
            what = f"{d('workload', {}).get('tokens', 0):,.0f} tokens"
            if not d("trains", True):
                what = f"{d('talk_s', 0) / 60:.0f} minutes of talk"
            return (
                "plan",
                f"run {d('run_id')}: {what}, at most {d('max_usd')} $ and "
                f"{d('max_s', 0) / 3600:.1f} h",
            )
        case "place":
            return "at", f"{d('url')}, account {d('account')}"
        case "offers":
            others = "".join(
                f"\n{'':31}not {r['offer']['gpu_name']} (offer {r['offer']['id']}): {r['why_not']}"
                for r in d("runners_up", [])
            )
            return "choose", f"offer {d('chosen')} of {d('seen')}: {d('why')}{others}"
        case "renting":
            o = d("offer")
            return (
                "offer",
                f"{o['id']}: {o['num_gpus']} x {o['gpu_name']}, {o['country']}, machine "
                f"{o['machine_id']}, {o['usd_per_hour']:.3f} $/h",
            )
        case "rented":
            return "rent", f"instance {d('instance_id')}" + (
                " (found by its label)" if d("adopted") else ""
            )
        case "unclear":
            return "unclear", f"{d('error')}; the label decides"
        case "absent":
            return "absent", f"nothing was created, seen {d('reads')} times"
        case "booted":
            return "boot", f"running after {d('seconds')} s"
        case "rebooted":
            return "reboot", f"{d('why')}"
        case "price":
            return "price", f"it rose to {d('usd_per_hour')} $/h: the box ends sooner"
        case "connected":
            return (
                "connect",
                f"{d('via')}, host key pinned, the box is what was offered ({d('seconds')} s)",
            )
        case "pushed":
            return (
                "push",
                f"{d('files')} files, {d('bytes_in', 0) / 1e6:.1f} MB sent, hashes equal "
                f"({d('seconds')} s)",
            )
        case "launched":
            return "launch", f"training {d('state')}"
        case "checkpoint":
            return "save", f"checkpoint of step {d('step')} is at home"
        case "stage_ended":
            numbers = "".join(f", {k} {v:.4g}" for k, v in list(d("numbers", {}).items())[:3])
            of = f"stage {d('number') + 1} of {d('stages')}, {d('stage')}"
            return "stage", f"{of}: {d('steps')} steps, loss {d('final_loss'):.4f}{numbers}"
        case "stage_pulled":
            return "stage", f"{d('number') + 1}, {d('stage')}: its result is at home, verified"
        case "event":
            return "trainer", f"{d('event')} {d('reason') or d('message') or ''}".rstrip()
        case "ended":
            return "train", f"ended with exit code {d('exit_code')}"
        case "bad_result":
            return "result", f"refused, fetched again: {d('why')}"
        case "pulled":
            return "pull", f"verified: {d('tensors')} tensors, sha256 {d('sha256')[:16]}…"
        case "evaluated":
            scores = ", ".join(f"{k} {v}" for k, v in list((d("scores") or {}).items())[:4])
            return "evaluate", scores or f"no scores: {d('why_not')}"
        case "merged":
            made = f"certified and verified: {d('tensors')} tensors in {d('folder')}"
            return "merge", made if d("folder") else f"no merged model: {d('why_not')}"
        case "serving":
            at = time.strftime("%H:%M", time.localtime(d("ends_at", 0)))
            return "talk", f"the result is served on the box until {at}"
        case "bad_machine" | "missed":
            return "next", f"machine {d('machine_id')} given up: {d('why')}"
        case "preempted":
            return "taken", f"{d('state')}"
        case "interrupted":
            return str(d("user") or "you"), f"chose: {d('chosen')}"
        case "attached":
            return "watch", "a terminal watches"
        case "detached":
            return "watch", "no terminal watches any more; the run goes on"
        case "left":
            return "left", f"the box is alone, and ends itself at {_at(d('ends_at', 0))}"
        case "limits":
            hours = d("max_s", 0) / 3600
            return "limits", f"from now on at most {d('max_usd'):.2f} $ and {hours:.1f} h"
        case "stopping":
            return "stop", f"instance {d('instance_id')}, its disk is kept"
        case "kept":
            return "kept", words(line)
        case "starting":
            return "start", f"instance {d('instance_id')}, which was stopped"
        case "destroying":
            return "destroy", f"because: {d('why')}"
        case "destroyed":
            return "destroy", f"absent in {len(d('reads', []))} spaced reads"
        case "leaked":
            return "LEAKED", f"{d('trouble')}"
        case "failed":
            return "failed", f"{d('what')}"
        case _:
            return "", ""


def phases(lines: list[Line], first_step_t: float | None) -> list[tuple[str, float]]:
    """(phase, seconds) from the command to the first step on the last machine. "load" is the
    trainer's: imports, model, step 1. `first_step_t` is in unix seconds."""
    marks = [("preflight", lines[0].get("began"), lines[0].t)]
    before = lines[0].t
    steps = {
        "search": "renting",
        "rent": "rented",
        "boot": "booted",
        "connect": "connected",
        "push": "pushed",
        "launch": "launched",
    }
    for name, kind in steps.items():
        line = last(lines, kind)
        if line is None:
            return [(n, round(b - a, 2)) for n, a, b in marks if a is not None]
        marks.append((name, before, line.t))
        before = line.t
    if first_step_t is not None:
        marks.append(("load", before, first_step_t))
    return [(n, round(b - a, 2)) for n, a, b in marks if a is not None]


def cost_lines(lines: list[Line], now: float) -> list[str]:
    """Lines that compare our meter, vast.ai's bill and the prediction, each machine's with its
    own."""
    out = [f"our meter: {spent_usd(lines, now):.4f} $ of at most {max_usd_of(lines):.2f} $"]
    bills, predicted = [line for line in lines if line.kind == "bill"], None
    for bill in bills:
        rented = [r.n for r in lines if r.kind == "rented" and _of(r) == _of(bill)]
        predicted = last(lines[: rented[0]], "offers") if rented else None
        if "items" not in bill.data:
            out.append(
                f"vast.ai's bill for instance {bill['instance_id']} could not be read: "
                f"{bill.get('error')}"
            )
            continue
        out.append(f"vast.ai's bill for instance {bill['instance_id']}: {bill['usd']:.4f} $")
        if predicted:
            out += [
                f"  {line}" for line in compare(predicted["predicted"], _by_type(bill["items"]))
            ]
    if len(bills) > 1 and (billed := billed_usd(lines)) is not None:
        out.append(f"vast.ai's bills for {len(bills)} machines together: {billed:.4f} $")
    return out


def billed_usd(lines: list[Line]) -> float | None:
    """Dollars of vast.ai's bills for every machine of the run; None until each has been read."""
    bills = {_of(line): line.get("usd") for line in lines if line.kind == "bill"}
    machines = {_of(line) for line in lines if line.kind == "rented"}
    known = [usd for usd in bills.values() if usd is not None]
    whole = machines <= bills.keys() and len(known) == len(bills) > 0
    return round(sum(known), 6) if whole else None


def _of(line: Line) -> int:
    return int(line["instance_id"])


def cost_facts(lines: list[Line], now: float) -> dict[str, Any]:
    """`cost_lines` as data: dollars by our meter, by vast.ai's bills, and predicted for the offer
    that was chosen last."""
    bills, predicted = [line for line in lines if line.kind == "bill"], last(lines, "offers")
    return {
        "spent_usd": round(spent_usd(lines, now), 6),
        "max_usd": max_usd_of(lines),
        "bills": [
            {"instance_id": b["instance_id"], "usd": b.get("usd"), "items": b.get("items", [])}
            for b in bills
        ],
        "predicted_usd": predicted["predicted"]["usd"] if predicted else None,
    }


def _by_type(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": i["kind"], "amount": i["usd"]} for i in items]


def _at(t: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t))
