"""`milktea data ...`: the user's rows before a job. `ops.api` is imported inside, as in app.py."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ops.cli.errors import errors
from ops.cli.history import Json
from ops.cli.typed import as_typed
from ops.errors import ConfigError
from ops.plain import json_line, number_of, plain

if TYPE_CHECKING:
    from ops import api

app = typer.Typer(
    no_args_is_help=True,
    help="Rows: check, describe, sample, take out repeats, hold some out, translate",
    rich_markup_mode=None,
)

Files = Annotated[
    list[Path], typer.Argument(help="Files, folders or patterns, as data.files of a job")
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="How rows look, as docs/data.md names it (auto finds out); prompts: without answers",
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option("--column", help="What the files call a column: --column output=answer"),
]
DropBad = Annotated[bool, typer.Option("--drop-bad", help="Leave out rows that are not sound")]
To = Annotated[
    Path | None, typer.Option("--to", help="The file to write; beside the first without it")
]
Force = Annotated[bool, typer.Option("--force", help="Write over files that exist")]
Near = Annotated[
    float, typer.Option(help="Share of 5-grams that near duplicates have in common, 0.4 to 1")
]
Exact = Annotated[bool, typer.Option("--exact", help="Equal rows only, no near ones")]
BASE = "Qwen/Qwen3-8B"  # proposed where a base model is asked for
SHOWN = 3  # rows of each rule of quality; --json has all
Seed = Annotated[int, typer.Option(help="Of what is drawn")]


@app.command()
def check(
    files: Files,
    rules: Annotated[
        str, typer.Option(help="Rules of quality by name, with commas; all, or none")
    ] = "all",
    language: Annotated[str, typer.Option(help="What answers are in: zh, en, ...")] = "",
    drop: Annotated[
        str, typer.Option(help="Write the rows that these rules find nothing in: names, or all")
    ] = "",
    to: To = None,
    force: Force = False,
    form: Format = "auto",
    column: Column = None,
    drop_bad: DropBad = False,
    as_json: Json = False,
) -> None:
    """The first defects of each kind with their places (--json: every one), and how often each
    occurs; exit code 3 where there is one. Then what the rules of quality find among the sound
    rows, which is no defect."""
    with errors(as_json):
        from ops import api

        reading = reading_of(form, column, drop_bad)
        if drop:
            written = api.data.drop(
                files, reading, rules=drop, language=language, to=to, force=force
            )
            tell_written(written, as_json)
            return
        found = api.data.check(files, reading)
        quality = api.data.looked_at(found, rules, language)
        (_checked_json if as_json else _checked)(found, quality, api.data.reasons(found))
        if found.defects or not found.rows:
            raise typer.Exit(3)


def _checked_json(
    found: api.data.Dataset, quality: list[api.data.Found], reasons: dict[str, int]
) -> None:
    for defect in found.defects:
        print(json_line({"kind": "defect", **vars(defect)}))
    for one in quality:
        print(json_line({"kind": "quality", **vars(one)}))
    row = {"kind": "checked", "rows": len(found.rows), "defects": len(found.defects)}
    told = {name: {"kind": k, "rows": n, "format": f} for name, (k, n, f) in _files(found)}
    print(json_line(row | {"reasons": reasons, "files": told, "notes": found.notes}))


def _checked(
    found: api.data.Dataset, quality: list[api.data.Found], reasons: dict[str, int]
) -> None:
    from ops import api

    for line in api.data.grouped(map(str, found.defects)):
        print(plain(line))
    for reason, count in reasons.items():
        print(plain(f"{count:>9,}  {reason}"))
    for one in quality:
        print(plain(f"{one.rule}: {number_of(len(one.rows), 'row')}: {one.what}"))
        for where, beginning in one.rows[:SHOWN]:
            print(plain(f"    {where}: {beginning}"))
    _tell(found)


@app.command()
def stats(
    files: Files,
    tokenizer: Annotated[
        str, typer.Option(help="Count tokens by this model's: a folder, or an id of the hub")
    ] = "",
    form: Format = "auto",
    column: Column = None,
    as_json: Json = False,
) -> None:
    """Rows, characters, tokens (told from characters, or counted), scripts, turns, repeats and the
    longest rows, of the sound ones."""
    with errors(as_json):
        from ops import api

        told, found = api.data.stats(files, reading_of(form, column), tokenizer)
        if as_json:
            print(json_line({"kind": "stats", "defects": len(found.defects), **told.as_dict()}))
            return
        print(plain(str(told)))
        _tell(found)


@app.command()
def dedupe(
    files: Files,
    near: Near = 0.7,
    exact: Exact = False,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Rows of this file are repeats too: of a held-out file, for example"),
    ] = None,
    to: To = None,
    force: Force = False,
    form: Format = "auto",
    column: Column = None,
    drop_bad: DropBad = False,
    as_json: Json = False,
) -> None:
    """Write the rows that repeat no earlier one, equally or nearly."""
    with errors(as_json):
        from ops import api

        written = api.data.dedupe(
            files,
            reading_of(form, column, drop_bad),
            near=None if exact else near,
            against=against or [],
            to=to,
            force=force,
        )
        tell_written(written, as_json)


@app.command()
def sample(
    files: Files,
    max_chars: Annotated[
        int | None, typer.Option(min=1, help="Of all rows together at most")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="At most so many")] = None,
    by: Annotated[
        str, typer.Option(help="spread: over all lengths; cheapest: the shortest rows")
    ] = "spread",
    seed: Seed = 42,
    to: To = None,
    force: Force = False,
    form: Format = "auto",
    column: Column = None,
    drop_bad: DropBad = False,
    as_json: Json = False,
) -> None:
    """Write a part of the rows, of so many characters: what a translation is paid by."""
    with errors(as_json):
        from ops import api

        if by not in ("cheapest", "spread"):
            raise ConfigError(f"--by {by!r} is none", hint="spread or cheapest")
        if max_chars is None and rows is None:
            raise ConfigError("how much is not said", hint="--max-chars 500000, or --rows 5000")
        written = api.data.sample(
            files,
            reading_of(form, column, drop_bad),
            max_characters=max_chars,
            max_rows=rows,
            by=cast("api.data.By", by),
            seed=seed,
            to=to,
            force=force,
        )
        tell_written(written, as_json)


@app.command()
def split(
    files: Files,
    held_out: Annotated[
        float, typer.Option(min=0, help="A share of the rows (0.02), or how many (200)")
    ] = 0.02,
    seed: Seed = 42,
    near: Near = 0.7,
    exact: Exact = False,
    to: To = None,
    held_to: Annotated[
        Path | None, typer.Option("--held-to", help="The file of held-out rows")
    ] = None,
    force: Force = False,
    form: Format = "auto",
    column: Column = None,
    drop_bad: DropBad = False,
    as_json: Json = False,
) -> None:
    """Write rows to train on and rows to hold out; rows that repeat each other stay on one side."""
    with errors(as_json):
        from ops import api

        written = api.data.split(
            files,
            reading_of(form, column, drop_bad),
            held_out=held_out,
            seed=seed,
            near=None if exact else near,
            to=to,
            held_to=held_to,
            force=force,
        )
        tell_written(written, as_json)


@app.command()
def convert(
    files: Annotated[Path, typer.Argument(metavar="FILE", help="A file, a folder or a pattern")],
    to: Annotated[str, typer.Option(help="messages, sharegpt, alpaca or preference")],
    out: Annotated[Path | None, typer.Argument(help="Beside FILE without it")] = None,
    force: Force = False,
    form: Format = "auto",
    column: Column = None,
    drop_bad: DropBad = False,
    as_json: Json = False,
) -> None:
    """Write the rows in another layout; a row that it cannot hold whole is left out and listed."""
    with errors(as_json):
        from ops import api

        reading = reading_of(form, column, drop_bad)
        tell_written(api.data.convert([files], to, reading, to=out, force=force), as_json)


@app.command()
def feedback(
    results: Annotated[
        list[str], typer.Argument(metavar="RUN", help="Runs, folders, or files that /save wrote")
    ],
    to: Annotated[
        Path | None,
        typer.Option("--to", help="What the files begin with: TO.sft.jsonl, TO.dpo.jsonl"),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write rows from what people thought of answers: thumbs, edits and votes of the page, and
    conversations that /save kept."""
    with errors(as_json):
        from ops import api

        places = [
            Path(named) if Path(named).exists() else api.find_result(named).beside
            for named in results
        ]
        tell_written(api.feedback(places, to=to, force=force), as_json)


