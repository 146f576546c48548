"""What is served: one base model with the adapters of several results on it, each by its name.

`base` is always there, but where a result is a whole model or a learned prompt. A result is asked
in the template of its training; the base in its own chat template, or, where it has none, in that
of the first result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from trainer.data.prepare import Prepared
from trainer.data.template import TemplateError, from_chat_template
from trainer.data.tokenised import Rows
from trainer.data.tokens import open_vocabulary, stop_ids, stop_token, token_hash
from trainer.model.decode import packs
from trainer.model.parts import ModelError, family_of
from trainer.model.prompts import is_prompted
from trainer.model.steps import hold_adapters, steps_of
from trainer.result.files import unpacked
from trainer.result.open import is_prompt, load_answering, open_words, with_adapter

BASE = "base"
NO_ADAPTER = "__base__"  # PEFT's name of a row without an adapter
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
CONTEXT = 4096  # tokens of a prompt and its answer, where the model says no less


@dataclass(frozen=True)
class Voice:
    """A name that is asked: how its prompts are made, and which adapter answers."""

    name: str
    data: Prepared
    adapter: str
    stops: frozenset[int]


class Models:
    """A loaded model and the voices that it answers with. `context` is the most tokens of a prompt
    and its answer together."""

    def __init__(
        self,
        model: nn.Module,
        voices: Mapping[str, Voice],
        device: torch.device,
        context: int = CONTEXT,
    ) -> None:
        self.model, self.voices, self.device = model, dict(voices), device
        positions = family_of(model).positions
        self.context = min(context, positions) if positions else context
        self._names: list[str] | None = None  # of the rows of one batch, or None: of none
        self._active = ""
        names = dict.fromkeys(v.adapter for v in self.voices.values() if v.adapter != NO_ADAPTER)
        self._held = hold_adapters(model, list(names)) if isinstance(model, PeftModel) else None
        layers = [m for m in model.modules() if isinstance(m, LoraLayer | AuxiliaryTrainingWrapper)]
        beside = not steps_of(model) and packs(model, self.context)
        self.mixes = self._held is not None or (beside and all(map(_mixes, layers)))
        """Whether rows of several adapters may stand in one batch; a model that does not pack has
        one row in each."""
        if self.mixes and self._held is None:
            for layer in layers:
                layer.register_forward_pre_hook(self._with_names, with_kwargs=True)

    def _with_names(
        self, module: nn.Module, arguments: tuple[Any, ...], more: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return arguments, more if self._names is None else {**more, "adapter_names": self._names}

    def read_as(self, adapter: str) -> None:
        """The next packs of prompts are read by this adapter."""
        self._names = None
        if isinstance(self.model, PeftModel):
            self._activate(adapter)

    def answer_as(self, adapters: list[str]) -> None:
        """In the next steps each row is answered by its adapter. Raises ValueError for several
        where they do not mix."""
        if self._held is not None:
            self._held.choose(adapters)
            return
        several = len(set(adapters)) > 1
        if several and not self.mixes:
            raise ValueError("adapters of this kind do not stand in one batch")
        self._names = list(adapters) if several else None
        if isinstance(self.model, PeftModel):
            # a batch that mixes needs any adapter switched on
            self._activate(next((a for a in adapters if a != NO_ADAPTER), NO_ADAPTER))

    def _activate(self, adapter: str) -> None:
        model: Any = self.model
        if adapter == self._active or is_prompted(model):  # a learned prompt stands alone
            return
        if adapter == NO_ADAPTER:
            model.base_model.disable_adapter_layers()
        else:
            if self._active in ("", NO_ADAPTER):
                model.base_model.enable_adapter_layers()
            model.set_adapter(adapter, inference_mode=True)
        self._active = adapter


def _mixes(layer: nn.Module) -> bool:
    """Whether PEFT computes this layer for rows of several adapters."""
    if isinstance(layer, ParamWrapper | MultiheadAttention):
        return False
    return not (isinstance(layer, LoraLayer) and any(layer.use_dora.values()))


def open_models(
    results: Mapping[str, Path],
    base: Path,
    device: torch.device,
    context: int = CONTEXT,
    precision: str = "auto",
    fast: bool | None = None,
) -> Models:
    """Loads the base model of the folder `base` in a precision of PRECISIONS (result/open.py) and,
    by their names, the adapters (folders, or adapter.zip) on it; `fast` as of `load_answering`.
    Raises TemplateError, ModelError as `open_adapter`."""
    for name in results:
        if not NAME.fullmatch(name) or name in (BASE, NO_ADAPTER):
            raise ModelError(f"a model cannot be called {name!r}: take letters, digits, . _ -")
    with ExitStack() as stack:
        folders = {n: stack.enter_context(unpacked(path)) for n, path in results.items()}
        words = {name: open_words(folder, base) for name, folder in folders.items()}
        whole = [n for n, f in folders.items() if not (f / "adapter_config.json").is_file()]
        prompted = [n for n, f in folders.items() if is_prompt(f)]
        alone = whole or prompted
        if alone and len(folders) > 1:
            kind = "a whole model, no adapter" if whole else "a learned prompt"
            raise ModelError(f"{alone[0]} is {kind}: serve it alone")
        if whole:
            model = load_answering(folders[whole[0]], device, precision, fast=fast)
        elif prompted:
            adapter = folders[prompted[0]]
            model = load_answering(
                base, device, precision, partial(with_adapter, adapter=adapter), fast=False
            )
        else:
            adapt = partial(_with_adapters, folders=folders)
            model = load_answering(base, device, precision, adapt, fast)
    voices = {name: _voice(name, words[name], n) for n, name in enumerate(words)}
    if not alone:
        own = _own_words(base, next(iter(words.values()), None))
        voices[BASE] = replace(_voice(BASE, own, 0), adapter=NO_ADAPTER)
    return Models(model, voices, device, context)


def _with_adapters(model: nn.Module, folders: Mapping[str, Path]) -> nn.Module:
    adapted: Any = None
    for n, folder in enumerate(folders.values()):
        if adapted is None:
            adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=_inner(n))
        else:
            adapted.load_adapter(str(folder), adapter_name=_inner(n))
    return model if adapted is None else adapted


def _inner(number: int) -> str:
    """An adapter's name in PEFT, which is a module's: ours may have dots."""
    return f"adapter{number}"


def _voice(name: str, data: Prepared, number: int) -> Voice:
    return Voice(name, data, _inner(number), stop_ids(data.vocabulary, data.template))


def _own_words(base: Path, other: Prepared | None) -> Prepared:
    """The base's own chat template, or else `other`'s words."""
    vocabulary = open_vocabulary(base)
    try:
        template = from_chat_template(vocabulary.chat_template)
        stop = stop_token(vocabulary, template)
    except TemplateError:
        if other is None:
            raise
        return other
    return Prepared(Rows.empty(), vocabulary, template, stop, token_hash(vocabulary, template))
