"""Everything that can be refused before torch is imported: the job's files, the model's tokenizer,
every row. Then the rows' tokens, cached.

ops calls `prepare` before renting, trainer.launch before starting processes, every process once
more to open the cache, which is keyed by content (data, tokenizer, template, settings). Nothing is
dropped or cut without a line in `notes`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from trainer.data import held_out, packing
from trainer.data.chat import Example
from trainer.data.files import Defect, Reading, read_rows
from trainer.data.formats import Row
from trainer.data.render import examples, prompt
from trainer.data.template import (
    Segment,
    Template,
    TemplateError,
    Turn,
    load,
    with_chat_template,
)
from trainer.data.tokens import (
    Vocabulary,
    encode,
    open_vocabulary,
    stop_ids,
    stop_token,
    token_hash,
    unjoined,
)
from trainer.wire.job import Data, Job
from trainer.wire.stages import section_of

VERSION = 4  # of the cache's layout and of what encode() makes
EXTRA = "extra/"  # before the names of Rows.extra in the cache
AT_ONCE = 4096  # rows tokenised together: the tokenizer spreads them over the cores


class InvalidJob(ValueError):
    """The job cannot start: exit code 3. `samples` are file:line; `hint` is what to do."""

    def __init__(self, reason: str, samples: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(reason)
        self.samples, self.hint = list(samples), hint


class ModelMissing(InvalidJob):
    """The base model is not on this machine, and the hub does not give it."""


@dataclass(frozen=True)
class Rows:
    """Tokenised rows, end to end: row i is ids[starts[i]:starts[i+1]]; `trained` marks targets;
    `where` is file:line. `notes` are lines of single rows that were changed or left out, `summary`
    lines of all rows together. `thinking` is the flag with which a chat template's prompts ask for
    reasoning, None where it has none. `extra` are numbers of each row that a stage needs, by
    name."""

    ids: np.ndarray  # int32 (tokens,)
    trained: np.ndarray  # bool (tokens,)
    starts: np.ndarray  # int64 (rows + 1,)
    prompted: np.ndarray  # bool (rows,): has a prompt; plain text has none
    where: list[str]
    notes: list[str] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    thinking: bool | None = None
    extra: dict[str, np.ndarray] = field(default_factory=dict)  # (rows,)

    @classmethod
    def empty(cls) -> Rows:
        return cls(
            np.zeros(0, np.int32),
            np.zeros(0, np.bool_),
            np.zeros(1, np.int64),
            np.zeros(0, np.bool_),
            [],
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> list[int]:
        return cast(list[int], np.diff(self.starts).tolist())

    def targets(self) -> list[int]:
        """Target tokens of each row. Its first token is never one: nothing predicts it."""
        marks = self.trained.astype(np.int64)
        marks[self.starts[:-1]] = 0
        return np.add.reduceat(marks, self.starts[:-1]).tolist() if len(self) else []


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


def prepare(job: Job, run: Path, reader: Reader | None = None) -> Prepared:
    """Checks and tokenises the job's data, as rows of answers unless a `reader` is given. Raises
    InvalidJob, with every defect, or TemplateError, before anything costs time or money."""
    reader = reader or ANSWERS
    validate_settings(job)
    folder = model_folder(job, run)
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
        raise InvalidJob(
            "no row is left to train on",
            rows.notes,
            "`python -m trainer.data FILE` says what each file holds",
        )
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
    """In which `items` rows are trained on."""
    training = job.training
    told = (training.batch_size, training.num_train_epochs, training.seed, training.max_steps)
    return packing.Order(items, *told)


def looks_at(job: Job, rows: Rows, held: Rows) -> held_out.Looks:
    """When the first rows of `held` are measured while `rows` are trained on."""
    order = order_of(job, len(rows))
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
    if job.training.method != "lora" and job.model.precision not in ("fp32", "bf16"):
        raise InvalidJob(
            f'training.method = "{job.training.method}" changes base weights, which '
            f"{job.model.precision} cannot hold",
            hint='set model.precision = "bf16", or training.method = "lora"',
        )


def job_template(job: Job, vocabulary: Vocabulary) -> Template:
    template = load(job.data.template, job.data.template_text)
    return (
        with_chat_template(template, vocabulary.chat_template)
        if template.name == "chat"
        else template
    )


def validate_vocabulary(vocabulary: Vocabulary, folder: Path) -> None:
    """Raises InvalidJob when the tokenizer can emit ids that the model has no embedding for."""
    config = folder / "config.json"
    held = (
        json.loads(config.read_text(encoding="utf-8")).get("vocab_size")
        if config.is_file()
        else None
    )
    if held is not None and vocabulary.size > held:
        raise InvalidJob(
            f"the tokenizer of {folder.name}/ has {vocabulary.size} ids, the model's "
            f"embedding {held}: they do not belong together",
            hint="take both from the same release of the model; tokens that were added need a "
            "model whose embedding was resized",
        )


def validate_files(job: Job, run: Path) -> None:
    """Raises InvalidJob when a data file is missing or is not the one that the job was made
    with."""
    for file in [*job.data.files, *([job.data.held_out] if job.data.held_out else [])]:
        path = run / file.path
        if not path.is_file():
            raise InvalidJob(
                f"{file.name} is not in the run folder ({file.path})", hint="push the data again"
            )
        with open(path, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
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


def _note_long_row(
    where: str,
    tokens: int,
    limit: int,
    policy: str,
    cut: object | None,
    found: _Tokenised,
) -> None:
    """Adds to the notes or to the refusals what `policy` made of a row that is too long; `cut` is
    what is left of it."""
    what = f"{where}: {tokens} tokens, data.max_length is {limit}"
    if policy == "refuse":
        found.refused.append(what)
    elif policy == "truncate" and cut is None:
        found.refused.append(f"{what}, and its prompt alone fills that")
    else:
        found.notes.append(
            f"{what}: {'dropped' if cut is None else 'cut at the end, stop token kept'}"
        )


def tokenise(rows: Sequence[Row], vocabulary: Vocabulary, template: Template, data: Data) -> Rows:
    """Rows to ids and targets; `data` are the job's settings. Over-length rows are refused, dropped
    or cut as it says; each is in the notes or in the refusal. A row that would teach nothing, whose
    answer would not end in a stop token, or that holds a special token's text, is refused."""
    limit, policy = data.max_length, data.over_length
    stop, stops = stop_token(vocabulary, template), stop_ids(vocabulary, template)
    found = _Tokenised()
    for begin in range(0, len(rows), AT_ONCE):
        made = _rendered(rows[begin : begin + AT_ONCE], vocabulary, template, data, found)
        texts = encode(vocabulary, template, [example.segments for _, example in made])
        for (row, _), (token_ids, trained) in zip(made, texts, strict=True):
            if fault := label_fault(token_ids, trained, stops):
                found.refuse(f"{row.where}: {fault}", data)
                continue
            if len(token_ids) > limit:
                found.longest = max(found.longest, len(token_ids))
                cut = truncated(token_ids, trained, stop, limit) if policy == "truncate" else None
                _note_long_row(row.where, len(token_ids), limit, policy, cut, found)
                if cut is None:
                    continue
                token_ids, trained = cut
            found.ids.append(np.asarray(token_ids, np.int32))
            found.marks.append(np.asarray(trained, np.bool_))
            found.prompted.append(bool(row.turns))
            found.where.append(row.where)
    if found.refused:
        hint = (
            long_rows_hint(found.longest, policy)
            if found.longest
            else "mend the rows above, or name another data.template"
        )
        raise InvalidJob(
            f"{len(found.refused)} of {len(rows)} rows cannot be trained on", found.refused, hint
        )
    return found.rows(data.enable_thinking)


