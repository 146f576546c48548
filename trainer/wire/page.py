"""The report of a run as one HTML page, made from facts: by the trainer beside its result, and by
the laptop from what it has verified. Standard library only.

Nothing here trusts a fact: every text is escaped, every number that is none is left out, and the
page has no script and asks nothing of the network.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MAX_POINTS = 1000  # of the drawn curve
WIDTH, HEIGHT, EDGE = 900, 380, 44  # of the picture, in CSS pixels
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#2b1d12}"
    "td,th{text-align:left;padding:.2em 1em .2em 0;vertical-align:top}svg{max-width:100%}"
    "text{font:12px sans-serif;fill:#6b5a48}pre{overflow:auto}"
)
SAFE = (  # where a browser obeys it, a script that slipped through neither runs nor fetches
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
)


def page(
    job: Mapping[str, Any],
    facts: Mapping[str, Any],
    samples: Iterable[Mapping[str, str]] = (),
    score: tuple[float, float] | None = None,
    beside: Mapping[str, str] | None = None,
    stages: Iterable[tuple[str, Mapping[str, Any]]] = (),
) -> bytes:
    """One HTML file with everything in it. `job` is job.json's object, `facts` the manifest's,
    `score` the exact match before and after, `beside` further rows of the table, `stages` name and
    facts of each stage that the run trained before."""
    run_id = html.escape(str(job["run_id"]))
    points = thinned(facts.get("curve"))
    held_out = thinned(_losses(facts.get("held_out_curve")))
    rows = "".join(
        f"<tr><th>{html.escape(name)}<td>{html.escape(text)}"
        for name, text in (_told(job, facts, points, score) | dict(beside or {})).items()
    )
    settings = html.escape(
        json.dumps({"lora": job["lora"], "training": job["training"]}, indent=1, default=str)
    )
    return (
        f'<!doctype html><meta charset="utf-8">{SAFE}<title>{run_id}</title>'
        f"<style>{STYLE}</style><h1>{run_id}</h1><table>{rows}</table>"
        f"{_curve(points, held_out)}{_answers(samples)}{''.join(_section(*s) for s in stages)}"
        f"<h2>Settings</h2><pre>{settings}</pre>\n"
    ).encode("utf-8", "replace")


def _section(name: str, facts: Mapping[str, Any]) -> str:
    """A stage that the run trained before the one of which the page tells first."""
    points = thinned(facts.get("curve"))
    told = {"steps": str(facts.get("steps"))}
    if points:
        told["loss"] = f"{points[0][1]:.4f} at first, {points[-1][1]:.4f} at last"
    rows = "".join(
        f"<tr><th>{html.escape(key)}<td>{html.escape(text)}"
        for key, text in (told | _measured(facts.get("held_out"))).items()
    )
    curve = _curve(points, thinned(_losses(facts.get("held_out_curve"))))
    return f"<h2>Stage {html.escape(name[:40])}</h2><table>{rows}</table>{curve}"


def thinned(curve: Any, most: int = MAX_POINTS) -> list[tuple[int, float]]:
    """(step, loss) of at most `most` points of a curve, evenly, the last among them; what is no
    pair of numbers is left out."""
    pairs = curve if isinstance(curve, list | tuple) else []
    stride = max(1, math.ceil(len(pairs) / most))
    kept = [*pairs[::stride][: most - 1], *pairs[-1:]]
    return sorted({p for pair in kept if (p := _point(pair)) is not None})


def _point(pair: Any) -> tuple[int, float] | None:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return None
    step, loss = pair
    fine = type(step) is int and 0 <= step < 2**53 and type(loss) in (int, float)
    return (step, float(loss)) if fine and abs(loss) < 1e300 else None  # NaN is not below either


def smooth(losses: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, without the pull towards zero at the start."""
    smoothed, average = [], 0.0
    for i, loss in enumerate(losses, 1):
        average = weight * average + (1 - weight) * loss
        smoothed.append(average / (1 - weight**i))
    return smoothed


