"""A first job file from rows, a base model and a budget: what `milktea init` writes."""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ops.catalogue.models import did_you_mean, lookup
from ops.errors import ConfigError, PreflightError
from ops.hardware import gpus
from ops.job import cards
from ops.job.config import parse
from ops.job.needs import is_practice
from ops.prepare.rows import Dataset, check, check_words, stats
from trainer import memory
from trainer.data.sources import Reading
from trainer.data.stats import Stats
from trainer.data.words import number_of

# memory of cards that are cheap by the hour: a model that fits in bf16 stays in bf16
CARD_GIB = 24.0
LEAST_LENGTH, MOST_LENGTH = 256, 4096  # tokens of data.max_length that are proposed
WINDOW = 1024  # tokens of texts that are learned whole
PRACTICE = "practice_model"  # the folder of milktea's own practice model
IMAGE = (  # as jobs/practice.toml has it
    'ref = "milktea/practice:3"  # without a key the emulator plays it; else `make image`',
    'trainer = "image"',
    "size_gib = 0.31",
)
STEPS = 50  # of the optimizer, that few rows are to make: by more epochs, then by smaller batches
MOST_EPOCHS, MOST_BATCH, LEAST_BATCH = 3, 32, 4
SURE = 1.3  # tokens are told from characters
STAGE = {"rows": "sft", "pairs": "dpo", "tagged": "kto"}
STAGE_WORDS = {
    "sft": "answers are learned",
    "pt": "texts are learned whole",
    "dpo": "pairs of a chosen and a rejected answer",
    "kto": "answers that are wanted or not",
}


@dataclass(frozen=True)
class Begun:
    """The job file as text, and what was chosen for it and why."""

    text: str
    chosen: list[str]


@dataclass(frozen=True)
class _Base:
    name: str
    precision: str
    template: str
    gated: bool
    context: int
    why: str
    practice: bool = False  # milktea's own practice model, which its practice image trains on a CPU


def begin(
    files: Sequence[Path],
    base: str,
    max_usd: float,
    to: Path,
    name: str = "",
    reading: Reading | None = None,
    held_out: Path | None = None,
) -> Begun:
    """A job file for `to`, with `held_out` as its held-out rows, checked as `milktea plan` checks
    it; nothing is written. Raises PreflightError for rows or a model that cannot be trained on,
    ConfigError."""
    told, found = stats(files, reading, _tokenizer(base))
    _validate(found, files, reading)
    kinds = {kind for kind, _, _ in found.files.values()}
    if "prompts" in kinds:
        raise ConfigError(
            "prompts are learned from by rewards, which nobody but you knows",
            hint="copy jobs/practice-grpo.toml; docs/stages.md tells of rewards",
        )
    if len(kinds) > 1:
        raise PreflightError(
            f"the files hold different things: {', '.join(sorted(kinds))}",
            hint="name those of one kind: a job learns from one",
        )
    stage = STAGE[kinds.pop()]
    if all(form == "text" for _, _, form in found.files.values()):
        stage = "pt"
    known = _base(base, to.parent)
    length, why_length = _length(told, known.context)
    if stage == "pt":
        length, why_length = min(WINDOW, known.context), "a longer text becomes several windows"
    name = name or re.sub(r"[^a-z0-9]+", "-", _stem(files[0]).lower()).strip("-")[:40] or "job"
    paths = [*files, *([held_out] if held_out else [])]
    there = [_quoted(os.path.relpath(path, to.parent)) for path in paths]
    rows = told.total_tokens // length if stage == "pt" else told.rows
    reading, out = reading or Reading(), _out(to.resolve().parent)
    text = _text(name, stage, there, known, length, max_usd, reading, bool(held_out), rows, out)
    parse(tomllib.loads(text), to)
    chosen = [
        f"stage {stage}: {STAGE_WORDS[stage]}, {number_of(told.rows, 'row')}, about "
        f"{told.total_tokens:,} "
        "tokens",
        f"precision {known.precision}: {known.why}",
        f"max_length {length:,}: {why_length}",
    ]
    chosen += found.notes
    if told.equal:
        chosen.append(
            f"{number_of(told.equal, 'row', 'is', 'are')} equal to others: `milktea data "
            "dedupe` drops them"
        )
    return Begun(text, chosen)


