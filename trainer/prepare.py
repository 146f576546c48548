"""Everything that can be refused before torch is imported: the job, its files, the model's tokenizer, every row. Then the rows' tokens, cached.

The cache is keyed by content (data, tokenizer, template, settings), so a second run or a resume opens it at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from trainer.data import read_rows
from trainer.job import Job
from trainer.prompt import Template, load, render, with_chat_template
from trainer.tokens import Vocabulary, encode, open_vocabulary, stop_token, token_hash

VERSION = 1  # of the cache's layout and of what encode() makes


class Refused(ValueError):
    """The job cannot start: exit code 3. `samples` are file:line; `hint` is what to do."""

    def __init__(self, reason: str, samples: list[str] | None = None, hint: str = "") -> None:
        super().__init__(reason)
        self.samples, self.hint = samples or [], hint


@dataclass(frozen=True)
class Rows:
    """Tokenised rows, end to end: row i is ids[starts[i]:starts[i+1]]; `trained` marks targets; `where` is file:line."""

    ids: np.ndarray  # int32 (tokens,)
    trained: np.ndarray  # bool (tokens,)
    starts: np.ndarray  # int64 (rows + 1,)
    where: list[str]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> list[int]:
        return np.diff(self.starts).tolist()

    def targets(self) -> list[int]:
        """Target tokens of each row. Its first token is never one: nothing predicts it."""
        marks = self.trained.astype(np.int64)
        marks[self.starts[:-1]] = 0
        return np.add.reduceat(marks, self.starts[:-1]).tolist() if len(self) else []


@dataclass(frozen=True)
class Prepared:
    rows: Rows
    vocabulary: Vocabulary
    template: Template
    stop_id: int
    token_hash: str


def model_folder(job: Job, run: Path) -> Path:
    """Where the base model lies: pushed with the data, named as a path, or fetched from the hub."""
    if job.model.path:
        return run / job.model.path
    if Path(job.model.base).is_dir():
        return Path(job.model.base)
    from huggingface_hub import snapshot_download

    keep = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    return Path(snapshot_download(job.model.base, revision=job.model.revision, allow_patterns=keep))


def prepare(job: Job, run: Path) -> Prepared:
    """Checks and tokenises the job's data. Raises Refused, with every defect, before anything costs time."""
    folder = model_folder(job, run)
    vocabulary = open_vocabulary(folder)
    template = load(job.data.template, job.data.template_text)
    if template.name == "chat":
        template = with_chat_template(template, vocabulary.chat_template)
    stop = stop_token(vocabulary, template)
    key = cache_key(job, folder, template)
    cache = (run.parent if run.parent.name == "milktea" else run) / "cache" / f"{key}.safetensors"
    rows = read_cache(cache)
    if rows is None:
        rows = tokenise(job, run, vocabulary, template)
        write_cache(cache, rows)
    return Prepared(rows, vocabulary, template, stop, token_hash(vocabulary, template))


def tokenise(job: Job, run: Path, vocabulary: Vocabulary, template: Template) -> Rows:
    found = [row for file in job.data.files for row in read_rows(run / file.path, file.name, job.data.format)]
    texts = [render(template, row.turns, eos=vocabulary.eos, bos=vocabulary.bos) for row in found]
    coded = encode(vocabulary, template, texts)
    lengths = [len(ids) for ids, _ in coded]
    return Rows(
        np.fromiter((i for ids, _ in coded for i in ids), np.int32, sum(lengths)),
        np.fromiter((t for _, trained in coded for t in trained), np.bool_, sum(lengths)),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        [row.where for row in found],
    )


def cache_key(job: Job, folder: Path, template: Template) -> str:
    tokenizer = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    settings = job.data.model_dump(exclude={"held_out", "template_text"}) | {"files": [(f.name, f.sha256) for f in job.data.files]}
    parts = [VERSION, settings, tokenizer, template.sha256]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def write_cache(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    where = np.frombuffer("\n".join(rows.where).encode(), np.uint8)
    save_file({"ids": rows.ids, "trained": rows.trained, "starts": rows.starts, "where": where}, part)
    part.rename(path)


def read_cache(path: Path) -> Rows | None:
    if not path.is_file():
        return None
    data = load_file(path)
    return Rows(data["ids"], data["trained"], data["starts"], data["where"].tobytes().decode().split("\n"))
