"""The base model's files, looked at before anything is started: headers only, in milliseconds. No
torch, no transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trainer import families
from trainer.data.errors import InvalidJob
from trainer.families import FamilyError

INDEX = "model.safetensors.index.json"
_HEADS = ("head", "embed_out", "output")  # in the names of output layers
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)


_LAYER = re.compile(r"(.*\b(?:layers|layer|h|blocks))\.(\d+)\.")
_AGAIN = "push or fetch the model again"


def validate_weights(folder: Path) -> None:
    """Raises InvalidJob for a model folder that transformers could not load, or would fill up with
    random numbers: an adapter's, files missing or cut, layers or an output layer missing, a
    vocabulary that is not the weights'."""
    _validate_no_adapter(folder)
    config = _read(folder, "config.json")
    if not config.get("model_type"):
        raise InvalidJob(
            f"{folder.name}/config.json names no model_type",
            hint="take config.json from the model's own release",
        )
    headers: dict[str, tuple[str, list[int]]] = {}
    for path in weight_files(folder):
        headers |= _headers(path)
    shapes = {name: shape for name, (_, shape) in headers.items()}
    _validate_names(folder)
    _validate_scales(folder, headers)
    _validate_complete(folder, config, shapes)
    for name, shape in shapes.items():
        held = config.get("vocab_size")
        if name.endswith(EMBEDDINGS) and isinstance(held, int) and shape[0] != held:
            raise InvalidJob(
                f"{folder.name}/config.json says that the vocabulary has {held} ids, {name} "
                f"has {shape[0]}: they do not belong together",
                hint="take both from the same release of the model; if the embedding was "
                f"resized, set vocab_size to {shape[0]} in config.json",
            )


def _validate_no_adapter(folder: Path) -> None:
    """transformers would load an adapter that lies beside a model's weights, or the base that it
    names."""
    if not (folder / "adapter_config.json").is_file():
        return
    base = _read(folder, "adapter_config.json").get("base_model_name_or_path")
    raise InvalidJob(
        f"{folder.name}/ holds an adapter (adapter_config.json) of {base or 'another model'}",
        hint="name the model that it was trained on in model.base, and this folder in start; or "
        "merge them first",
    )


def _validate_names(folder: Path) -> None:
    """Raises InvalidJob where transformers would not find the files by their names."""
    if (folder / "model.safetensors").is_file() or (folder / INDEX).is_file():
        return
    names = sorted(p.name for p in weight_files(folder))
    raise InvalidJob(
        f"{folder.name}/ has {names[0]}"
        + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        + f", and neither model.safetensors nor {INDEX}, by which transformers finds weights",
        hint=f"{_AGAIN}, with {INDEX}"
        if len(names) > 1
        else "save the model again with save_pretrained",
    )


def _validate_complete(folder: Path, config: dict[str, Any], names: Collection[str]) -> None:
    """Raises InvalidJob where layers that config.json tells of, or the output layer, have no
    weights: transformers would make up theirs."""
    try:
        family = families.read(config)
        layers = family.layers
    except FamilyError:
        return  # refused for its family
    held: dict[str, int] = {}
    for name in names:
        if found := _LAYER.match(name):
            held[found[1]] = max(held.get(found[1], 0), int(found[2]) + 1)
    if held and max(held.values()) < layers:
        raise InvalidJob(
            f"{folder.name}/config.json tells of {layers} layers, the weights are of "
            f"{max(held.values())}",
            hint="take both from the same release of the model",
        )
    ties = [part.get("tie_word_embeddings") for part in (config, family.config)]
    if (
        False in ties
        and not any(ties)
        and held
        and not any(word in name for name in names for word in _HEADS)
    ):
        raise InvalidJob(
            f"{folder.name}/ has no output layer among its weights, and config.json says that it "
            "is not the embedding (tie_word_embeddings)",
            hint="name a causal language model in model.base: a classifier or an embedding model "
            "has no output layer; or take config.json from the same release",
        )


def _validate_scales(folder: Path, headers: Mapping[str, tuple[str, Any]]) -> None:
    """Raises InvalidJob for a tensor in float8 beside which no scale stands."""
    for name, (kind, _) in headers.items():
        module = name.removesuffix("weight")
        scales = (f"{name}_scale", f"{module}scale", f"{module}weight_scale")
        if kind.startswith("F8_E") and not any(other.startswith(scales) for other in headers):
            raise InvalidJob(
                f"{name} of {folder.name}/ is in float8, without the scales that restore it",
                hint="name the model that it was made from in model.base",
            )


def module_names(folder: Path) -> set[str]:
    """Names of the modules of a model's folder that have weights, or hold some that have, as its
    files name them. Raises InvalidJob."""
    steps = (name.split(".")[:-1] for path in weight_files(folder) for name in _headers(path))
    return {".".join(of[:n]) for of in steps for n in range(1, len(of) + 1)}


def _read(folder: Path, name: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise InvalidJob(
            f"the base model's folder {folder.name}/ is not in the run folder",
            hint="push it again, or correct model.path in job.json",
        )
    if not (folder / name).is_file():
        raise InvalidJob(
            f"{folder.name}/ has no {name}: it is not a model that transformers saved",
            hint="push the model's whole folder",
        )
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidJob(
            f"{folder.name}/{name} is not JSON ({error})", hint="fetch it again"
        ) from error
    return found if isinstance(found, dict) else {}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: model.safetensors, those that its index names, or
    all. Raises InvalidJob where one is missing or there is none."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).is_file():
        names = {p.name for p in folder.glob("*.safetensors")}
        if not names:
            old = next((p.name for p in folder.glob("*.bin")), "")
            raise InvalidJob(
                f"{folder.name}/ has no weights (*.safetensors)"
                + (f", only {old}, which may run code when it is opened" if old else ""),
                hint="save the model again with save_pretrained, which writes safetensors"
                if old
                else "push the model's whole folder",
            )
        return [folder / name for name in sorted(names)]
    told = _read(folder, INDEX).get("weight_map")
    if not isinstance(told, dict) or not all(isinstance(name, str) for name in told.values()):
        raise InvalidJob(
            f"{folder.name}/{INDEX} has no weight_map from the names of tensors to files",
            hint=_AGAIN,
        )
    names = set(told.values())
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise InvalidJob(
            f"{folder.name}/ lacks {len(missing)} of {len(names)} files of weights: {missing[0]}",
            hint=_AGAIN,
        )
    return [folder / name for name in sorted(names)]


def _headers(path: Path) -> dict[str, tuple[str, list[int]]]:
    """The type and the shape of each tensor of a file."""
    try:
        with safe_open(path, "numpy") as file:
            parts = {n: file.get_slice(n) for n in file.keys()}  # noqa: SIM118 - no iterator
            return {n: (part.get_dtype(), list(part.get_shape())) for n, part in parts.items()}
    except (OSError, SafetensorError) as error:
        raise InvalidJob(
            f"{path.parent.name}/{path.name} ({path.stat().st_size:,} bytes) is not a whole "
            f"safetensors file: {error}",
            hint="push or fetch it again, and compare its sha256 with the release's",
        ) from error