def reading_of(form: str, columns: list[str] | None, drop_bad: bool = False) -> api.Reading:
    from ops import api

    if form not in api.data.FORMATS:
        known = ", ".join(api.data.FORMATS)
        raise ConfigError(f"--format {form!r} is none", hint=f"one of {known}")
    names = dict[str, str]()
    for told in columns or []:
        name, sign, there = told.partition("=")
        if not (name and sign and there):
            raise ConfigError(f"--column {told!r} is none", hint="--column output=answer")
        names[name] = there
    return api.Reading(form, names, bad_rows="drop" if drop_bad else "refuse")


def _files(found: api.data.Dataset) -> list[tuple[str, tuple[str, int, str]]]:
    return list(found.files.items())


def _tell(found: api.data.Dataset) -> None:
    for note in found.notes:
        print(plain(note))
    for name, (kind, rows, form) in _files(found):
        layout = form if kind == "rows" else kind
        print(plain(f"{name}: {rows:,} sound rows ({layout})"))
    count = len(found.defects)
    print(f"{len(found.rows):,} sound rows, {count:,} defect{'' if count == 1 else 's'}")


def tell_written(written: api.data.RowsWritten, as_json: bool) -> None:
    if as_json:
        print(json_line({"kind": "written", **written.as_dict()}))
        return
    print(f"{number_of(written.rows, 'row')} read")
    for reason, count in written.removed.items():
        print(plain(f"{count:>9,}  left out: {reason}"))
    for path, count in written.files.items():
        print(plain(f"{count:>9,}  in {path}"))
    print(plain(f"report     {written.report}"))