@dataclass
class _Tokenised:
    """What tokenise() has made so far."""

    ids: list[np.ndarray] = field(default_factory=list)
    marks: list[np.ndarray] = field(default_factory=list)
    prompted: list[bool] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    longest: int = 0  # of the rows over the limit
    split: int = 0  # conversations that became several examples
    pieces: int = 0  # examples that they became
    empty_blocks: int = 0
    thinking: Counter[bool | None] = field(default_factory=Counter)

    def refuse(self, fault: str, data: Data) -> None:
        if data.bad_rows == "drop":
            self.notes.append(f"{fault}; left out")
        else:
            self.refused.append(fault)

    def rows(self, wanted: bool | None) -> Rows:
        """`wanted` is the job's enable_thinking."""
        starts = np.concatenate([[0], np.cumsum([len(i) for i in self.ids])]).astype(np.int64)
        return Rows(
            np.concatenate([np.zeros(0, np.int32), *self.ids]),
            np.concatenate([np.zeros(0, np.bool_), *self.marks]),
            starts,
            np.asarray(self.prompted, np.bool_),
            self.where,
            self.notes,
            self._summary(wanted),
            wanted if wanted is not None else self._flag(),
        )

    def _flag(self) -> bool | None:
        return (
            None if not (self.thinking[True] or self.thinking[False]) else bool(self.thinking[True])
        )

    def _summary(self, wanted: bool | None) -> list[str]:
        lines = []
        if self.split:
            lines.append(
                f"{self.split:,} conversations became {self.pieces:,} examples: the chat template "
                "writes earlier answers otherwise than it lets the model write them"
            )
        plain, reasoned = self.thinking[False], self.thinking[True]
        if wanted is None and plain:
            share = f"{plain:,} of {plain + reasoned:,} examples have" if reasoned else "no row has"
            lines.append(
                f"{share} no reasoning and are trained as with enable_thinking = false"
                if reasoned
                else f"{share} reasoning: trained as with enable_thinking = false; serve it so, or "
                "set data.enable_thinking"
            )
        if self.empty_blocks:
            lines.append(
                f"{self.empty_blocks:,} examples have no reasoning although the chat template's "
                "prompt opens a block of it: the model learns to close it, empty"
            )
        return lines


