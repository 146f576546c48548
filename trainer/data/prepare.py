"""Everything that can be refused before torch is imported: the job's files, the model's tokenizer,
every row. Then the rows' tokens, cached.

ops calls `prepare` before renting, trainer.launch before starting processes, every process once
more to open the cache, which is keyed by content (data, tokenizer, template, settings). Nothing is
dropped or cut without a line in `notes`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data import held_out, packing
from trainer.data.cache import cache_key, read_cache, write_cache
from trainer.data.chat import open_chat
from trainer.data.errors import InvalidJob, ModelMissing
from trainer.data.files import read_rows
from trainer.data.formats import Row
from trainer.data.render import prompt
from trainer.data.sources import Defect, Reading
from trainer.data.template import Template, TemplateError, Turn, from_chat_template, load
from trainer.data.tokenised import Rows, tokenise
from trainer.data.tokens import Vocabulary, encode, open_vocabulary, stop_token, token_hash
from trainer.families import TEXT_KEYS
from trainer.wire.digest import sha256_of
from trainer.wire.job import Data, Job
from trainer.wire.stages import STAGES


@dataclass(frozen=True)
class Prepared:
    """`held` are rows that the job holds out by itself; None where it holds out none."""

    rows: Rows
    vocabulary: Vocabulary
    template: Template
    stop_id: int
    token_hash: str
    held: Rows | None = None


@dataclass(frozen=True)
class Reader:
    """How files become the rows of a stage: `read` as files.read_rows does, `tokenise` of the sound
    rows, which may raise InvalidJob. `kind` is part of the cache's key."""

    kind: str
    read: Callable[
        [Sequence[tuple[Path, str]], Reading, list[str] | None], tuple[list[Any], list[Defect]]
    ]
    tokenise: Callable[[list[Any], Vocabulary, Template, Job], Rows]


def model_folder(job: Job, run: Path, weights: bool = False) -> Path:
    """Where the base model lies: pushed with the data, or in the hub's cache, fetched there when it
    is not (weights only when asked for)."""
    if job.model.path:
        return run / job.model.path
    return hub_folder(job.model.base, job.model.revision, weights)