def validate(files: Sequence[Path], reading: Reading | None = None) -> None:
    """Raises PreflightError for files that hold no row, or one that is not sound."""
    _validate(check(files, reading), files, reading)


def _validate(found: Dataset, files: Sequence[Path], reading: Reading | None) -> None:
    if not found.defects and found.rows:
        return
    first = f", the first: {found.defects[0]}" if found.defects else ""
    hint = f"`{check_words(files, reading)}` tells all"
    raise PreflightError(
        f"{number_of(len(found.rows), 'sound row')} and "
        f"{number_of(len(found.defects), 'defect')}{first}",
        hint=f"{hint}; --drop-bad leaves such rows out" if found.rows else hint,
    )


def _stem(path: Path) -> str:
    return path.name.split(".")[0] if "*" not in path.name else path.parent.name


def _base(name: str, folder: Path) -> _Base:
    """What is known of a base model: from the catalogue, else from its name."""
    entry = lookup(name)
    if Path(name).expanduser().is_dir():
        return _of_folder(Path(name).expanduser(), folder)
    if entry is None:
        near = did_you_mean(name)
        why = f"this model is not in `milktea models`{near or '; nf4 takes less memory'}"
        return _Base(name, "bf16", _guessed(name), False, MOST_LENGTH, why)
    model = cards.known(entry)
    if model.why:
        raise PreflightError(f"{entry.id} cannot be trained: {model.why}", hint=model.hint)
    precision, why = _precision(entry.id, model.lora_gib)
    context = int(entry.values.get("context") or MOST_LENGTH)
    named = name if "@" in name else entry.id
    return _Base(named, precision, model.template, bool(entry.gated), context, why)


def _of_folder(model: Path, folder: Path) -> _Base:
    """What a model's own folder tells of it."""
    there = os.path.relpath(model, folder)
    shown = there if there.startswith(".") else f"./{there}"
    precision, why, context, practice = "bf16", "its memory is not known", MOST_LENGTH, False
    try:
        config = json.loads((model / "config.json").read_text("utf-8"))
        context = int(config.get("max_position_embeddings") or MOST_LENGTH)
        precision, why = _precision(shown, cards.lora_gib(config))
        named = model.resolve().name == PRACTICE
        practice = named and is_practice(memory.Shape.from_config(config))
    except (OSError, ValueError, TypeError, AttributeError):
        pass  # `milktea plan` says what is wrong with it
    if practice:
        precision, why = "fp32", "milktea's practice model: the CPU of this computer trains it"
    template = "chat" if _has_chat_template(model) else _guessed(model.resolve().name)
    return _Base(shown, precision, template, False, context, why, practice)