def _rendered(
    rows: Sequence[Row],
    vocabulary: Vocabulary,
    template: Template,
    data: Data,
    found: _Tokenised,
) -> list[tuple[Row, Example]]:
    """Each row's texts with their trained parts. Plain text is trained whole; what the template
    refuses, or spells out a special token, is added to `found.refused`."""
    specials = [s for s in vocabulary.special_texts if len(s) > 2]
    pattern = re.compile("|".join(map(re.escape, specials))) if specials else None
    made: list[tuple[Row, Example]] = []
    for row in rows:
        if row.text:
            end = "" if row.text.endswith(vocabulary.eos) else vocabulary.eos
            made.append((row, Example([Segment(row.text + end, True)])))
            continue
        if fault := special_token_fault(row, pattern):
            found.refuse(f"{row.where}: {fault}", data)
            continue
        try:
            some = examples(
                template,
                row.turns,
                vocabulary.special_tokens,
                tools=row.tools,
                thinking=data.enable_thinking,
                last_only=data.train_on == "last",
            )
        except TemplateError as error:
            found.refuse(f"{row.where}: {error}", data)
            continue
        if not some:
            found.notes.append(f"{row.where}: left out, no answer of it is to be learned")
        found.split += len(some) > 1
        found.pieces += len(some) if len(some) > 1 else 0
        found.empty_blocks += sum(example.empty_block for example in some)
        found.thinking.update(example.thinking for example in some)
        for example in some:
            parts = unjoined(vocabulary, example.segments) if template.name == "chat" else []
            if len(parts) > 1:
                made += [(row, Example(part)) for part in parts]
            else:
                made.append((row, example))
    return made


ANSWERS = Reader(
    "rows",
    read_rows,
    lambda found, vocabulary, template, job: tokenise(found, vocabulary, template, job.data),
)


