"""Weights in other people's files, read without running them, and safetensors written from them.

Formats: what `torch.save` writes (.pth, .bin), a zip of a pickle and of each tensor's bytes; and
safetensors. The pickle is read by torch's own unpickler for weights, which knows tensors and
refuses every other name before it is looked up.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"
Progress = Callable[[str], None]


class InvalidCheckpoint(ValueError):
    """A file that is not converted; ``hint`` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name, mapped into memory and not yet read.

    Raises InvalidCheckpoint for a torn file, for a pickle that names anything but tensors, and for
    a tensor that reaches outside of its storage."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # safetensors has an exception of its own for a torn header
            raise _torn(path, error) from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InvalidCheckpoint(
            f"{path.name}: its pickle names more than tensors, so it is refused: {_short(error)}",
            "get the weights from where they were published; this file can run code",
        ) from error
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, TypeError) as error:
        raise _torn(path, error) from error
    if not isinstance(found, Mapping):
        raise _torn(path, TypeError(f"it holds a {type(found).__name__}, no tensors by name"))
    for name, tensor in found.items():
        _validate_bounds(path, name, tensor)
    return {str(name): tensor.detach() for name, tensor in found.items()}


def write(
    tensors: Iterable[tuple[str, Tensor]],
    target: Path,
    progress: Progress,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write ``tensors``, in their order, as safetensors shards of about ``shard_bytes`` with an
    index; returns the shards. Memory: one shard.
    """
    parts: list[Path] = []
    where: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    filled = total = 0

    def flush() -> None:
        nonlocal held, filled
        parts.append(target / f"part-{len(parts) + 1:05d}")
        progress(f"writing shard {len(parts)}: {len(held)} tensors")
        save_file(held, parts[-1], metadata={"format": "pt"})
        held, filled = {}, 0

    for name, tensor in tensors:
        size = tensor.nbytes
        if held and filled + size > shard_bytes:
            flush()
        held[name] = tensor.contiguous()
        where[name] = len(parts)
        filled, total = filled + size, total + size
    flush()
    names = (
        ["model.safetensors"]
        if len(parts) == 1
        else [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
    )
    shards = [part.rename(target / name) for part, name in zip(parts, names, strict=True)]
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: names[number] for name, number in where.items()},
        }
        write_json(target / INDEX, index)
    return shards


def new_folder(target: Path) -> None:
    """Make ``target``; raises InvalidCheckpoint where it holds something."""
    if target.exists() and any(target.iterdir()):
        raise InvalidCheckpoint(f"{target} is not empty", "name a new folder")
    target.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")


def main(convert: Callable[..., list[Path]], usage: str, folders: int = 2) -> int:
    """The command line of a converter, which takes so many folders and a Progress; says what it
    refuses and returns 2."""
    given = [Path(word) for word in sys.argv[1:]]
    if len(given) != folders:
        print(usage, file=sys.stderr)
        return 2
    try:
        shards = convert(*given, lambda line: print(line, file=sys.stderr))
    except InvalidCheckpoint as error:
        print(f"refused: {error}\ndo this: {error.hint}", file=sys.stderr)
        return 2
    print(*shards, sep="\n")
    return 0


def _validate_bounds(path: Path, name: object, tensor: object) -> None:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise _torn(path, TypeError(f"{name!r} is no tensor"))
    there = tensor.untyped_storage().nbytes()
    last = tensor.storage_offset() + tensor.numel()
    if not tensor.is_contiguous() or last * tensor.element_size() > there:
        raise InvalidCheckpoint(
            f"{path.name}: {name} reaches outside of its {there:,} bytes, or is no plain tensor",
            "get the weights from where they were published",
        )


def _torn(path: Path, error: Exception) -> InvalidCheckpoint:
    return InvalidCheckpoint(
        f"{path.name} is not a whole checkpoint: {_short(error)}", "download it again: it broke off"
    )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
