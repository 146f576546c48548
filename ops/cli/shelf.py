"""`milktea models` and `milktea gpus`: what is known of models and cards before a job exists."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli.errors import errors
from ops.cli.history import Json
from ops.errors import ConfigError, MarketError
from ops.plain import json_line, plain

if TYPE_CHECKING:
    from ops import api

DETAILED = 3  # so many models are told in full
COLUMNS = 100
NAMED = 5  # cards that are named of all that hold a model
MODELS = ((38, "model"), (6, "size"), (13, "licence"), (6, "templ."), (15, "bf16 from"), (15, ""))


def models(
    words: Annotated[
        list[str] | None, typer.Argument(help="Words of a name, type or licence; all must match")
    ] = None,
    as_json: Json = False,
) -> None:
    """The open models that are known without a network: size, licence, template, whether they
    train, and the smallest card for LoRA. Of three or fewer, everything."""
    with errors(as_json):
        from ops import api

        found = api.models(words or [])
        if not found:
            raise ConfigError(
                f"no known model has {' '.join(words or [])!r} in it",
                hint="`milktea models` lists all; other models of the hub train too",
            )
        if as_json:
            for model in found:
                print(json_line(model.as_dict()))
            return
        if len(found) <= DETAILED:
            print("\n\n".join(_details(model) for model in found))
            return
        print(_cells("model", "size", "licence", "templ.", "LoRA bf16 from", "LoRA nf4 from"))
        for model in found:
            print(_row(model))
        print(
            "* gated: the hub asks for a token of somebody who accepted the licence. Cards: the "
            "smallest for\nLoRA as a new job has it. `milktea models NAME` tells everything of one."
        )


def _cells(*texts: str) -> str:
    widths = [width for width, _ in MODELS]
    return " ".join(_clip(t, w).ljust(w) for t, w in zip(texts, widths, strict=True)).rstrip()


def _clip(text: str, width: int) -> str:
    text = plain(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def _row(model: api.KnownModel) -> str:
    e = model.entry
    licence = (e.licence or "?")[:12] + ("*" if e.gated else "")
    first = [e.id, _size(e.parameters), licence, model.template]
    if model.why or not model.lora_gib:
        why = f"refused: {model.why}" if model.why else model.notes[0]
        line = _cells(*first, "", "")
        at = sum(width + 1 for width, _ in MODELS[:4])
        return line.ljust(at) + _clip(why, COLUMNS - at - 1)
    return _cells(*first, *((model.cards(p) or ["no card"])[0] for p in ("bf16", "nf4")))


def _size(parameters: int | None) -> str:
    return "?" if not parameters else f"{parameters / 1e9:.3g}B"


def _details(model: api.KnownModel) -> str:
    e = model.entry
    active = f", {_size(e.active)} of them for a token" if e.active else ""
    weights = f", weights {e.weights_gb} GB" if e.weights_gb else ""
    gated = {True: "gated: needs a token of yours", False: "not gated", None: "gated or not: ?"}
    lines = [
        f"{e.id} ({e.model_type})",
        f"size: {_size(e.parameters)} parameters{active}{weights}",
        f"licence: {e.licence or 'not known'}, {gated[e.gated]}",
        f'template: "{model.template}", context {e.values.get("context") or "?"} tokens',
        f"refused: {model.why}: {model.hint}" if model.why else "trains",
        *model.notes,
    ]
    for precision, gib in model.lora_gib.items():
        names = model.cards(precision)
        cards = ", ".join(names[:NAMED]) or "no card alone holds that"
        more = f" and {len(names) - NAMED} larger or faster" if len(names) > NAMED else ""
        lines.append(f"LoRA {precision} needs {gib:.1f} GiB: {cards}{more}")
    first, *rest = lines
    return "\n".join(
        [plain(first)]
        + [
            textwrap.fill(plain(text), COLUMNS, initial_indent="  ", subsequent_indent="    ")
            for text in rest
        ]
    )


def gpus(
    words: Annotated[
        list[str] | None, typer.Argument(help="A job file, and words of a card's name")
    ] = None,
    as_json: Json = False,
    offline: Annotated[bool, typer.Option("--offline", help="Ask the market for no price")] = False,
) -> None:
    """The cards that are known: memory, speed, and the cheapest offer now; with a job file, whether
    a card holds it or why not."""
    with errors(as_json):
        from ops import api

        jobs = [w for w in words or [] if w.endswith(".toml")]
        if len(jobs) > 1:
            raise ConfigError("more than one job file", hint="milktea gpus JOB")
        prices, note = ({}, "prices were not asked for") if offline else _prices()
        job = Path(jobs[0]) if jobs else None
        rest = [w for w in words or [] if w not in jobs]
        found = api.gpus(rest, job=job, prices=prices)
        if as_json:
            for card in found:
                print(json_line(card.as_dict()))
        else:
            head = f"{'card':<16}{'memory':>9}{'bf16':>7}{'fp8':>7}{'$/h':>9}{'offers':>8}"
            print(head + ("  this job" if job else ""))
            for card in found:
                print(_card(card))
            print("bf16 and fp8 in TFLOP/s; $/h of one card on demand, without disk")
        if note:
            print(note, file=sys.stderr)


def _prices() -> tuple[dict[api.Gpu, api.Price], str]:
    """What the market asks, and why it tells nothing."""
    from ops import api

    if not api.uses_vast_ai():
        return {}, "no prices: VAST_API_KEY is not set"
    try:
        return api.prices(), ""
    except MarketError as e:
        return {}, plain(f"no prices: {e}")


def _card(card: api.KnownCard) -> str:
    g = card.gpu
    fp8 = f"{g.fp8_tflops:.0f}" if g.fp8_tflops else "-"
    usd, offers = (
        ("-", "-")
        if card.price is None
        else (f"{card.price.usd_per_hour:.3f}", str(card.price.offers))
    )
    line = f"{g.name:<16}{g.memory_gib:>5.0f} GiB{g.bf16_tflops:>7.0f}{fp8:>7}{usd:>9}{offers:>8}"
    told = "" if card.fits is None else "fits" if card.fits else card.why_not
    return _clip(f"{line}  {told}".rstrip(), COLUMNS)
