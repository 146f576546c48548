"""Angles by document, for models whose angles depend on a row's length (LongRoPE, dynamic NTK).

transformers takes the longest position of the whole batch, so a short row beside a long one would
get the long row's angles. ``by_document`` calls the model's own module once for all short documents
and separately for long ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def by_document(model: nn.Module) -> int:
    """Make every rotary embedding of the model that depends on length treat each document by
    itself. Returns how many there are; safe to call twice."""
    found: list[Any] = [m for m in model.modules() if _kinds(m) and not hasattr(m, "whole_batch")]
    for module in found:
        module.whole_batch = module.forward
        module.forward = _Forward(module)
    return len(found)


def by_length(model: nn.Module) -> bool:
    """Whether the model's angles depend on a row's length; computing them waits for the device."""
    return any(_kinds(m) for m in model.modules())


def _kinds(module: nn.Module) -> set[str]:
    told: Any = getattr(module, "rope_type", None)
    kinds = set(told.values()) if isinstance(told, dict) else {told}
    rope = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    short = rope.get("short_factor")
    if short is not None and short == rope.get("long_factor"):
        return set()  # long rows have the angles of short ones (a converted ChatGLM)
    return {k for k in kinds if isinstance(k, str) and (k == "longrope" or "dynamic" in k)}


class _Forward:
    """Replaces a rotary embedding's forward: x [B, S, h], position_ids [B, S] -> cos and sin [B, S,
    D]. Waits for the device once a call."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **more: Any) -> Any:
        kind = more.get("layer_type", args[0] if args else None)
        limit, long_rope = self._limit(kind)
        lengths = document_lengths(position_ids)
        long = sorted(set(lengths[lengths > limit].tolist())) if limit else []
        if not long:
            return self._ask(x, position_ids, args, more)
        flat = position_ids.expand(lengths.shape).reshape(1, -1)
        groups = [lengths.reshape(-1) <= limit]
        groups += [lengths.reshape(-1) > limit] if long_rope else []
        groups += [] if long_rope else [lengths.reshape(-1) == n for n in long]
        parts = [
            (at, self._ask(x, flat[:, at], args, more))
            for at in (g.nonzero().flatten() for g in groups)
            if len(at)
        ]
        whole = [p.new_empty(1, flat.shape[1], p.shape[-1]) for p in parts[0][1]]
        for at, angles in parts:
            for to, part in zip(whole, angles, strict=True):
                to[:, at] = part
        return tuple(w.view(*lengths.shape, -1) for w in whole)

    def _limit(self, kind: str | None) -> tuple[int, bool]:
        """(the longest document with the short angles, 0 where none depends on its length; whether
        all longer ones have the same angles)."""
        told = self._module.rope_type
        name = told[kind] if isinstance(told, dict) else told
        settings = self._module.config.rope_parameters
        settings = settings[kind] if kind is not None and kind in settings else settings
        if name == "longrope":
            return int(settings["original_max_position_embeddings"]), True
        return (int(self._module.original_max_seq_len), False) if "dynamic" in name else (0, False)

    def _ask(self, x: Tensor, positions: Tensor, args: Any, more: dict[str, Any]) -> Any:
        """The module's own angles, without memory of earlier calls: dynamic NTK otherwise goes on
        from the longest row it has computed."""
        module = self._module
        kind = more.get("layer_type", args[0] if args else None)
        if self._limit(kind)[1] is False:
            prefix = "" if kind is None else f"{kind}_"
            if hasattr(module, f"{prefix}original_inv_freq"):
                first = getattr(module, f"{prefix}original_inv_freq")
                module.register_buffer(f"{prefix}inv_freq", first.clone(), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
        return module.whole_batch(x, positions, *args, **more)


def document_lengths(position_ids: Tensor) -> Tensor:
    """[B, S] positions, which begin at 0 in each document -> for each token its document's length.
    A row that begins later continues a cache; its length includes the cached tokens."""
    begins = position_ids == 0
    begins[:, 0] = True
    number = begins.flatten().cumsum(0) - 1
    lengths = torch.zeros(len(number), dtype=position_ids.dtype, device=position_ids.device)
    lengths.scatter_reduce_(0, number, position_ids.flatten() + 1, "amax")
    return lengths[number].view(position_ids.shape)
