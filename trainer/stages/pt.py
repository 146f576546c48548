"""Continued pre-training: the model learns every token of texts of any length.

A batch is `training.batch_size` windows of one global order (trainer/data/windows.py), the loss
the cross-entropy of all their tokens. Held-out texts are measured in bits per byte, which compares
models of different tokenizers: nats of all trained tokens, end tokens too, over ln 2 and the bytes
of the texts in UTF-8.
"""

from __future__ import annotations

import math

from torch import nn

from trainer.data import batch
from trainer.data.tokenised import Rows
from trainer.model.forward import target_loss
from trainer.stages import measured


class Stage(measured.Stage):
    def measure(self, model: nn.Module, held: Rows, enter: measured.Enter) -> dict[str, float]:
        """{"bits per byte"} of the first windows."""
        chosen = range(min(measured.MOST_ROWS, len(held)))
        nats = 0.0
        for micro in self.micro(held, chosen):
            nats += float(enter(target_loss, model, batch.on(self.ranks.device, micro)))
        return {"bits per byte": nats / math.log(2) / int(held.extra["bytes"][: len(chosen)].sum())}
