"""What a user may ask of a run: to go on, or one of four ends, each with its price. For a run that
another process owns, the wish is a file in the run's folder; the first one counts, and later ones
see it there."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ops.job.label import USER, this_user
from ops.job.plan import Plan
from ops.market.models import Offer
from ops.market.ranking import bid_of
from ops.run.folders import ours
from ops.run.journal import Line, last
from ops.run.kept import kept, terms, words
from ops.run.meter import burn_usd_per_hour, ends_itself_at, may_have_box, plan_of, spent_usd

FILE = "wish.json"
_MAX_BYTES = 4096
GO_ON = "go on"  # nothing changes
LEAVE = "leave"  # the run goes on without this terminal, or the box without this process
FETCH = "fetch"  # the newest checkpoint comes home, then the box is destroyed
KEEP = "keep"  # the same, but the box is stopped and its disk kept, where that is worth it
DESTROY = "destroy"  # now
ENDS = (LEAVE, FETCH, KEEP, DESTROY)  # what a file may wish


@dataclass(frozen=True)
class Choice:
    """`wish` is one of this module's constants, `text` says in a line what it does and costs."""

    wish: str
    text: str


def launched(lines: list[Line]) -> bool:
    """Whether the training was started on the newest machine: from then on it has work to lose."""
    line = last(lines, "launched", "serving", "renting", "absent", "destroyed")
    return line is not None and line.kind == "launched"


def talking(lines: list[Line]) -> bool:
    """Whether the newest machine serves a result to people: nothing of it is lost by its end."""
    line = last(lines, "serving", "renting", "absent", "destroyed")
    return line is not None and line.kind == "serving"


def works_alone(lines: list[Line], plan: Plan) -> bool:
    """Whether the box trains on without a client."""
    return launched(lines) and plan.when_silent == "finish"


def coming_home(lines: list[Line]) -> bool:
    """Whether the training ended with exit code 0, and its result is being pulled."""
    ended = last(lines, "ended", "launched", "renting")
    return ended is not None and ended.kind == "ended" and ended["exit_code"] == 0


def at_home(lines: list[Line]) -> bool:
    """Whether the verified result is here: its box has nothing to lose then, only what the job asks
    for afterwards to do."""
    return last(lines, "pulled") is not None


def choices(lines: list[Line], plan: Plan, now: float, *, attached: bool) -> list[Choice]:
    """The choices of this moment, each with its price; the first keeps what is paid for.
    `attached`: another process owns the run, and it goes on without this terminal."""
    spent = spent_usd(lines, now)
    if not may_have_box(lines):
        text = f"nothing is rented now, and {spent:.3f} $ are spent"
        return [
            Choice(LEAVE if attached else GO_ON, f"go on: {text}"),
            Choice(DESTROY, f"end the run here: {text}"),
        ]
    if (line := kept(lines)) is not None:
        text = f"leave the box as it is: {words(line)}; {spent:.3f} $ are spent"
        return [
            Choice(LEAVE if attached else GO_ON, text),
            Choice(DESTROY, f"destroy now: about {spent:.3f} $ in all"),
        ]
    rent = last(lines, "renting")
    assert rent is not None, "a box without its intent"
    offer = Offer(**rent["offer"])
    rate = burn_usd_per_hour(plan, offer, bid_of(offer, plan.needs))
    ends_at = ends_itself_at(lines) or now
    max_usd = min(plan.max_usd, spent + rate * max(0.0, ends_at - now) / 3600)
    predicted = (last(lines, "offers") or Line(0, 0, "", {})).get("predicted", {}).get("usd")
    about = f"about {max(predicted, spent):.3f} $, " if predicted else ""
    price = f"{about}at most {max_usd:.3f} $ in all"
    home = "the result is on its way home" if coming_home(lines) else "the adapter comes home"
    if at_home(lines):
        home = "the adapter is at home, and the box does what the job asks for afterwards"
    if talking(lines):
        home = f"people talk until {time.strftime('%H:%M', time.localtime(ends_at))}"
    offered = [
        Choice(LEAVE, f"leave; the run goes on without this terminal, {home}: {price}")
        if attached
        else Choice(GO_ON, f"go on, {home}: {price}")
    ]
    if at_home(lines) and not talking(lines):
        end = f"end it and destroy now, the adapter is at home: about {spent:.3f} $ in all"
        return [*offered, Choice(DESTROY, end)]
    if works_alone(lines, plan) and not attached:
        at = time.strftime("%H:%M", time.localtime(ends_at))
        text = f"leave the box alone: it works on, and ends itself at {at}: {price}"
        offered.append(Choice(LEAVE, text))
    if talking(lines):
        return [*offered, Choice(DESTROY, f"end it and destroy now: about {spent:.3f} $ in all")]
    if launched(lines) and not coming_home(lines):
        text = f"save, fetch the checkpoint, then destroy: about {spent + rate / 60:.3f} $ in all"
        offered.append(Choice(FETCH, text))
        if (agreed := terms(lines, plan, now)).worth(now):
            text = (
                f"save, fetch the checkpoint, then stop the box and keep its disk: {agreed.words()}"
            )
            offered.append(Choice(KEEP, text))
    lost = "; what was trained since the last checkpoint is lost" if launched(lines) else ""
    lost = "; the result is lost" if coming_home(lines) else lost
    offered.append(Choice(DESTROY, f"destroy now: about {spent:.3f} $ in all{lost}"))
    return offered


def why_not_kept(lines: list[Line]) -> str:
    """Why KEEP is not among the choices, in words."""
    if not launched(lines):
        return "its training was not launched, so that nothing of it is on the disk"
    if coming_home(lines):
        return "its training has ended, and the result is on its way home"
    agreed = terms(lines, plan_of(lines), time.time())
    return (
        f"its disk costs {agreed.usd_per_day:.3f} $ a day, and a start on another machine "
        f"{agreed.saved_usd:.4f} $"
    )


def send(folder: Path, wish: str) -> str:
    """Leave a wish for the run's owner. Returns the wish that counts: an earlier one where there
    was one."""
    path, own = folder / FILE, folder / f"{FILE}.{os.getpid()}"
    with open(own, "w", opener=ours) as file:
        told = {"wish": wish, "t": round(time.time(), 3), "by": os.getpid(), "user": this_user()}
        file.write(json.dumps(told))
    try:
        os.link(own, path)  # atomic, and fails where another wish is there
    except FileExistsError:
        return read(folder) or wish
    finally:
        own.unlink(missing_ok=True)
    return wish


def read(folder: Path) -> str | None:
    """The wish in this folder; None without one, or for one that cannot be read."""
    wish = _told(folder, "wish")
    return wish if wish in ENDS else None


def sender(folder: Path) -> str:
    """Who left the wish in this folder; "" without one."""
    user = _told(folder, "user") or ""
    return user if USER.fullmatch(user) else ""


def _told(folder: Path, key: str) -> str | None:
    try:
        with open(folder / FILE, "rb") as file:
            value = json.loads(file.read(_MAX_BYTES))[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def forget(folder: Path) -> None:
    """Remove the wish, once the journal has it."""
    with suppress(OSError):
        (folder / FILE).unlink(missing_ok=True)
