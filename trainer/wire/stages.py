"""What the job file, the plan and the trainer must know of a training stage before it runs.

Data only. What a stage does is in trainer/stages/NAME.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

StageName = Literal["sft"]


@dataclass(frozen=True)
class StageFacts:
    """`formats` are the data.format values whose rows it trains on. On one base, `adapters` are
    trained, with their gradients and moments, and `frozen_adapters` only held (a reference, a
    reward model). `work` is its time for a token, sft's being 1: every pass counts."""

    formats: tuple[str, ...]
    adapters: int = 1
    frozen_adapters: int = 0
    work: float = 1.0

    @property
    def memory(self) -> dict[str, int]:
        """Keyword arguments of trainer.memory's functions."""
        return {"adapters": self.adapters, "frozen_adapters": self.frozen_adapters}


STAGES: Mapping[StageName, StageFacts] = {
    "sft": StageFacts(formats=("alpaca", "sharegpt", "messages", "prompt", "text")),
}


def format_defect(stage: StageName, data_format: str) -> str:
    """Why `stage` does not train on rows of data.format `data_format`; empty where it does."""
    formats = STAGES[stage].formats
    if data_format in ("auto", *formats):
        return ""
    return (
        f"stage {stage} does not train on rows of format {data_format}: it takes "
        f"{', '.join(formats)}"
    )