def hub_folder(base: str, revision: str | None = None, weights: bool = False) -> Path:
    """Where the hub's cache has a model, fetched there when it is not (weights only when asked
    for). Raises ModelMissing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.model", "*.jinja", "*.txt"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelMissing(
            f"{base} is not on this machine and could not be fetched from the hub: {why}",
            hint="check model.base and model.revision (a gated model needs HF_TOKEN); without a "
            "network, set model.base to the model's folder",
        ) from error


def prepare(
    job: Job, run: Path, reader: Reader | None = None, model: Path | None = None
) -> Prepared:
    """Checks and tokenises the job's data, as rows of answers unless a `reader` is given. `model`
    is the base model's folder, that of `model_folder` without it. Raises InvalidJob, with every
    defect, or TemplateError, before anything costs time or money."""
    reader = reader or ANSWERS
    validate_settings(job)
    folder = model or model_folder(job, run)
    if not folder.is_dir():
        raise InvalidJob(
            f"the base model's folder {job.model.path}/ is not in the run folder",
            hint="push it again, or correct model.path in job.json",
        )
    vocabulary = open_vocabulary(folder)
    validate_vocabulary(vocabulary, folder)
    template = job_template(job, vocabulary)
    stop = stop_token(vocabulary, template)
    cache = (
        (run.parent if run.parent.name == "milktea" else run)
        / "cache"
        / f"{cache_key(job, folder, template, reader.kind)}.safetensors"
    )
    held_cache = cache.with_suffix(".held" + cache.suffix)
    rows, held = read_cache(cache), read_cache(held_cache)
    if rows is None or (held is None and job.data.held_out_share):
        validate_files(job, run)
        found, out, notes = _found(job, run, reader, vocabulary, template)
        rows = reader.tokenise(found, vocabulary, template, job)
        held = reader.tokenise(out, vocabulary, template, job) if out else Rows.empty()
        rows.summary[:0] = notes
        rows.notes.extend(held.notes)
        stop_text = vocabulary.tokenizer.id_to_token(stop)
        if vocabulary.stops and stop_text not in vocabulary.stops:
            rows.summary.append(
                f"answers end in {stop_text}, at which the model's generation_config.json stops no "
                "answer: tell your server to stop there"
            )
        if job.data.held_out_share:
            write_cache(held_cache, held)
        write_cache(cache, rows)
    if not len(rows):
        too_long = any("data.max_length" in note for note in rows.notes)
        hint = "`python -m trainer.data FILE` says what each file holds"
        if too_long:
            hint = 'raise data.max_length, set data.over_length = "truncate", or part long rows'
        raise InvalidJob("no row is left to train on", rows.notes, hint)
    known = token_hash(vocabulary, template)
    return Prepared(rows, vocabulary, template, stop, known, held if held else None)


def _found(
    job: Job, run: Path, reader: Reader, vocabulary: Vocabulary, template: Template
) -> tuple[list[Any], list[Any], list[str]]:
    """(rows to train on, rows that the job holds out by itself, lines about all of them), before
    they are tokenised. Raises InvalidJob with every defect."""
    reading, notes = reading_of(job.data), list[str]()
    found, defects = reader.read([(run / f.path, f.name) for f in job.data.files], reading, notes)
    told = ""
    if job.data.held_out is not None:
        file = (run / job.data.held_out.path, job.data.held_out.name)
        questions, faults = reader.read([file], reading, None)
        defects += faults
        if reader is ANSWERS:
            validate_questions(questions, vocabulary, template, job.data)
        told = held_out.in_both(questions, found)
    validate_rows(defects)
    out: list[Any] = []
    if job.data.held_out is None:
        found, out, told = held_out.split(found, job.data.held_out_share)
    return found, out, [*notes, *filter(None, [told])]


def order_of(job: Job, items: int) -> packing.Order:
    """The order in which `items` rows are trained on."""
    training = job.training
    told = (training.batch_size, training.num_train_epochs, training.seed, training.max_steps)
    return packing.Order(items, *told)


def looks_at(job: Job, rows: Rows, held: Rows) -> held_out.Looks:
    """When the first rows of `held` are measured while `rows` are trained on."""
    order = order_of(job, len(rows) // STAGES[job.stage].rows_per_item)
    trained = int(rows.starts[-1]) * order.total_steps / order.steps_per_epoch
    size = int(held.starts[min(len(held), held_out.MOST_ROWS)])
    return held_out.looks(job.training, order.total_steps, trained, size)


def validate_questions(
    rows: Sequence[Row], vocabulary: Vocabulary, template: Template, data: Data
) -> None:
    """Raises InvalidJob when the template cannot ask held-out rows, before the training that they
    are to score."""
    refused = []
    for row in rows:
        try:
            if row.turns:
                tokens, flag = vocabulary.special_tokens, data.enable_thinking
                prompt(template, row.turns[:-1], tokens, tools=row.tools, thinking=flag)
        except TemplateError as error:
            refused.append(f"{row.where}: {error}")
    if refused:
        raise InvalidJob(
            f"{len(refused)} of {len(rows)} held-out rows cannot be asked",
            refused,
            "mend the rows above, or name another data.template",
        )


def reading_of(data: Data) -> Reading:
    """How the job says that rows are to be read."""
    columns = {str(name): column for name, column in data.columns.items()}
    return Reading(data.format, columns, dict(data.fill), data.bad_rows)


def validate_settings(job: Job) -> None:
    """Raises InvalidJob for settings that no card and no data could serve."""
    if job.training.trains_base and job.model.precision not in ("fp32", "bf16", "fp16"):
        raise InvalidJob(
            f'training.method = "{job.training.method}" changes base weights, which '
            f"{job.model.precision} cannot hold",
            hint='set model.precision = "bf16", or training.method = "lora"',
        )
    begun = "use_dora" if job.lora.use_dora else ""
    begun = "init_lora_weights" if job.lora.init_lora_weights == "pissa" else begun
    if job.training.method == "lora" and job.model.precision == "int8" and begun:
        raise InvalidJob(
            f"lora.{begun} reads the base's own numbers, which int8 does not give",
            hint=f'set model.precision = "nf4" or "bf16", or leave lora.{begun} out',
        )


def job_template(job: Job, vocabulary: Vocabulary) -> Template:
    """The template of a job. Raises InvalidJob where data.enable_thinking would change nothing,
    TemplateError."""
    template = load(job.data.template, job.data.template_text)
    chat = template.name == "chat"
    if chat and not template.jinja:
        template = from_chat_template(vocabulary.chat_template)
    asked = job.data.enable_thinking is not None
    if asked and not (chat and open_chat(template.jinja, vocabulary.special_tokens).flags):
        which = "this tokenizer's chat template" if chat else f"template {template.name}"
        raise InvalidJob(
            f"data.enable_thinking: {which} has no such flag",
            hint="take it out" + ("" if chat else ', or set data.template = "chat"'),
        )
    return template


def validate_vocabulary(vocabulary: Vocabulary, folder: Path) -> None:
    """Raises InvalidJob when the tokenizer can emit ids that the model has no embedding for."""
    held = vocabulary_size(folder)
    if held is not None and vocabulary.size > held:
        raise InvalidJob(
            f"the tokenizer of {folder.name}/ has {vocabulary.size} ids, the model's "
            f"embedding {held}: they do not belong together",
            hint="take both from the same release of the model; tokens that were added need a "
            "model whose embedding was resized",
        )


def vocabulary_size(folder: Path) -> int | None:
    """The vocabulary that config.json tells of, itself or for its text tower; None where it tells
    of none. Raises InvalidJob for a file that is no JSON."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        parts = [config, *(config.get(k) or {} for k in TEXT_KEYS)]
        found = next((p["vocab_size"] for p in parts if "vocab_size" in p), None)
    except (ValueError, TypeError, AttributeError, RecursionError) as why:
        raise InvalidJob(
            f"{folder.name}/config.json is no configuration ({why})", hint="fetch it again"
        ) from why
    return found if isinstance(found, int) else None


