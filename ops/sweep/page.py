"""Pure: how a sweep ended, as lines, and as one HTML page with the held-out curves of all runs."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from ops.sweep.state import DONE, Trial
from trainer.data.words import number_of
from trainer.wire.page import EDGE, HEIGHT, SAFE, STYLE, WIDTH, thinned

BEST, OTHERS = "#2f6f9f", "#b9a28a"  # of the best run, and of the others
HEADS = ("run", "differs in", "held-out loss", "$", "how it ended", "run id")


def best(trials: Sequence[Trial]) -> Trial | None:
    """Of the runs whose result is at home that with the smallest held-out loss."""
    done = [t for t in trials if t.state == DONE and t.held_out is not None]
    finite = [t for t in done if t.held_out is not None and math.isfinite(t.held_out)]
    return min(finite, key=lambda t: t.held_out or 0.0, default=None)


def ordered(trials: Sequence[Trial]) -> list[Trial]:
    """The done ones first, each group by its held-out loss."""

    def key(trial: Trial) -> tuple[bool, float, int]:
        loss = trial.held_out
        known = math.inf if loss is None or math.isnan(loss) else loss
        return trial.state != DONE, known, trial.number

    return sorted(trials, key=key)


def rows(trials: Sequence[Trial]) -> list[list[str]]:
    """The cells of the table at the end, its head first."""
    found = [list(HEADS)]
    winner = best(trials)
    for t in ordered(trials):
        loss = "-" if t.held_out is None else f"{t.held_out:.4f}"
        how = "best" if t is winner else t.state + (f": {t.why}" if t.why else "")
        run = t.run.id if t.run else "-"
        found.append([str(t.number), t.words, loss, f"{t.spent_usd:.4f}", how, run])
    return found


def page(
    name: str,
    trials: Sequence[Trial],
    looks: Mapping[int, Sequence[tuple[int, float]]],
    spent_usd: float,
    max_usd: float,
) -> bytes:
    """One HTML file with everything in it. `looks` has for each trial (step, held-out loss)."""
    head, *body = rows(trials)
    table = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in body)
    names = "".join(f"<th>{html.escape(cell)}" for cell in head)
    title = html.escape(name)
    return (
        f'<!doctype html><meta charset="utf-8">{SAFE}<title>{title}</title>'
        f"<style>{STYLE}</style><h1>{title}</h1>"
        f"<p>{number_of(len(trials), 'run')}, {spent_usd:.4f} $ of {max_usd:.2f} $.</p>"
        f"{picture(trials, looks)}<table><tr>{names}{table}</table>\n"
    ).encode("utf-8", "replace")


def picture(trials: Sequence[Trial], looks: Mapping[int, Sequence[tuple[int, float]]]) -> str:
    """The held-out losses of every run as lines, that of the best in blue, each with its number at
    its end; nothing where no run has two looks."""
    points = {t.number: thinned([list(p) for p in looks.get(t.number, ())]) for t in trials}
    lines = {n: p for n, p in points.items() if len(p) > 1}
    if not lines:
        return ""
    every = [p for line in lines.values() for p in line]
    low, high = min(loss for _, loss in every), max(loss for _, loss in every)
    first, last = min(step for step, _ in every), max(step for step, _ in every)

    def at(step: int, loss: float) -> tuple[float, float]:
        x = EDGE + (WIDTH - 2 * EDGE) * (step - first) / (last - first)
        return x, HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * (loss - low) / ((high - low) or 1.0)

    winner = best(trials)
    drawn = []
    for number, line in sorted(lines.items(), key=lambda item: item[0] == _number(winner)):
        colour, width = (BEST, 2.4) if number == _number(winner) else (OTHERS, 1.4)
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in line))
        x, y = at(*line[-1])
        drawn.append(
            f'<polyline stroke="{colour}" stroke-width="{width}" fill="none" points="{places}"/>'
            f'<text x="{x + 5:.1f}" y="{y + 4:.1f}">{number}</text>'
        )
    foot = HEIGHT - EDGE + 16
    words = (
        f'<text x="2" y="{EDGE + 4}">{high:.3g}</text>'
        f'<text x="2" y="{HEIGHT - EDGE + 4}">{low:.3g}</text>'
        f'<text x="{EDGE}" y="{foot}">step {first}</text>'
        f'<text x="{WIDTH - EDGE}" y="{foot}" text-anchor="end">step {last}</text>'
        f'<text x="{EDGE}" y="20">held-out loss per target token; the best run in blue</text>'
    )
    return (
        f'<svg role="img" aria-label="held-out losses" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"{words}{''.join(drawn)}</svg>"
    )


def _number(trial: Trial | None) -> int | None:
    return None if trial is None else trial.number
