"""An adapter merged into its base, file by file: each weight in fp32, cast once and written.
No model is held in memory; of an adapted weight, one layer at a time.

    python -m trainer.result.merge ADAPTER --base MODEL --out FOLDER [--dtype bf16] [--data FILE]
    python -m trainer.result.merge RUN_FOLDER --out FOLDER

What becomes of each weight is planned first (trainer/result/merge_plan.py). A merge counts once
its certificate passes (trainer/result/certificate.py).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.tuners.lora import Embedding, LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from trainer.data.weights import weight_files
from trainer.result.adapter import base_defect, merged_defect
from trainer.result.certificate import (
    NotCertified,
    certificate_text,
    certify,
    device_for,
    open_tokenizer,
)
from trainer.result.command import StatusLine, answer, parser_of
from trainer.result.files import PREFIX, unpacked
from trainer.result.merge_plan import Change, MergeError, MergePlan, plan_of
from trainer.result.open import (
    NO_ANSWERS,
    TEXTS,
    base_folder,
    base_of_result,
    result_of_run,
    texts_of,
)
from trainer.wire.digest import sha256_of
from trainer.wire.merged import CERTIFICATE, INDEX, WORDS, part_of

Tell = Callable[[str], None]  # is called with each line of progress
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MARGIN_BYTES = 256 << 20


def merge(
    adapter: Path, base: Path, out: Path, dtype: str = "bf16", tell: Tell = lambda line: None
) -> dict[str, Any]:
    """Write base + adapter to the new folder `out` as `dtype` (fp32, bf16, fp16); `tell` hears of
    each file. Returns the number of changed weights and of bytes. Raises MergeError for an adapter
    that does not fit this base, for one that cannot be merged, for a weight that does not fit the
    type."""
    with _part(out) as part:
        made = _written(adapter, base, part, dtype, tell)
        part.rename(out)
    return made


def _written(adapter: Path, base: Path, out: Path, dtype: str, tell: Tell) -> dict[str, Any]:
    """Fills the folder `out`; returns and raises as `merge`."""
    if defect := merged_defect(adapter, base):
        raise MergeError(defect)
    shards = shards_of(base)
    _validate_room(shards, base, out, dtype)
    total = 0
    index: dict[str, str] = {}
    with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
        stored = {n for names in shards.values() for n in names}
        plan = plan_of(adapter, base, tensors, stored)
        for number, (shard, names) in enumerate(shards.items(), 1):
            tell(f"merging {shard}, {number} of {len(shards)}")
            written: dict[str, torch.Tensor] = {}
            with safe_open(base / shard, "pt") as source:
                for name, value in _merged(plan, source, names, tensors, stored):
                    written[name] = _cast(name, value, dtype, name in plan.changes)
            save_file(written, out / shard, metadata={"format": "pt"})
            index |= dict.fromkeys(written, shard)
            total += sum(t.nbytes for t in written.values())
    _write_settings(adapter, base, out, dtype, plan.unties)
    if len(shards) > 1:
        (out / INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        )
    return {"dtype": dtype, "changed": len(plan.changes), "bytes": total, "untied": plan.unties}


@contextmanager
def _part(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, locked while the block runs, and gone after it. Raises MergeError
    where `out` is there."""
    if out.exists():
        raise MergeError(f"{out} exists: name a new folder")
    part = part_of(out)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    lock = os.open(part, os.O_RDONLY)
    try:
        with suppress(OSError):  # a disk without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield part
    finally:
        os.close(lock)
        shutil.rmtree(part, ignore_errors=True)


def shards_of(base: Path) -> dict[str, list[str]]:
    """The safetensors files of a model's folder, each with the names in it. Raises InvalidJob where
    one is missing."""
    shards = {}
    for path in weight_files(base):
        with safe_open(path, "pt") as source:
            shards[path.name] = list(source.keys())
    return shards


