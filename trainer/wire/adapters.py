"""The adapters that a job starts from or is judged by, before they travel: where their files are,
and what they say of the LoRA that is trained. No torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.wire import tensors
from trainer.wire.chain import (
    CHAIN,
    CONFIG,
    WEIGHTS,
    chain_of,
    opened,
    reward_defect,
    text_of,
    weights_sha256,
)
from trainer.wire.job import Adapter, How, Lora
from trainer.wire.prompts import PROMPT_METHODS, TAKEN_UP, PromptLearning

TAKEN = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
)
# settings of PEFT's that change what an adapter computes, and that nothing here computes
UNKNOWN = (
    *("target_parameters", "trainable_token_indices", "lora_bias", "alora_invocation_tokens"),
    *("use_qalora", "megatron_config"),
)


def files_of(adapter: Path, to: Path) -> list[Path]:
    """Weights, settings and chain of an adapter; those of an archive are unpacked into the new
    folder `to`. Raises OSError, ValueError (no archive, no safetensors)."""
    held = [WEIGHTS, CONFIG, *([CHAIN] if chain_of(adapter) is not None else [])]
    folder = adapter if adapter.is_dir() else to
    if folder is to:
        to.mkdir(parents=True, exist_ok=True)
        for name in held:
            with opened(adapter, name) as source, open(to / name, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    with open(folder / WEIGHTS, "rb") as file:
        try:
            tensors.names(file, (folder / WEIGHTS).stat().st_size)
        except ValueError as why:
            raise ValueError(f"{WEIGHTS} cannot be read: {why}") from why
    return [folder / name for name in held]


def settings_from(
    adapter: Path, method: str, lora: Lora, prompt: PromptLearning, how: How
) -> dict[str, Lora | PromptLearning]:
    """The keys of a job that what it takes up decides: lora, or of a learned prompt
    prompt_learning. Raises ValueError with what does not go together, OSError."""
    if method in PROMPT_METHODS:
        return {"prompt_learning": prompt_from(adapter, method, prompt)}
    return {"lora": lora_from(adapter, lora, how)}


def prompt_from(adapter: Path, method: str, job: PromptLearning) -> PromptLearning:
    """The job's settings with the number of learned places in the adapter. Raises ValueError for
    one that this training.method does not go on from, OSError."""
    told = json.loads(text_of(adapter, CONFIG))
    kind = told.get("peft_type") if isinstance(told, dict) else None
    if kind not in TAKEN_UP.get(method, ()):
        kinds = " or ".join(TAKEN_UP.get(method, ()))
        raise ValueError(f'it is {kind}, and training.method = "{method}" goes on from {kinds}')
    name, plain = "num_virtual_tokens", PromptLearning()
    if getattr(job, name) not in (getattr(plain, name), told.get(name)):
        raise ValueError(
            f"prompt_learning.{name} = {getattr(job, name)} (the adapter has {told.get(name)}): "
            "remove it, the adapter says it"
        )
    return PromptLearning.model_validate(job.model_dump() | {name: told.get(name)})


def lora_from(adapter: Path, job: Lora, how: How) -> Lora:
    """The LoRA settings of the training: the adapter's own to continue it; the job's, with the rank
    of both, to stack on it. Raises ValueError with what does not go together, OSError."""
    told = settings_of(adapter)
    return _continued(told, job) if how == "continue" else lora_on(told, job)


def lora_on(told: Mapping[str, Any], job: Lora) -> Lora:
    """The settings of a LoRA that is stacked on one with the settings `told` (TAKEN by name): the
    job's, with the rank of both. Raises ValueError with what does not go together."""
    if told["rank_pattern"] or told["alpha_pattern"] or job.rank_pattern or job.alpha_pattern:
        raise ValueError('how = "stack" knows no rank_pattern and no alpha_pattern: continue it')
    r = told["r"] + job.r
    changes = {"r": r, "lora_alpha": job.lora_alpha / job.r * r}
    if isinstance(job.target_modules, list):
        named = told["target_modules"]
        if isinstance(named, str) or set(named) - set(job.target_modules):
            raise ValueError(
                f"lora.target_modules leaves out some of the adapter's, which are {named}"
            )
    return Lora.model_validate(job.model_dump() | changes)


def _continued(told: dict[str, Any], job: Lora) -> Lora:
    plain, asked = Lora(), job.model_dump()
    odd = [
        f"lora.{name} = {asked[name]!r} (the adapter has {told[name]!r})"
        for name in TAKEN
        if getattr(job, name) != getattr(plain, name) and not _same(asked[name], told[name])
    ]
    if odd:
        raise ValueError(f"{', '.join(odd)}: remove it, the adapter says it")
    return Lora.model_validate(asked | {name: told[name] for name in TAKEN})


def _same(asked: Any, told: Any) -> bool:
    if isinstance(asked, list) and isinstance(told, list):
        return sorted(map(str, asked)) == sorted(map(str, told))
    return bool(asked == told)


def settings_of(adapter: Path) -> dict[str, Any]:
    """TAKEN of adapter_config.json. Raises ValueError for an adapter that no stage takes up."""
    if peft_type(adapter) != "LORA":
        raise ValueError("it is no LoRA: only a LoRA is taken up")
    told = json.loads(text_of(adapter, CONFIG))
    odd = {
        "use_dora": told.get("use_dora"),
        "use_rslora": told.get("use_rslora"),
        **{name: told.get(name) for name in UNKNOWN},
        "modules_to_save": set(told.get("modules_to_save") or ()) - {"score"},
        "bias": told.get("bias", "none") != "none",
    }
    if found := [name for name, on in odd.items() if on]:
        raise ValueError(f"it has {found[0]}, which no stage takes up")
    taken = {name: told.get(name, getattr(Lora(), name)) for name in TAKEN}
    for name in ("rank_pattern", "alpha_pattern"):
        taken[name] = taken[name] or {}
    kinds = {"r": (int,), "lora_alpha": (int, float), "target_modules": (list, str)}
    for name, known in kinds.items():
        if type(taken[name]) not in known:
            raise ValueError(f"{CONFIG} has {name} = {taken[name]!r:.40}")
    return taken


def peft_type(adapter: Path) -> str:
    """What kind an adapter is by its settings, in PEFT's word. Raises OSError, ValueError."""
    told = json.loads(text_of(adapter, CONFIG))
    return f"{told.get('peft_type')}" if isinstance(told, dict) else "no adapter"


def as_told(adapter: Path, path: str, name: str) -> dict[str, str]:
    """What a job says of an adapter that lies in `path` of the run folder. Raises OSError."""
    told = Adapter(path=path, name=name, sha256=weights_sha256(adapter))
    return told.model_dump()


def judge_defect(
    judge: Path, start: Path | None, base: str, foreign: bool, merged: bool = False
) -> str:
    """chain.reward_defect of adapters' files. Raises OSError, ValueError."""
    before = None if start is None else chain_of(start)
    return reward_defect(chain_of(judge), weights_sha256(judge), before, base, foreign, merged)
