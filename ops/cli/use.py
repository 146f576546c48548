"""The commands over a result: merge, and `milktea adapter ...`. `ops.api` is imported inside them,
as in app.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.cli.errors import errors
from ops.cli.history import Json
from ops.cli.remote import talk_remotely
from ops.errors import ConfigError

if TYPE_CHECKING:
    from ops import api
    from ops.api import words

adapter_app = typer.Typer(
    no_args_is_help=True,
    help="Adapters: check what loads one, export, combine",
    rich_markup_mode=None,
)

Result = Annotated[
    str, typer.Argument(help="A run id, its beginning or `last`; or an adapter's folder or zip")
]
Base = Annotated[
    str | None, typer.Option(help="The base model's folder or hub id, where it is not known")
]
TARGETS = ("vllm", "sglang", "llama.cpp", "ollama", "cog", "hf", "chatglm")
DTYPES = ("bf16", "fp16", "fp32")


def merge(
    run: Result,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32")] = "bf16",
    base: Base = None,
    to: Annotated[
        Path | None, typer.Option(help="The new folder; merged-DTYPE beside the adapter without it")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Rows for the certificate; the job's held-out ones without it"),
    ] = None,
    as_json: Json = False,
) -> None:
    """The adapter merged into its base, as a model of its own; with a certificate that the files
    compute what base and adapter do."""
    with errors(as_json):
        from ops.api import words

        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is none", hint=f"one of {', '.join(DTYPES)}")
        _show(lambda: words.merge(_found(run, base), dtype, to, data), as_json)


def chat(
    run: Result,
    prompt: Annotated[
        str | None, typer.Option(help="One question, instead of a conversation")
    ] = None,
    system: Annotated[str, typer.Option(help="What the model is told of its task")] = "",
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=1e-6, max=1)] = 1.0,
    penalty: Annotated[
        float, typer.Option(min=0.01, help="Of what was said already; 1 does nothing")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer at most")] = 1024,
    context: Annotated[int, typer.Option(min=2, help="Tokens of all turns at most")] = 4096,
    device: Annotated[str, typer.Option(help="auto, cuda, mps or cpu")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp8, int8 or nf4")] = "auto",
    web: Annotated[
        bool, typer.Option("--web", help="In the browser, with settings there; as `milktea serve`")
    ] = False,
    remote: Annotated[
        bool, typer.Option("--remote", help="On a box that is rented for it, within --max-usd")
    ] = False,
    minutes: Annotated[float, typer.Option(min=1, help="Of --remote, once it is loaded")] = 60,
    max_usd: Annotated[float, typer.Option(min=0.01, help="Of --remote at most")] = 1.0,
    yes: Annotated[bool, typer.Option("--yes", help="Of --remote: do not ask")] = False,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Talk to a result in this terminal, in the template that it was trained with. /help lists what
    can be typed; Ctrl-C stops an answer."""
    with errors(as_json):
        from ops.api import words

        if remote and (base or prompt is not None):
            raise ConfigError(
                "--remote takes a run, whose base is known, and no --prompt or --base",
                hint=f"milktea chat {run} --remote --web",
            )
        if remote and web:
            talk_remotely(_found(run, None), minutes, max_usd, yes, as_json, None)
            return
        if web:
            options = [f"--context={context}", f"--device={device}", f"--precision={precision}"]
            _show(lambda: words.serve([_found(run, base)], options), as_json)
            return
        given = {"system": system, "temperature": temperature, "top-p": top_p, "seed": seed}
        given |= {"penalty": penalty, "tokens": tokens, "context": context}
        given |= {"device": device, "precision": precision}
        options = [f"--{name}={value}" for name, value in given.items()]
        options += [f"--prompt={prompt}"] if prompt is not None else []
        if remote:
            talk_remotely(_found(run, None), minutes, max_usd, yes, as_json, options)
            return
        _show(lambda: words.chat(_found(run, base), options), as_json)


