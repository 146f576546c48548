"""The cache of tokenised rows, keyed by a hash of what they are made from."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from trainer.data.template import Template
from trainer.data.tokenised import Rows
from trainer.wire.job import Job
from trainer.wire.stages import section_of

VERSION = 5  # of the cache's layout and of what encode() makes


EXTRA = "extra/"  # before the names of Rows.extra in the cache


def cache_key(job: Job, folder: Path, template: Template, kind: str) -> str:
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    read = [folder / name for name in names]
    known = [hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in read]
    settings = job.data.model_dump(exclude={"held_out", "template_text"}) | {
        "files": [(f.name, f.sha256) for f in job.data.files]
    }
    named = [VERSION, kind, section_of(job), settings, known, template.name, template.sha256]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:32]


def write_cache(path: Path, rows: Rows) -> None:
    """Atomic. Several processes may write it at once: they write the same bytes. Writes nothing
    where the disk is full or refuses: rows without a cache are made again."""
    # a pid is not unique over machines
    part = path.with_suffix(f".{os.getpid()}.{secrets.token_hex(4)}.part")
    told = [rows.where, rows.notes, rows.summary, rows.thinking]
    text = np.frombuffer(json.dumps(told).encode(), np.uint8)
    arrays = {
        "ids": rows.ids,
        "trained": rows.trained,
        "starts": rows.starts,
        "prompted": rows.prompted,
        "text": text,
        **{EXTRA + name: numbers for name, numbers in rows.extra.items()},
    }
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(arrays, part)
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)


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
