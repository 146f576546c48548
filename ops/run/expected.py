"""What a result must be by its job, and the names of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.wire.job import WIRE
from trainer.wire.prompts import PROMPT_METHODS

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER = "adapter.zip"


@dataclass(frozen=True)
class ExpectedResult:
    """What the job asked for; a None is not compared."""

    base_model: str
    r: int
    data_sha256: tuple[str, ...]
    method: str = "lora"
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    use_dora: bool | None = None
    use_rslora: bool | None = None
    init_lora_weights: str = "default"
    wire: int = WIRE
    virtual_tokens: int = 0  # of a learned prompt

    @classmethod
    def of(cls, job: Mapping[str, Any]) -> ExpectedResult:
        """From a wire job (trainer.wire.job.Job, dumped)."""
        lora, named = job["lora"], job["lora"]["target_modules"]
        return cls(
            job["model"]["base"],
            lora["r"],
            tuple(f["sha256"] for f in job["data"]["files"]),
            job["training"]["method"],
            lora["lora_alpha"],
            None if isinstance(named, str) else tuple(named),
            lora["use_dora"],
            lora["use_rslora"],
            lora["init_lora_weights"],
            job["wire"],
            _virtual_tokens(job),
        )


def _virtual_tokens(job: Mapping[str, Any]) -> int:
    if job["training"]["method"] not in PROMPT_METHODS:
        return 0
    return int(job["prompt_learning"]["num_virtual_tokens"])


class Invalid(Exception):
    """The result is not what its job and its manifest say; the message says where."""


def validate(holds: bool, defect: str) -> None:
    """Raises Invalid with `defect` unless `holds`."""
    if not holds:
        raise Invalid(defect)
