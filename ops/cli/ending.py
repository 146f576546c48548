"""What a command prints once a run has ended, or goes on without it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from ops.cli.typed import short, word
from ops.plain import number_of, plain

if TYPE_CHECKING:
    from ops import api
    from ops.cli.screen import JsonLines, Terminal


def last_lines(run: api.Run, screen: Terminal | JsonLines, as_json: bool) -> None:
    """Print how a run ended: the model's answers, what it cost, where its adapter is."""
    cost, adapter, (merged, why_not) = run.cost(), run.adapter, run.merged
    if adapter is None:
        _detached(run, as_json)
        return
    if as_json:
        facts: dict[str, Any] = {"run_id": run.id, "adapter": str(adapter), "sha256": run.sha256}
        facts |= {"spent_usd": round(cost.spent_usd, 5), "bill_usd": cost.billed_usd}
        facts |= {"merged": str(merged)} if merged else {}
        facts |= {"no_merged": why_not} if why_not else {}
        print(json.dumps({"kind": "done", **facts}))
        return
    for sample in screen.samples:
        print(f"  {plain(' / '.join(sample.prompt.splitlines()))}")
        print(f"    before: {plain(sample.before)}\n    after:  {plain(sample.after)}")
    if (score := screen.score) is not None:
        print(
            f"held-out exact match: {score.exact_match_before:.1%} before, "
            f"{score.exact_match_after:.1%} after ({number_of(score.rows, 'row')})"
        )
    bill = "not to be had yet" if cost.billed_usd is None else f"{cost.billed_usd:.4f} $"
    predicted = "" if cost.predicted_usd is None else f", predicted {cost.predicted_usd:.4f} $"
    print(f"cost      {cost.spent_usd:.4f} $ (vast.ai's bill {bill}{predicted})")
    print(f"adapter   {short(adapter)}")
    if merged:
        print(f"merged    {short(merged)}")
    elif why_not:
        print(f"merged    not on the box: {plain(why_not)}; here: {word()} merge {run.id}")
    if run.answers:
        print(f"talk      {word()} serve {run.id}   (or chat)")


def _detached(run: api.Run, as_json: bool) -> None:
    ends_at = run.ends_itself_at
    if run.kept and not run.is_owned:
        _kept(run, as_json)
    elif as_json:
        row = {"kind": "detached", "run_id": run.id, "owner": run.owner, "dies_at": ends_at}
        print(json.dumps(row))
    elif run.is_owned:
        print(
            f"the run goes on without this terminal: `{word()} attach {run.id}` watches it, "
            f"`{word()} stop {run.id}` ends it"
        )
    else:
        at = f" at {time.strftime('%a %H:%M', time.localtime(ends_at))}" if ends_at else ""
        print(
            f"the box works on alone and ends itself{at}: `{word()} resume {run.id}` brings the "
            f"adapter home, `{word()} reap` would destroy it"
        )


def _kept(run: api.Run, as_json: bool) -> None:
    if as_json:
        status = run.status()
        row = {"usd_per_hour": status.usd_per_hour, "kept_until": status.kept_until}
        print(json.dumps({"kind": "kept", "run_id": run.id, **row}))
        return
    print(
        f"the box is {run.kept}; `{word()} resume {run.id}` starts it, "
        f"`{word()} destroy {run.id}` ends it"
    )


def stopped(run: api.Run, screen: Terminal | JsonLines, as_json: bool) -> None:
    if run.adapter is not None:
        last_lines(run, screen, as_json)
        return
    if run.kept:
        _kept(run, as_json)
        return
    spent = run.cost().spent_usd
    if as_json:
        print(json.dumps({"kind": "stopped", "run_id": run.id, "spent_usd": round(spent, 5)}))
    else:
        print(f"stopped, {spent:.4f} $ spent; `{word()} resume {run.id}` goes on from what is home")