def evaluate(
    run: Result,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Rows with answers, or questions with options (C-Eval, CMMLU, MMLU); the job's "
            "held-out rows without it"
        ),
    ] = None,
    against: Annotated[
        str, typer.Option(help="`base`, or another run, adapter's folder or zip")
    ] = "base",
    rows: Annotated[int, typer.Option(help="The first ones of the file")] = 200,
    new_tokens: Annotated[int, typer.Option(help="Of one answer at most")] = 256,
    precision: Annotated[
        str, typer.Option(help="auto, fp32, bf16, fp8, int8 or nf4, of both sides")
    ] = "auto",
    base: Base = None,
    to: Annotated[
        Path | None, typer.Option(help="The JSON file; evaluation.json beside the adapter")
    ] = None,
    as_json: Json = False,
) -> None:
    """How good the answers are, beside those of the base or of another run: BLEU-4, ROUGE, chrF,
    exact match, perplexity, lengths; of questions with options the accuracy."""
    with errors(as_json):
        from ops.api import words

        other = None if against == "base" else _found(against, None)
        more = (rows, new_tokens, to, precision)
        _show(lambda: words.evaluate(_found(run, base), data, other, *more), as_json)


@adapter_app.command()
def check(run: Result, base: Base = None, as_json: Json = False) -> None:
    """Which programs load an adapter, ours or not: yes with the command, or no and why."""
    with errors(as_json):
        from ops.api import words

        _show(lambda: words.check(_found(run, base)), as_json)


@adapter_app.command("export")
def export_adapter(
    run: Result,
    target: Annotated[str, typer.Option("--for", help=", ".join(TARGETS))],
    name: Annotated[str, typer.Option(help="What the model will be called")] = "tuned",
    kind: Annotated[str, typer.Option("--type", help="Of a GGUF file: f16 or q8_0")] = "f16",
    merged: Annotated[
        bool, typer.Option("--merged", help="For vllm and sglang: one model, which is faster")
    ] = False,
    repo: Annotated[
        str, typer.Option(help="For hf: USER/NAME to upload to, by the token in HF_TOKEN")
    ] = "",
    public: Annotated[bool, typer.Option("--public", help="For hf: not private")] = False,
    base: Base = None,
    to: Annotated[
        Path | None, typer.Option(help="The new folder; for-ENGINE beside the adapter without it")
    ] = None,
    as_json: Json = False,
) -> None:
    """A result as another program takes it, with the command that starts it."""
    with errors(as_json):
        from ops.api import words

        if target not in TARGETS:
            raise ConfigError(f"{target!r} is no target", hint=f"one of {', '.join(TARGETS)}")
        options = [f"--name={name}", f"--type={kind}", f"--repo={repo}"]
        options += [f"--{word}" for word, on in (("merged", merged), ("public", public)) if on]
        _show(lambda: words.export(_found(run, base), target, to, options), as_json)


@adapter_app.command()
def combine(
    runs: Annotated[
        list[str], typer.Argument(help="RUN=WEIGHT, two or more; also folders and zips")
    ],
    to: Annotated[Path, typer.Option(help="The new .zip, or a new folder")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Cut to this rank; the exact sum without it")
    ] = None,
    as_json: Json = False,
) -> None:
    """Add adapters of one base: the exact weighted sum, whose rank is the sum of theirs."""
    with errors(as_json):
        from ops.api import words

        parts = []
        for word in runs:
            name, sign, number = word.rpartition("=")
            try:
                weight = float(number) if sign else 1.0
            except ValueError:
                raise ConfigError(f"{word!r} has no weight", hint="RUN=0.5") from None
            parts.append((_found(name if sign else word, None), weight))
        _show(lambda: words.combine(parts, to, rank), as_json)


def _found(run: str, base: str | None) -> api.Found:
    from ops import api

    return api.find_result(run, base=base)


def _show(word: Callable[[], words.Word], as_json: bool) -> None:
    """Do it on this terminal; its exit code is the command's."""
    from ops.api import words

    if code := words.show(word(), as_json):
        raise typer.Exit(code)