def init(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Rows to train on; asked for without any")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="A model of the hub, or a folder; `milktea models` lists")
    ] = None,
    max_usd: Annotated[
        float | None, typer.Option(min=0.01, help="What the whole run may cost")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the job; that of the first file without it")] = "",
    to: Annotated[Path, typer.Option("--to", help="The job file to write")] = Path("job.toml"),
    held_out: Annotated[
        Path | None, typer.Option(help="Rows that are never trained on: the other file of `split`")
    ] = None,
    force: Force = False,
    form: Format = "auto",
    column: Column = None,
    drop_bad: DropBad = False,
    as_json: Json = False,
) -> None:
    """Write a commented job file for rows, a base model and a budget; what is not given is asked
    for. Nothing is rented."""
    with errors(as_json):
        from ops import api

        if to.exists() and not force:
            raise ConfigError(f"{to} exists", hint="name another with --to, or add --force")
        reading = reading_of(form, column, drop_bad)
        rows = files or typed_paths(_asked("File with the rows to train on", "FILES", as_json))
        if not (base and max_usd):
            api.begin.validate(rows, reading)  # before more is asked
        model = base or _asked(
            "Base model (`milktea models` lists)", "--base", as_json, default=BASE
        )
        usd = max_usd or _dollars(_asked("Dollars that the run may cost", "--max-usd", as_json))
        begun = api.begin.begin(rows, model, usd, to, name, reading, held_out)
        api.begin.write(begun, to, force)
        if as_json:
            print(json_line({"kind": "begun", "job": str(to), "chosen": begun.chosen}))
            return
        print(*(as_typed(plain(line)) for line in begun.chosen), sep="\n")
        plan = f"`milktea plan {shlex.quote(str(to))}`"
        print(as_typed(plain(f"wrote {to}; {plan} shows what it costs")))


def typed_paths(typed: str) -> list[Path]:
    """The files of a line that was typed, or that a terminal wrote where files were dropped on it:
    in quotation marks, or with a backslash before each blank."""
    whole = Path(typed.strip()).expanduser()
    try:
        parts = [str(whole)] if whole.exists() else shlex.split(typed)
    except ValueError:  # a quotation mark that is part of a name
        parts = [str(whole)]
    return [Path(part).expanduser() for part in parts]


def _asked(what: str, flag: str, as_json: bool, default: str | None = None) -> str:
    """What somebody types. Raises ConfigError where nobody can be asked."""
    if as_json or not sys.stdin.isatty():
        raise ConfigError(f"{flag} is not given, and nobody can be asked here", hint=f"add {flag}")
    return str(typer.prompt(what, default=default))


def _dollars(text: str) -> float:
    try:
        usd = float(text.strip().lstrip("$"))
    except ValueError:
        usd = 0.0
    if not 0 < usd < 1e6:
        raise ConfigError(f"{text!r} is no sum of dollars", hint="--max-usd 3")
    return usd
