"""The commands that only tell: from the journals and what was brought home, without a network.
Imports are inside, as in cli.py."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ops.cli.errors import errors

Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs")]
Run = Annotated[
    str, typer.Argument(help="A run id, or an unambiguous beginning of one; `last` is the newest")
]


def status(
    run: Annotated[str | None, typer.Argument(help="One run; without it, all")] = None,
    as_json: Json = False,
) -> None:
    """Where every run stands, from the journals alone."""
    with errors(as_json):
        from ops.run import explain, journal

        folders = [folder_of(run)] if run else journal.runs(runs())
        rows = [
            explain.status(f.name, lines, time.time()) for f in folders if (lines := _readable(f))
        ]
        if as_json:
            for row in rows:
                print(json.dumps(row.as_dict()))
            return
        for row in rows:
            box = f"box {row.box}" if row.box else "no box"
            step = f"  checkpoint {row.step}" if row.step else ""
            print(
                f"{row.run_id}  {row.stage}  {box}  {row.spent_usd:.4f} of {row.max_usd:.2f} "
                f"${step}" + (f"  {row.adapter}" if row.adapter else "")
            )
        if not rows:
            print("no runs yet: `make rent-and-train` makes the first")


def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as new lines come")] = False,
    as_json: Json = False,
) -> None:
    """What the trainer said, as far as it is at home; acts on nothing."""
    with errors(as_json):
        from ops.run import journal
        from trainer.wire.events import parse, whole_lines

        folder, offset = folder_of(run), 0
        while True:
            path = folder / "events.jsonl"
            if path.exists():
                with path.open("rb") as f:
                    f.seek(offset)
                    lines, used = whole_lines(f.read())
                offset += used
                for text in lines:
                    if as_json:
                        print(text)
                        continue
                    event = parse(text)
                    facts = event.model_dump(exclude={"t", "event"})
                    print(
                        getattr(event, "event", ""),
                        *(
                            f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}"
                            for k, v in facts.items()
                        ),
                        sep="  ",
                    )
            ended = journal.last(journal.read(folder), "destroyed", "leaked", "renting")
            if not follow or (ended is not None and ended.kind != "renting"):
                break
            time.sleep(1)
        for name in ("log.txt", "container.log"):
            if (folder / name).exists() and not as_json:
                print(f"--- {name}\n{(folder / name).read_text('utf-8')}")


def cost(
    run: Annotated[str | None, typer.Argument(help="One run; without it, all")] = None,
    as_json: Json = False,
) -> None:
    """Our meter, vast.ai's bill and the prediction, from the journals alone."""
    with errors(as_json):
        from ops.run import explain, journal

        for folder in [folder_of(run)] if run else journal.runs(runs()):
            if not (lines := _readable(folder)):
                continue
            if as_json:
                print(json.dumps({"run_id": folder.name, **explain.cost_facts(lines, time.time())}))
            else:
                print(folder.name, *explain.cost_lines(lines, time.time()), sep="\n  ")


def explain(run: Run, as_json: Json = False) -> None:
    """Why this offer, why it stopped, where each cent went."""
    with errors(as_json):
        from ops.run import explain as telling
        from ops.run import journal

        folder = folder_of(run)
        lines = journal.read(folder)
        if as_json:
            print(
                *(
                    json.dumps({"t": line.t, "kind": line.kind, **line.data}, ensure_ascii=False)
                    for line in lines
                ),
                sep="\n",
            )
        else:
            print(*telling.explain(lines, time.time()), sep="\n")
            print(
                "from the command to the first step: "
                + ", ".join(f"{n} {s} s" for n, s in telling.phases(lines, _first_step(folder)))
            )


def runs() -> Path:
    return Path(os.environ.get("MILKTEA_RUNS", "runs")).resolve()


def folder_of(run: str) -> Path:
    from ops.errors import JournalError
    from ops.run import journal

    found = journal.runs(runs())
    chosen = (
        found[-1:]
        if run == "last"
        else [f for f in found if f.name == run] or [f for f in found if f.name.startswith(run)]
    )
    if run == "last":
        chosen = sorted(found, key=lambda f: (f / journal.FILE).stat().st_mtime)[-1:]
    if len(chosen) != 1:
        raise JournalError(
            f"{run!r} names {len(chosen)} runs under {runs()}", hint="`milktea status` lists them"
        )
    return chosen[0]


def _first_step(folder: Path) -> float | None:
    from trainer.wire.events import Step, parse

    path = folder / "events.jsonl"
    if not path.exists():
        return None
    with path.open("rb") as f:
        return next(
            (
                event.t
                for line in f
                if line.endswith(b"\n") and isinstance(event := parse(line.decode()), Step)
            ),
            None,
        )


def _readable(folder: Path) -> list[Any]:
    from ops.errors import JournalError
    from ops.run import journal

    try:
        return journal.read(folder)
    except JournalError as e:
        print(f"{folder.name}: {e}\n  {e.hint}", file=sys.stderr)
        return []
