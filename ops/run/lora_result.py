"""Pure: whether the tensors of a result are the LoRA that its job asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ops.run.expected import CONFIG, WEIGHTS, ExpectedResult, validate
from trainer.families import EXPERT_PARTS
from trainer.wire.tensors import Tensor

_PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.weight)?$"
)


def validate_lora(
    found: Mapping[str, Tensor], json_files: Mapping[str, Any], expect: ExpectedResult
) -> None:
    """The tensors are the LoRA that the job asked for: PEFT's names, lora_A and lora_B of each
    module, the rank, and at least one module that was trained."""
    validate(CONFIG in json_files, f"adapter.zip lacks {CONFIG}")
    config = json_files[CONFIG]
    validate(
        isinstance(config, dict) and config.get("peft_type") == "LORA", f"{CONFIG} is not a LoRA's"
    )
    # a PiSSA adapter is saved as a difference from its start, which doubles its rank
    ranks = {expect.r, 2 * expect.r} if expect.init_lora_weights == "pissa" else {expect.r}
    r = config.get("r")
    validate(type(r) is int and r in ranks, f"{CONFIG} has r {r!r}, the job asked for {expect.r}")
    base = config.get("base_model_name_or_path")
    validate(
        base == expect.base_model,
        f"{CONFIG} is of base model {base!r}, the job asked for {expect.base_model!r}",
    )
    for key in ("lora_alpha", "use_dora", "use_rslora"):
        wanted, have = getattr(expect, key), config.get(key)
        doubled = key == "lora_alpha" and r != expect.r
        validate(
            wanted is None or doubled or have == wanted,
            f"{CONFIG} has {key} {have!r}, the job asked for {wanted!r}",
        )
    _validate_targets(found, config, expect)
    pairs = _pairs(found, config)
    validate(bool(pairs), f"{WEIGHTS} holds no LoRA pair")
    _validate_shapes(pairs, config)
    trained = any(not a.zero and not b.zero for a, b in pairs.values())
    validate(
        trained,
        f"{WEIGHTS}: one half of each of the {len(pairs)} modules is zero: nothing was learnt",
    )


def _validate_targets(
    found: Mapping[str, Tensor], config: Mapping[str, Any], expect: ExpectedResult
) -> None:
    """Every tensor belongs to a target module or to modules_to_save, and every target has
    tensors."""
    named = config.get("target_modules")
    if expect.target_modules is not None:
        validate(
            _names_as_requested(named, config, expect.target_modules),
            f"{CONFIG} has target_modules {named}, the job asked for {list(expect.target_modules)}",
        )
    kept = config.get("modules_to_save") or []
    validate(
        isinstance(kept, list) and all(isinstance(k, str) for k in kept),
        f"{CONFIG} has modules_to_save {kept!r}",
    )
    modules = {m["module"] for m in map(_PART.match, found) if m}
    for name in found:
        owned = _PART.match(name) or any(f".{k}." in f".{name}" for k in kept)
        validate(bool(owned), f"{WEIGHTS}: tensor {name} belongs to no LoRA and no module to save")
    if isinstance(named, list):
        ends = tuple(named)
        for module in modules:
            if _of_experts(module, config):
                continue
            aimed = any(module == end or module.endswith("." + end) for end in ends)
            validate(aimed, f"{WEIGHTS}: {module} is none of {CONFIG}'s target_modules")
        for end in ends:
            validate(
                any(m == end or m.endswith("." + end) for m in modules),
                f"{WEIGHTS}: target {end!r} has no tensors",
            )


def _pairs(
    found: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        if match := _PART.match(name):
            parts.setdefault(match["module"], {})[match["part"]] = tensor
    dora = bool(config.get("use_dora"))
    pairs = {}
    for module, have in parts.items():
        kind = (
            "lora_embedding_"
            if "lora_embedding_A" in have or "lora_embedding_B" in have
            else "lora_"
        )
        for half in (f"{kind}A", f"{kind}B", *(["lora_magnitude_vector"] if dora else [])):
            validate(half in have, f"{WEIGHTS}: {module} lacks its {half}")
        validate(
            dora or "lora_magnitude_vector" not in have,
            f"{WEIGHTS}: {module} has a DoRA vector, {CONFIG} wants none",
        )
        a, b = have[f"{kind}A"], have[f"{kind}B"]
        # the half that PEFT fills with random numbers; the other starts at zero
        random = b if kind == "lora_embedding_" else a
        validate(
            not random.zero, f"{WEIGHTS}: {random.name} is all zero, which no initialisation gives"
        )
        if dora:
            vector = have["lora_magnitude_vector"]
            fits = math.prod(vector.shape) == b.shape[0] and not vector.zero
            validate(
                fits,
                f"{WEIGHTS}: {vector.name} {vector.shape} does not fit lora_B {b.shape}, or "
                "is all zero",
            )
        pairs[module] = (a, b)
    return pairs


def _names_as_requested(named: Any, config: Mapping[str, Any], requested: tuple[str, ...]) -> bool:
    """Whether `named` means the modules that the job asked for: the same list, an expression that
    names them within one tower, or a list without the experts' modules, which PEFT has as
    target_parameters."""
    if isinstance(named, str):
        return all(re.escape(module) in named for module in requested)
    if not isinstance(named, list) or not set(named) <= set(requested):
        return False
    left = set(requested) - set(named)
    return not left or (bool(config.get("target_parameters")) and left <= set(EXPERT_PARTS))


def _of_experts(module: str, config: Mapping[str, Any]) -> bool:
    """Whether the module holds experts that target_parameters names: PEFT names their adapter by
    the module that holds them, or by its base_layer where it has two."""
    named = config.get("target_parameters") or []
    holders = {str(p).rpartition(".")[0] for p in named if isinstance(p, str)}
    held = module.removesuffix(".base_layer")
    return any(h and (held == h or held.endswith("." + h)) for h in holders)


def _validate_shapes(pairs: Mapping[str, tuple[Tensor, Tensor]], config: Mapping[str, Any]) -> None:
    pattern = _literal_ranks(config)
    for module, (a, b) in pairs.items():
        if _of_experts(module, config):  # the ranks of all experts side by side
            same = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
            validate(same, f"{WEIGHTS}: {module} has lora_A {a.shape} and lora_B {b.shape}")
            continue
        special = [r for end, r in pattern.items() if f".{module}".endswith(f".{end}")]
        r = special[0] if special else config["r"]
        fits = len(a.shape) >= 2 and len(b.shape) >= 2 and a.shape[0] == r and b.shape[1] == r
        validate(
            fits,
            f"{WEIGHTS}: {module} has lora_A {a.shape} and lora_B {b.shape}, {CONFIG} says r {r}",
        )
        validate(
            a.dtype == b.dtype,
            f"{WEIGHTS}: {module} has lora_A in {a.dtype} and lora_B in {b.dtype}",
        )


def _literal_ranks(config: Mapping[str, Any]) -> Mapping[str, int]:
    """PEFT's rank_pattern, of plain module names only. PEFT takes regular expressions too; our
    trainer writes none, and a stranger's expression may run for ever."""
    pattern = config.get("rank_pattern") or {}
    sound = isinstance(pattern, dict) and all(
        re.fullmatch(r"[A-Za-z0-9_.]{1,200}", end) and type(r) is int for end, r in pattern.items()
    )
    validate(sound, f"{CONFIG} has a rank_pattern that is no list of modules: {pattern!r:.80}")
    return dict(pattern)