def validate_files(job: Job, run: Path) -> None:
    """Raises InvalidJob when a data file is missing or is not the one that the job was made
    with."""
    for file in [*job.data.files, *([job.data.held_out] if job.data.held_out else [])]:
        path = run / file.path
        if not path.is_file():
            raise InvalidJob(
                f"{file.name} is not in the run folder ({file.path})", hint="push the data again"
            )
        found = sha256_of(path)
        if found != file.sha256:
            raise InvalidJob(
                f"{file.name} has sha256 {found[:12]}, job.json says {file.sha256[:12]}",
                hint="push the data again, or make the job anew",
            )


def validate_rows(defects: Sequence[Defect]) -> None:
    if defects:
        many = "1 defect" if len(defects) == 1 else f"{len(defects)} defects"
        raise InvalidJob(
            f"{many} in the data",
            [str(d) for d in defects],
            "mend the rows above; `python -m trainer.data FILE` checks again",
        )


ANSWERS = Reader(
    "rows",
    read_rows,
    lambda found, vocabulary, template, job: tokenise(found, vocabulary, template, job.data),
)


def prompt_ids(data: Prepared, turns: Sequence[Turn], tools: Sequence[Any] = ()) -> list[int]:
    """The ids of a conversation up to where the model answers: exactly how training rows begin."""
    tokens, thinking = data.vocabulary.special_tokens, data.rows.thinking
    text = prompt(data.template, turns, tokens, tools=tools, thinking=thinking)
    return encode(data.vocabulary, data.template, [text])[0][0]
