"""Micro-batches as tensors: a pack of whole rows end to end, or a padded rectangle; made a step
ahead of the one that is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.data.shared_keys import SharedKeys, shared_keys
from trainer.data.sharing import Borrowed
from trainer.data.tokenised import Rows


@dataclass(frozen=True)
class Work:
    """What one process does in one step. `micro` are its own micro-batches, in host memory, and
    `filler` is one that counts nothing, for processes that must take as many turns as others.
    `count`, by which the summed losses are divided (target tokens, pairs), `tokens` and `where`
    (file:line of the rows) are those of all processes together."""

    micro: list[dict[str, Any]]
    filler: dict[str, Any]
    count: int
    tokens: int
    where: list[str]


class Prefetcher:
    """Makes the next step's work in a thread while the current one is computed. Prefetched work
    that was not used is not part of a checkpoint."""

    def __init__(self, make: Callable[[int], Work], first: int, total: int) -> None:
        """`make` gets the step's number, from `first` to `total` - 1."""
        self._make, self._step, self._total = make, first, total
        self._thread = ThreadPoolExecutor(1, "batches")
        self._next: Future[Work] | None = self._start()

    def _start(self) -> Future[Work] | None:
        return self._thread.submit(self._make, self._step) if self._step < self._total else None

    def take(self) -> Work:
        """The work of the next step. Raises what `make` raised."""
        assert self._next is not None, f"all {self._total} steps were taken"
        work = self._next.result()
        self._step += 1
        self._next = self._start()
        return work

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def pinned(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch in pinned memory where `device` is a GPU. The device is given because a new thread
    would use the first GPU."""
    if device.type != "cuda":
        return batch
    with torch.cuda.device(device):
        return {k: _each(torch.Tensor.pin_memory, v) for k, v in batch.items()}


def on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch on `device`. The copy from pinned memory is queued like any work of the device;
    nothing waits for it here."""
    return {k: _each(lambda x: x.to(device, non_blocking=True), v) for k, v in batch.items()}


def _each(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """The value with `change` made to the tensors that it is, or has."""
    if isinstance(value, SharedKeys):
        return SharedKeys(*map(change, value))
    return change(value) if isinstance(value, torch.Tensor) else value


def packed(
    rows: Rows,
    chosen: Sequence[int],
    device: torch.device,
    borrowed: Sequence[Borrowed] | None = None,
) -> dict[str, Any]:
    """One row of T tokens: input_ids, position_ids, labels (1, T), boundaries (documents + 1,).
    labels are shifted: labels[t] is what token t must predict, -100 at the last token of each row
    and wherever the next token is not a target. A row that borrows its beginning of another one has
    the rest of its tokens in the batch, at their places in the row, and `shared_keys` says where
    attention finds the others' keys."""
    fronts = [0] * len(chosen) if borrowed is None else [b.tokens for b in borrowed]
    spans = [slice(rows.starts[r], rows.starts[r + 1]) for r in chosen]
    lengths = [s.stop - s.start - n for s, n in zip(spans, fronts, strict=True)]
    every = list(zip(spans, fronts, strict=True))
    ids = np.concatenate([rows.ids[s][n:] for s, n in every]).astype(np.int64)
    labels = np.concatenate([_shifted(rows, s)[n:] for s, n in every])
    positions = np.concatenate([np.arange(n, s.stop - s.start) for s, n in every])
    numbers = np.repeat(np.asarray(chosen, np.int64), lengths)
    ends = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)
    longest = int(max(lengths))
    batch = {"input_ids": ids, "position_ids": positions, "labels": labels, "rows": numbers}
    tensors: dict[str, Any] = {
        k: torch.from_numpy(v)[None].to(device, non_blocking=True) for k, v in batch.items()
    }
    tensors["targets_at"] = _targets_at(labels, device)
    tensors |= {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if borrowed is None or not any(fronts):
        return tensors
    keys, ends = shared_keys(lengths, borrowed)
    most = max(s.stop - s.start for s in spans)
    told = {"shared_keys": keys, "cu_seq_lens_k": ends, "max_length_k": most}
    return tensors | on(device, told)


def padded(rows: Rows, chosen: Sequence[int], device: torch.device) -> dict[str, Any]:
    """(B, L) tensors padded at the right, with an attention mask. Padding is never a target."""
    spans = [slice(rows.starts[r], rows.starts[r + 1]) for r in chosen]
    shape = (len(chosen), int(max(s.stop - s.start for s in spans)))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels, positions = np.full(shape, -100, np.int64), np.zeros(shape, np.int64)
    for b, span in enumerate(spans):
        n = span.stop - span.start
        ids[b, :n], mask[b, :n], labels[b, :n], positions[b, :n] = (
            rows.ids[span],
            1,
            _shifted(rows, span),
            np.arange(n),
        )
    numbers = np.repeat(np.asarray(chosen, np.int64)[:, None], shape[1], 1)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "labels": labels,
        "rows": numbers,
    }
    return {k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in batch.items()} | {
        "targets_at": _targets_at(labels, device)
    }


def _targets_at(labels: np.ndarray, device: torch.device) -> torch.Tensor:
    """Flat positions of the targets, found here so that nothing waits for the device later."""
    return torch.from_numpy(np.flatnonzero(labels != -100)).to(device, non_blocking=True)


def _shifted(rows: Rows, span: slice) -> np.ndarray:
    labels = np.where(rows.trained[span], rows.ids[span], -100).astype(np.int64)
    return np.append(labels[1:], -100)
