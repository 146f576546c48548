"""How likely a model holds given texts: nats of each row's trained tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from trainer.data import batch, packing
from trainer.data.formats import Row
from trainer.data.prepare import Prepared
from trainer.data.tokenised import Rows, tokenise
from trainer.model.decode import packs
from trainer.model.forward import target_log_probs
from trainer.wire.job import Data

TOKENS_AT_ONCE = 4096
LONGEST = 1 << 20  # tokens of a row: the model's own limit is smaller


def tokens_of(rows: Sequence[Row], data: Prepared) -> Rows:
    """The rows as the adapter was trained on them, of a conversation its last answer. Rows that
    cannot be asked are left out; `notes` says which."""
    settings = Data(
        files=[],
        max_length=LONGEST,
        train_on="last",
        bad_rows="drop",
        enable_thinking=data.rows.thinking,
    )
    numbered = [row._replace(where=_where(row, n)) for n, row in enumerate(rows)]
    return tokenise(numbered, data.vocabulary, data.template, settings)


def _where(row: Row, number: int) -> str:
    """A place that is unique for each row: a whole array may stand on one line."""
    return f"{row.where} (row {number + 1})"


@torch.no_grad()
def nats(
    model: nn.Module,
    rows: Rows,
    device: torch.device,
    tell: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """-log p of the trained tokens of each row, summed, float64 (rows,); `tell` hears how many rows
    are done. Dropout is off meanwhile."""
    lengths, found, done = rows.lengths, np.zeros(len(rows)), 0
    if not len(rows):
        return found
    packed = packs(model, max(lengths))
    lay, collate = (packing.pack, batch.packed) if packed else (packing.pad, batch.padded)
    training = model.training
    model.eval()
    for chosen in lay(range(len(rows)), lengths, TOKENS_AT_ONCE):
        micro = collate(rows, chosen, torch.device("cpu"))
        at = micro["targets_at"].numpy()
        owners = micro["rows"].flatten().numpy()[at]
        log_probs, _ = target_log_probs(model, batch.on(device, micro))
        np.add.at(found, owners, -log_probs.double().cpu().numpy())
        done += len(chosen)
        tell(done)
    model.train(training)
    return found


def bytes_of(tokens: Rows, rows: Sequence[Row]) -> list[int]:
    """UTF-8 bytes of what each row of `tokens`, which were made of `rows`, is measured on."""
    size = {
        _where(row, n): len((row.text or row.turns[-1].reasoning + row.turns[-1].text).encode())
        for n, row in enumerate(rows)
    }
    return [size[where] for where in tokens.where]
