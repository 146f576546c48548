"""What a merged model from a box must be: its certificate, and every byte of its files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ops.run.expected import WEIGHTS, validate
from trainer.wire import tensors
from trainer.wire.merged import CERTIFICATE, CONFIG, INDEX, holds_weights, may_hold
from trainer.wire.tensors import Tensor

DTYPE = "bfloat16"
MAX_FILES = 1024
MAX_TEXT = 64 << 20  # bytes of a file that is not weights


def listed(certificate: Mapping[str, Any], members: Mapping[str, Any]) -> dict[str, Any]:
    """(sha256, bytes) by name of the files that a certificate lists, and the numbers in it that are
    shown. `members` are those of the verified adapter.zip: what both have must be the same. Raises
    Invalid, KeyError, TypeError."""
    hashes, sizes = certificate["files_sha256"], certificate["files_bytes"]
    validate(set(hashes) == set(sizes), "its certificate has not one size for each file")
    validate(0 < len(hashes) <= MAX_FILES, f"its certificate lists {len(hashes)} files")
    validate(
        certificate["adapter_sha256"] == members[WEIGHTS]["sha256"],
        "it was made of another adapter than the one that came home",
    )
    for name, sha256 in hashes.items():
        validate(may_hold(name), f"it has a file {name!r:.80}, which no merged model has")
        size = sizes[name]
        validate(
            isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256) is not None,
            f"{name} is listed without a sha256",
        )
        validate(type(size) is int and 0 < size < 1 << 50, f"{name} is listed with {size!r:.40}")
        validate(holds_weights(name) or size <= MAX_TEXT, f"{name} has {size:,} bytes")
        validate(
            name not in members or members[name]["sha256"] == sha256,
            f"its {name} is not the one in adapter.zip",
        )
    weights = [name for name in hashes if holds_weights(name)]
    validate(CONFIG in hashes and bool(weights), "it has no weights, or no config.json")
    validate(len(weights) == 1 or INDEX in hashes, f"it has {len(weights)} files and no index")
    numbers = certificate["numbers"]
    shown = {name: numbers[name] for name in ("kl_nats", "share_of_effect", "max_token_nats")}
    validate(
        all(isinstance(v, int | float) and math.isfinite(v) for v in shown.values()),
        "its certificate has no numbers",
    )
    return {"files": {name: [hashes[name], sizes[name]] for name in hashes}, "numbers": shown}


def verify(folder: Path) -> dict[str, int]:
    """Read every byte of a merged model whose files have the hashes of its certificate. Returns the
    counts of tensors and of numbers in them. Raises Invalid, ValueError, OSError."""
    found: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for path in sorted(p for p in folder.iterdir() if p.name != CERTIFICATE):
        if not holds_weights(path.name):
            _validate_text(path)
            continue
        with path.open("rb") as file:
            for tensor in tensors.read(file, path.stat().st_size):
                validate(tensor.name not in found, f"{path.name}: {tensor.name} is there twice")
                validate(tensor.finite, f"{path.name}: {tensor.name} is not finite")
                validate(
                    tensor.dtype == DTYPE or not tensor.dtype.startswith(("float", "bfloat")),
                    f"{path.name}: {tensor.name} is {tensor.dtype}, not {DTYPE}",
                )
                found[tensor.name], places[tensor.name] = tensor, path.name
    validate(any(not tensor.zero for tensor in found.values()), "every weight is zero")
    if (folder / INDEX).is_file():
        told = tensors.strict_json((folder / INDEX).read_bytes())
        validate(
            isinstance(told, dict) and told.get("weight_map") == places,
            f"{INDEX} does not say where its tensors are",
        )
    return {
        "tensors": len(found),
        "parameters": sum(math.prod(tensor.shape) for tensor in found.values()),
    }


def _validate_text(path: Path) -> None:
    if path.suffix == ".jinja":
        path.read_text("utf-8")
    if path.suffix != ".json":
        return
    told = tensors.strict_json(path.read_bytes())
    validate(isinstance(told, dict), f"{path.name} is no object")
    # REPOSITORY--MODULE: code that transformers fetches elsewhere where it is told to trust it
    validate("--" not in f"{told.get('auto_map')}", f"{path.name} names code of another place")
    if path.name == CONFIG:
        validate(isinstance(told.get("model_type"), str), f"{CONFIG} names no model_type")
        validate("quantization_config" not in told, f"{CONFIG} says that it is quantised")