def _validate_room(shards: dict[str, list[str]], base: Path, out: Path, dtype: str) -> None:
    if dtype not in DTYPES:
        raise MergeError(f"dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    held = sum((base / name).stat().st_size for name in shards)
    widest = held * (2 if dtype == "fp32" else 1) + _MARGIN_BYTES
    parent = next(p for p in out.resolve().parents if p.exists())
    if shutil.disk_usage(parent).free < widest:
        raise MergeError(
            f"{parent} has no room for {widest / 1e9:.1f} GB: name an --out on another disk"
        )


def _merged(
    plan: MergePlan, source: Any, names: list[str], tensors: Any, stored: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of one file, of all the `stored` ones; where head and embedding were one and
    only one of them changed, the head comes beside the embedding under its own name."""
    parts: dict[str, dict[str, torch.Tensor]] = {}  # of the layer at work
    for name in names:
        value = source.get_tensor(name)
        yield name, _changed(plan, name, value, tensors, parts)
        if name == plan.embedding and plan.unties and plan.head not in stored:
            yield plan.head, _changed(plan, plan.head, value, tensors, parts)


def _changed(
    plan: MergePlan,
    name: str,
    value: torch.Tensor,
    tensors: Any,
    parts: dict[str, dict[str, torch.Tensor]],
) -> torch.Tensor:
    change = plan.changes.get(name)
    if change is None:
        return value
    made = change.layer or change.replacement
    if made not in parts:
        parts.clear()
        parts[made] = _parts(plan, change, tensors)
    its = parts[made]
    part = its[name] if name in its else its[f"{plan.model.base_model_prefix}.{name}"]
    if part.shape != value.shape:
        raise MergeError(
            f"{name} is {tuple(value.shape)} in the base and {tuple(part.shape)} in the adapter: "
            "it is another base"
        )
    if change.replacement:
        return part.clone()  # those of one tensor share its memory
    if (own := f"{change.layer}.base_layer.weight") in tensors.keys():  # noqa: SIM118 - a file
        value = tensors.get_tensor(own)  # PEFT saves an adapted embedding along
    return _scaled(plan.model.get_submodule(change.layer), change, value.float() + part, tensors)


def _scaled(module: Any, change: Change, merged: torch.Tensor, tensors: Any) -> torch.Tensor:
    """Of a DoRA the vectors of a merged weight with the lengths that it learned."""
    name = f"{change.layer}.lora_magnitude_vector"
    if name not in tensors.keys():  # noqa: SIM118 - a file, not a dict
        return merged
    across = 0 if isinstance(module, Embedding) or module.fan_in_fan_out else 1
    length = torch.linalg.vector_norm(merged, dim=across, keepdim=True)
    learned = tensors.get_tensor(name).float().reshape(length.shape)
    return torch.Tensor(merged * (learned / length))


def _parts(plan: MergePlan, change: Change, tensors: Any) -> dict[str, torch.Tensor]:
    """What a change brings, by the names in the files: deltas in fp32, or new weights."""
    if change.layer:
        return _delta(plan, change.layer, tensors)
    new = tensors.get_tensor(change.replacement)
    key = change.replacement.removeprefix(PREFIX)
    return dict(revert_weight_conversion(plan.model.get_base_model(), {key: new}))


def _delta(plan: MergePlan, layer: str, tensors: Any) -> dict[str, torch.Tensor]:
    """The deltas of a layer, fp32, scale included, by the names in the files."""
    module: Any = plan.model.get_submodule(layer)
    for key in tensors.keys():  # noqa: SIM118 - a file, not a dict
        if not key.startswith(f"{layer}.lora_") or key.endswith("lora_magnitude_vector"):
            continue
        part = key.removeprefix(f"{layer}.").split(".")[0]
        held, value = getattr(module, part), nn.Parameter(tensors.get_tensor(key).float())
        if isinstance(held, nn.ParameterDict):
            held["default"] = value
        else:
            held["default"].weight = value
    with torch.no_grad(), _weight_at(module):
        delta = module.get_delta_weight("default")
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        if held := getattr(module, part, None):
            held.to("meta")
    base = plan.model.get_base_model()
    return dict(revert_weight_conversion(base, {plan.keys[layer]: delta}))


@contextmanager
def _weight_at(module: Any) -> Iterator[None]:
    """Experts' deltas go where their weights are and take their type: for the while, here and
    fp32."""
    name = getattr(module, "parameter_name", "")
    inner = module
    while isinstance(inner, LoraLayer):
        inner = inner.get_base_layer()
    held = getattr(inner, name) if name else None
    if held is not None:
        setattr(inner, name, nn.Parameter(torch.empty(0)))
    yield
    if held is not None:
        setattr(inner, name, held)


def _cast(name: str, value: torch.Tensor, dtype: str, changed: bool) -> torch.Tensor:
    """Raises MergeError for a number that becomes none. What the base has of them stays."""
    if not value.is_floating_point():
        return value.contiguous()
    cast = value.to(DTYPES[dtype]).contiguous()
    if not torch.isfinite(cast).all():
        if changed and not torch.isfinite(value).all():
            raise MergeError(f"{name} holds a number that is not finite, in base or adapter")
        if (value.isfinite() & ~cast.isfinite()).any():
            raise MergeError(f"{name} does not fit {dtype}: use bf16 or fp32")
    return cast


def _write_settings(adapter: Path, base: Path, out: Path, dtype: str, untied: bool) -> None:
    settings = json.loads((base / "config.json").read_bytes())
    settings.pop("torch_dtype", None)
    settings.pop("quantization_config", None)
    settings["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    if untied:
        settings["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for name in WORDS:
        found = next((d / name for d in (adapter, base) if (d / name).is_file()), None)
        if found:
            shutil.copyfile(found, out / name)


def certified_merge(
    adapter: Path,
    base: Path,
    out: Path,
    dtype: str,
    texts: Sequence[str],
    device: str,
    tell: Tell = lambda line: None,
    precision: str = "",
) -> dict[str, Any]:
    """Merge, and write certificate.json beside the files; `out` is there once all of it is.
    `precision` is the training's. Where the certificate does not pass, the folder is called
    OUT.refused and NotCertified raised."""
    open_tokenizer(base)
    if defect := base_defect(adapter, base):
        raise MergeError(defect)
    with _part(out) as part:
        merged = _written(adapter, base, part, dtype, tell)
        files = {p.name: sha256_of(p) for p in sorted(part.iterdir())}
        made = {
            "made_by": {"torch": torch.__version__, "transformers": transformers.__version__},
            "adapter_sha256": sha256_of(adapter / "adapter_model.safetensors"),
            "base_sha256": {name: sha256_of(base / name) for name in shards_of(base)},
            "merge": merged,
            "files_sha256": files,
            "files_bytes": {name: (part / name).stat().st_size for name in files},
        }
        try:
            made["numbers"] = certify(adapter, base, part, texts, device, tell, precision)
        except NotCertified as error:
            refused = out.with_name(f"{out.name}.refused")
            shutil.rmtree(refused, ignore_errors=True)
            part.rename(refused)
            error.add_note(f"what was written lies in {refused}")
            raise
        (part / CERTIFICATE).write_text(json.dumps(made, indent=1) + "\n")
        part.rename(out)
    return made


def main() -> int:
    parser = parser_of("trainer.result.merge", "Merge an adapter into its base, and prove it.")
    parser.add_argument("adapter", type=Path, help="an adapter's folder or zip, or a run folder")
    parser.add_argument("--base", help="folder of the base model, or its hub id")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--data", type=Path, help="rows for the certificate, beside general texts")
    parser.add_argument("--job", type=Path, help="job.json, which says how --data is read")
    parser.add_argument("--trained-in", default="", help="what the training held the base in")
    parser.add_argument("--rows", type=int, default=TEXTS, help="the first ones of --data")
    told, tell = parser.parse_args(), StatusLine()

    def work() -> dict[str, Any]:
        given, base, data, job, held = _sources(told)
        with unpacked(given) as adapter:
            if not (adapter / "adapter_config.json").is_file():
                raise MergeError(f"{given} is a whole model: nothing is to be merged")
            texts = texts_of(adapter, base, data, job, told.rows) if data else []
            try:
                made = certified_merge(
                    adapter, base, told.out, told.dtype, texts, device_for(base), tell, held
                )
            finally:
                tell.end()
        return {"folder": str(told.out), **made}

    return answer(work, lambda made: certificate_text(told.out, made), told.json, (NotCertified,))


def _sources(told: argparse.Namespace) -> tuple[Path, Path, Path | None, Path | None, str]:
    """(adapter, base, rows, the job.json that reads them, the training's precision). Raises
    MergeError without a base, InvalidJob, ModelMissing."""
    base, data = told.base and base_folder(told.base), told.data
    if (told.adapter / "job.json").is_file():
        run = told.adapter
        job, adapter = result_of_run(run)
        if data is None and job.data.held_out is not None and job.stage not in NO_ANSWERS:
            data = run / job.data.held_out.path
        base, held = base or base_of_result(job, run), told.trained_in or job.model.precision
        return adapter, base, data, told.job or run / "job.json", held
    if base is None:
        raise MergeError("--base is needed for an adapter that is no run folder")
    return told.adapter, base, data, told.job, told.trained_in


if __name__ == "__main__":
    sys.exit(main())