def long_rows_hint(longest: int, policy: str) -> str:
    """What to do about rows that are too long."""
    others = {"refuse": '"drop" or "truncate"', "truncate": '"drop"'}[policy]
    return f"set data.max_length to {longest} (the longest row), or data.over_length to {others}"


def special_token_fault(row: Row, specials: re.Pattern[str] | None) -> str:
    """The fault of a row that spells out a special token: it would become that token in the middle
    of a text."""
    if specials is None:
        return ""
    for turn in row.turns:
        for text in (turn.text, turn.extra, turn.reasoning):
            if text and (held := specials.search(text)):
                return (
                    f"holds the text {held[0]!r}, which this tokenizer reads as a special "
                    "token: write it otherwise"
                )
    return ""


def label_fault(ids: Sequence[int], trained: Sequence[bool], stops: frozenset[int]) -> str:
    """The fault of a row without a target, or with an answer that does not end in one of
    `stops`."""
    if not any(trained[1:]):
        return "not one token of it would be learned: every label is masked"
    ends = [i for i in range(len(ids)) if trained[i] and (i + 1 == len(ids) or not trained[i + 1])]
    bare = [i for i in ends if ids[i] not in stops]
    return (
        f"answer {ends.index(bare[0]) + 1} does not end in the stop token as a trained label"
        if bare
        else ""
    )


def truncated(
    ids: list[int], trained: list[bool], stop: int, limit: int
) -> tuple[list[int], list[bool]] | None:
    """The first `limit` tokens with the stop token as the last, trained one; None where no token of
    an answer would be left before it."""
    room = limit - 1
    if not any(trained[1:room]):
        return None
    # the cut falls into a later question: end with the answer before it, whose stop token is there
    while not trained[room - 1]:
        room -= 1
    if ids[room - 1] == stop and (room >= len(ids) or not trained[room]):
        return ids[:room], trained[:room]
    return [*ids[:room], stop], [*trained[:room], True]


def cache_key(job: Job, folder: Path, template: Template, kind: str) -> str:
    read = [folder / "tokenizer.json", folder / "generation_config.json"]
    known = [hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in read]
    settings = job.data.model_dump(exclude={"held_out", "template_text"}) | {
        "files": [(f.name, f.sha256) for f in job.data.files]
    }
    named = [VERSION, kind, section_of(job), settings, known, template.name, template.sha256]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:32]


def write_cache(path: Path, rows: Rows) -> None:
    """Atomic, and the same whoever writes it: several processes may."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # a pid is not unique over machines
    part = path.with_suffix(f".{os.getpid()}.{secrets.token_hex(4)}.part")
    told = [rows.where, rows.notes, rows.summary, rows.thinking]
    text = np.frombuffer(json.dumps(told).encode(), np.uint8)
    save_file(
        {
            "ids": rows.ids,
            "trained": rows.trained,
            "starts": rows.starts,
            "prompted": rows.prompted,
            "text": text,
            **{EXTRA + name: numbers for name, numbers in rows.extra.items()},
        },
        part,
    )
    part.rename(path)


def read_cache(path: Path) -> Rows | None:
    """The cached rows, or None where there are none or the file is damaged."""
    try:
        data = load_file(path)
        where, notes, summary, thinking = json.loads(data["text"].tobytes())
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    arrays = (data["ids"], data["trained"], data["starts"], data["prompted"])
    extra = {k.removeprefix(EXTRA): v for k, v in data.items() if k.startswith(EXTRA)}
    return Rows(*arrays, where, notes, summary, thinking, extra)


def prompt_ids(data: Prepared, turns: Sequence[Turn], tools: Sequence[Any] = ()) -> list[int]:
    """The ids of a conversation up to where the model answers: exactly how training rows begin."""
    tokens, thinking = data.vocabulary.special_tokens, data.rows.thinking
    text = prompt(data.template, turns, tokens, tools=tools, thinking=thinking)
    return encode(data.vocabulary, data.template, [text])[0][0]
