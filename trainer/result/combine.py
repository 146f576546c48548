"""Several adapters of one base as one adapter: the weighted sum of what each adds to a weight.

    python -m trainer.result.combine A=1.0 B=0.5 --out mix.zip [--rank 16]

A's and B's factors stand beside each other (what PEFT calls `cat`), scales and weights folded into
B: the sum is exact, and its rank the sum of the ranks. `--rank` keeps the largest singular values
of each sum and says what is lost. Every other way to combine adds factors by themselves, which is
another sum, and is not offered.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.result.adapter import zip_folder
from trainer.result.command import answer, parser_of
from trainer.result.engines import loads_in, table
from trainer.result.files import PLAIN_STARTS, TOWERS, json_object, read, unknown, unpacked, variant
from trainer.result.words import BASES_JINJA, JINJA
from trainer.wire.digest import sha256_of
from trainer.wire.merged import TOKENIZER_FILES

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_WORDS = ("template.json", "generation_config.json", JINJA, BASES_JINJA, *TOKENIZER_FILES)
_SHOWN = 8  # modules of which the card names the loss


class NoSum(ValueError):
    """Adapters that cannot be added, and what to do instead."""


@dataclass(frozen=True)
class WeightedAdapter:
    """One adapter: `factors` are (A (r, in), B (out, r)) by the name of the module, the scale
    folded into B."""

    name: str
    weight: float
    folder: Path
    config: dict[str, Any]
    factors: dict[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        return max(a.shape[0] for a, _ in self.factors.values())


# -- reading ---------------------------------------------------------------------------------------


def open_adapter(name: str, weight: float, folder: Path) -> WeightedAdapter:
    """Raises NoAdapter for what is no adapter, NoSum for one that cannot be added to others."""
    config, names = read(folder)
    if why := _refusal(config, names):
        raise NoSum(f"{name} cannot be combined: {why}")
    tensors = load_file(folder / WEIGHTS)
    factors = {}
    for key in (k for k in names if ".lora_A." in k):
        module = key.partition(".lora_A.")[0]
        a, b = tensors[key], tensors[key.replace(".lora_A.", ".lora_B.")]
        if why := _factors_defect(a, b):
            raise NoSum(f"{name} cannot be combined: {module} {why}")
        factors[module] = a.float(), b.float() * _scale(config, module, a.shape[0])
    return WeightedAdapter(name, weight, folder, config, factors)


def _factors_defect(a: Tensor, b: Tensor) -> str:
    """Why these are no factors of a LoRA, "" where they are."""
    if not (a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] and a.shape[0]):
        return f"has factors of {tuple(a.shape)} and {tuple(b.shape)}, of no one rank"
    if not (a.is_floating_point() and b.is_floating_point()):
        return "has factors of whole numbers"
    if not (a.float().isfinite().all() and b.float().isfinite().all()):
        return "has a number that is not finite"
    return ""


def _refusal(config: dict[str, Any], names: Sequence[str]) -> str:
    start = config.get("init_lora_weights", True)
    later, kind = unknown(config), variant(config)
    found = {
        f"its settings have {later}, which PEFT 0.21 does not know": later,
        f"{kind} makes it another kind of LoRA": kind,
        "it repeats layers of the base": config.get("layer_replication"),
        "it is a DoRA, whose weights are no sum: merge each into a model of its own": config.get(
            "use_dora"
        ),
        "it trains whole modules beside the LoRA (modules_to_save)": config.get("modules_to_save")
        or any(".lora_A." not in n and ".lora_B." not in n for n in names),
        "it trains single rows of the embedding": config.get("trainable_token_indices"),
        "it adapts the experts of a mixture": config.get("target_parameters")
        or any(".experts." in n for n in names),
        "it is no language model's (a classifier or a reward model)": config.get("task_type")
        not in (None, "CAUSAL_LM"),
        "it adapts the part of the base that reads images or sound": any(
            part in name for name in names for part in TOWERS
        ),
        "it has biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        f"it stands on a base that {start} changed": start not in PLAIN_STARTS,
        "it is no LoRA": config.get("peft_type", "LORA") != "LORA",
    }
    return "; ".join(why for why, is_so in found.items() if is_so)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """PEFT's scale of this module: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def validate_alike(adapters: Sequence[WeightedAdapter]) -> list[str]:
    """Returns notes for the user. Raises NoSum for adapters of different bases or templates."""
    first, notes = adapters[0], list[str]()
    for other in adapters[1:]:
        for key in ("base_model_name_or_path", "revision", "fan_in_fan_out"):
            mine, theirs = first.config.get(key), other.config.get(key)
            if (mine or None) != (theirs or None):
                raise NoSum(f"{first.name} and {other.name} differ in {key}: {mine}, {theirs}")
        for module in set(first.factors) & set(other.factors):
            (a, b), (c, d) = first.factors[module], other.factors[module]
            if a.shape[1] != c.shape[1] or b.shape[0] != d.shape[0]:
                raise NoSum(f"{module} has another shape in {other.name}: it is another base")
    hashes = {p.name: _template(p.folder) for p in adapters}
    known = {h for h in hashes.values() if h}
    if len(known) > 1:
        raise NoSum("they were trained with different templates or tokenizers: " + str(hashes))
    if not all(hashes.values()):
        notes.append("not each of them says in which template it was trained: they may differ")
    return notes