def _told(
    job: Mapping[str, Any],
    facts: Mapping[str, Any],
    points: Sequence[tuple[int, float]],
    score: tuple[float, float] | None,
) -> dict[str, str]:
    template = facts.get("template")
    template = template if isinstance(template, dict) else {}
    token_hash = str(template.get("token_hash", ""))[:12]
    told = {
        "base model": str(job["model"]["base"]),
        "method": f"{job['training']['method']}, {job['model']['precision']}",
        "steps": f"{facts.get('steps')}, of {job['training']['batch_size']} rows each",
        "prompt template": f"{template.get('name', '')} ({token_hash})",
        "data": ", ".join(f"{f['name']} ({f['sha256'][:12]})" for f in job["data"]["files"]),
        "versions": _listed(facts.get("versions"), " "),
        "kernels": _listed(facts.get("kernels"), ": ") or "plain torch",
    }
    if points:
        told["loss"] = f"{points[0][1]:.4f} at first, {points[-1][1]:.4f} at last"
    if score is not None:
        told["held-out exact match"] = f"{score[0]:.1%} before, {score[1]:.1%} after"
    return told | _measured(facts.get("held_out"))


def _measured(value: Any) -> dict[str, str]:
    """What a stage measured on held-out rows: name -> (before, after)."""
    told = {}
    for name, pair in list(value.items())[:32] if isinstance(value, dict) else []:
        if isinstance(pair, list | tuple) and [type(x) in (int, float) for x in pair] == [True] * 2:
            told[f"held-out {str(name)[:80]}"] = f"{pair[0]:.4g} before, {pair[1]:.4g} after"
    return told


def _listed(value: Any, between: str) -> str:
    rows = list(value.items())[:32] if isinstance(value, dict) else []
    return ", ".join(f"{str(k)[:80]}{between}{str(v)[:200]}" for k, v in rows)


def _answers(samples: Iterable[Mapping[str, str]]) -> str:
    names = ("prompt", "expected", "before", "after")
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(s.get(n, '')))}" for n in names) for s in samples
    )
    if not rows:
        return ""
    head = "<tr><th>asked<th>expected<th>before<th>after"
    return f"<h2>Held-out questions</h2><table>{head}{rows}</table>"


def _losses(looks: Any) -> list[Any]:
    """(step, loss) of [step, loss, accuracy]; what is none stays what it is."""
    rows = looks if isinstance(looks, list | tuple) else []
    return [look[:2] if isinstance(look, list | tuple) else look for look in rows]


def _curve(points: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]] = ()) -> str:
    """The losses, their moving average and those of held-out rows as a picture of lines; nothing
    without two points."""
    if len(points) < 2:
        return ""
    losses = [loss for _, loss in points]
    held_out = [look for look in held_out if points[0][0] - 1 <= look[0] <= points[-1][0]]
    every = [*losses, *(loss for _, loss in held_out)]
    low, high = min(every), max(every)
    first, last = points[0][0], points[-1][0]

    def at(step: int, loss: float) -> str:
        x = EDGE + (WIDTH - 2 * EDGE) * (step - first) / (last - first)
        y = HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * (loss - low) / ((high - low) or 1.0)
        return f"{x:.1f},{y:.1f}"

    def line(values: Iterable[float], colour: str, width: float) -> str:
        return joined(zip((step for step, _ in points), values, strict=True), colour, width)

    def joined(places: Iterable[tuple[int, float]], colour: str, width: float) -> str:
        drawn = " ".join(at(step, v) for step, v in places)
        shape = f'stroke="{colour}" stroke-width="{width}" fill="none"'
        return f'<polyline {shape} points="{drawn}"/>'

    beside = "; blue: of held-out rows" if held_out else ""
    blue = joined(held_out, "#2f6f9f", 1.8) if held_out else ""
    foot = HEIGHT - EDGE + 16
    words = (
        f'<text x="2" y="{EDGE + 4}">{high:.3g}</text>'
        f'<text x="2" y="{HEIGHT - EDGE + 4}">{low:.3g}</text>'
        f'<text x="{EDGE}" y="{foot}">step {first}</text>'
        f'<text x="{WIDTH - EDGE}" y="{foot}" text-anchor="end">step {last}</text>'
        f'<text x="{EDGE}" y="20">loss per target token, and its moving average{beside}</text>'
    )
    return (
        f'<svg role="img" aria-label="loss curve" viewBox="0 0 {WIDTH} {HEIGHT}">{words}'
        f"{line(losses, '#b9a28a', 0.8)}{line(smooth(losses), '#6b3f1d', 1.8)}{blue}</svg>"
    )
