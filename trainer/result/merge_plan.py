"""What becomes of each weight of a base when an adapter is merged into it.

The layers are PEFT's, on a model without storage; the names are those of the base's files
(`revert_weight_conversion`: the experts of a mixture are stored one by one).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from trainer.result.files import PLAIN_STARTS, PREFIX, read, unknown, variant
from trainer.wire.prompts import PEFT_TYPES


class MergeError(ValueError):
    """A merge that cannot be right; the text says what to do."""


@dataclass
class Change:
    """What becomes of one weight: `layer` adds its delta, or `replacement` (a tensor's name in the
    adapter) takes its place."""

    layer: str = ""
    replacement: str = ""


@dataclass
class MergePlan:
    """Names in the base's files with their changes, in the naming of the files. `head` and
    `embedding` are the names of two weights that the base has as one, "" where it has them
    apart."""

    model: Any  # the base with LoRA layers, without storage
    changes: dict[str, Change] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # a layer's name -> its parameter's
    head: str = ""
    embedding: str = ""

    @property
    def unties(self) -> bool:
        """Whether head and embedding are two from now on."""
        return bool(self.head) and bool({self.head, self.embedding} & set(self.changes))


def plan_of(adapter: Path, base: Path, tensors: Any, names: set[str]) -> MergePlan:
    """The plan for an adapter with the open file `tensors` on a base whose files hold `names`.
    Raises MergeError, NoAdapter."""
    told, stored = read(adapter)
    if why := _defect(told, stored):
        raise MergeError(why)
    config: Any = PeftConfig.from_pretrained(str(adapter))
    saved, config.modules_to_save = config.modules_to_save, None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    prefix = f"{model.base_model_prefix}."

    def filed(name: str) -> str:
        plain = name.removeprefix(prefix)
        return name if name in names or plain not in names else plain

    head, embedding = (filed(name) for name in _tied(model))
    with warnings.catch_warnings():  # of heads tied to embeddings: they are untied here
        warnings.simplefilter("ignore", UserWarning)
        plan = MergePlan(
            get_peft_model(model, config, low_cpu_mem_usage=True), head=head, embedding=embedding
        )

    def add(key: str, change: Change, like: torch.Tensor) -> None:
        for name in revert_weight_conversion(model, {key: like}):
            found = filed(name)
            if found not in names and found != head:
                raise MergeError(
                    f"the adapter changes {found}, which {base.name}/ does not have: it is "
                    "another base, or another kind of model"
                )
            plan.changes[found] = change

    left = set(tensors.keys())
    for layer, module in plan.model.named_modules():
        own = {k for k in left if k.startswith((f"{layer}.lora_", f"{layer}.base_layer.weight"))}
        if not any(".lora_" in k for k in own) or not isinstance(module, LoraLayer):
            continue
        left -= own
        parameter = getattr(module, "parameter_name", "weight")
        key = f"{layer}.{parameter}".removeprefix(PREFIX).replace(".base_layer", "")
        plan.keys[layer] = key
        weight = module.get_base_layer()
        while isinstance(weight, LoraLayer):
            weight = weight.get_base_layer()
        for name in own:
            _validate_shape(module, name.removeprefix(f"{layer}."), name, tensors)
        add(key, Change(layer=layer), getattr(weight, parameter))
    for tensor in sorted(left):
        key = tensor.removeprefix(PREFIX)
        if not saved or key not in model.state_dict():
            raise MergeError(f"the adapter's {tensor} belongs to no layer of {base.name}/")
        add(key, Change(replacement=tensor), model.state_dict()[key])
    return plan


def _defect(told: Mapping[str, Any], names: list[str]) -> str:
    """Why an adapter of these settings and tensors cannot be merged, "" where it can."""
    start, later, kind = told.get("init_lora_weights", True), unknown(told), variant(told)
    biases = told.get("bias", "none") != "none" and any(n.endswith(".bias") for n in names)
    found = {
        "it is a learned prompt and no LoRA: it cannot be merged": told.get("peft_type")
        in PEFT_TYPES.values(),
        f"its settings have {later}, which PEFT 0.21 does not know: a later PEFT merges it": later,
        f"{kind} makes it another kind of LoRA: it has no one merged weight": kind,
        "single rows of the embedding are trained: merge it with PEFT itself": told.get(
            "trainable_token_indices"
        ),
        "it repeats layers of the base: merge it with PEFT itself": told.get("layer_replication"),
        "biases are trained beside the LoRA: merge it with PEFT itself": biases
        or told.get("lora_bias"),
        f"it stands on a base that {start} changed: convert it first "
        "(PEFT: path_initial_model_for_weight_conversion)": start not in PLAIN_STARTS,
    }
    return next((why for why, is_so in found.items() if is_so), "")


def _validate_shape(module: Any, part: str, name: str, tensors: Any) -> None:
    """Raises MergeError for a factor that the settings and the base have no place for."""
    kind = part.split(".")[0]
    if kind not in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        return
    held = getattr(module, kind)["default"]
    wanted = tuple((held if isinstance(held, nn.Parameter) else held.weight).shape)
    shape = tuple(tensors.get_slice(name).get_shape())
    if shape != wanted:
        raise MergeError(
            f"{name} is {shape}, by this base and the adapter's settings it would be {wanted}: it "
            "is another base, or another rank"
        )


def _tied(model: Any) -> tuple[str, str]:
    """The names of head and embedding where both are one weight, else two empty ones."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not model.config.get_text_config().tie_word_embeddings:
        return "", ""
    names = {id(module): name for name, module in model.named_modules()}
    return f"{names[id(head)]}.weight", f"{names[id(embedding)]}.weight"