def _template(folder: Path) -> str:
    path = folder / "template.json"
    return str(json_object(path).get("token_hash", "")) if path.is_file() else ""


# -- the sum ---------------------------------------------------------------------------------------


def added(adapters: Sequence[WeightedAdapter]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of the weighted sum, of one rank in every module: a module that an adapter leaves
    alone has zeros there."""
    shapes = {m: (a.shape[1], b.shape[0]) for p in adapters for m, (a, b) in p.factors.items()}
    found = {}
    for module, (width, height) in sorted(shapes.items()):
        every_a, every_b = [], []
        for adapter in adapters:
            a, b = adapter.factors.get(module, (torch.zeros(0, width), torch.zeros(height, 0)))
            missing = adapter.rank - a.shape[0]
            every_a.append(torch.cat([a, torch.zeros(missing, width)]))
            every_b.append(torch.cat([adapter.weight * b, torch.zeros(height, missing)], 1))
        found[module] = torch.cat(every_a), torch.cat(every_b, 1)
    return found


def cut(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest product of `rank`, and by how much it is off: the norm of what is lost as a share
    of the norm of the whole. From the factors alone, in fp64: nothing of the weight's size."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T)
    total = float(values.norm())
    lost = float(values[rank:].norm()) / total if total else 0.0
    root = values[:rank].sqrt()
    new_b, new_a = (q_b @ u[:, :rank]) * root, root[:, None] * (v[:rank] @ q_a.T)
    missing = rank - len(root)
    new_a = torch.cat([new_a, new_a.new_zeros(missing, a.shape[1])])
    new_b = torch.cat([new_b, new_b.new_zeros(b.shape[0], missing)], 1)
    return new_a.float().contiguous(), new_b.float().contiguous(), lost


def combine(
    adapters: Sequence[WeightedAdapter], out: Path, rank: int | None = None
) -> dict[str, Any]:
    """Write the adapter to `out`, a new archive (.zip) or folder. Returns its rank, what was lost
    by module (nothing without `rank`), notes. Raises NoSum."""
    if out.exists():
        raise NoSum(f"{out} exists: name a new archive or folder")
    if len(adapters) < 2:
        raise NoSum("name two adapters or more: A=1.0 B=0.5")
    notes, lost = validate_alike(adapters), dict[str, float]()
    factors = added(adapters)
    whole = sum(adapter.rank for adapter in adapters)
    if rank is not None and not 0 < rank < whole:
        raise NoSum(f"the exact sum has rank {whole}: --rank takes less, or leave it out")
    for module, (a, b) in factors.items() if rank else ():
        *cut_factors, lost[module] = cut(a, b, rank or whole)
        factors[module] = cut_factors[0], cut_factors[1]
    told = {"rank": rank or whole, "lost": lost, "notes": notes, "modules": len(factors)}
    with tempfile.TemporaryDirectory(dir=out.resolve().parent) as made:
        folder = Path(made) / "mix"
        folder.mkdir()
        _write(folder, adapters, factors, rank or whole)
        (folder / "README.md").write_text(_card(folder, adapters, told), encoding="utf-8")
        if out.suffix == ".zip":
            zip_folder(folder, Path(made) / "mix.zip")
            (Path(made) / "mix.zip").rename(out)
        else:
            folder.rename(out)
    return {"file": str(out), **told}


def _write(
    folder: Path,
    adapters: Sequence[WeightedAdapter],
    factors: dict[str, tuple[Tensor, Tensor]],
    rank: int,
) -> None:
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    some = any(p.config.get("layers_to_transform") is not None for p in adapters)
    bare = [m.removeprefix("base_model.model.") for m in factors]
    names = bare if some else [m.rsplit(".", 1)[-1] for m in bare]
    config = adapters[0].config | {
        "r": rank,
        "lora_alpha": rank,  # a scale of 1
        "lora_dropout": 0.0,
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": sorted(set(names)),
        "inference_mode": True,
    }
    for key in ("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"):
        config[key] = {} if key.endswith("a_pattern") or key == "rank_pattern" else None
    config["exclude_modules"] = None
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    first = next((p.folder for p in adapters if (p.folder / "template.json").is_file()), None)
    for name in _WORDS if first else ():
        if first and (first / name).is_file():
            shutil.copyfile(first / name, folder / name)


def _card(folder: Path, adapters: Sequence[WeightedAdapter], told: dict[str, Any]) -> str:
    base = adapters[0].config.get("base_model_name_or_path")
    rows = [
        f"| {p.name} | {p.weight:g} | `{sha256_of(p.folder / WEIGHTS)[:16]}` |" for p in adapters
    ]
    lines = ["---", f"base_model: {base}", "library_name: peft", "tags: [lora, milktea]", "---"]
    lines += ["# A sum of adapters", "", "| adapter | weight | sha256 |", "|---|---|---|", *rows]
    lines += ["", f"Rank {told['rank']}, {told['modules']} modules. {_loss(told)}", ""]
    worst = sorted(told["lost"].items(), key=lambda item: -item[1])[:_SHOWN]
    lines += [f"- {module}: {lost:.2%} lost" for module, lost in worst]
    return "\n".join([*lines, "", table(loads_in(*read(folder))), ""])


def _loss(told: dict[str, Any]) -> str:
    if not told["lost"]:
        return "The sum is exact."
    values = list(told["lost"].values())
    return (
        f"By the cut, {max(values):.2%} of what is added to a weight is lost at most, "
        f"{sum(values) / len(values):.2%} on average."
    )


# -- the command -----------------------------------------------------------------------------------


def parsed(word: str) -> tuple[Path, float]:
    """(path, weight) of PATH=WEIGHT; 1 without a weight. Raises NoSum."""
    name, sign, number = word.rpartition("=")
    try:
        weight = float(number) if sign else 1.0
    except ValueError:
        raise NoSum(f"{word!r}: write ADAPTER=0.5, with a number behind the sign") from None
    if not math.isfinite(weight) or not weight:
        raise NoSum(f"{word!r}: the weight is to be a number other than 0")
    return Path(name if sign else word), weight


def main(words: list[str] | None = None) -> int:
    parser = parser_of("trainer.result.combine", "Add adapters of one base.")
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER=WEIGHT", help="folder or zip")
    parser.add_argument("--out", type=Path, required=True, help="a new .zip, or a new folder")
    parser.add_argument("--rank", type=int, help="cut to it; the exact sum without")
    told = parser.parse_args(words)

    def work() -> dict[str, Any]:
        with ExitStack() as stack:
            adapters = []
            for path, weight in map(parsed, told.adapters):
                if not path.exists():
                    raise NoSum(f"there is no {path}")
                name = path.parent.name if path.name == "adapter.zip" else path.stem
                adapters.append(open_adapter(name, weight, stack.enter_context(unpacked(path))))
            return combine(adapters, told.out, told.rank)

    return answer(work, text, told.json)


def text(made: dict[str, Any]) -> str:
    """The lines for a terminal: what was written, and what to try next."""
    return "\n".join(
        [
            f"{made['file']}: rank {made['rank']}, {made['modules']} modules. {_loss(made)}",
            *made["notes"],
            "what the sum is good for, only rows tell: `milktea evaluate "
            f"{made['file']} --data FILE`, with the held-out rows of each",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
