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
STYLE = """
:root{--back:#faf7f2;--face:#fffdfa;--line:#e7dfd4;--text:#2b1d12;--dim:#6b5a48;--tea:#6b3f1d;
--raw:#b9a28a;--blue:#2f6f9f}
@media(prefers-color-scheme:dark){:root{--back:#191613;--face:#211d19;--line:#37302a;--text:#ece4da;
--dim:#a1958a;--tea:#dba97d;--raw:#6b5b4d;--blue:#7db7e3}}
*{box-sizing:border-box}
body{font:15px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"PingFang SC","Hiragino Sans GB",
"Microsoft YaHei","Noto Sans CJK SC","Noto Sans",sans-serif;max-width:62em;margin:0 auto;
padding:2em 1.2em 4em;color:var(--text);background:var(--back);overflow-wrap:anywhere}
h1{font-size:1.5em;line-height:1.3;letter-spacing:-.01em;margin:0 0 .8em}
h2{font-size:1.05em;margin:2.2em 0 .7em}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(10em,1fr));gap:.7em;
margin:0 0 1.6em}
.cards div,.box{background:var(--face);border:1px solid var(--line);border-radius:12px;
padding:.7em .9em}
.cards b{display:block;font-size:1.15em;line-height:1.4}
.cards span,.dim{color:var(--dim);font-size:.88em}
table{border-collapse:collapse;width:100%}
td,th{text-align:left;padding:.4em 1em .4em 0;vertical-align:top;
border-bottom:1px solid var(--line)}
th{font-weight:500;color:var(--dim)}
.facts th{width:13em}.answers td{width:25%;white-space:pre-wrap}
svg{display:block;max-width:100%;height:auto}text{font:12px sans-serif;fill:var(--dim)}
.raw{stroke:var(--raw)}.mean{stroke:var(--tea)}.held{stroke:var(--blue)}
pre{white-space:pre-wrap;margin:0;font:13px/1.7 ui-monospace,Menlo,Consolas,"Noto Sans Mono CJK SC",
monospace}
ul{margin:0;padding-left:1.2em}
@media(max-width:40em){text{font-size:22px}
.facts th,.facts td,.answers th,.answers td{display:block;width:auto}
.facts th{border:0;padding-bottom:0}.answers tr:first-child{display:none}
.answers td{border:0;padding:.1em 0}.answers td[title]::before{content:attr(title) ": ";
color:var(--dim)}.answers tr{display:block;border-bottom:1px solid var(--line);padding:.6em 0}}
@media print{:root{--back:#fff;--face:#fff;--line:#ccc;--text:#000;--dim:#555;--tea:#6b3f1d;
--raw:#b9a28a;--blue:#2f6f9f}body{padding:0;max-width:none;font-size:11pt}
h2{break-after:avoid}tr,svg,.box,.cards div{break-inside:avoid}}
"""
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
    cards: Iterable[tuple[str, str, str]] = (),
    commands: Iterable[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> bytes:
    """One HTML file with everything in it. `job` is job.json's object, `facts` the manifest's,
    `score` the exact match before and after, `beside` further rows of the table, `stages` name and
    facts of each stage that the run trained before, `cards` (name, value, more) of the numbers at
    the top, `commands` (command, what it does) that use the result, `notes` what the plan said."""
    run_id = html.escape(str(job["run_id"]))
    points = thinned(facts.get("curve"))
    held_out = thinned(_losses(facts.get("held_out_curve")))
    told = _told(job, facts, points, score) | dict(beside or {})
    parts = [
        f"<h1>{run_id}</h1>{_cards(cards)}{_table(told)}",
        _titled("Loss", _curve(points, held_out)),
        _answers(samples),
        *(_section(*s) for s in stages),
        _titled("How to use it", _commands(commands)),
        _titled("Settings", _table(_flat(job["lora"], "lora.") | _flat(job["training"]))),
        _titled("What the plan said", _list(notes)),
    ]
    return (
        f'<!doctype html><html><meta charset="utf-8">{SAFE}<title>{run_id}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}</style>{''.join(parts)}\n"
    ).encode("utf-8", "replace")


def _titled(title: str, body: str) -> str:
    """Nothing without a body."""
    return f'<h2>{html.escape(title)}</h2><div class="box">{body}</div>' if body else ""


def _table(told: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}<td>{html.escape(text)}" for name, text in told.items()
    )
    return f'<table class="facts">{rows}</table>'


def _cards(cards: Iterable[tuple[str, str, str]]) -> str:
    shown = "".join(
        f"<div><span>{html.escape(name)}</span><b>{html.escape(value)}</b>"
        f"<span>{html.escape(more)}</span></div>"
        for name, value, more in cards
    )
    return f'<div class="cards">{shown}</div>' if shown else ""


def _commands(commands: Iterable[tuple[str, str]]) -> str:
    return "".join(
        f'<pre>{html.escape(command)}</pre><div class="dim">{html.escape(what)}</div>'
        for command, what in commands
    )


def _list(notes: Sequence[str]) -> str:
    shown = "".join(f"<li>{html.escape(note)}" for note in notes)
    return f"<ul>{shown}</ul>" if shown else ""


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Each setting as words; what is left out is left out."""
    told = {}
    for name, value in settings.items():
        if value is None or value == {} or value == []:
            continue
        words = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        told[f"{before}{name}"] = json.dumps(words) if isinstance(words, dict) else str(words)
    return told


def _section(name: str, facts: Mapping[str, Any]) -> str:
    """A stage that the run trained before the one of which the page tells first."""
    points = thinned(facts.get("curve"))
    told = {"steps": str(facts.get("steps"))}
    if points:
        told["loss"] = f"{points[0][1]:.4f} at first, {points[-1][1]:.4f} at last"
    table = _table(told | _measured(facts.get("held_out")))
    curve = _curve(points, thinned(_losses(facts.get("held_out_curve"))))
    return _titled(f"Stage {name[:40]}", table + curve)


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
    titles = ("asked", *names[1:])
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td title="{title}">{html.escape(str(s.get(name, "")))}'
            for name, title in zip(names, titles, strict=True)
        )
        for s in samples
    )
    if not rows:
        return ""
    head = "<tr><th>asked<th>expected<th>before<th>after"
    return _titled("Held-out questions", f'<table class="answers">{head}{rows}</table>')


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

    def line(values: Iterable[float], kind: str, width: float) -> str:
        return joined(zip((step for step, _ in points), values, strict=True), kind, width)

    def joined(places: Iterable[tuple[int, float]], kind: str, width: float) -> str:
        drawn = " ".join(at(step, v) for step, v in places)
        shape = f'class="{kind}" stroke-width="{width}" fill="none"'
        return f'<polyline {shape} points="{drawn}"/>'

    beside = "; blue: of held-out rows" if held_out else ""
    blue = joined(held_out, "held", 1.8) if held_out else ""
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
        f"{line(losses, 'raw', 0.8)}{line(smooth(losses), 'mean', 1.8)}{blue}</svg>"
    )
