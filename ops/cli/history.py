"""The commands that only read: journals and pulled files, without a network."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from ops.cli.acting import market
from ops.cli.errors import errors
from ops.errors import ConfigError, JournalError
from ops.plain import json_line, plain, span

if TYPE_CHECKING:
    from ops import api

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs")]
Run = Annotated[
    str, typer.Argument(help="A run id, or an unambiguous beginning of one; `last` is the newest")
]


def status(
    run: Annotated[str | None, typer.Argument(help="One run; without it, all")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also every box of the account, and whose it is")
    ] = False,
    as_json: Json = False,
) -> None:
    """Where every run stands and who looks after it, from what lies here alone. live: a terminal
    watches it; detached: nobody watches; alone: its box has no owner; kept: its box is stopped,
    for the price a day that is shown. Runs of other people in a shared folder say whose they are.
    With --all, vast.ai is asked too."""
    with errors(as_json):
        from ops import api

        if run is not None and everything:
            raise ConfigError("a run or --all, not both", hint="milktea status --all")
        found = list(_readable(run))
        rows = [(one.status(), one.is_mine) for one in found]
        for row, mine in rows:
            print(json_line(row.as_dict()) if as_json else _status_line(row, time.time(), mine))
        for run_id, user in api.closed_runs() if run is None and not as_json else []:
            print(plain(f"{run_id}  a run of {user}, closed to you"))
        if not rows and not as_json:
            print("no runs yet: `milktea rent-and-train JOB` makes the first")
        if everything:
            _boxes(api.boxes(vast=market()), as_json)


def _boxes(boxes: list[api.Rented], as_json: bool) -> None:
    """The boxes of the account, with what they cost an hour."""
    if as_json:
        for box in boxes:
            print(json_line({"kind": "box", **box.as_dict()}))
        return
    print(f"boxes of this account: {len(boxes)}, {sum(b.usd_per_hour for b in boxes):.3f} $/h")
    for box in boxes:
        whose = f"of {box.user}" if box.user else "its label names nobody"
        if not box.run_id:
            whose = f"not of milktea: {box.label!r}" if box.label else "not of milktea"
        words = [f"box {box.instance_id}", box.gpu, box.status, f"{box.usd_per_hour:.3f} $/h"]
        words += [box.run_id, whose] if box.run_id else [whose]
        if box.run_id and not box.is_here:
            words.append("no run folder here")
        print(plain("  " + "  ".join(words)))


def _status_line(row: api.Status, now: float, mine: bool = True) -> str:
    box = f"box {row.box}" if row.box else "no box"
    words = [row.run_id, row.stage, box, f"{row.spent_usd:.4f} of {row.max_usd:.2f} $"]
    if row.owner:
        words.insert(1, f"{row.owner} {span(now - row.began)}")
    if not mine:
        words.insert(1, f"of {row.user}")
    if row.usd_per_hour is not None:
        words.append(f"{row.usd_per_hour:.3f} $/h")
    if row.kept_until is not None and row.usd_per_hour is not None:
        at = time.strftime("%a %d %b %H:%M", time.localtime(row.kept_until))
        words.append(f"{24 * row.usd_per_hour:.3f} $ a day, kept until {at}")
    if row.ends_itself_at is not None:
        at = time.strftime("%a %H:%M", time.localtime(row.ends_itself_at))
        words.append(f"ends itself {at} at the latest")
    if row.training:
        words.append(row.training)
    if row.step:
        words.append(f"checkpoint {row.step}")
    if row.adapter:
        words.append(row.adapter)
    return "  ".join(words)


def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as new lines come")] = False,
    as_json: Json = False,
) -> None:
    """What the trainer said, as far as it is at home; acts on nothing."""
    with errors(as_json):
        from ops import api

        found = api.find_run(run)
        for event in found.events(follow=follow):
            if as_json:
                print(json_line(event.model_dump()), flush=True)
                continue
            facts = event.model_dump(exclude={"t", "event"})
            words = (
                f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()
            )
            print(plain("  ".join([event.event, *words])), flush=True)
        adapter = found.adapter
        if follow and as_json and adapter is not None:
            row = {"kind": "done", "run_id": found.id, "adapter": str(adapter)}
            print(json_line(row | {"sha256": found.sha256}))
        for name in ("log.txt", "container.log"):
            if (found.folder / name).exists() and not as_json:
                print(f"--- {name}\n" + plain((found.folder / name).read_text("utf-8", "replace")))


def cost(
    run: Annotated[str | None, typer.Argument(help="One run; without it, all")] = None,
    by: Annotated[
        str | None, typer.Option("--by", help="month or day: what the runs cost together in each")
    ] = None,
    as_json: Json = False,
) -> None:
    """Our meter, vast.ai's bill and the prediction, from the journals alone."""
    with errors(as_json):
        if by is not None:
            _totals(run, by, as_json)
            return
        for found in _readable(run):
            if as_json:
                print(json_line({"run_id": found.id, **found.cost_facts()}))
            else:
                print(found.id, *map(plain, found.cost_lines()), sep="\n  ")


def _totals(run: str | None, by: str, as_json: bool) -> None:
    from ops import api

    if by not in ("day", "month"):
        raise ConfigError(f"--by {by!r} is neither month nor day", hint="milktea cost --by month")
    period = cast(Literal["day", "month"], by)
    journals = [found.journal for found in _readable(run)]
    totals = api.ledger.totals(journals, time.time(), period)
    if as_json:
        for total in totals:
            print(json_line(vars(total)))
        return
    print(f"{by:<10}  {'our meter':>11}  {'as billed':>11}  runs")
    for t in totals:
        print(f"{t.period:<10}  {t.metered_usd:>9.4f} $  {t.billed_usd:>9.4f} $  {t.runs}")
    metered, billed = sum(t.metered_usd for t in totals), sum(t.billed_usd for t in totals)
    print(f"{'all':<10}  {metered:>9.4f} $  {billed:>9.4f} $  {len(journals)}")


def explain(run: Run, as_json: Json = False) -> None:
    """Why this offer, why it stopped, where each cent went."""
    with errors(as_json):
        from ops import api

        found = api.find_run(run)
        if not as_json:
            print(*map(plain, found.explain()), sep="\n")
            return
        for line in found.journal:
            row = {"t": line.t, "kind": line.kind, **line.data}
            print(json_line(row))


def _readable(name: str | None) -> Iterator[api.Run]:
    """The named run, or all of them; for a journal that cannot be read, stderr says why."""
    from ops import api

    for run in [api.find_run(name)] if name else api.runs():
        try:
            if run.journal:
                yield run
        except JournalError as e:
            print(plain(f"{run.id}: {e}\n  {e.hint}"), file=sys.stderr)