def _has_chat_template(model: Path) -> bool:
    if (model / "chat_template.jinja").is_file():
        return True
    try:
        told = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
        return bool(told.get("chat_template"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _precision(name: str, lora_gib: Mapping[str, float]) -> tuple[str, str]:
    """model.precision, and why. Raises PreflightError where no known card holds the model."""
    if not lora_gib:
        return "bf16", "its memory is not known"
    small = lora_gib["bf16"] <= CARD_GIB
    quantised = not small and lora_gib["nf4"] < 0.8 * lora_gib["bf16"]
    precision = "nf4" if quantised else "bf16"
    need = lora_gib[precision]
    if not (holding := gpus.that_hold(need, precision)):
        raise PreflightError(
            f"{name} needs {need:.0f} GiB on one card in {precision}; no known card has it",
            hint="`milktea models` shows smaller ones",
        )
    other = f"; in bf16 {lora_gib['bf16']:.0f} GiB" if quantised else ""
    card = cards.label(holding[0])
    return precision, f"needs {max(need, 1):.0f} GiB, which a card like {card} has{other}"


def _tokenizer(base: str) -> str:
    """Where tokens of this base can be counted without a network; "" where they cannot."""
    folder = Path(base).expanduser()
    return str(folder) if (folder / "tokenizer.json").is_file() else ""


def _guessed(name: str) -> str:
    talks = any(word in Path(name).name.lower() for word in ("instruct", "chat", "-it"))
    return "chat" if talks else "alpaca"


def _length(told: Stats, context: int) -> tuple[int, str]:
    """data.max_length, and why: a power of two over the longest row, as far as one may go."""
    longest = told.tokens["most"] * SURE
    length = LEAST_LENGTH
    while length < longest and length < MOST_LENGTH:
        length *= 2
    length = min(length, context)
    if length >= longest:
        return length, f"the longest row has about {told.tokens['most']:,} tokens"
    return length, (
        f"the longest row has about {told.tokens['most']:,} tokens; longer rows are dropped and "
        "counted"
    )


def _text(
    name: str,
    stage: str,
    there: Sequence[str],
    base: _Base,
    length: int,
    max_usd: float,
    reading: Reading,
    held_out: bool,
    rows: int,
    out: str,
) -> str:
    """The commented TOML. `there` are the quoted paths of the files, the held-out one last."""
    files = there[:-1] if held_out else there
    lines = [
        "# Written by `milktea init`. `milktea plan` shows what it costs, `milktea schema` every",
        "# key; jobs/reference.toml of milktea's checkout explains them.",
        f"name = {_quoted(name)}",
        f'stage = "{stage}"  # {STAGE_WORDS[stage]}',
    ]
    if base.gated:
        lines.append('env = ["HF_TOKEN"]  # the model is gated: your token travels to the machine')
    lines += [
        "",
        "[model]",
        f"base = {_quoted(base.name)}",
        f'precision = "{base.precision}"  # {base.why}',
        "",
        "[data]",
        f"files = [{', '.join(files)}]",
        *([f"held_out = {there[-1]}  # never trained on"] if held_out else []),
        f"max_length = {length}  # tokens of one row; fewer need less memory",
    ]
    if stage != "pt":
        over_length = (
            "split" if stage == "sft" and reading.form in ("sharegpt", "messages") else "drop"
        )
        lines += [
            f'template = "{base.template}"  # chat: the model\'s own; alpaca suits one without any',
            f'over_length = "{over_length}"  # longer rows; the plan tells how many',
        ]
    lines += [
        *_as_read(reading),
        "",
        "[training]",
        *_pace(rows),
        f"learning_rate = {_rate(stage, base)}",
        "",
        "[limits]",
        f"max_usd = {max_usd:.2f}  # of the whole run; the machine itself keeps to it as well",
        "max_hours = 6  # from rent to destroy",
        "",
        "[results]",
        f"folder = {_quoted(out)}  # RUN/adapter.zip and its report",
    ]
    if base.practice:
        lines += ["", "[image]", *IMAGE]
    return "\n".join(lines) + "\n"


def _out(folder: Path) -> str:
    """`out` of the working directory as a job file in `folder` calls it; beside a job file that
    lies elsewhere."""
    here = Path.cwd()
    return os.path.relpath(here / "out", folder) if folder.is_relative_to(here) else "out"


def _as_read(reading: Reading) -> list[str]:
    lines = []
    if reading.form != "auto":
        lines.append(f'format = "{reading.form}"')
    if reading.bad_rows == "drop":
        lines.append('bad_rows = "drop"  # rows that are not sound; the plan tells how many')
    if reading.columns:
        mapped = ", ".join(f"{k} = {_quoted(v)}" for k, v in reading.columns.items())
        lines.append(f"columns = {{ {mapped} }}")
    return lines


def _pace(rows: int) -> list[str]:
    """training.num_train_epochs and, of few rows, training.batch_size: about STEPS steps at least,
    as far as MOST_EPOCHS and LEAST_BATCH go."""
    rows = max(rows, 1)
    epochs = min(MOST_EPOCHS, math.ceil(STEPS * MOST_BATCH / rows))
    if epochs == 1:
        return ["num_train_epochs = 1  # more learn by heart sooner than better"]
    batch = MOST_BATCH
    while batch > LEAST_BATCH and rows * epochs < STEPS * batch:
        batch //= 2
    steps = math.ceil(rows / batch) * epochs
    return [
        f"num_train_epochs = {epochs}  # {number_of(rows, 'row')}: few are read more than once",
        f"batch_size = {batch}  # rows of one step: {steps} steps in all",
    ]


def _rate(stage: str, base: _Base) -> str:
    if stage not in ("sft", "pt"):
        return "1e-5"
    return "3e-3  # a tiny model learns fast" if base.practice else "2e-4"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def write(begun: Begun, to: Path, force: bool) -> None:
    """Raises ConfigError where `to` exists and may not be written over."""
    if to.exists() and not force:
        raise ConfigError(f"{to} exists", hint="name another with --to, or add --force")
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(begun.text, "utf-8")
