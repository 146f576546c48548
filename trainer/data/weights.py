"""The base model's files, looked at before anything is started: headers only, in milliseconds. No
torch, no transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trainer.data.errors import InvalidJob

EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)


def validate_weights(folder: Path) -> None:
    """Raises InvalidJob for a model folder that transformers could not load: files missing or cut,
    or a vocabulary that is not the weights'."""
    config = _read(folder, "config.json")
    if not config.get("model_type"):
        raise InvalidJob(
            f"{folder.name}/config.json names no model_type",
            hint="take config.json from the model's own release",
        )
    shapes: dict[str, list[int]] = {}
    for path in weight_files(folder):
        shapes |= _shapes(path)
    for name, shape in shapes.items():
        held = config.get("vocab_size")
        if name.endswith(EMBEDDINGS) and isinstance(held, int) and shape[0] != held:
            raise InvalidJob(
                f"{folder.name}/config.json says that the vocabulary has {held} ids, {name} "
                f"has {shape[0]}: they do not belong together",
                hint="take both from the same release of the model; if the embedding was "
                f"resized, set vocab_size to {shape[0]} in config.json",
            )


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
    index = "model.safetensors.index.json"
    if not (folder / index).is_file():
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
    told = _read(folder, index).get("weight_map")
    if not isinstance(told, dict) or not all(isinstance(name, str) for name in told.values()):
        raise InvalidJob(
            f"{folder.name}/{index} has no weight_map from the names of tensors to files",
            hint="push or fetch the model again",
        )
    names = set(told.values())
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise InvalidJob(
            f"{folder.name}/ lacks {len(missing)} of {len(names)} files of weights: {missing[0]}",
            hint="push or fetch the model again",
        )
    return [folder / name for name in sorted(names)]


def _shapes(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, "numpy") as file:
            return {
                name: list(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118 - no iterator of its own
                if name.endswith(EMBEDDINGS)
            }
    except (OSError, SafetensorError) as error:
        raise InvalidJob(
            f"{path.parent.name}/{path.name} ({path.stat().st_size:,} bytes) is not a whole "
            f"safetensors file: {error}",
            hint="push or fetch it again, and compare its sha256 with the release's",
        ) from error
