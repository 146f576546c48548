"""Adapters on one frozen base: the one that a run trains, what it starts from, and others beside
it that judge or are judged.

PEFT holds them by name and reads their files. Which of them computes is chosen here, by name, and
touches nothing else: PEFT's own switch also says which parameters are trained.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.model.parts import ModelError, causal
from trainer.wire.chain import WEIGHTS

MAIN = "default"  # PEFT's name of the adapter that a run trains
SCORE = "base_model.model.score.weight"


class Roles:
    """The adapters of a model that PEFT has wrapped, by name, and the linear heads beside them, on
    the hidden states: `head(name)`. One computes at a time, until another is taken."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]

    def take(self, name: str) -> None:
        """Lets the adapter `name` compute in forward passes from now on. A backward pass computes
        by the adapter that its forward pass had, as long as no other was taken between them."""
        for layer in self.layers:
            layer._active_adapter = [name]

    def add(self, name: str, folder: Path | None, *, trained: bool) -> None:
        """The adapter of a folder, or where it is None a copy of the trained one, and a head: the
        folder's score, or one that says 0. Raises ModelError where it does not fit."""
        config = copy.deepcopy(self.model.peft_config[MAIN])
        if folder is not None:
            config = PeftConfig.from_pretrained(str(folder))
        validate_kind(config, folder)
        config.modules_to_save, config.task_type = None, "CAUSAL_LM"
        config.inference_mode, config.lora_dropout = False, 0.0
        wanted = {n: p.requires_grad for n, p in self.model.named_parameters()}
        self.model.add_adapter(name, config)
        for n, p in self.model.named_parameters():
            p.requires_grad_(wanted.get(n, trained))
        tensors = self._main() if folder is None else load_file(folder / WEIGHTS)
        score = tensors.pop(SCORE, None)
        fill(self.model, tensors, name)
        self._add_head(name, score, trained)
        self.take(MAIN)

    def _main(self) -> dict[str, Tensor]:
        mark = f".{MAIN}."
        return {
            n.replace(mark, "."): p.detach()
            for n, p in self.model.named_parameters()
            if mark in n and "lora_" in n
        }

    def _add_head(self, name: str, score: Tensor | None, trained: bool) -> None:
        hidden: int = causal(self.model).config.get_text_config().hidden_size
        head = nn.Linear(hidden, 1, bias=False, device=next(self.model.parameters()).device)
        with torch.no_grad():
            head.weight.copy_(torch.zeros(1, hidden) if score is None else score)
        self.model.add_module(f"{name}_head", head.requires_grad_(trained))

    def head(self, name: str) -> nn.Module:
        found: nn.Module = self.model.get_submodule(f"{name}_head")
        return found

    def parameters(self, name: str) -> list[str]:
        """Names of the parameters of an adapter and its head."""
        own = (f".{name}.", f"{name}_head.")
        return [n for n, _ in self.model.named_parameters() if any(mark in n for mark in own)]


def validate_kind(config: Any, folder: Path | None) -> None:
    """Raises ModelError for an adapter that cannot stand beside another."""
    where = "the adapter that is trained" if folder is None else f"the adapter in {folder.name}/"
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{where} is no LoRA but {config.peft_type}: give one")
    odd = {
        "lora.use_dora": config.use_dora,
        "an adapter of experts": config.target_parameters,
        "lora.modules_to_save": set(config.modules_to_save or ()) - {"score"},
        f'lora.init_lora_weights = "{config.init_lora_weights}"': not isinstance(
            config.init_lora_weights, bool
        )
        and config.init_lora_weights != "gaussian",
    }
    found = [name for name, on in odd.items() if on]
    if found:
        raise ModelError(f"{where} has {found[0]}, which no stage takes up: leave it out")


def fill(model: nn.Module, tensors: dict[str, Tensor], name: str = MAIN) -> None:
    """Puts the tensors of an adapter's file into the parameters of the adapter `name`, which are
    fp32 from then on. Raises ModelError unless names and shapes are the same."""
    held = {_in_file(n, name): p for n, p in model.named_parameters() if f".{name}." in n}
    if odd := sorted(held.keys() ^ tensors.keys())[:3]:
        raise ModelError(
            f"the adapter has other modules than this model: {odd}: is it one of the same base, "
            "with the same lora settings?"
        )
    for key, parameter in held.items():
        if parameter.shape != tensors[key].shape:
            raise ModelError(
                f"{key} is {list(tensors[key].shape)} in the adapter and {list(parameter.shape)} "
                "here: lora.r, or the base, is another"
            )
        parameter.data = tensors[key].to(parameter.device, torch.float32, copy=True)


def _in_file(parameter: str, name: str) -> str:
    return parameter.replace(f".{name}.", ".")


def continue_from(model: nn.Module, folder: Path) -> None:
    """Lets the trained adapter go on from that of a folder. Raises ModelError."""
    validate_kind(PeftConfig.from_pretrained(str(folder)), folder)
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(SCORE, None)
    fill(model, tensors)


def stack_on(model: Any, folder: Path) -> None:
    """Lets the trained adapter be that of a folder, which stays as it is, and a fresh one beside
    it: the first rows of A and the first columns of B, which get no gradient. Together they are one
    LoRA, of both ranks. Raises ModelError."""
    config = PeftConfig.from_pretrained(str(folder))
    validate_kind(config, folder)
    if config.rank_pattern or config.alpha_pattern:
        raise ModelError(
            "an adapter with rank_pattern or alpha_pattern is not stacked: continue it"
        )
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(SCORE, None)
    held = {_in_file(n, MAIN): p for n, p in model.named_parameters() if f".{MAIN}." in n}
    if missing := sorted(tensors.keys() - held.keys())[:3]:
        raise ModelError(f"the adapter has modules that lora.target_modules leaves out: {missing}")
    mine = model.peft_config[MAIN]
    was = config.lora_alpha / config.r
    scale = was / (mine.lora_alpha / mine.r)
    for key, before in tensors.items():
        parameter, first = held[key], "lora_A" in key or "lora_embedding_A" in key
        ours = parameter.data if first else parameter.data.t()
        theirs = before if first else before.t() * scale
        if ours.shape[0] <= theirs.shape[0] or ours.shape[1:] != theirs.shape[1:]:
            raise ModelError(f"{key} is {list(before.shape)} in the adapter: it is another base's")
        ours[: len(theirs)] = theirs.to(ours.device, ours.dtype)
        mask = torch.ones_like(parameter)
        (mask if first else mask.t())[: len(theirs)] = 0
        parameter.register_hook(lambda grad, mask=mask: grad * mask)
