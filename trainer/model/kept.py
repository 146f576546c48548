"""The base model that the stages of one run share: read from disk once, with a fresh adapter for
each stage."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.kernels.lora import MOST_RANK
from trainer.model.dropout import TokenKeys
from trainer.model.load import checkpoint_first, family_in, load, uncheckpoint, why_unpacked
from trainer.model.lora import add_adapter
from trainer.model.parts import decoder_layers, family_of
from trainer.model.roles import MAIN
from trainer.wire.job import Job


class KeptBase:
    """A base that stays on its device. `reads` counts how often it was read from disk; `keys` key
    its dropout, in every stage."""

    def __init__(self) -> None:
        self.reads = 0
        self.keys = TokenKeys()
        self.compared: dict[str, str] = {}  # its comparison with stock, for `kernels`
        self._model: Any = None
        self._names: dict[str, str] = {}
        self._made_for: tuple[Any, ...] = ()

    def holds(self, job: Job, folder: Path, device: torch.device, longest: int) -> bool:
        """Whether `load` of this job would read nothing from disk."""
        return self._model is not None and self._made_for == _made_for(job, folder, device, longest)

    def load(
        self,
        job: Job,
        folder: Path,
        device: torch.device,
        recomputed: int,
        shard: int | None,
        longest: int,
    ) -> tuple[nn.Module, dict[str, str]]:
        """Same as `trainer.model.load.load`, with a fresh adapter. Reads the base in the first
        stage, and where a stage needs another base, precision or set of modules than the one
        before. Raises ModelError."""
        if self.holds(job, folder, device, longest):
            self._renew(job, recomputed)
        else:
            self._model = None  # its memory is needed
            self.keys = TokenKeys()
            self.reads += 1
            made = load(job, folder, device, self.keys, recomputed, shard, longest)
            self._model, self._names = made
            self._made_for = () if shard is not None else _made_for(job, folder, device, longest)
        return self._model, dict(self._names)

    def _renew(self, job: Job, recomputed: int) -> None:
        """Replace all adapters by a fresh one for `job`, and remove value heads."""
        model, layers = self._model, decoder_layers(self._model)
        config = copy.deepcopy(model.peft_config[MAIN])
        for name in list(model.peft_config):
            model.delete_adapter(name)
        for name in [n for n, _ in model.named_children() if n == "score" or n.endswith("_head")]:
            delattr(model, name)
        lora = job.lora
        config.r, config.lora_alpha, config.lora_dropout = lora.r, lora.lora_alpha, 0.0
        config.rank_pattern = dict(lora.rank_pattern)
        config.alpha_pattern = dict(lora.alpha_pattern)
        config.inference_mode, config.init_lora_weights = False, True
        if lora.init_lora_weights == "gaussian":
            config.init_lora_weights = "gaussian"
        config.lora_dropout, config.use_rslora = lora.lora_dropout, lora.use_rslora
        add_adapter(job, model, config, self.keys)
        uncheckpoint(layers)
        fused = family_of(model).fused and self._names.get("layer", "").startswith("fused")
        for number, fast in enumerate(getattr(_inner(model), "fast_layers", ())):
            fast.checkpoint = number < recomputed
        if "checkpointed_layers" in self._names:
            self._names["checkpointed_layers"] = f"{recomputed} of {len(layers)}"
        slower = bool(recomputed) and "fused" in self._names.get("layer", "") and not fused
        checkpoint_first(model, len(layers) if slower else recomputed)
        model.train()


def _inner(model: nn.Module) -> nn.Module:
    """The module that has the fast layers, or the model."""
    found: nn.Module = next((m for m in model.modules() if hasattr(m, "fast_layers")), model)
    return found


def _made_for(job: Job, folder: Path, device: torch.device, longest: int) -> tuple[Any, ...]:
    """What a base is set up for, apart from its adapter's values."""
    lora, training = job.lora, job.training
    modules = (lora.target_modules, lora.exclude_modules, lora.layers_to_transform)
    return (
        folder.resolve(),
        job.model.precision,
        why_unpacked(family_in(folder), longest, device, job.model.precision),
        str(modules),
        lora.lora_dropout > 0,
        lora.use_dora,
        str(lora.modules_to_save),
        lora.largest_rank > MOST_RANK,
        training.method,
        training.neftune_noise_alpha,
        training.router_aux_loss_coef,
    )
