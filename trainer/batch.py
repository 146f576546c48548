"""Micro-batches as tensors: a pack of whole rows end to end, or a padded rectangle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trainer.prepare import Rows


def packed(rows: Rows, chosen: Sequence[int], device: torch.device) -> dict[str, Any]:
    """One row of T tokens: input_ids, position_ids, labels (1, T), boundaries (documents + 1,). labels are shifted: labels[t] is what
    token t must predict, -100 at the last token of each row and wherever the next token is not a target."""
    spans = [slice(rows.starts[r], rows.starts[r + 1]) for r in chosen]
    lengths = [s.stop - s.start for s in spans]
    ids = np.concatenate([rows.ids[s] for s in spans]).astype(np.int64)
    labels = np.concatenate([_shifted(rows, s) for s in spans])
    positions = np.concatenate([np.arange(n) for n in lengths])
    numbers = np.repeat(np.asarray(chosen, np.int64), lengths)
    ends = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)
    longest = int(max(lengths))
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels, "rows": numbers}
    tensors: dict[str, Any] = {k: torch.from_numpy(v)[None].to(device, non_blocking=True) for k, v in batch.items()}
    tensors["targets_at"] = _targets_at(labels, device)
    return tensors | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def padded(rows: Rows, chosen: Sequence[int], device: torch.device) -> dict[str, Any]:
    """(B, L) tensors padded at the right, with an attention mask. Padding is never a target."""
    spans = [slice(rows.starts[r], rows.starts[r + 1]) for r in chosen]
    shape = (len(chosen), int(max(s.stop - s.start for s in spans)))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels, positions = np.full(shape, -100, np.int64), np.zeros(shape, np.int64)
    for b, span in enumerate(spans):
        n = span.stop - span.start
        ids[b, :n], mask[b, :n], labels[b, :n], positions[b, :n] = rows.ids[span], 1, _shifted(rows, span), np.arange(n)
    numbers = np.repeat(np.asarray(chosen, np.int64)[:, None], shape[1], 1)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels, "rows": numbers}
    return {k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in batch.items()} | {"targets_at": _targets_at(labels, device)}


def _targets_at(labels: np.ndarray, device: torch.device) -> torch.Tensor:
    """Flat positions of the targets, found here so that nothing waits for the device later."""
    return torch.from_numpy(np.flatnonzero(labels != -100)).to(device, non_blocking=True)


def _shifted(rows: Rows, span: slice) -> np.ndarray:
    labels = np.where(rows.trained[span], rows.ids[span], -100).astype(np.int64)
    return np.append(labels[1:], -100)
